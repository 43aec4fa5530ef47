"""The shadow oracle and the canaries: silent while all is right, loud when one token is wrong, never in the way."""

import dataclasses
import json

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.serving.canary import Canary, CanaryProbe, audit
from labs_lib.serving.engine import Engine
from labs_lib.serving.oracle import ShadowOracle, Witness
from labs_lib.serving.types import IsolationError, Provenance, Request, Result, Timing

from .conftest import CONFIGS, small_model

NAMES = ["base", *CONFIGS]
PROMPT = [5, 6, 7, 8, 9]


def request(zoo, name: str, prompt=PROMPT, tokens: int = 8, **more) -> Request:
    return Request(list(prompt), tenant=name, adapter=zoo.shas.get(name), max_tokens=tokens, **more)


def witness_of(zoo, copies: int = 2) -> Witness:
    return Witness(small_model(), zoo.folder_of, copies)


def oracle_of(zoo, share: float = 1.0, copies: int = 2, **more) -> ShadowOracle:
    return ShadowOracle(witness_of(zoo, copies), share, **more)


def result_of(zoo, name: str, tokens: list[int], finish: str = "length", id: int = 1, **more) -> Result:
    sha = zoo.shas.get(name)
    return Result(
        id,
        request(zoo, name, **more),
        tokens,
        finish,
        Provenance(sha, 1 if sha else 0, 3),
        Timing(0, 0, 0, 0),
    )


@pytest.fixture
def engine(zoo):
    with Engine(small_model(), zoo.folder_of, slots=3, max_rank=8) as engine:
        yield engine


# -- judging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_witness_answers_as_the_merged_model_does(zoo, name):
    """The truth in conftest is computed another way again: a fresh base per adapter, the whole prompt each time."""
    witness = witness_of(zoo)
    assert witness.answer(zoo.shas.get(name), PROMPT, 8) == zoo.truth(name, PROMPT, 8)
    assert witness.judge(result_of(zoo, name, zoo.truth(name, PROMPT, 8))) is None
    for other in NAMES:
        assert witness.agrees(zoo.shas.get(name), PROMPT, zoo.truth(other, PROMPT, 8)) == (name == other)


def test_a_wrong_token_is_found_where_it_is(zoo):
    tokens = zoo.truth("plain", PROMPT, 8)
    wrong = [*tokens[:3], (tokens[3] + 1) % 90, *tokens[4:]]
    difference = witness_of(zoo).judge(result_of(zoo, "plain", wrong))
    assert (difference.position, difference.got, difference.expected) == (3, wrong[3], tokens[3])
    assert difference.gap > 1e-4
    assert (difference.slot, difference.generation) == (1, 3)
    assert "plain" in str(difference)


def test_another_tenants_answer_is_a_mismatch(zoo):
    tokens = zoo.truth("dora", PROMPT, 8)
    oracle = oracle_of(zoo)
    oracle(result_of(zoo, "plain", tokens))
    oracle(result_of(zoo, "dora", tokens))
    oracle.judge_waiting()
    assert oracle.tallies["plain"].mismatch == 1
    assert oracle.tallies["dora"].agree == 1
    assert oracle.mismatches[0].more > 0
    assert not oracle.clean


