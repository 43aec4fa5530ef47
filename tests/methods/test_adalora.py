"""Our AdaLoRA is PEFT's, step by step: outputs, gradients, the ranks pruned over a whole schedule, files, merging.

The last part keeps today's behaviour of the locked PEFT where it surprises: each test is a box of lab 07.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.adalora import (
    FACTORS,
    RankAllocator,
    Schedule,
    SVDLinear,
    inject_adalora,
    keep_best,
    merge_adalora,
    orthogonality,
    penalise,
    rank_budget,
    ranks,
    smoothed_importance,
    svd_layers,
)
from labs_lib.methods.adalora_io import load_adalora, save_adalora
from labs_lib.models.twins import peft_parameter_count, random_like

SCHEDULE = Schedule(total=16, warmup=3, final=5, interval=2)
STEPS = range(1, SCHEDULE.total + 1)


def peft_config(**changes):
    from peft import AdaLoraConfig

    usual = {
        "init_r": 4,
        "target_r": 2,
        "lora_alpha": 8,
        "total_step": SCHEDULE.total,
        "tinit": SCHEDULE.warmup,
        "tfinal": SCHEDULE.final,
        "deltaT": SCHEDULE.interval,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    return AdaLoraConfig(**usual | changes)


def pair(tiny_llama, weight=0.5):
    """Our model and PEFT's with the same factors; E is filled, since with E = 0 comparisons are vacuous."""
    from peft import get_peft_model

    ours = inject_adalora(tiny_llama(), "all-linear", 4, 8, generator=torch.Generator().manual_seed(3))
    penalise(ours, weight)
    theirs = get_peft_model(tiny_llama(), peft_config(orth_reg_weight=weight))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, layer in svd_layers(ours).items():
            layer.lora_E.copy_(torch.randn(layer.lora_E.shape, generator=generator))
            twin = theirs.base_model.model.get_submodule(name)
            for factor in FACTORS:
                getattr(twin, factor)["default"].copy_(getattr(layer, factor))
    return ours.train(), theirs.train()


def factors(ours, theirs):
    """Each of our factors beside PEFT's."""
    for name, layer in svd_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        for factor in FACTORS:
            yield f"{name}.{factor}", getattr(layer, factor), getattr(twin, factor)["default"]


def train(tiny_llama, batch, allocate=True, lr=0.02):
    """Both models over the whole schedule; returns them, our allocator, and both patterns of zeros at every step."""
    ours, theirs = pair(tiny_llama)
    allocator = RankAllocator(ours, target=2, schedule=SCHEDULE)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr) for m in (ours, theirs)
    ]
    history = []
    for step in STEPS:
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
        if allocate:
            allocator.step(step)
            theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        alive = {n: (a != 0, b != 0) for n, a, b in factors(ours, theirs) if n.endswith("lora_E")}
        history.append(alive)
    return ours, theirs, allocator, history


# --- the pieces


def test_a_fresh_layer_is_its_base_and_e_gets_the_first_gradient():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer = SVDLinear(base, rank=3, alpha=6)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert layer.lora_E.grad.any() and not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


def test_delta_by_hand():
    layer = SVDLinear(nn.Linear(2, 2), rank=2, alpha=2)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(2))
        layer.lora_B.copy_(torch.eye(2))
        layer.lora_E.copy_(torch.tensor([[3.0], [0.5]]))
    torch.testing.assert_close(layer.delta(), torch.diag(torch.tensor([3.0, 0.5])), rtol=1e-5, atol=1e-6)


def test_merging_twice_adds_once():
    torch.manual_seed(0)
    layer, x = SVDLinear(nn.Linear(6, 5), rank=2, alpha=3), torch.randn(4, 6)
    nn.init.normal_(layer.lora_E, std=100)
    y = layer(x)
    assert not torch.allclose(y, layer.base(x))
    layer.merge()
    layer.merge()
    torch.testing.assert_close(layer(x), y)


def test_importance_by_hand():
    weight, gradient = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.0])
    mean, spread = smoothed_importance(weight, gradient, torch.zeros(2), torch.ones(2), beta1=0.5, beta2=0.75)
    assert mean.tolist() == [1.0, 0.0]  # sensitivities 2 and 0
    assert spread.tolist() == [1.0, 0.75]  # 0.75 + 0.25 * |2 - 1|, 0.75 + 0


