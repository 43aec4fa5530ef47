"""Every bug of the fault lab is caught by the alarms that claim it, and a healthy engine rings none."""

import logging
import time

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.serving import fault_lab, ops, peft_config
from labs_lib.serving.fault_lab import alarms, harness, score, small_model, traffic
from labs_lib.serving.faults import FAULTS, fault
from labs_lib.serving.kv import KVCache
from labs_lib.serving.types import IsolationError

from . import conftest


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)  # the faults are loud
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_a_healthy_engine_rings_no_alarm(policy):
    engine, truth = harness(policy=policy)
    with engine:
        assert alarms(engine, truth) == dict.fromkeys(
            ("merged model", "oracle", "canary", "audit", "neighbours"), False
        )


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_caught_by_those_who_claim_it_and_ends_with_its_block(name):
    engine, truth = harness()
    with engine:
        with fault(name, engine):
            rung = {alarm for alarm, rings in alarms(engine, truth).items() if rings}
        assert set(FAULTS[name].caught_by) == rung
    engine, truth = harness()
    with engine:
        with fault(name, engine):
            pass
        assert all(
            truth.right(result) for result in engine.generate([truth.request("acme"), truth.request("base")])
        )
        assert not vars(engine.executor).keys() & {"prefill", "decode", "_index_of"}
        assert not vars(engine.pool).keys() & {"fill", "clear"}
        assert not vars(engine).keys() & {"_with_lease", "_start"}
        assert not vars(engine.kv).keys() & {"reserve", "share", "drop_idle"}
        assert engine.executor.step.op == "auto"
        assert "masked" not in ops.OPS
        assert peft_config.scales.__name__ == "scales"


@pytest.mark.parametrize("name", FAULTS)
def test_a_slow_disk_hides_no_fault(name):
    """Were requests for the base over before the first adapter is read, none would share a batch with one."""
    engine, truth = harness()
    read = engine.tiers.loader._read

    def slow(adapter):
        time.sleep(0.1)
        return read(adapter)

    engine.tiers.loader._read = slow
    with engine, fault(name, engine):
        rung = {alarm for alarm, rings in alarms(engine, truth).items() if rings}
    assert rung == set(FAULTS[name].caught_by)


def test_the_faults_that_the_course_names_are_there():
    assert {
        "last-slot",
        "not-zeroed",
        "remapped-in-flight",
        "stale-prefix",
        "loader-kills-engine",
        "reused-name",
        "row-order",
        "rslora-ignored",
    } <= FAULTS.keys()
    assert set().union(*(fault.caught_by for fault in FAULTS.values())) == set(alarm_names())


def alarm_names() -> list[str]:
    return ["merged model", "oracle", "canary", "audit", "neighbours"]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_says_who_had_it_and_where_to_read(name):
    entry = FAULTS[name]
    assert entry.source.startswith("https://github.com/")
    assert entry.what.endswith(".")
    assert entry.seen.endswith(".")
    assert entry.engine


def test_a_fault_ends_also_when_the_block_fails():
    engine, _ = harness()
    with engine:
        right = engine.kv.reserve
        with pytest.raises(ZeroDivisionError), fault("stale-prefix", engine):
            assert engine.kv.reserve != right
            raise ZeroDivisionError
        assert engine.kv.reserve == right
        assert type(engine.kv).reserve is KVCache.reserve


def test_faults_can_be_combined():
    engine, truth = harness()
    with engine, fault("row-order", engine), fault("last-slot", engine):
        assert not all(truth.right(result) for result in traffic(engine, truth))
    assert not vars(engine.executor).keys() & {"prefill", "decode", "_index_of"}


def test_an_unknown_fault_is_refused():
    engine, _ = harness()
    with engine, pytest.raises(LabsError, match="last-slot"), fault("gremlins", engine):
        pass


def test_not_zeroed_needs_fixed_slots():
    engine, _ = harness(policy="unified")
    with engine, pytest.raises(LabsError, match="separate"), fault("not-zeroed", engine):
        pass


# -- what stands between a fault and a tenant ----------------------------------------------------------------------


def test_the_lease_check_turns_a_remapped_request_into_an_error():
    """The same fault with the check left on: the request fails, and no token of the other version gets out."""
    engine, truth = harness()
    with engine, fault("remapped-in-flight", engine):
        engine._with_lease = type(engine)._with_lease.__get__(engine)
        results = []
        engine.submit(truth.request("acme", tokens=30), on_end=results.append)
        engine.generate([truth.request("acme-2", tokens=2)])  # brings the new version into host memory
        engine.drive(lambda: len(results) == 1)
    assert results[0].finish == "error"
    assert "another adapter" in results[0].error
    assert truth.right(results[0])


def test_the_index_refuses_the_slot_that_last_slot_relies_on():
    """In this engine -1 is no slot: the fault has to go around the check to happen at all."""
    from labs_lib.serving.batch import Index

    engine, _ = harness()
    with engine, pytest.raises(IsolationError):
        Index(torch.tensor([1, -1]), engine.pool.table)


def test_provenance_is_a_claim_and_no_proof():
    """With the cache keyed by name each response names the new version, and the tokens are the old one's."""
    engine, truth = harness()
    with engine, fault("reused-name", engine):
        old, new = (engine.generate([truth.request(name)])[0] for name in ("acme", "acme-2"))
    assert new.provenance.adapter == truth.shas["acme-2"]
    assert new.tokens == old.tokens == truth.tokens("acme")


# -- scoring a learner's test --------------------------------------------------------------------------------------


def test_a_good_test_scores():
    def mixed_batch(engine, truth):
        engine.generate(
            [truth.request(name) for name in ("acme", "bolt")]
        )  # loaded, so that all start together
        names = ["acme", "base", "bolt", "base"]
        return not all(
            truth.right(result) for result in engine.generate([truth.request(name) for name in names])
        )

    outcomes = {
        outcome.fault: outcome.caught for outcome in score(mixed_batch, ["last-slot", "scaled-twice"])
    }
    assert outcomes == {"last-slot": True, "scaled-twice": False}


def test_a_test_that_always_cries_is_told_so():
    with pytest.raises(LabsError, match="healthy"):
        score(lambda engine, truth: True, ["last-slot"])


def test_a_test_that_never_cries_catches_nothing():
    assert not any(
        outcome.caught for outcome in score(lambda engine, truth: False, ["last-slot", "row-order"])
    )


def test_a_crash_counts_as_caught_and_is_noted():
    def neighbours(engine, truth):
        return any(
            result.error
            for result in engine.generate([truth.request("gone"), truth.request("base", tokens=40)])[1:]
        )

    (outcome,) = score(neighbours, ["loader-kills-engine"])
    assert outcome.caught
    assert outcome.note.startswith("Refused")


def test_the_table_has_a_row_for_the_healthy_engine():
    found = fault_lab.table(["stale-index"])
    assert not any(found["healthy"].values())
    assert found["stale-index"]["merged model"]
    assert not found["stale-index"]["canary"]  # it travels with adapters, so its batches are never base only


def test_the_truth_is_the_merged_models():
    """Checked once against the independent truth of the other tests: the same model, the same way of reading files."""
    ours, theirs = small_model(), conftest.small_model()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    engine, truth = harness()
    engine.close()
    answers = [tuple(truth.tokens(name)) for name in truth.shas if name != "gone"]
    assert len(set(answers)) == len(answers)
