"""galore_torch's 8-bit optimiser, both bugs and the cure; the chapter's calls; the Trainer's; bytes of a step."""

import copy
import warnings

import pytest
import torch
from torch import nn

from labs_lib.measure.count import optimizer_state_bytes, tensor_bytes
from labs_lib.methods.galore import (
    DEFAULTS,
    GaLoreAdamW,
    Projector,
    adam_bytes,
    galore_bytes,
    galore_groups,
    update_in_backward,
)
from labs_lib.methods.lora import lora_layers
from labs_lib.models.base import load_base
from labs_lib.training.adapt import METHODS
from labs_lib.training.galore import FixedGaLoreAdamW8bit, measure_step
from labs_lib.training.sweep import run_point
from labs_lib.training.sweeps import Arm

CODEBOOKS = 2 * 256 * 4  # bitsandbytes' two tables of 256 float32 each, shared by all 8-bit states


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


@pytest.fixture
def broken(monkeypatch):
    """galore_torch's own class, its CUDA call made harmless so that the other bug can be seen."""
    from galore_torch import GaLoreAdamW8bit

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    return GaLoreAdamW8bit


def tiny():
    return load_base("tiny")[0]


def matrix(size=128, rank=8, value=0.0):
    """A weight and its group; its projected states have size * rank numbers."""
    weight = nn.Parameter(torch.full((size, size), value))
    weight.grad = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return weight, [{"params": [weight], "rank": rank} | DEFAULTS]


def moved(kind, groups, weight, steps=3, **settings):
    before, gradient = weight.detach().clone(), weight.grad
    optimizer = kind(groups, lr=1e-2, weight_decay=0.0, **settings)
    for _ in range(steps):
        weight.grad = gradient.clone()  # galore_torch's class leaves the projected one behind
        optimizer.step()
    return (weight.detach() - before).norm().item()


# --- the chapter's lines


@pytest.mark.parametrize("name", ["rank", "update_proj_gap"])
def test_the_printed_call_raises(name):
    """Claim 41: the projection's settings belong to parameter groups; no GaLore optimiser takes them as arguments."""
    from galore_torch import GaLoreAdamW8bit

    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        GaLoreAdamW8bit(tiny().parameters(), lr=1e-5, **{name: 128})


def test_without_the_arguments_the_line_runs_and_projects_nothing(batch):
    """What is left of the line when the error is repaired by deleting: plain 8-bit Adam."""
    model = tiny()
    optimizer = FixedGaLoreAdamW8bit(model.parameters(), lr=1e-5)
    model(**batch).loss.backward()
    optimizer.step()
    assert not any("projector" in state for state in optimizer.state.values())


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Linear(3, 8)])
def test_the_printed_class_projects_the_outputs_whatever_the_shape(layer):
    """Claim 42: its result is (rank, d_in), where the comment says d_out; the library projects the smaller side."""
    from galore_torch.galore_projector import GaLoreProjector

    gradient = torch.randn(layer.out_features, layer.in_features)
    U = torch.linalg.svd(gradient, full_matrices=False)[0]
    printed = U[:, :2].T @ gradient
    assert printed.shape == (2, layer.in_features)
    library = GaLoreProjector(2).project(gradient, 0)
    assert (library.shape == printed.shape) == (layer.out_features < layer.in_features)
    assert library.shape == Projector(2).project(gradient, 0).shape


# --- the two bugs


@pytest.mark.skipif(torch.cuda.is_available(), reason="the call works where CUDA does")
def test_bug_1_a_step_calls_cuda_whatever_the_device():
    from galore_torch import GaLoreAdamW8bit

    groups = matrix()[1]
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        GaLoreAdamW8bit(groups, lr=1e-2).step()


def test_bug_2_small_projected_states_are_frozen(broken):
    """128 x 8 numbers of state stay in float32, and float32 states obey max_unorm, which is meant to be off."""
    weight, groups = matrix()
    frozen = moved(broken, groups, weight)
    right = moved(FixedGaLoreAdamW8bit, *reversed(matrix()))
    exact = moved(GaLoreAdamW, *reversed(matrix()), eps=1e-8)
    assert frozen <= 1e-3 * right
    assert right == pytest.approx(exact, rel=1e-3)


def test_bug_2_is_two_settings_in_the_wrong_place(broken):
    assert {
        k: broken([nn.Parameter(torch.ones(2))]).args.__dict__[k] for k in ("max_unorm", "skip_zeros")
    } == {
        "max_unorm": 100,
        "skip_zeros": True,
    }
    fixed = FixedGaLoreAdamW8bit([nn.Parameter(torch.ones(2))]).args
    assert (fixed.max_unorm, fixed.skip_zeros) == (0.0, False)


