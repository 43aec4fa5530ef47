"""A mixture of LoRA experts: what the gate says is what is added, exactly; merging and X-LoRA as its special cases."""

import pytest
import torch
from torch.nn import functional as F

from labs_lib.methods.lora import inject_lora, lora_layers, lora_state_dict, trainable_parameters
from labs_lib.methods.mixture import (
    Gate,
    balance,
    balance_loss,
    fix_gates,
    gate_weights,
    gates_of,
    inject_mixture,
    mixture_delta,
    stack_experts,
)

from .parity import assert_same, logits, weights

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def experts(tiny_llama):
    """Three trained-looking adapters (tensors, model): ranks 2, 4 and 4, alpha twice the rank."""
    made = []
    for seed, rank in enumerate((2, 4, 4)):
        model = inject_lora(
            tiny_llama(), TARGETS, rank, 2 * rank, generator=torch.Generator().manual_seed(seed)
        )
        generator = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.normal_(std=0.1, generator=generator)
        made.append(({key: value.clone() for key, value in lora_state_dict(model).items()}, model))
    return made


def mixed(tiny_llama, experts, **more):
    return inject_mixture(tiny_llama(), [tensors for tensors, _ in experts], [2.0] * len(experts), **more)


def test_shares_add_up_and_only_top_k_get_any():
    scores = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gate_weights(scores), F.softmax(scores, -1), rtol=0, atol=0)
    shares = gate_weights(scores, top_k=2)
    assert ((shares > 0).sum(-1) == 2).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(5, 7))
    first, second = shares.sort(-1, descending=True).values[..., :2].unbind(-1)
    gap = scores.sort(-1, descending=True).values
    torch.testing.assert_close((first / second).log(), gap[..., 0] - gap[..., 1])
    assert torch.equal(gate_weights(scores, top_k=1).argmax(-1), scores.argmax(-1))


def test_failure_you_will_meet_a_lone_expert_teaches_its_router_nothing():
    for top_k, learns in ((1, False), (2, True), (None, True)):
        scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), requires_grad=True)
        gate_weights(scores, top_k)[:, 0].square().sum().backward()
        assert bool(scores.grad.abs().sum() > 1e-6) == learns, top_k


def test_the_delta_is_the_weighted_sum_of_the_experts_own():
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(shape, generator=generator) for shape in ((3, 2, 6), (3, 5, 2)))
    x, shares = torch.randn(4, 7, 6, generator=generator), torch.rand(4, 7, 3, generator=generator)
    expected = sum(shares[..., e : e + 1] * (x @ (B[e] @ A[e]).T) for e in range(3))
    torch.testing.assert_close(mixture_delta(x, A, B, shares), expected, rtol=0, atol=1e-5)


def test_experts_of_different_ranks_are_filled_up():
    small, large = (torch.ones(1, 4), torch.ones(3, 1), 2.0), (torch.ones(2, 4), torch.ones(3, 2), 0.5)
    A, B = stack_experts([small, large])
    assert A.shape == (2, 2, 4) and B.shape == (2, 3, 2)
    torch.testing.assert_close(B[0] @ A[0], 2.0 * torch.ones(3, 4))
    torch.testing.assert_close(B[1] @ A[1], 0.5 * 2 * torch.ones(3, 4))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gate_that_chooses_one_expert_is_that_adapter(tiny_llama, experts, batch, which):
    shares = [float(i == which) for i in range(3)]
    got = logits(fix_gates(mixed(tiny_llama, experts), shares), batch)
    torch.testing.assert_close(got, logits(experts[which][1], batch), rtol=0, atol=1e-6)


def test_gates_start_as_the_mean_and_experts_are_silent_without_them(tiny_llama, experts, batch):
    model = mixed(tiny_llama, experts)
    torch.testing.assert_close(
        logits(model, batch),
        logits(fix_gates(mixed(tiny_llama, experts), [1 / 3] * 3), batch),
        rtol=0,
        atol=1e-6,
    )
    fix_gates(model, [0.0] * 3)
    torch.testing.assert_close(logits(model, batch), logits(tiny_llama(), batch), rtol=0, atol=1e-6)


