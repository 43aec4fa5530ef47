"""The engine's first promise: every row of any mixed batch gets exactly the tokens of its own merged model."""

import random
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labs_lib.errors import LabsError
from labs_lib.serving.engine import Engine
from labs_lib.serving.types import QueueFull, Request

from .conftest import CONFIGS, VOCABULARY, small_model

NAMES = ["base", *CONFIGS]


def request(zoo, name: str, prompt: list[int], tokens: int = 6, **more) -> Request:
    return Request(prompt, tenant=name, adapter=zoo.shas.get(name), max_tokens=tokens, **more)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 40))] for _ in range(count)]


@contextmanager
def serving(zoo, model=None, **settings):
    with Engine(model or small_model(), zoo.folder_of, **({"slots": 4, "max_rank": 8} | settings)) as engine:
        yield engine


@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_every_adapter_alone_equals_its_merged_model(zoo, policy):
    with serving(zoo, policy=policy) as engine:
        for name in NAMES:
            (result,) = engine.generate([request(zoo, name, [5, 6, 7, 8, 9], 12)])
            assert result.error is None
            assert result.tokens == zoo.truth(name, [5, 6, 7, 8, 9], 12), name
            assert result.provenance.adapter == zoo.shas.get(name)
            assert (result.provenance.slot == 0) == (name == "base")


def test_the_adapters_differ_from_each_other_and_from_the_base(zoo):
    """Else no test here could tell one from another."""
    answers = {name: tuple(zoo.truth(name, [5, 6, 7, 8, 9], 12)) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)


@pytest.mark.parametrize("policy", ["separate", "unified"])
@pytest.mark.parametrize("op", ["auto", "loop", "gather", "segments", "grouped"])
def test_all_adapters_in_one_batch(zoo, policy, op):
    with serving(zoo, policy=policy, op=op, slots=len(CONFIGS)) as engine:
        jobs = [(name, prompt) for name, prompt in zip(NAMES * 2, prompts(2 * len(NAMES)), strict=True)]
        results = engine.generate([request(zoo, name, prompt, 8) for name, prompt in jobs])
        assert max(len(engine.running), 1) == 1
        for (name, prompt), result in zip(jobs, results, strict=True):
            assert result.tokens == zoo.truth(name, prompt, 8), name


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=40),
            st.integers(1, 9),
            st.integers(0, 12),  # the step at which it arrives
        ),
        min_size=1,
        max_size=16,
    ),
    slots=st.integers(1, 3),
    batch=st.integers(1, 6),
    kv_tokens=st.integers(64, 200),
    host=st.integers(1, 3),
    policy=st.sampled_from(["separate", "unified"]),
    fairness=st.sampled_from(["fcfs", "fair"]),
    prefix_cache=st.booleans(),
    unload_at=st.integers(0, 12),
)
def test_random_traffic_under_forced_tiny_pools(
    zoo, jobs, slots, batch, kv_tokens, host, policy, fairness, prefix_cache, unload_at
):
    """Arrivals, departures, loads, evictions and swaps at any step, and not one token from a neighbour."""
    with serving(
        zoo,
        slots=slots,
        max_batch=batch,
        kv_tokens=kv_tokens,
        host_bytes=host * 9 * 5000,
        policy=policy,
        fairness=fairness,
        prefix_cache=prefix_cache,
        patience=0.05,
    ) as engine:
        ended, wanted, step = {}, {}, 0
        todo = sorted(jobs, key=lambda job: job[3])
        while len(ended) < len(jobs):
            while todo and todo[0][3] <= step:
                name, prompt, tokens, _ = todo.pop(0)
                id = engine.submit(
                    request(zoo, name, prompt, tokens),
                    on_end=lambda result: ended.__setitem__(result.id, result),
                )
                wanted[id] = name, prompt, tokens
            if step == unload_at:
                for slot in engine.pool.resident:
                    if not slot.refs:
                        engine.unload(slot.adapter)
            if not engine.step():
                time.sleep(0.0005)  # the loader's turn
            step += 1
            assert step < 20_000, "no progress"
        for id, result in ended.items():
            name, prompt, tokens = wanted[id]
            assert result.error is None
            assert result.tokens == zoo.truth(name, prompt, tokens)
            assert result.provenance.adapter == zoo.shas.get(name)
        assert engine.pool.slots[0].adapter is None
        assert all(slot.refs == 0 for slot in engine.pool.slots)


