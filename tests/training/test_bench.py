"""`labs bench training`: every arm takes real steps, what cannot be measured is a row, and stopped work goes on."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from labs_lib import cli
from labs_lib.errors import LabsError
from labs_lib.measure.count import count_parameters, tensor_bytes
from labs_lib.measure.records import stored
from labs_lib.methods.galore import Projector
from labs_lib.models.twins import random_packed, twin_config
from labs_lib.training import bench, bench_arms
from labs_lib.training.bakeoff import ON_7B
from labs_lib.training.bench_arms import arms_for, random_bases, reference, refresh_costs, share, trainee

TWIN = "random:64x2"
CONFIG = twin_config(TWIN)
ARMS = {arm.name: arm for arm in arms_for(CONFIG, half=True)}


def plan(**changes) -> bench.Plan:
    return bench.Plan(**({"model": TWIN, "length": 12, "seconds": 0.0, "least": 2} | changes))


@pytest.fixture
def bases():
    return bench.Bases(plan())


@pytest.fixture
def learner(tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    return tmp_path


# --- arms


def test_on_llama_2_7b_the_arms_are_those_that_the_bakeoff_counts():
    arms = {arm.arm.name: arm.arm for arm in arms_for(twin_config("llama-2-7b"), half=True)}
    assert {arm.name: arms[arm.name] for arm in ON_7B} == {arm.name: arm for arm in ON_7B}
    assert len(arms) == len(set(arms)) > 25


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_what_it_says_and_leaves_the_shared_base_frozen(name, bases):
    arm = ARMS[name]
    base = bench.load(TWIN, "cpu", "bfloat16") if arm.autocast else bases.get(arm.packed)
    batch = bench.tokens(plan(), base)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with random_bases():
        one = trainee(arm, base, batch)
        starts = [each.detach().clone() for each in one.model.parameters() if each.requires_grad]
        for optimizer in one.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
        one.step()
        one.step()
    assert torch.isfinite(torch.tensor(one.loss()))
    trained = [each for each in one.model.parameters() if each.requires_grad]
    moved = sum(not torch.equal(old, new) for old, new in zip(starts, trained, strict=True))
    assert moved == len(trained)
    assert all(each.grad is None for each in one.model.parameters())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    same = all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert same == (not arm.touches_base)


def test_no_matrix_of_an_adapter_is_zero(bases):
    for name in ("LoRA r16", "DoRA r16", "LLaMA-Adapter 10", "adapters, 1/16 of the width"):
        model = bench_arms.adapted(ARMS[name], bases.get())
        assert all(each.any() for each in model.parameters() if each.requires_grad), name


def test_dora_is_compared_with_lora_of_its_own_kind():
    pairs = {
        name: reference(arm).name for name, arm in ARMS.items() if arm.arm.method == "dora" or name == "IA3"
    }
    assert pairs == {
        "DoRA r16": "LoRA r16",
        "DoRA r16, dropout 0.05": "LoRA r16, dropout 0.05",
        "DoRA r16, PEFT": "LoRA r16, PEFT",
        "DoRA r16, dropout 0.05, PEFT": "LoRA r16, dropout 0.05, PEFT",
        "DoRA r16, autocast": "LoRA r16, autocast",
        "DoRA r16, dropout 0.05, autocast": "LoRA r16, dropout 0.05, autocast",
        "IA3": "LoRA r16",
    }


def test_a_shared_base_takes_no_memory_of_its_own(bases):
    base = bases.get()
    again = share(base)
    assert tensor_bytes(base, again) == tensor_bytes(base)
    assert all(a is not b for a, b in zip(base.parameters(), again.parameters(), strict=True))


def test_a_packed_twin_has_all_layers_in_4_bits():
    whole, packed = bench.load(TWIN, "cpu", "float32"), random_packed("random:64x3", "cpu", torch.float32)
    assert (
        count_parameters(packed).total == count_parameters(bench.load("random:64x3", "cpu", "float32")).total
    )
    assert {module.config.num_hidden_layers for module in packed.modules() if hasattr(module, "config")} == {
        3
    }
    assert tensor_bytes(packed.model.layers[2]) < 0.2 * tensor_bytes(whole.model.layers[1])
    assert torch.isfinite(packed(input_ids=torch.full((1, 4), 5)).logits).all()


def test_layer_by_layer_is_the_plain_galore_with_one_gradient_at_a_time():
    """The arms differ in when a parameter steps, and in nothing else; with the same basis the weights end the same."""

    def weights(name: str) -> list[torch.Tensor]:
        base = bench.load(TWIN, "cpu", "float32")
        one = trainee(ARMS[name], base, bench.tokens(plan(), base))  # with the real basis, a gradient's own
        for optimizer in one.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
        for _ in range(3):
            one.step()
        return [each.detach() for each in one.model.parameters()]

    for kind in ("GaLore", "GaLore, 8-bit"):
        plain, layers = weights(kind), weights(f"{kind}, layer by layer")
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, layers, strict=True))


def test_random_bases_have_the_shapes_of_real_ones_and_end():
    gradient, found = torch.randn(6, 9), {}
    real = Projector.refresh
    for kind in ("std", "right", "full"):
        with random_bases():
            low = Projector(2, proj_type=kind).project(gradient, 0)
        found[kind] = low.shape == Projector(2, proj_type=kind).project(gradient, 0).shape
    assert all(found.values()) and Projector.refresh is real


def test_a_new_basis_is_timed_once_per_shape(bases):
    found = refresh_costs(bases.get(), rank=2, seconds=60)
    assert sorted(shape[:3] for shape in found["refresh_shapes"]) == [
        (64, 64, 8),
        (64, 256, 2),
        (256, 64, 4),
    ]
    assert found["refresh_s"] == pytest.approx(sum(n * each for *_, n, each in found["refresh_shapes"]))
    assert found["refresh_extra_bytes"] > 0
    assert refresh_costs(bases.get(), rank=2, seconds=0) == {"refresh_shapes": []}


def test_a_closed_trainee_is_gone():
    """A hook on a parameter would keep model, states and base for ever: the next arm's memory would be too high."""
    base = bench.load(TWIN, "cpu", "float32")
    with random_bases():
        one = trainee(ARMS["GaLore, layer by layer"], base, bench.tokens(plan(), base))
    watched = weakref.ref(next(one.model.parameters()))
    one.close()
    del one
    gc.collect()
    assert watched() is None


