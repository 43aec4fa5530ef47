"""Every path of the library that takes a device, on the pretended one: in float32, and in bfloat16 as in `gpu`."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from labs_lib.errors import LabsError
from labs_lib.methods.lora import inject_lora, lora_state_dict
from labs_lib.models.base import load_base
from labs_lib.training.bakeoff import ARMS
from labs_lib.training.fit import fit

from . import pretend

ROWS = {
    "prompt": [f"Who buys item {i}?\nAnswer:" for i in range(8)],
    "completion": [f" {name}" for name in ("Mira", "Otto", "Ines", "Ada") * 2],
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def device(tmp_path):
    """Its own MonkeyPatch: a test's is undone later, and would put the pretended functions back for good."""
    with pytest.MonkeyPatch.context() as patch, pretend("gpu"):
        patch.setenv("LABS_CACHE", str(tmp_path))
        patch.delenv("LABS_RECORD", raising=False)
        yield


def devices(model) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


# Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", [None, "nf4", "int8"])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_base_goes_where_it_is_sent(where, quantise):
    """Quantised as well: without a device map transformers would choose the GPU by itself."""
    model, tokenizer = load_base("tiny", device=where, quantise=quantise)
    assert devices(model) == {where}
    ids = tokenizer("Facts: Alder Arc kettle", return_tensors="pt")["input_ids"].to(where)
    if quantise != "int8" or where == "cpu":  # its kernels are the device's own
        assert torch.isfinite(model(ids).logits).all()


@DTYPES
def test_four_bit_layers_compute_in_the_bases_dtype(dtype):
    model, _ = load_base("tiny", dtype=dtype, device="cuda", quantise="nf4")
    layer = model.model.layers[0].mlp.up_proj
    assert (
        layer.compute_dtype == dtype and layer(torch.randn(2, 64, device="cuda", dtype=dtype)).dtype == dtype
    )


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(LabsError, match=r"no device 'gpu'.*cuda"):
        load_base("tiny", device="gpu")


# Training ------------------------------------------------------------------------------------------------------------


def test_fit_stays_where_the_model_is_run_after_run():
    """A CPU run on a machine with a GPU stays on the CPU; accelerate's state of one run does not leak into the next."""
    for where in ("cpu", "cuda", "cpu", "cuda"):
        model, tokenizer = load_base("tiny", device=where)
        inject_lora(model, ["q_proj"], 2, 4)
        run = fit(model, tokenizer, ROWS, steps=2, lr=1e-3, batch_size=4, progress=False)
        assert devices(model) == {where} and (run.peak_bytes is not None) == (where == "cuda")