@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_nothing_is_left_behind(zoo, policy):
    """When all is over and unloaded, every page is free and zero: no tenant's weights or keys can be read again."""
    with serving(zoo, policy=policy, prefix_cache=False) as engine:
        engine.generate(
            [request(zoo, name, prompt, 5) for name, prompt in zip(NAMES, prompts(8), strict=True)]
        )
        for slot in engine.pool.resident:
            engine.unload(slot.adapter)
        assert engine.pool.adapters.data.count_nonzero() == 0
        assert engine.pool.kv.data.count_nonzero() == 0
        assert engine.pool.kv_free == engine.pool.kv_count


def test_page_zero_stays_zero(zoo):
    with serving(zoo, policy="unified", slots=2, kv_tokens=128) as engine:
        engine.generate(
            [request(zoo, name, prompt, 5) for name, prompt in zip(NAMES, prompts(8), strict=True)]
        )
        assert engine.pool.kv.data[0].count_nonzero() == 0


def test_the_prefix_cache_saves_work_and_changes_nothing(zoo):
    prompt = list(range(3, 60))
    with serving(zoo) as engine:
        for name in ("plain", "attention", "plain", "base", "base"):
            (result,) = engine.generate([request(zoo, name, prompt, 6)])
            assert result.tokens == zoo.truth(name, prompt, 6), name
        assert (
            engine.kv.hits == 2 * 48
        )  # the second "plain" and the second "base": three full pages of 16 each


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(zoo):
    hot = request(zoo, "plain", [5, 6, 7], 10, temperature=1.5, top_p=0.9, seed=11)
    with serving(zoo) as engine:
        (alone,) = engine.generate([hot])
        crowd = engine.generate([request(zoo, "dora", [9, 9], 12), hot, request(zoo, "base", [4], 3)])
        (other,) = engine.generate(
            [request(zoo, "plain", [5, 6, 7], 10, temperature=1.5, top_p=0.9, seed=12)]
        )
    assert crowd[1].tokens == alone.tokens
    assert other.tokens != alone.tokens


def test_stop_tokens_end_and_are_not_returned(zoo):
    tokens = zoo.truth("plain", [5, 6, 7], 12)
    stop = tokens[3]
    with serving(zoo) as engine:
        (result,) = engine.generate([request(zoo, "plain", [5, 6, 7], 12, stop_ids=(stop,))])
        assert (result.finish, result.tokens) == ("stop", tokens[: tokens.index(stop)])
        (result,) = engine.generate([request(zoo, "plain", [5, 6, 7], 12, stop_ids=(stop,), ignore_eos=True)])
        assert (result.finish, result.tokens) == ("length", tokens)


def test_abort_frees_the_row_for_others(zoo):
    with serving(zoo, max_batch=1) as engine:
        ended = []
        first = engine.submit(request(zoo, "plain", [5, 6], 50), on_end=ended.append)
        for _ in range(200):
            engine.step()
            if engine.running:
                break
        engine.abort(first)
        (second,) = engine.generate([request(zoo, "base", [5, 6], 4)])
        assert ended[0].finish == "abort"
        assert second.tokens == zoo.truth("base", [5, 6], 4)


