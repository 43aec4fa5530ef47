"""Static decode steps: the same tokens as ever, from buffers that never move, and from nothing but buffers.

A recorded graph repeats kernels on fixed addresses, so what would break it on a GPU is looked for here, on the CPU:
a number read on the host, data that comes from the host, a shape that changes, a tensor that the step did not own.
"""

import random
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from labs_lib.errors import LabsError
from labs_lib.serving.batch import TILE, Index, StaticIndex
from labs_lib.serving.engine import Engine
from labs_lib.serving.graphs import CaptureError
from labs_lib.serving.ops import gather, loop
from labs_lib.serving.static import Kind, column_bucket, rank_bucket, row_bucket
from labs_lib.serving.types import Request

from ..pretend_cuda import pretend
from .conftest import CONFIGS, VOCABULARY, small_model

NAMES = ["base", *CONFIGS]


def request(zoo, name: str, prompt: list[int], tokens: int = 6, **more) -> Request:
    return Request(prompt, tenant=name, adapter=zoo.shas.get(name), max_tokens=tokens, **more)


def serving(zoo, **settings) -> Engine:
    settings = {"slots": len(CONFIGS), "max_rank": 9, "graphs": "on"} | settings
    return Engine(small_model(), zoo.folder_of, **settings)


def static(engine):
    return engine.executor._static


def test_buckets():
    assert [row_bucket(n) for n in (1, 2, 3, 8, 9, 33, 64)] == [1, 2, 4, 8, 16, 64, 64]
    assert [column_bucket(n) for n in (1, 64, 65, 128, 129, 192, 193, 257, 500, 513, 1500)] == [
        64, 64, 128, 128, 192, 192, 256, 384, 512, 768, 1536,
    ]  # fmt: skip
    assert [rank_bucket(n) for n in (0, 1, 8, 9, 64)] == [0, 8, 8, 16, 64]
    for bucket in (row_bucket, column_bucket, rank_bucket):
        assert all(bucket(n) >= n and bucket(bucket(n)) == bucket(n) for n in range(1, 3000))


# -- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["separate", "unified"])
@pytest.mark.parametrize("op", ["auto", "gather"])
def test_traffic_of_all_kinds_gets_its_own_models_tokens(zoo, policy, op, monkeypatch):
    """Joins, leaves, mixed ranks, DoRA's gains, base rows, and rows and columns that grow and shrink."""
    monkeypatch.setattr("labs_lib.serving.static.LEAST_RANKS", 1)  # else one kind of ranks would do for all
    draw = random.Random(1)
    jobs = [
        (
            name,
            [draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 5, 30, 62, 90]))],
            draw.choice([1, 3, 9, 40]),
            draw.randrange(30),
        )
        for name in NAMES * 5
    ]
    seen: set[Kind] = set()
    with serving(zoo, policy=policy, op=op, max_batch=7, kv_tokens=600, slots=3) as engine:
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
            if not engine.step():
                time.sleep(0.0005)
            seen |= {static(engine)._kind} - {None}
            step += 1
            assert step < 20_000, "no progress"
        assert not engine.pool.cells()[0].any(), "rows without a sequence wrote into the page of zeros"
    for id, result in ended.items():
        name, prompt, tokens = wanted[id]
        assert result.error is None
        assert result.tokens == zoo.truth(name, prompt, tokens), name
    for each in (
        "rows",
        "columns",
        "ranks",
        "gains",
    ):  # how many rows run together depends on the loader's thread
        assert len({getattr(kind, each) for kind in seen}) >= 2, each


def test_a_batch_of_base_rows_has_no_adapter_kernels(zoo):
    with serving(zoo) as engine:
        results = engine.generate([request(zoo, "base", [5, 6, 7], 5) for _ in range(3)])
        assert [r.tokens for r in results] == [zoo.truth("base", [5, 6, 7], 5)] * 3
        assert {kind.ranks for kind in static(engine)._steps} == {0}


def test_drawn_tokens_are_those_of_the_eager_path(zoo):
    jobs = [request(zoo, name, [5, 6, 7], 12, temperature=1.0, seed=4) for name in NAMES]
    found = {}
    for graphs in ("on", "off"):
        with serving(zoo, graphs=graphs) as engine:
            found[graphs] = [result.tokens for result in engine.generate(jobs)]
    assert found["on"] == found["off"]