# --- a row


def test_a_row_counts_and_times(bases):
    row = bench.measure(ARMS["LoRA r16"], plan(), bases)
    layer = 4 * (64 + 64) + 3 * (64 + 256)
    assert row["params"] == 16 * 2 * layer and row["finite"] and row["exact"]
    assert row["state_bytes"] >= 8 * row["params"]
    assert row["weight_bytes"] < row["peak_bytes"]
    assert row["against"] == "LoRA r16" and row["paired"] and row["rounds"] == 2
    assert row["ratio_lo"] <= row["ratio"] <= row["ratio_hi"]
    assert row["tokens_per_s"] == pytest.approx(12 / row["step_s"])
    full = bench.measure(ARMS["full fine-tuning"], plan(), bases)
    assert full["train_flops"] > row["train_flops"] and full["state_bytes"] > row["state_bytes"]


def test_checkpointing_saves_memory_and_a_prefix_refuses_it():
    sized = plan(length=96)
    bases = bench.Bases(sized)
    plain, twice = (bench.measure(ARMS["LoRA r16"], sized, bases, ways) for ways in (False, True))
    assert twice["peak_bytes"] < plain["peak_bytes"] and twice["train_flops"] > plain["train_flops"]
    assert "checkpointing" in bench.measure(ARMS["prefix 30"], sized, bases, True)["refused"]


MESSAGE = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 14.74 GiB"


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError(MESSAGE)