def test_the_queue_is_bounded(zoo):
    with serving(zoo, queue_limit=2) as engine:
        for _ in range(2):
            engine.submit(request(zoo, "base", [5], 4))
        with pytest.raises(QueueFull) as refused:
            engine.submit(request(zoo, "base", [5], 4))
        assert refused.value.retry_after > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [VOCABULARY]}, "vocabulary"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"prompt": [5], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [5], "max_tokens": 256}, "shorten"),
        ({"prompt": [5], "temperature": float("nan")}, "temperature"),
        ({"prompt": [5], "top_p": 0}, "top_p"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(zoo, settings, says):
    with serving(zoo) as engine, pytest.raises(LabsError, match=says):
        engine.submit(Request(tenant="t", **settings))


def test_an_adapter_that_cannot_be_read_fails_its_requests_only(zoo, tmp_path):
    def folder_of(sha):
        return tmp_path / "gone" if sha == "f" * 64 else zoo.folder_of(sha)

    with Engine(small_model(), folder_of, slots=2, max_rank=8) as engine:
        bad = Request([5, 6], "bad", adapter="f" * 64, max_tokens=4)
        results = engine.generate([bad, request(zoo, "plain", [5, 6], 4), bad])
        assert [result.finish for result in results] == ["error", "length", "error"]
        assert results[0].error
        assert results[1].tokens == zoo.truth("plain", [5, 6], 4)


def test_files_changed_after_publication_are_not_served(zoo):
    """The sha256 is the adapter's identity: other content under the same name must not run."""
    with Engine(small_model(), lambda sha: zoo.folders["plain"], slots=2, max_rank=8) as engine:
        (result,) = engine.generate([Request([5, 6], "t", adapter=zoo.shas["dora"], max_tokens=4)])
        assert result.finish == "error"
        assert "changed" in result.error


def test_an_adapter_too_large_for_a_slot_says_what_to_do(zoo):
    with serving(zoo, max_rank=4) as engine:
        (result,) = engine.generate([request(zoo, "rslora", [5, 6], 4)])
        assert result.finish == "error"
        assert "--max-rank 8" in result.error


def test_a_request_larger_than_all_memory_ends_with_an_error(zoo):
    """In a unified pool the adapter's own pages count: what passed `submit` can still be too much."""
    with serving(zoo, policy="unified", slots=1, max_rank=8, kv_tokens=16) as engine:
        most = engine.pool.kv_count * engine.pool.tokens_per_page
        (result,) = engine.generate([request(zoo, "rslora", [5], min(most - 1, 200))])
        assert result.finish == "error"
        assert "memory" in result.error


def test_a_forward_pass_that_fails_ends_its_rows_and_not_the_engine(zoo, monkeypatch):
    with serving(zoo) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.executor, "decode", lambda rows: 1 / 0)
            (failed,) = engine.generate([request(zoo, "plain", [5, 6], 4)])
        (after,) = engine.generate([request(zoo, "plain", [5, 6], 4)])
        assert failed.finish == "error"
        assert "ZeroDivisionError" in failed.error
        assert after.tokens == zoo.truth("plain", [5, 6], 4)
        assert all(slot.refs == 0 for slot in engine.pool.slots)


def test_a_lost_lease_is_an_error_and_not_another_tenants_tokens(zoo):
    with serving(zoo) as engine:
        ended = []
        engine.submit(request(zoo, "plain", [5, 6], 50), on_end=ended.append)
        while not engine.running:
            engine.step()
        engine.running[0].slot.generation += 1  # what a slot given away under a running request looks like
        engine.step()
        assert ended[0].finish == "error"
        assert "another adapter" in ended[0].error


def test_the_thread_serves_and_stops(zoo):
    import threading

    with serving(zoo) as engine:
        engine.start()
        done = threading.Semaphore(0)
        results = {}

        def end(result):
            results[result.id] = result
            done.release()

        jobs = {}
        for name, prompt in zip(NAMES, prompts(8), strict=True):
            jobs[engine.submit(request(zoo, name, prompt, 5), on_end=end)] = name, prompt
        for _ in jobs:
            assert done.acquire(timeout=30)
        for id, (name, prompt) in jobs.items():
            assert results[id].tokens == zoo.truth(name, prompt, 5)
        engine.stop()
        with pytest.raises(LabsError, match="shutting down"):
            engine.submit(request(zoo, "base", [5], 2))


def test_draining_without_a_thread_finishes_what_waits(zoo):
    results = []
    with serving(zoo) as engine:
        for name, prompt in zip(NAMES, prompts(8), strict=True):
            engine.submit(request(zoo, name, prompt, 5), on_end=results.append)
        engine.stop()
    assert [result.finish for result in results] == ["length"] * len(NAMES)


def test_closing_gives_the_model_back(zoo):
    model = small_model()
    before = [name for name, _ in model.named_modules()]
    with serving(zoo, model=model), pytest.raises(LabsError, match="already serves"):
        Engine(model, zoo.folder_of)
    assert [name for name, _ in model.named_modules()] == before
    logits = model(torch.tensor([[5, 6]])).logits
    assert torch.equal(logits, small_model()(torch.tensor([[5, 6]])).logits)