def test_budget_falls_from_start_to_target_and_is_pefts(tiny_llama):
    from peft import get_peft_model

    allocator = get_peft_model(tiny_llama(), peft_config()).base_model.rankallocator
    start, target = allocator.init_bgt, allocator.target_bgt
    ours = [rank_budget(step, start, target, 16, 3, 5) for step in STEPS]
    assert ours == [allocator.budget_schedule(step)[0] for step in STEPS]
    assert ours[:3] == [start] * 3 and ours[10:] == [target] * 6
    assert ours == sorted(ours, reverse=True) and len(set(ours)) > 5


def test_keep_best_is_global_and_ties_are_pruned():
    scores = {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([3.0, 0.0])}
    assert {k: v.tolist() for k, v in keep_best(scores, 2).items()} == {
        "a": [True, True],
        "b": [False, False],
    }
    assert all(v.all() for v in keep_best(scores, 4).values())
    tied = keep_best({"a": torch.tensor([1.0, 1.0, 2.0])}, 2)
    assert tied["a"].tolist() == [False, False, True]


def test_orthogonality_is_zero_for_orthonormal_factors():
    layer = SVDLinear(nn.Linear(6, 5), rank=3, alpha=3)
    with torch.no_grad():
        layer.lora_A.copy_(torch.linalg.qr(torch.randn(6, 3)).Q.T)
        layer.lora_B.copy_(torch.linalg.qr(torch.randn(5, 3)).Q)
    assert orthogonality({"": layer}).item() < 1e-5
    with torch.no_grad():
        layer.lora_A.mul_(2)  # the gram of A is 4 I: a gap of 3 on the diagonal
    assert orthogonality({"": layer}).item() == pytest.approx(3 * 3**0.5 / 2, rel=1e-4)


def test_a_schedule_without_a_pruning_phase_is_refused_as_in_peft():
    with pytest.raises(ValueError, match="No step is left"):
        Schedule(total=10, warmup=5, final=5)
    with pytest.raises(ValueError, match="budgeting phase"):
        peft_config(total_step=10, tinit=5, tfinal=5)


def test_injecting_refuses_what_it_cannot_do_and_leaves_the_model(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least 1"):
        inject_adalora(model, "all-linear", 0, 8)
    with pytest.raises(ValueError, match="closest"):
        inject_adalora(model, ["q_prj"], 2, 8)
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject_adalora(model, ["q_proj"], 2, 8)
    with pytest.raises(ValueError, match="already"):
        inject_adalora(model, ["q_proj"], 2, 8)


# --- equal to PEFT


def test_a_fresh_model_is_its_base_bit_for_bit(tiny_llama, batch):
    ours = inject_adalora(tiny_llama(), "all-linear", 4, 8)
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, tiny_llama()(**batch).logits)