def test_a_near_tie_is_counted_apart_and_does_not_hide_a_mismatch(zoo):
    tokens = zoo.truth("plain", PROMPT, 8)
    logits = zoo.merged("plain")(torch.tensor([PROMPT])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    gap = float(logits.max() - logits[second])
    after = zoo.truth("plain", [*PROMPT, second], 3)
    for tie, agree_to in ((gap / 2, "mismatch"), (gap * 2, "tie")):
        oracle = oracle_of(zoo, tie=tie)
        oracle(result_of(zoo, "plain", [second, *after]))
        oracle.judge_waiting()
        assert dataclasses.asdict(oracle.tallies["plain"])[agree_to] == 1
    oracle = oracle_of(zoo, tie=gap * 2)
    far = int(zoo.merged("plain")(torch.tensor([[*PROMPT, second]])).logits[0, -1].argmin())
    oracle(result_of(zoo, "plain", [second, far]))
    oracle.judge_waiting()
    assert oracle.mismatches[0].position == 1
    assert tokens[0] != second


def test_an_early_stop_is_judged_too(zoo):
    """A leak can also be a stop that somebody else's adapter would have made."""
    tokens = zoo.truth("plain", PROMPT, 8)
    at = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    right = result_of(zoo, "plain", tokens[:at], "stop", stop_ids=(tokens[at],))
    wrong = result_of(zoo, "plain", tokens[:at], "stop", stop_ids=((tokens[at] + 1) % 90,))
    nothing = result_of(zoo, "plain", [], "stop", stop_ids=((tokens[0] + 1) % 90,))
    oracle = oracle_of(zoo)
    assert oracle.witness.judge(right) is None
    assert (oracle.witness.judge(wrong).position, oracle.witness.judge(wrong).got) == (at, None)
    oracle(nothing)
    oracle.judge_waiting()
    assert oracle.mismatches[0].position == 0


def test_merged_copies_are_bounded_and_the_least_used_goes(zoo):
    witness = witness_of(zoo, copies=2)
    for name in ("plain", "dora", "plain", "rslora"):
        witness.merged(zoo.shas[name])
    assert list(witness._merged) == [zoo.shas["plain"], zoo.shas["rslora"]]


def test_a_loader_instead_of_a_model(zoo):
    witness = Witness(small_model, zoo.folder_of)
    assert witness.answer(zoo.shas["plain"], PROMPT, 3) == zoo.truth("plain", PROMPT, 3)


def test_the_serving_model_cannot_be_its_own_witness(zoo, engine):
    with pytest.raises(LabsError, match="copy of its own"):
        Witness(engine.model, zoo.folder_of).merged(None)


def test_an_adapter_that_cannot_be_loaded_is_unjudged_and_ends_nothing(zoo, tmp_path):
    oracle = ShadowOracle(Witness(small_model(), lambda sha: tmp_path), 1.0)
    oracle(result_of(zoo, "plain", [1, 2]))
    oracle(result_of(zoo, "base", zoo.truth("base", PROMPT, 4)))
    oracle.judge_waiting()
    assert oracle.tallies["plain"].unjudged == 1
    assert oracle.tallies["base"].agree == 1
    assert not oracle.mismatches


def test_files_that_changed_are_no_witness(zoo):
    oracle = ShadowOracle(Witness(small_model(), lambda sha: zoo.folders["dora"]), 1.0)
    oracle(result_of(zoo, "plain", [1, 2]))
    oracle.judge_waiting()
    assert "changed" in oracle.failures[0][1]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(zoo, share):
    with pytest.raises(LabsError, match="0 to 1"):
        oracle_of(zoo, share)


# -- among the traffic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_it_agrees_with_all_that_a_healthy_engine_says(zoo, policy):
    with (
        Engine(small_model(), zoo.folder_of, slots=2, max_rank=8, policy=policy) as engine,
        oracle_of(zoo, copies=8) as oracle,
    ):
        engine.observers.append(oracle)
        for _ in range(2):
            engine.generate([request(zoo, name, [*PROMPT, i], 6) for i, name in enumerate(NAMES)])
        oracle.judge_waiting()
    report = oracle.report()
    assert report["agree"] + report["tie"] == report["seen"] == 2 * len(NAMES)
    assert oracle.clean
    assert set(report["tenants"]) == set(NAMES)
    assert json.loads(json.dumps(report)) == report


def test_only_greedy_results_are_taken(zoo, engine):
    oracle = oracle_of(zoo)
    engine.observers.append(oracle)
    engine.generate([request(zoo, "plain", temperature=1.0, seed=1), request(zoo, "plain")])
    assert oracle.seen == 1


def test_the_share_is_drawn_with_the_seed(zoo):
    result = result_of(zoo, "base", [1])
    counts = []
    for seed in (1, 1, 2):
        oracle = oracle_of(zoo, 0.3, seed=seed, waiting=1000)
        drawn = []
        for _ in range(300):
            before = oracle.report()["waiting"]
            oracle(result)
            drawn.append(oracle.report()["waiting"] - before)
        counts.append(drawn)
    assert counts[0] == counts[1] != counts[2]
    assert 60 < sum(counts[0]) < 120


def test_a_full_queue_drops_and_counts(zoo):
    oracle = oracle_of(zoo, waiting=3)
    for _ in range(10):
        oracle(result_of(zoo, "base", zoo.truth("base", PROMPT, 2)))
    assert oracle.dropped == 7
    oracle.judge_waiting()
    assert oracle.tallies["base"].agree == 3


def test_an_observer_that_fails_breaks_nobody(zoo, engine):
    def broken(result):
        raise ValueError("observer")

    engine.observers.append(broken)
    (result,) = engine.generate([request(zoo, "plain")])
    assert result.tokens == zoo.truth("plain", PROMPT, 8)


def test_a_mismatch_is_told_at_once(zoo):
    told = []
    with oracle_of(zoo, on_mismatch=told.append) as oracle:
        oracle(result_of(zoo, "plain", zoo.truth("dora", PROMPT, 4)))
    assert [difference.tenant for difference in told] == ["plain"]


# -- canaries ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canaries(zoo):
    witness = witness_of(zoo, copies=8)
    everyone = [zoo.shas.get(name) for name in NAMES]
    return [Canary.of(witness, name, zoo.shas.get(name), PROMPT, 8, everyone) for name in NAMES]


@pytest.mark.parametrize("threaded", [False, True])
def test_canaries_sing_right_among_other_traffic(zoo, engine, canaries, threaded):
    if threaded:
        engine.start()
    probe = CanaryProbe(engine, canaries)
    assert probe.run(among=[request(zoo, name, [9, 8, 7], 5) for name in NAMES]) == []
    assert probe.sung == len(canaries)
    assert not probe.errors


def test_a_leak_raises_and_says_whose_answer_it_was(zoo, engine, canaries):
    told = []
    swap = {zoo.shas["plain"]: zoo.shas["dora"], zoo.shas["dora"]: zoo.shas["plain"]}
    mixed = [
        dataclasses.replace(canary, adapter=swap.get(canary.adapter, canary.adapter)) for canary in canaries
    ]
    probe = CanaryProbe(engine, mixed, told.append)
    with pytest.raises(IsolationError, match="stop serving"):
        probe.run()
    assert {leak.canary.tenant for leak in probe.leaks} == {"plain", "dora"}
    assert len(told) == 2
    assert {leak.said_by for leak in probe.leaks} == {"plain", "dora"}


def test_a_leak_is_told_before_the_request_has_ended(zoo, engine, canaries):
    ended = []
    engine.observers.append(ended.append)
    wrong = dataclasses.replace(
        canaries[1], expected=(canaries[1].expected[0] + 1, *canaries[1].expected[1:])
    )
    heard = []
    probe = CanaryProbe(engine, [wrong], lambda leak: heard.append(len(ended)))
    with pytest.raises(IsolationError):
        probe.run()
    assert heard == [0]


def test_a_canary_that_fails_is_neither_leak_nor_proof(zoo, engine):
    lost = Canary("t", "f" * 64, tuple(PROMPT), (1, 2))
    engine_of_nothing = Engine(small_model(), lambda sha: zoo.folders["plain"] / "gone", slots=1)
    with engine_of_nothing:
        probe = CanaryProbe(engine_of_nothing, [lost])
        assert probe.run() == []
        assert probe.sung == 0
        assert probe.errors[0].finish == "error"


def test_a_canary_that_cannot_tell_is_refused(zoo):
    with pytest.raises(LabsError, match="another prompt"):
        Canary.of(witness_of(zoo), "t", zoo.shas["attention"], PROMPT, count=0)


def test_a_probe_without_canaries_is_refused(engine):
    with pytest.raises(LabsError, match="canaries"):
        CanaryProbe(engine, [])


# -- audit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_a_healthy_engine_passes_its_audit_at_every_step(zoo, policy):
    with Engine(small_model(), zoo.folder_of, slots=2, max_rank=8, kv_tokens=256, policy=policy) as engine:
        for i in range(2):
            for name in NAMES:
                engine.submit(request(zoo, name, list(range(3, 25 + i)), 4))
        while engine.running or engine.queue.waiting:
            engine.step()
            assert audit(engine) == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda pool: pool.adapters.data[-1].fill_(1.0), "left behind"),
        (lambda pool: pool.adapters.data[0].fill_(1.0), "left behind"),
        (lambda pool: pool.kv.data[0].fill_(1.0), "left behind"),
        (lambda pool: pool.kv.data[-1].fill_(float("nan")), "left behind"),
        (lambda pool: pool.adapters.erase(pool.resident[0].pages), "only zeros"),
        (lambda pool: pool.table.fill_(3), "page table"),
        (lambda pool: setattr(pool.resident[0], "refs", 5), "counts 5"),
        (lambda pool: setattr(pool.resident[0], "pages", pool.resident[1].pages), "two owners"),
        (lambda pool: setattr(pool.slots[0], "adapter", "x"), "Slot 0"),
    ],
)
def test_the_audit_sees(zoo, engine, harm, says):
    engine.generate([request(zoo, name) for name in ("plain", "rank-one")])
    assert audit(engine) == []
    harm(engine.pool)
    assert says in " ".join(audit(engine))


def test_the_audit_sees_a_lease_that_is_lost(zoo, engine):
    engine.submit(request(zoo, "plain", tokens=20))
    engine.drive(lambda: bool(engine.running))
    engine.running[0].slot.generation += 1
    assert "given to another" in " ".join(audit(engine))