def test_shares_of_one_each_are_what_peft_s_merge_makes(tiny_llama, experts, batch, tmp_path):
    """add_weighted_adapter("cat") adds the updates exactly."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    def config(rank):
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")

    theirs = get_peft_model(tiny_llama(), config(2), adapter_name="e0")
    for i, (tensors, _) in enumerate(experts):
        if i:
            theirs.add_adapter(f"e{i}", config(4))
        set_peft_model_state_dict(theirs, tensors, adapter_name=f"e{i}")
    theirs.add_weighted_adapter(["e0", "e1", "e2"], [1.0, 1.0, 1.0], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    ours = fix_gates(mixed(tiny_llama, experts), [1.0] * 3)
    torch.testing.assert_close(logits(ours, batch), logits(theirs.eval(), batch), rtol=0, atol=1e-5)


@pytest.fixture
def xlora(tiny_llama, experts, tmp_path):
    """PEFT's X-LoRA over the same experts, with a classifier that is not trivial."""
    from peft import LoraConfig, XLoraConfig, get_peft_model
    from safetensors.torch import save_file

    for i, (tensors, _) in enumerate(experts):
        rank = (2, 4, 4)[i]
        folder = tmp_path / str(i)
        LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM"
        ).save_pretrained(folder)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors"
        )
    base = tiny_llama()
    base.config.use_cache = False
    adapters = {str(i): str(tmp_path / str(i)) for i in range(3)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.normal_(std=1.0, generator=torch.Generator().manual_seed(9))
    return model.eval()


def test_with_x_lora_s_own_scalings_we_are_x_lora(tiny_llama, experts, batch, xlora):
    expected = logits(xlora, batch)
    scalings = xlora.get_latest_scalings().detach()
    assert scalings.shape == (3, 11, 6, 3) and scalings.std() > 0.1
    ours = fix_gates(mixed(tiny_llama, experts), scalings[:, :, 0])  # the same for each layer
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=1e-5)


def test_failure_you_will_meet_x_lora_wants_no_cache(tiny_llama, tmp_path):
    from peft import XLoraConfig, get_peft_model

    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)})
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        get_peft_model(tiny_llama(), config)


def test_generation_with_a_cache_is_generation_without(tiny_llama, experts, batch):
    """The gate reads what its block reads, one token at a time too."""
    model = mixed(tiny_llama, experts).eval()
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.router.weight.normal_(generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    told = [model.generate(batch["input_ids"], use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*told)


def test_only_the_gates_learn(tiny_llama, experts, batch):
    model = mixed(tiny_llama, experts, top_k=2)
    before = weights(model)
    assert len(gates_of(model)) == 2
    assert sum(p.numel() for p in trainable_parameters(model)) == 2 * (32 * 3 + 3)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=10.0)
    for _ in range(2):
        optimizer.zero_grad()
        (model(**batch).loss + 0.1 * balance(model)).backward()
        optimizer.step()
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".gate.router." in name for name in changed)
    assert_same(*({n: w for n, w in each.items() if ".gate." not in n} for each in (before, after)))


def test_balance_is_one_for_even_gates_and_the_number_of_experts_for_one_that_takes_all():
    even = torch.eye(4).repeat(3, 1)
    assert balance_loss(even).item() == pytest.approx(1)
    one = torch.zeros(5, 6, 4)
    one[..., 2] = 1
    assert balance_loss(one).item() == pytest.approx(4)
    shares = torch.randn(8, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    balance_loss(gate_weights(shares)).backward()
    assert shares.grad.abs().sum() > 0


def test_what_is_wrong_is_said(tiny_llama, experts):
    tensors = [each for each, _ in experts]
    with pytest.raises(ValueError, match="two experts"):
        inject_mixture(tiny_llama(), tensors[:1], [2.0])
    fewer = dict(list(tensors[1].items())[2:])
    with pytest.raises(ValueError, match="different layers"):
        inject_mixture(tiny_llama(), [tensors[0], fewer], [2.0, 2.0])
    head = {key.replace("model.layers.0.self_attn.q_proj", "lm_head"): v for key, v in tensors[0].items()}
    with pytest.raises(ValueError, match="no block"):
        inject_mixture(tiny_llama(), [head, head], [2.0, 2.0])
    with pytest.raises(ValueError, match="top_k"):
        Gate(4, 2, top_k=3)
