"""fit(): deterministic, resumable, and clear about what cannot be trained."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from labs_lib.errors import LabsError
from labs_lib.methods.lora import inject_lora, lora_state_dict
from labs_lib.models.base import load_base
from labs_lib.training.fit import fit

ROWS = {
    "prompt": [f"Who buys item {i}?\nAnswer:" for i in range(12)],
    "completion": [f" {name}" for name in ("Mira", "Otto", "Ines") * 4],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("tiny")[1]


def adapted(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return inject_lora(
        LlamaForCausalLM(config), "all-linear", 2, 4, dropout=0.1, generator=torch.Generator().manual_seed(0)
    )


def run(model, tokenizer, **changes):
    return fit(
        model, tokenizer, ROWS, **{"steps": 20, "lr": 1e-2, "batch_size": 4, "progress": False} | changes
    )


def test_trains_only_the_adapter_and_reports_every_step(tokenizer):
    model = adapted(tokenizer)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    done = run(model, tokenizer)
    assert len(done.losses) == 20 and done.losses[-1] < done.losses[0]
    assert done.trainable_parameters == sum(t.numel() for t in lora_state_dict(model).values())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not model.training and done.tokens_per_second > 0 and done.peak_bytes is None


def test_the_seed_decides_everything(tokenizer):
    first, second, other = (run(adapted(tokenizer), tokenizer, seed=seed).losses for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_a_killed_run_resumes_and_ends_the_same(tokenizer, tmp_path):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise KeyboardInterrupt

    whole = adapted(tokenizer)
    losses = run(whole, tokenizer, checkpoints=tmp_path / "whole").losses
    broken = adapted(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run(broken, tokenizer, checkpoints=tmp_path / "broken", callbacks=[Kill()])
    resumed = adapted(tokenizer)
    again = run(resumed, tokenizer, checkpoints=tmp_path / "broken")
    assert again.losses == pytest.approx(losses)
    for name, tensor in lora_state_dict(whole).items():
        assert torch.allclose(lora_state_dict(resumed)[name], tensor, atol=1e-7), name


def test_a_given_optimizer_keeps_its_own_rates(tokenizer):
    model = adapted(tokenizer)
    before = {n: t.clone() for n, t in lora_state_dict(model).items()}
    groups = [
        {"params": [p for n, p in model.named_parameters() if "lora_A" in n], "lr": 0.0},
        {"params": [p for n, p in model.named_parameters() if "lora_B" in n], "lr": 1e-2},
    ]
    run(model, tokenizer, optimizer=torch.optim.AdamW(groups))
    moved = {n for n, t in lora_state_dict(model).items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if "lora_B" in n}


def test_nothing_to_train_says_what_to_do(tokenizer):
    model = adapted(tokenizer).requires_grad_(False)
    with pytest.raises(LabsError, match="Inject an adapter"):
        run(model, tokenizer)
    with pytest.raises(LabsError, match="no rows"):
        fit(adapted(tokenizer), tokenizer, {"prompt": [], "completion": []}, steps=2, lr=1e-3)


def test_a_diverging_loss_names_step_and_remedy(tokenizer):
    with pytest.raises(LabsError, match=r"at step \d+: lower the learning rate"):
        run(adapted(tokenizer), tokenizer, lr=1e30, max_grad_norm=0.0, warmup=0.0)