def test_outputs_loss_and_gradients_are_pefts(tiny_llama, batch):
    ours, theirs = pair(tiny_llama)
    outputs = ours(**batch), theirs(**batch)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=0, atol=1e-6)
    assert not torch.allclose(outputs[0].logits, tiny_llama()(**batch).logits, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    for name, mine, other in factors(ours, theirs):
        assert mine.grad.abs().max() > 0, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_same_ranks_are_pruned_at_every_step_of_the_schedule(tiny_llama, batch):
    ours, theirs, allocator, history = train(tiny_llama, batch)
    for step, alive in zip(STEPS, history, strict=True):
        for name, (mine, other) in alive.items():
            assert torch.equal(mine, other), (step, name)
    counts = [sum(int(mine.sum()) for mine, _ in alive.values()) for alive in history]
    assert counts[0] == counts[2] == 56 and counts[-1] == 28
    assert len(set(counts)) > 3  # it fell in several steps
    assert set(ranks(ours).values()) != {2}  # and not evenly
    for name, mine, other in factors(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=name)
    pattern = theirs.peft_config["default"].rank_pattern
    kept = {f"{name}.lora_E.default": mask.tolist() for name, mask in allocator.kept.items()}
    assert kept == pattern


def test_scores_of_every_rank_are_pefts(tiny_llama, batch):
    ours, theirs = pair(tiny_llama)
    allocator, theirs_allocator = RankAllocator(ours, 2, SCHEDULE), theirs.base_model.rankallocator
    for step in (1, 2):  # the warm-up: averages only
        for model in (ours, theirs):
            model.zero_grad()
            model(**batch).loss.backward()
        allocator.step(step)
        theirs.base_model.update_and_allocate(step)
    for (name, factor), (mean, spread) in allocator.averages.items():
        key = f"{name}.{factor}.default"
        torch.testing.assert_close(mean, theirs_allocator.exp_avg_ipt[key])
        torch.testing.assert_close(spread, theirs_allocator.exp_avg_unc[key])


def test_merged_weights_are_pefts(tiny_llama, batch):
    ours, theirs = pair(tiny_llama)
    apart = ours.eval()(**batch).logits
    merged = merge_adalora(copy.deepcopy(ours))
    unloaded = theirs.merge_and_unload()
    assert not svd_layers(merged)
    for (name, mine), (_, other) in zip(merged.named_parameters(), unloaded.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(merged(**batch).logits, apart, rtol=0, atol=1e-5)


def test_merging_refuses_a_shared_weight(tiny_llama):
    model = inject_adalora(tiny_llama(tied=True), ["lm_head"], 2, 4)
    with pytest.raises(ValueError, match="shares its weight"):
        merge_adalora(model)


@pytest.mark.parametrize("pruned", [True, False])
def test_files_go_both_ways(tiny_llama, batch, tmp_path, pruned):
    from peft import PeftModel

    ours, theirs, allocator, _ = train(tiny_llama, batch, allocate=pruned)
    save_adalora(ours, tmp_path / "ours", allocator.kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
        there = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    back = load_adalora(tiny_llama(), tmp_path / "theirs").eval()
    for saved, loaded in ((ours, there), (theirs, back)):
        with torch.no_grad():
            expected = saved.eval()(batch["input_ids"]).logits
            torch.testing.assert_close(loaded(batch["input_ids"]).logits, expected, rtol=0, atol=1e-5)
    sizes = [(tmp_path / who / "adapter_model.safetensors").stat().st_size for who in ("ours", "theirs")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_a_wrong_file_says_why(tiny_llama, tmp_path):
    from labs_lib.methods.io import save_lora
    from labs_lib.methods.lora import inject_lora

    with pytest.raises(LabsError, match="missing"):
        load_adalora(tiny_llama(), tmp_path)
    save_lora(inject_lora(tiny_llama(), ["q_proj"], 2, 4), tmp_path)
    with pytest.raises(LabsError, match="not ADALORA"):
        load_adalora(tiny_llama(), tmp_path)
    with pytest.raises(LabsError, match="no AdaLoRA layers"):
        save_adalora(tiny_llama(), tmp_path)
    save_adalora(inject_adalora(tiny_llama(), ["lm_head"], 2, 4), tmp_path)
    with pytest.raises(LabsError, match=r"does not fit"):
        load_adalora(nn.ModuleDict({"lm_head": nn.Linear(3, 3)}), tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_parameters_on_7b_are_pefts(targets):
    twin = random_like("llama-2-7b")
    theirs = peft_parameter_count(twin, peft_config(init_r=12, target_modules=targets))
    with torch.device("meta"):
        ours = inject_adalora(twin, targets, 12, 24)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs


# --- the loss


def test_our_loss_is_the_cross_entropy_in_eval_and_holds_the_penalty_in_training(tiny_llama, batch):
    ours, _ = pair(tiny_llama)
    plain = ours.eval()(**batch).loss.item()
    assert plain == pytest.approx(nn_cross_entropy(ours, batch), rel=1e-5)
    trained = ours.train()(**batch).loss.item()
    penalty = 0.5 * orthogonality(svd_layers(ours)).item()
    assert trained == pytest.approx(plain + penalty, rel=1e-5) and penalty > 0.1
    assert ours.cross_entropy.item() == pytest.approx(plain, rel=1e-5)


def nn_cross_entropy(model, batch):
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


def test_the_penalty_can_be_taken_back(tiny_llama, batch):
    model = inject_adalora(tiny_llama(), ["q_proj"], 2, 4).train()
    undo = penalise(model)
    loss = model(**batch).loss
    undo()
    assert model(**batch).loss < loss


# --- failures you will meet: what the locked PEFT does today


def test_peft_reports_the_penalty_as_loss_even_in_eval(tiny_llama, batch):
    _, theirs = pair(tiny_llama)
    theirs.eval()
    with torch.no_grad():
        reported = theirs(**batch).loss.item()
    assert reported > nn_cross_entropy(theirs, batch) + 0.1


def test_without_update_and_allocate_nothing_is_pruned_and_nobody_says_so(tiny_llama, batch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, theirs, _, history = train(tiny_llama, batch, allocate=False)
    assert all(mine.all() and other.all() for mine, other in history[-1].values())
    assert theirs.peft_config["default"].rank_pattern is None
    assert not [w for w in caught if "allocate" in str(w.message)]


def trainer_run(tiny_llama, tmp_path, event=None, steps=SCHEDULE.total, **changes):
    """PEFT's AdaLoRA under the Trainer, `update_and_allocate` called at `event`; returns the model."""
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), peft_config(**changes))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 61, (8, 9))]

    class Allocate(TrainerCallback):
        pass

    if event:
        setattr(
            Allocate,
            event,
            lambda self, args, state, control, **kw: model.base_model.update_and_allocate(
                state.global_step + 1
            ),
        )
    settings = TrainingArguments(
        tmp_path, max_steps=steps, learning_rate=0.02, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Allocate()]).train()
    return model


def left(model):
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


def test_the_trainer_prunes_only_with_a_callback(tiny_llama, tmp_path):
    assert left(trainer_run(tiny_llama, tmp_path)) == 56
    assert left(trainer_run(tiny_llama, tmp_path, "on_optimizer_step")) == 28


def test_a_callback_at_the_end_of_the_step_finds_no_gradients(tiny_llama, tmp_path):
    with pytest.raises(TypeError, match="NoneType"):
        trainer_run(tiny_llama, tmp_path, "on_step_end")


def test_our_allocator_says_so_instead(tiny_llama, batch):
    ours, _ = pair(tiny_llama)
    with pytest.raises(ValueError, match="before zero_grad"):
        RankAllocator(ours, 2, SCHEDULE).step(1)


def test_a_total_step_beyond_the_end_leaves_ranks_over_the_budget(tiny_llama, tmp_path):
    over = left(trainer_run(tiny_llama, tmp_path, "on_optimizer_step", total_step=2 * SCHEDULE.total))
    assert 28 < over < 56


def test_equal_start_and_target_fail_late_in_kthvalue(tiny_llama, batch):
    from peft import get_peft_model

    theirs = get_peft_model(tiny_llama(), peft_config(init_r=2)).train()
    theirs(**batch).loss.backward()
    theirs.base_model.update_and_allocate(1)  # within the warm-up all is well
    with pytest.raises(RuntimeError, match="kthvalue"):
        theirs.base_model.update_and_allocate(4)
    kept = keep_best({"a": torch.rand(4)}, 4)  # ours keeps everything
    assert kept["a"].all()


def test_saving_and_loading_a_layer_without_ranks_warns_of_what_did_not_happen(tiny_llama, batch, tmp_path):
    from peft import PeftModel

    _, theirs, _, _ = train(tiny_llama, batch)
    pattern = theirs.peft_config["default"].rank_pattern
    emptied = next(iter(pattern))
    pattern[emptied] = [False] * 4  # as happens in practice; here by hand, to be sure
    with torch.no_grad():
        dict(theirs.base_model.model.named_parameters())[emptied].zero_()
    expected = theirs.eval()(batch["input_ids"]).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    said = " ".join(str(warning.message) for warning in caught)
    assert "ZeRO-3" in said and "were ignored" in said
    torch.testing.assert_close(loaded(batch["input_ids"]).logits, expected, rtol=0, atol=1e-5)  # all is well


def test_a_loaded_adapter_cannot_compute_a_loss(tiny_llama, batch, tmp_path):
    from peft import PeftModel

    save_adalora(inject_adalora(tiny_llama(), ["q_proj"], 2, 4), tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded(batch["input_ids"]).logits.isfinite().all()
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loaded(**batch)
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)(**batch).loss.isfinite()
    assert load_adalora(tiny_llama(), tmp_path)(**batch).loss.isfinite()


def test_merging_into_a_4_bit_base_is_not_implemented_and_ours_says_what_to_do():
    from peft import get_peft_model

    from labs_lib import load_base

    theirs = get_peft_model(load_base("tiny", quantise="nf4")[0], peft_config(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match=r"^$"):
        theirs.merge_and_unload()
    ours = inject_adalora(load_base("tiny", quantise="nf4")[0], ["q_proj"], 4, 8)
    with pytest.raises(ValueError, match="is quantised"):
        merge_adalora(ours)


def test_without_a_task_type_the_penalty_is_silently_missing(tiny_llama, batch):
    from peft import get_peft_model

    losses = []
    for task in ("CAUSAL_LM", None):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), peft_config(task_type=task)).train()
        losses.append(model(**batch).loss.item())
    assert losses[1] == pytest.approx(nn_cross_entropy(model, batch), rel=1e-5)
    assert losses[0] > losses[1] + 0.5