def test_what_does_not_fit_is_a_row_and_the_next_arm_is_measured(bases, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    row = bench.measure(ARMS["full fine-tuning"], plan(), bases)
    assert row["out_of_memory"] and row["asked_bytes"] == row["needed_bytes"] == 3 * 2**29
    assert "at least 1.6 GB" in bench.obstacle(row)
    monkeypatch.undo()
    assert "step_s" in bench.measure(ARMS["IA3"], plan(), bases)


def test_an_arm_that_fits_only_alone_is_timed_alone(bases, monkeypatch):
    made = bench_arms.trainee

    def first_only(arm, *args):
        return out_of_memory() if arm is bench_arms.LORA else made(arm, *args)

    monkeypatch.setattr(bench_arms, "trainee", first_only)
    row = bench.measure(ARMS["full fine-tuning"], plan(), bases)
    assert not row["paired"] and row["step_s"] > 0 and "ratio" not in row
    assert " alone " in bench.table([row | {"arm": "full", "checkpointing": False}])


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory",
        ),
        (ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"), "package bitsandbytes"),
        (RuntimeError("shapes cannot be multiplied"), "RuntimeError: shapes cannot be multiplied"),
        (KeyError("step"), "KeyError: 'step'"),
        (LabsError("not this model"), "not this model"),
    ],
)
def test_what_goes_wrong_is_told_in_the_row(error, words, bases, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(bench_arms, "trainee", fail)
    assert words in bench.obstacle(bench.measure(ARMS["IA3"], plan(), bases))


def test_on_a_gpu_the_bytes_held_count_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    assert bench.no_room(torch.OutOfMemoryError(MESSAGE), "cuda")["needed_bytes"] == 1000 + 3 * 2**29


# --- the whole


def test_it_stops_in_time_resumes_and_measures_nothing_twice(learner, monkeypatch):
    counted, log, clock = [], learner / "log.jsonl", [0.0]

    def measured(arm, shorter, *rest) -> dict:
        counted.append((arm.name, shorter.seconds))
        clock[0] += 40  # seconds that an arm takes
        return {"step_s": 1.0}

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    wanted = plan(arms=("LoRA r16", "IA3", "prompt 10"), checkpointing=(False, True), seconds=4.0)
    assert bench.run(wanted, log, minutes=0) == ([], False)
    rows, complete = bench.run(wanted, log, minutes=1)
    assert [row["arm"] for row in rows] == ["LoRA r16", "IA3"] and not complete
    assert counted == [("LoRA r16", 4.0), ("IA3", 2.0)]  # 20 s are left for five points, half of it for turns
    rows, complete = bench.run(wanted, log)
    assert complete and len(rows) == len(counted) == 6
    assert [row["checkpointing"] for row in rows] == [False] * 3 + [True] * 3


def test_the_command_records_what_it_measured(learner, capsys):
    words = ["bench", "training", "--model", TWIN, "--device", "cpu", "--length", "8", "--quick"]
    assert cli.main([*words, "--arms", "LoRA r16; GaLore; QLoRA r16"]) == 0
    record = stored("bench_training", recorded=False)[-1]
    assert [row["arm"] for row in record.rows] == ["LoRA r16", "GaLore", "QLoRA r16"]
    assert all(row["model"] == TWIN and row["rounds"] == 3 and row["ratio"] > 0 for row in record.rows)
    assert record.rows[1]["refresh_s"] > 0 and "quick" in record.note
    assert record.provenance["settings"]["length"] == 8 and "versions" in record.provenance
    said = capsys.readouterr().out
    assert "QLoRA r16" in said and "recorded in" in said
    assert not list((learner / "bench").iterdir())  # the log of unfinished work is gone
    json.dumps(record.rows, allow_nan=False)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--arms", "magic"], "no arm 'magic'"),
        (["--length", "0"], "above 0"),
        (["--model", "random:70x0"], "random:4096x32"),
        (["--model", "gpt-5"], "No base 'gpt-5'"),
    ],
)
def test_wrong_words_are_told(words, told, learner, capsys):
    assert cli.main(["bench", "training", "--device", "cpu", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(capsys):
    assert cli.main(["bench", "training", "--device", "cuda"]) == 2
    assert "There is no GPU" in capsys.readouterr().err


def test_the_defaults_follow_the_card(monkeypatch):
    args = SimpleNamespace(device=None, dtype=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in (((7, 5), "float16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert bench.device_and_dtype(args) == ("cuda", dtype)