def test_a_tenant_who_overflows_spoils_only_his_own_rows(zoo):
    """And leaves nothing behind: not in the pages, nor in the row of the window that the next one gets."""
    with serving(zoo, max_batch=2) as engine:
        (slot,) = [
            engine.tiers.acquire(zoo.shas["plain"], "x") or engine.tiers.prefetch(zoo.shas["plain"], "x")
        ]
        while slot is None:
            engine.tiers.poll()
            slot = engine.tiers.acquire(zoo.shas["plain"], "x")
        engine.tiers.release(slot)
        engine.pool.adapters.data[slot.pages[0]] = torch.nan
        bad = request(zoo, "plain", [5, 6, 7], 4)
        good = request(zoo, "rslora", [8, 9], 20)
        results = engine.generate([bad, good, request(zoo, "base", [5, 6], 9)])
        assert results[1].tokens == zoo.truth("rslora", [8, 9], 20)
        assert results[2].tokens == zoo.truth("base", [5, 6], 9)


def test_a_failed_forward_pass_forgets_the_window(zoo, monkeypatch):
    with serving(zoo) as engine:
        engine.generate([request(zoo, "plain", [5, 6, 7], 3)])
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", lambda **_: 1 / 0)
            assert engine.generate([request(zoo, "plain", [5, 6, 7], 3)])[0].finish == "error"
        (result,) = engine.generate([request(zoo, "plain", [5, 6, 7], 9)])
        assert result.tokens == zoo.truth("plain", [5, 6, 7], 9)


# -- buffers --------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "_local_scalar_dense": "a number read on the host",
    "item": "a number read on the host",
    "is_nonzero": "a number read on the host",
    "lift_fresh": "a tensor made from the host's numbers (torch.tensor)",
    "nonzero": "a shape that follows from values",
    "masked_select": "a shape that follows from values",
    "unique_dim": "a shape that follows from values",
    "_unique2": "a shape that follows from values",
    "repeat_interleave": "a shape that follows from values",
}


class OnlyBuffers(TorchDispatchMode):
    """Fails on what a graph could not repeat: host data, and any tensor that is neither given nor made inside."""

    def __init__(self, given) -> None:
        super().__init__()
        self.known = {each.untyped_storage().data_ptr() for each in given}
        self.kept: list = []  # so that no address is used twice
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().removeprefix("aten::").partition(".")[0], kwargs or {}
        assert name not in FORBIDDEN, f"{name}: {FORBIDDEN[name]}"
        tensors = [
            each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        ]
        if name in ("index", "index_put_", "index_put"):
            assert all(each.dtype != torch.bool for each in tensors), (
                f"{name}: a shape that follows from values"
            )
        for each in tensors:
            assert each.untyped_storage().data_ptr() in self.known, f"{name} reads a tensor nobody listed"
        out = func(*args, **kwargs)
        made = [each for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.kept += made
        self.known |= {each.untyped_storage().data_ptr() for each in made}
        self.calls.append((name, *(tuple(each.shape) for each in [*tensors, *made])))
        return out


def weights(engine) -> list[torch.Tensor]:
    model, pool = engine.executor.model, engine.pool
    return [*model.parameters(), *model.buffers(), pool.adapters.data, pool.kv.data]


@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_a_step_reads_buffers_only_and_does_the_same_each_time(zoo, policy):
    jobs = [("plain", 20, 30), ("dora", 3, 12), ("base", 7, 4), ("rslora", 1, 30), ("patterns", 9, 25)]
    with serving(zoo, policy=policy, max_batch=4) as engine:
        engine.generate(
            [request(zoo, name, [5] * 70, 2) for name, *_ in jobs]
        )  # all steps larger than needed
        done: list = []
        for name, length, tokens in jobs:
            engine.submit(request(zoo, name, list(range(3, 3 + length)), tokens), on_end=done.append)
        calls: dict[Kind, list] = {}
        places: dict[Kind, dict] = {}
        recorder = static(engine).recorder

        def run(kind, step):
            found = {name: each.data_ptr() for name, each in step.buffers.items()}
            assert places.setdefault(kind, found) == found, "a buffer has moved"
            with OnlyBuffers([*weights(engine), *step.buffers.values()]) as watch:
                outputs = step()
            assert calls.setdefault(kind, watch.calls) == watch.calls, "another step than the recorded one"
            return outputs

        recorder.run = run
        while len(done) < len(jobs):
            engine.step()
        for result in done:
            name = result.request.tenant
            assert result.tokens == zoo.truth(name, result.request.prompt, result.request.max_tokens), name
    assert len(calls) >= 2 and all(len(each) > 50 for each in calls.values())


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda step: step.position.max().item(), "number read on the host"),
        (lambda step: step.position + torch.tensor([1]), "made from the host's numbers"),
        (lambda step: step.position[step.position > 0], "follows from values"),
        (lambda step: step.position + OUTSIDE, "nobody listed"),
    ],
)
def test_the_watch_sees_what_a_graph_could_not_repeat(zoo, wrong, why):
    with serving(zoo) as engine, torch.inference_mode():
        engine.generate([request(zoo, "plain", [5, 6], 3)])
        step = static(engine)._steps[static(engine)._kind or next(iter(static(engine)._steps))]
        with pytest.raises(AssertionError, match=why), OnlyBuffers(step.buffers.values()):
            wrong(step)