def test_fit_uses_one_card_of_two(monkeypatch):
    """The Trainer would cut every batch in two: other gradients, and a wrapper that hides the model."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model, tokenizer = load_base("tiny", device="cuda")
    inject_lora(model, ["q_proj"], 2, 4)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((type(model).__name__, args.train_batch_size))

    fit(model, tokenizer, ROWS, steps=2, lr=1e-3, batch_size=4, progress=False, callbacks=[Look()])
    assert seen == [("LlamaForCausalLM", 4)] * 2


@DTYPES
def test_fit_resumes_on_the_device(tmp_path, dtype):
    made = []
    for steps in (2, 4, 4):
        model, tokenizer = load_base("tiny", dtype=dtype, device="cuda")
        inject_lora(model, ["q_proj"], 2, 4, generator=torch.Generator().manual_seed(0))
        folder = tmp_path / ("resumed" if steps == 2 or len(made) == 1 else "whole")
        settings = {
            "lr": 1e-3,
            "batch_size": 4,
            "schedule": "constant",
            "progress": False,
            "checkpoints": folder,
        }
        fit(model, tokenizer, ROWS, steps=steps, **settings)
        made.append(lora_state_dict(model))
    for key, tensor in made[2].items():
        assert tensor.is_cuda
        torch.testing.assert_close(made[1][key], tensor)


@DTYPES
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_method_trains_and_writes_on_the_device(arm, dtype):
    from labs_lib.measure.quality import generate, recall
    from labs_lib.training.adapt import METHODS

    model, tokenizer = load_base("tiny", dtype=dtype, device="cuda", quantise=arm.quantise)
    if "block" in arm.options:
        arm = replace(arm, options=arm.options | {"block": 8})  # the tiny base is narrower
    adapted = METHODS[arm.method](model, arm, 1, 4)
    run = fit(
        adapted.model,
        tokenizer,
        ROWS,
        steps=2,
        lr=1e-3,
        batch_size=4,
        optimizer=adapted.optimizer and adapted.optimizer(1e-3),
        callbacks=adapted.callbacks,
        progress=False,
    )
    adapted.finish()
    assert devices(adapted.model) == {"cuda"} and run.peak_bytes > 0
    assert len(generate(adapted.model, tokenizer, ROWS["prompt"][:2], max_new_tokens=3)) == 2
    assert len(recall(adapted.model, tokenizer, ROWS)) == 8


@pytest.mark.parametrize(
    "arm", [arm for arm in ARMS if arm.method not in ("qlora", "full", "galore")], ids=lambda arm: arm.name
)
def test_every_method_is_described_on_the_device(arm):
    from labs_lib.methods.unified import describe
    from labs_lib.training.adapt import METHODS

    model = load_base("tiny", dtype=torch.bfloat16, device="cuda")[0]
    if "block" in arm.options:
        arm = replace(arm, options=arm.options | {"block": 8})
    small = {"tokens": 4, "prompts": 4, "layers": 2}
    arm = replace(arm, options=arm.options | {k: v for k, v in small.items() if k in arm.options})
    adapted = METHODS[arm.method](model, arm, 1, 4).model
    assert describe(adapted, torch.randint(3, 999, (2, 24), device="cuda"))
    assert devices(adapted) == {"cuda"}


def test_a_qlora_run_reports_its_merges_on_the_device():
    from labs_lib.training.merges import merge_report

    model, tokenizer = load_base("tiny", device="cuda", quantise="nf4")
    inject_lora(model, "all-linear", 2, 4)
    report = merge_report(model, tokenizer, {"facts": ROWS})
    assert report["float32"]["kl_facts"] < 1e-3


@pytest.mark.parametrize("arm", ["a", "planted", "fresh"])
def test_a_sweep_runs_on_the_device_and_records_it(arm):
    from labs_lib.measure.records import load_record
    from labs_lib.training import sweep as sweeping
    from labs_lib.training.sweeps import Arm, Sweep, Task

    options = {
        "a": {},
        "planted": {"init": 3, "plant": {"block": 1, "size": 2.0, "rank": 2}},
        "fresh": {"fresh": True},
    }[arm]
    method = {"a": "lora", "planted": "adalora", "fresh": "full"}[arm]
    sweep = Sweep(
        name=f"test_{arm}",
        note="",
        arms=(Arm(arm, method, rank=2, targets=("q_proj",), options=options),),
        tasks=(Task("facts", "knowledge", steps=2, batch=8, facts=16),),
        rates=(1e-3,),
        seeds=1,
        size="tiny",
    )
    path = sweeping.run_sweep(sweep, device="cuda")
    assert path.name == f"pretend24gb.sweep_test_{arm}.json"
    assert load_record(sweep_name := f"sweep_test_{arm}", "gpu").device == "pretend24gb"
    assert not load_record(sweep_name, "cpu")
    assert sweeping.log_path(sweep, "cuda") != sweeping.log_path(sweep)


def test_skills_are_composed_on_the_device():
    from labs_lib.methods.adapters import inject_adapters
    from labs_lib.training.composition import Stream, train

    model, tokenizer = load_base("tiny", device="cuda")
    inject_adapters(model, 4, "pfeiffer")
    train(model, tokenizer, (Stream(ROWS, 4), Stream(ROWS, 2)), steps=2, lr=1e-3, seed=0)
    assert devices(model) == {"cuda"}


@DTYPES
def test_a_mixture_of_experts_trains_on_the_device(dtype):
    from labs_lib.methods.mixture import inject_mixture

    experts = []
    for seed in (0, 1):
        model, tokenizer = load_base("tiny", dtype=dtype, device="cuda")
        inject_lora(model, "all-linear", 2, 4, generator=torch.Generator().manual_seed(seed))
        experts.append({key: value.cpu() for key, value in lora_state_dict(model).items()})  # as from a file
    mixture = inject_mixture(load_base("tiny", dtype=dtype, device="cuda")[0], experts, [2.0, 2.0])
    run = fit(mixture, tokenizer, ROWS, steps=2, lr=1e-2, batch_size=4, progress=False)
    assert devices(mixture) == {"cuda"} and run.trainable_parameters == 4 * (64 * 2 + 2)


def test_a_fleet_trains_is_judged_and_recorded_on_the_device(tmp_path, monkeypatch, capsys):
    from labs_lib.cli import main
    from labs_lib.measure.records import load_record
    from labs_lib.training import fleet_run

    monkeypatch.setattr(fleet_run, "ROWS", {"validation": 1, "test": 1})
    command = [
        "fleet",
        "ampersea",
        "fathom-eleven",
        "--base",
        "tiny",
        "--steps",
        "2",
        "--here",
        "--device",
        "cuda",
    ]
    main([*command, "--out", str(tmp_path / "fleet"), "--record"])
    assert "2 of 2 trained" in capsys.readouterr().out
    record = load_record("fleet", "gpu")
    assert record.device == "pretend24gb"
    steps = [row for row in record.rows if row["section"] == "step"]
    assert steps and all("ms_per_tenant" in row and "cpu_ms_per_tenant" not in row for row in steps)


# Measuring -----------------------------------------------------------------------------------------------------------


def test_peak_memory_asks_the_cards_allocator():
    from labs_lib.measure import peak_memory

    x = torch.zeros(1000, device="cuda")
    peak = peak_memory(lambda: (x * 2).sum(), x)
    assert not peak.exact and peak.extra >= 4000


def test_the_doctor_sees_the_card():
    from labs_lib import doctor

    checks = (doctor.device, doctor.bitsandbytes, doctor.profile, doctor.room)
    found = {finding.topic: finding for finding in (check() for check in checks)}
    assert found["GPU"].text.startswith("NVIDIA Pretend 24GB, 26 GB")
    assert found["bitsandbytes"].text == "NF4 works on cuda"
    assert found["Profile"].text.startswith("gpu: ")
    assert found["Room"].text.endswith(
        "full fine-tuning llama-3.2-1b; LoRA r16 llama-2-7b; QLoRA r16 llama-2-7b"
    )


def test_a_record_says_which_card():
    from labs_lib.measure import context, records

    assert records.device_slug("cuda") == "pretend24gb"
    assert "NVIDIA Pretend 24GB" in records.provenance("cuda")["machine"]
    assert "NVIDIA" not in records.provenance("cpu")["machine"]
    assert context.current().device == "cpu"


@pytest.mark.parametrize("bf16", [False, True])
def test_a_small_step_of_pretraining_runs_on_the_card(tmp_path, bf16):
    from labs_lib.models import pretrain

    model, tokenizer = load_base("tiny")
    stage = replace(pretrain.STAGES[0], steps=2, schedule=2, warmup=1)
    losses = pretrain.train_stage(model, tokenizer, stage, 1, 4, 1e-3, bf16, tmp_path / "work")
    assert len(losses) == 2 and devices(model) == {"cuda"}