def test_bug_2_spares_states_of_8_bits(broken):
    """From 4,096 numbers on bitsandbytes keeps 8 bits, and there it has no max_unorm: large models do train."""
    weight, groups = matrix(size=512)
    assert moved(broken, groups, weight) == pytest.approx(
        moved(FixedGaLoreAdamW8bit, *reversed(matrix(size=512))), rel=1e-3
    )


def test_the_loss_falls_although_the_matrices_stand_still(broken, batch):
    """Why nobody sees it: embeddings and norms, which are not projected, go on learning."""
    fallen, change = {}, {}
    for kind in (broken, FixedGaLoreAdamW8bit):
        model = tiny()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer, losses = kind(galore_groups(model, "all-linear", 4), lr=5e-3, weight_decay=0.0), []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        name = "model.layers.0.self_attn.q_proj.weight"
        fallen[kind] = losses[0] - losses[-1]
        change[kind] = (model.state_dict()[name] - start[name]).norm().item()
    assert fallen[broken] > 1
    assert change[broken] < 0.02 * change[FixedGaLoreAdamW8bit]


# --- the fixed one


def test_fixed_is_galore_up_to_8_bits(batch):
    """With one basis: at a new one, gradients that differ in the last bits may flip the sign of a direction."""
    models = tiny(), tiny()
    optimizers = [
        kind(galore_groups(model, "all-linear", 32), lr=1e-3, eps=1e-8, weight_decay=0.01)
        for kind, model in zip((GaLoreAdamW, FixedGaLoreAdamW8bit), models, strict=True)
    ]
    starts = tiny()
    for _ in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    for start, exact, rounded in zip(*(each.parameters() for each in (starts, *models)), strict=True):
        change, other = exact - start, rounded - start
        assert (change - other).norm() < 0.3 * change.norm()  # small averages are coarse in 8 bits
    kinds = {state["state1"].dtype for state in optimizers[1].state.values()}
    assert kinds == {torch.uint8, torch.float32}


def test_fixed_without_a_rank_is_bitsandbytes_adamw(batch):
    from bitsandbytes.optim import AdamW8bit

    models = tiny(), tiny()
    for model, kind in zip(models, (AdamW8bit, FixedGaLoreAdamW8bit), strict=True):
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    for one, other in zip(*(each.parameters() for each in models), strict=True):
        assert torch.equal(one, other)


def test_weight_decay_is_of_the_weight_after_its_step():
    weight, groups = matrix(value=1.0)
    same, others = matrix(value=1.0)
    FixedGaLoreAdamW8bit(groups, lr=1e-2, weight_decay=0.1).step()
    GaLoreAdamW(others, lr=1e-2, eps=1e-8, weight_decay=0.1).step()
    torch.testing.assert_close(weight, same, rtol=1e-5, atol=1e-6)
    assert groups[0]["weight_decay"] == 0.1


def test_a_step_that_fails_gives_the_weight_back(monkeypatch):
    weight, groups = matrix(value=1.0)
    gradient, optimizer = weight.grad.clone(), FixedGaLoreAdamW8bit(groups)
    monkeypatch.setattr(optimizer, "update_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert weight.shape == (128, 128) and torch.equal(weight.grad, gradient) and torch.all(weight == 1)


def test_8_bit_bytes_are_the_arithmetics(batch):
    model = tiny()
    optimizer = FixedGaLoreAdamW8bit(galore_groups(model, "all-linear", 32))
    model(**batch).loss.backward()
    optimizer.step()
    counted = galore_bytes(model, 32, weight=4, state=1)
    assert optimizer_state_bytes(optimizer) == counted.optimizer + CODEBOOKS
    assert counted.plain >= adam_bytes(model.get_input_embeddings().weight.numel(), 1)


# --- a step, measured


def test_bytes_of_a_step(batch):
    model = tiny()

    def measured(per_layer):
        each = copy.deepcopy(model)
        found = measure_step(each, batch, galore_groups(each, "all-linear", 8), GaLoreAdamW, per_layer)
        assert all(parameter.grad is None for parameter in each.parameters())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in each.parameters())
        return found

    usual, hooked = measured(False), measured(True)
    counted = galore_bytes(model, 8, weight=4, state=4)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    assert usual.weights == hooked.weights == counted.weights
    assert usual.gradients == counted.gradients == sum(sizes)
    assert hooked.gradients == max(sizes)
    assert usual.states == hooked.states == counted.optimizer
    assert usual.later > usual.gradients + usual.states
    assert hooked.later < usual.later  # what the hooks save


# --- the Trainer's