OUTSIDE = torch.ones(1, dtype=torch.long)


def test_growth_of_the_memory_drops_what_was_recorded_on_the_old(zoo):
    with serving(zoo, max_batch=1) as engine:
        decoder = static(engine)
        engine.generate([request(zoo, "plain", [5, 6], 3)])
        assert {kind.columns for kind in decoder._steps} == {64}
        (result,) = engine.generate([request(zoo, "plain", [5] * 100, 40)])
        assert result.tokens == zoo.truth("plain", [5] * 100, 40)
        assert {kind.columns for kind in decoder._steps} == {192}, (
            "64 and 128 lay in memory that was given back"
        )
        (result,) = engine.generate([request(zoo, "plain", [5, 6], 70)])
        assert result.tokens == zoo.truth("plain", [5, 6], 70)
        assert {kind.columns for kind in decoder._steps} == {64, 128, 192}


# -- the index ------------------------------------------------------------------------------------------------------


def test_a_static_index_holds_any_batch_that_fits():
    pages = torch.zeros(4, 8, dtype=torch.long)
    pages[1, :3], pages[2, :8], pages[3, :1] = torch.arange(1, 4), torch.arange(4, 12), 12
    arena = torch.randn(13, 10 + 6)
    arena[0] = 0
    a, b = arena[:, :10], arena[:, 10:]
    held = StaticIndex(4, 8, "cpu")
    addresses = [each.data_ptr() for each in held.buffers.values()]
    for slots in ([1, 2, 3, 0], [0, 0, 0, 1], [2, 2, 2, 2], [3, 0, 3, 1]):
        index = Index(slots, pages)
        held.fill(index)
        x = torch.randn(4, 10)
        torch.testing.assert_close(gather(x, a, b, held), loop(x, a, b, index))
        cells = held.tiles(TILE).cells_on_device.view(4, TILE)
        for tile, rows in enumerate(cells):
            owners = {slots[row] for row in rows.tolist() if row >= 0}
            assert len(owners) <= 1 and 0 not in owners
            if owners:
                assert torch.equal(held.pages[tile], pages[owners.pop()])
            else:
                assert not held.pages[tile].any()
        assert sorted(cells[cells >= 0].tolist()) == [i for i, slot in enumerate(slots) if slot]
    assert addresses == [each.data_ptr() for each in held.buffers.values()]


# -- options --------------------------------------------------------------------------------------------------------


def test_graphs_are_off_on_the_cpu_unless_asked_for(zoo):
    with serving(zoo, graphs="auto") as engine:
        assert static(engine) is None
    with pytest.raises(LabsError, match="cannot be recorded"):
        serving(zoo, op="tiles")
    with pytest.raises(LabsError, match="graphs='maybe'"):
        serving(zoo, graphs="maybe")


def test_what_cannot_be_recorded_is_served_without(zoo, caplog):
    def refuse(kind, step):
        raise CaptureError("The decode step could not be recorded.")

    with serving(zoo) as engine:
        static(engine).recorder.run = refuse
        (result,) = engine.generate([request(zoo, "plain", [5, 6, 7], 9)])
        assert result.finish == "error" and "could not be recorded" in result.error
    with serving(zoo) as engine:
        engine.executor.graphs = "auto"
        static(engine).recorder.run = refuse
        (result,) = engine.generate([request(zoo, "plain", [5, 6, 7], 9)])
        assert result.tokens == zoo.truth("plain", [5, 6, 7], 9)
        assert "From now on without" in caplog.text


@pytest.fixture
def card(monkeypatch):
    """A CUDA device, or the pretended one: its graphs repeat operators on the memory they were recorded with."""
    if torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(
        "labs_lib.serving.ops.has_triton", lambda: False
    )  # there is nothing that could run it
    with pretend("gpu"):
        yield


@pytest.mark.gpu  # a pretended one does
@pytest.mark.parametrize("policy", ["separate", "unified"])
def test_a_gpu_replays_what_the_eager_path_says(zoo, card, policy):
    draw = random.Random(2)
    jobs = [
        request(zoo, name, [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 60))], 30)
        for name in NAMES * 3
    ]
    with Engine(
        small_model().cuda(), zoo.folder_of, slots=3, max_rank=9, max_batch=6, policy=policy
    ) as engine:
        results = engine.generate(jobs)
        assert static(engine).recorder.count >= 2
    for job, result in zip(jobs, results, strict=True):
        assert result.tokens == zoo.truth(job.tenant, job.prompt, 30), job.tenant