def trained(model, optim, tmp_path, batch, steps=4, **more):
    """The Trainer on one batch; returns what it logged."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim=optim,
        optim_target_modules=[r".*self_attn\..*", r".*mlp\..*"],
        optim_args="rank=4, update_proj_gap=2, scale=0.5",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def ours_trained(batch, steps=4, clip=1.0, **settings):
    model = tiny().train()
    groups = galore_groups(model, "all-linear", 4, update_proj_gap=2, scale=0.5)
    optimizer = GaLoreAdamW(groups, lr=1e-2, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_trainers_galore_is_ours(tmp_path, batch):
    model = tiny()
    log = trained(model, "galore_adamw", tmp_path, batch)
    assert all(row["grad_norm"] > 0 for row in log)
    assert distance(model, ours_trained(batch)) < 1e-4


def test_the_trainers_galore_ignores_weight_decay(tmp_path, batch):
    """Hazard: of its settings only the learning rate arrives; weight_decay and the betas are dropped in silence."""
    plain, decayed = tiny(), tiny()
    trained(plain, "galore_adamw", tmp_path, batch)
    trained(decayed, "galore_adamw", tmp_path, batch, weight_decay=0.5, adam_beta1=0.5)
    assert distance(plain, decayed) == 0


def test_layerwise_is_ours_without_clipping_and_reports_no_norm(tmp_path, batch):
    model = tiny()
    log = trained(model, "galore_adamw_layerwise", tmp_path, batch)
    assert all(row["grad_norm"] == 0 for row in log)  # the gradients are gone when the norm is taken
    assert distance(model, ours_trained(batch, clip=None)) < 1e-4
    assert distance(model, ours_trained(batch)) > 1e-3


def test_layerwise_refuses_gradient_accumulation(tmp_path, batch):
    with pytest.raises(ValueError, match="gradient accumulation"):
        trained(tiny(), "galore_adamw_layerwise", tmp_path, batch, gradient_accumulation_steps=2)


def test_after_layerwise_training_every_backward_still_trains(tmp_path, batch):
    """Hazard: the Trainer leaves its hooks on the model. Ours come off."""
    model = tiny()
    trained(model, "galore_adamw_layerwise", tmp_path, batch, steps=1)
    before = copy.deepcopy(model.state_dict())
    model(**batch).loss.backward()
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    ours = tiny()
    _, remove = update_in_backward(
        galore_groups(ours, "all-linear", 4), lambda groups: GaLoreAdamW(groups, lr=1e-2)
    )
    ours(**batch).loss.backward()
    remove()
    before = copy.deepcopy(ours.state_dict())
    ours(**batch).loss.backward()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


# --- as an arm of a sweep


def test_the_arm_trains_every_weight_with_its_own_projection():
    model = tiny()
    arm = Arm("GaLore", "galore", rank=4, options={"update_proj_gap": 7, "scale": 1.0, "fresh": True})
    adapted = METHODS["galore"](model, arm, 0, 10)
    rest, projected = adapted.optimizer(1e-3).param_groups
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (projected["rank"], projected["update_proj_gap"], projected["scale"]) == (4, 7, 1.0)
    assert projected["eps"] == rest["eps"] == 1e-8 and projected["lr"] == 1e-3


def test_lora_and_the_rest_freezes_only_what_it_adapts():
    model = METHODS["lora"](tiny(), Arm("LoRA", rank=2, options={"rest": True}), 0, 10).model
    frozen = {id(layer.base.weight) for layer in lora_layers(model).values()}
    assert {id(each) for each in model.parameters() if not each.requires_grad} == frozen
    assert tensor_bytes(list(model.parameters())) > tensor_bytes(list(tiny().parameters()))


def test_a_point_on_waybills_from_pretrained_and_from_random_weights():
    task = {
        "label": "waybills",
        "task": "domain",
        "steps": 2,
        "batch": 2,
        "stage": "sweep",
        "seed": 0,
        "lr": 1e-3,
    }
    rows = [
        run_point(task | {"arm": Arm("GaLore", "galore", options={"fresh": fresh}).to_dict()}, "tiny")
        for fresh in (False, True)
    ]
    for row in rows:
        assert row["score"] == pytest.approx(1 / row["perplexity"]) and row["params"] == 320_064
    assert rows[0]["kept"] > 0.5 and rows[1]["kept"] == 0  # random weights know no fact
    assert 1000 < rows[1]["perplexity"] < 3000  # and hold every token of about 1,000 as likely


def test_the_control_slows_the_matrices_only():
    model = tiny()
    adapted = METHODS["full"](model, Arm("scaled", "full", options={"matrices": 0.25}), 0, 10)
    rest, matrices = adapted.optimizer(1e-2).param_groups
    assert (rest["lr"], matrices["lr"]) == (1e-2, 2.5e-3) and matrices["weight_decay"] == 0
    assert len(rest["params"]) + len(matrices["params"]) == len(list(model.parameters()))
    assert METHODS["full"](model, Arm("full", "full"), 0, 10).optimizer is None
