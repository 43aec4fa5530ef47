"""He et al.'s table, measured: each method's row is what the paper (or its own paper) says, and can come out wrong."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from labs_lib.methods.adalora import inject_adalora
from labs_lib.methods.adapters import inject_adapters, use_adapters
from labs_lib.methods.adapters_io import load_adapter, save_adapter
from labs_lib.methods.dora import inject_dora
from labs_lib.methods.ia3 import inject_ia3
from labs_lib.methods.llama_adapter import inject_llama_adapter
from labs_lib.methods.lora import LoRALinear, inject_lora, trainable_parameters
from labs_lib.methods.modules import replace
from labs_lib.methods.prefix_tuning import add_prefix
from labs_lib.methods.prompt_tuning import add_prompt
from labs_lib.methods.rslora import inject_rslora
from labs_lib.methods.unified import describe, mix_and_match
from labs_lib.methods.virtual_io import load_prefix, save_prefix
from labs_lib.methods.zoo import ZOO
from labs_lib.methods.zoo.layer import inject_zoo

from .parity import assert_same, logits, weights

QV = ["q_proj", "v_proj"]
QV_SITE = "attention (q_proj, v_proj)"
HEADS = "attention (heads), through "
# method: (how it is made, rows of: where, insertion, form, composition, scale, width)
ROWS = {
    "lora": (
        lambda base: inject_lora(base, QV, 3, 6),
        [(QV_SITE, "parallel", "linear", "h + D", "fixed: alpha", 3)],
    ),
    "lora everywhere": (
        lambda base: inject_lora(base, "all-linear", 3, 6),
        [
            (
                "attention (q_proj, k_proj, v_proj, o_proj), ffn (gate_proj, up_proj, down_proj)",
                *("parallel", "linear", "h + D", "fixed: alpha", 3),
            )
        ],
    ),
    "rslora": (
        lambda base: inject_rslora(base, QV, 3, 6),
        [(QV_SITE, "parallel", "linear", "h + D", "fixed: alpha", 3)],
    ),
    "adalora": (
        lambda base: inject_adalora(base, QV, 3, 6),
        [(QV_SITE, "parallel", "linear", "h + D", "fixed: alpha; learned: lora_E", 3)],
    ),
    "dora": (
        lambda base: inject_dora(base, QV, 3, 6),
        [(QV_SITE, "parallel", "linear", "g h + D", "learned: lora_magnitude_vector, on h", 3)],
    ),
    "ia3": (
        inject_ia3,
        [
            ("attention (k_proj, v_proj)", "sequential", "linear", "l h", "learned: ia3_l, on h", 16),
            ("ffn (down_proj)", "sequential, on x", "linear", "l x", "learned: ia3_l, on x", 48),
        ],
    ),
    "adapter, houlsby": (
        lambda base: inject_adapters(base, 5, "houlsby"),
        [("attention, ffn", "sequential", "nonlinear (relu)", "h + D", "fixed: scale", 6)],
    ),
    "adapter, pfeiffer": (
        lambda base: inject_adapters(base, 5, "pfeiffer", activation="gelu"),
        [("ffn", "sequential", "nonlinear (gelu)", "h + D", "fixed: scale", 6)],
    ),
    "adapter, scaled parallel": (
        lambda base: inject_adapters(base, 5, "parallel", scale=4.0, exact=True),
        [("ffn", "parallel", "nonlinear (relu)", "h + D", "fixed: scale", 6)],
    ),
    "llama_adapter": (
        lambda base: inject_llama_adapter(base, 3, 2),
        [("attention", "parallel", "softmax", "h + D", "learned: adaption_gate", 4 * 2 + 1)],
    ),
    "prefix": (
        lambda base: add_prefix(base, 3, DynamicCache),
        [
            (
                HEADS + "each layer's keys and values",
                "parallel",
                "softmax",
                "(1 - p) h + p D",
                "none",
                4 * 2 + 1,
            )
        ],
    ),
    "prompt": (
        lambda base: add_prompt(base, 3),
        [(HEADS + "the input", "parallel", "softmax", "(1 - p) h + p D", "none", 4 * 2 + 1)],
    ),
    "mix and match": (
        lambda base: mix_and_match(base, 3, 5, DynamicCache),
        [
            (
                HEADS + "each layer's keys and values",
                "parallel",
                "softmax",
                "(1 - p) h + p D",
                "none",
                4 * 2 + 1,
            ),
            ("ffn", "parallel", "nonlinear (relu)", "h + D", "fixed: scale", 6),
        ],
    ),
}
for name, options, insertion, composition, scale, width in [
    ("vera", {"rank": 3}, "parallel", "h + D", "learned: vera_lambda_d, vera_lambda_b", 3),
    ("tied_lora", {"rank": 3}, "parallel", "h + D", "fixed: scale; learned: u, v", 3),
    ("loha", {"rank": 3}, "parallel", "h + D", "fixed: scale", 9),
    ("lokr", {"rank": 2}, "parallel", "h + D", "fixed: scale", 8),
    ("miss", {"rank": 3}, "parallel", "h + D", "none", 3),
    ("oft", {"block": 8}, "sequential, on x", "x + D", "none", 32),
    ("boft", {"block": 8}, "sequential, on x", "x + D", "learned: boft_s, on h", 32),
]:
    ROWS[name] = (
        lambda base, name=name, options=options: inject_zoo(base, ZOO[name], QV, **options),
        [(QV_SITE, insertion, "linear", composition, scale, width)],
    )


@pytest.mark.parametrize("method", ROWS)
def test_a_methods_row_is_measured(tiny_llama, batch, method):
    make, expected = ROWS[method]
    model = make(tiny_llama())
    before = weights(model)
    found = describe(model, batch["input_ids"])
    rows = [(d.where, d.insertion, d.form, d.composition, d.scale, d.width) for d in found]
    assert rows == expected
    assert {d.blocks for d in found} == {2}
    assert_same(weights(model), before)  # a copy was shaken, not the model


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("method", ["dora", "adapter, houlsby", "llama_adapter", "prefix", "boft", "ia3"])
def test_other_noise_gives_the_same_row(tiny_llama, batch, method, seed):
    make, expected = ROWS[method]
    found = describe(make(tiny_llama()), batch["input_ids"][:2, :7], seed=seed)
    assert [(d.where, d.insertion, d.form, d.composition, d.scale) for d in found] == [
        row[:-1] for row in expected
    ]


def test_what_is_kept_of_h(tiny_llama, batch):
    """All of it where D is added; a factor per output in (IA)3 and DoRA; what the virtual tokens leave over."""
    kept = {
        method: describe(ROWS[method][0](tiny_llama()), batch["input_ids"])[0].kept
        for method in ("lora", "adapter, scaled parallel", "ia3", "prefix", "prompt")
    }
    assert kept["lora"] == kept["adapter, scaled parallel"] == (1, 1)
    assert kept["ia3"][0] < 1 < kept["ia3"][1]
    for method in ("prefix", "prompt"):
        assert 0 < kept[method][0] < kept[method][1] < 1


def test_the_prefixs_share_is_the_attention_that_it_draws(tiny_llama, batch):
    """Against attention computed by hand: p is the sum of the softmax's weights on the prefix."""
    model = add_prefix(tiny_llama(), 3, DynamicCache)
    low, high = describe(model, batch["input_ids"], noise=0.0)[0].kept
    model.base.config._attn_implementation = "eager"
    attentions = model(input_ids=batch["input_ids"], output_attentions=True).attentions
    left = torch.stack([1 - each[..., :3].sum(-1) for each in attentions])
    assert low == pytest.approx(left.min().item(), abs=1e-3)
    assert high == pytest.approx(left.max().item(), abs=1e-3)


class Odd(LoRALinear):
    """A layer whose row none of the methods has: the measurement is not a list of names."""

    def forward(self, x):
        y = self.base(x)
        return y + torch.tanh(y @ self.lora_A.T[: y.shape[-1]]) @ self.lora_B.T


def test_the_row_comes_from_the_code_and_not_from_the_name(tiny_llama, batch):
    model = inject_lora(tiny_llama(), ["q_proj"], 3, 6)
    name = "model.layers.1.self_attn.q_proj"
    replace(model, name, Odd(model.get_submodule(name).base, 3, 6))
    (row,) = describe(model, batch["input_ids"])
    assert (row.insertion, row.form, row.composition) == ("sequential", "nonlinear (tanh)", "h + D")
    assert row.scale == "none"  # it never multiplies by alpha / rank


def test_a_plain_model_is_an_error(tiny_llama, batch):
    with pytest.raises(ValueError, match="Nothing on this model"):
        describe(tiny_llama(), batch["input_ids"])


def test_a_fresh_adapter_without_noise_is_an_error_and_a_trained_one_is_not(tiny_llama, batch):
    model = inject_lora(tiny_llama(), QV, 3, 6)
    with pytest.raises(ValueError, match="q_proj changes nothing yet"):
        describe(model, batch["input_ids"], noise=0.0)
    for parameter in trainable_parameters(model):
        nn.init.normal_(parameter, std=1e-4)  # however small it is
    (row,) = describe(model, batch["input_ids"], noise=0.0)
    assert (row.insertion, row.form, row.composition) == ("parallel", "linear", "h + D")


# --- the hybrid


def test_mix_and_match_trains_both_parts_and_not_the_base(tiny_llama, batch):
    model = mix_and_match(tiny_llama(), 3, 5, DynamicCache)
    trained = sum(p.numel() for p in trainable_parameters(model))
    assert trained == 3 * 2 * 2 * 16 + 2 * (2 * 32 * 5 + 5 + 32)
    before = [p.clone() for p in trainable_parameters(model)]
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert not any(map(torch.equal, before, trainable_parameters(model)))
    base = {n.replace(".base.", "."): p for n, p in model.base.state_dict().items() if ".adapters." not in n}
    assert_same(base, weights(tiny_llama()))


def test_mix_and_match_is_its_two_parts(tiny_llama, batch):
    """Without the adapters it is the prefix, bit for bit; without the prefix it is the adapters."""
    ours = mix_and_match(tiny_llama(), 3, 5, DynamicCache, generator=torch.Generator().manual_seed(0))
    prefix = add_prefix(tiny_llama(), 3, DynamicCache)
    prefix.prefix.load_state_dict(ours.prefix.state_dict())
    assert torch.equal(logits(ours, batch), logits(prefix, batch))  # adapters start as exactly nothing
    for parameter in trainable_parameters(ours):
        nn.init.normal_(parameter, std=0.3)
    adapters = inject_adapters(tiny_llama(), 5, "parallel", scale=4.0, exact=True)
    adapters.load_state_dict(ours.base.state_dict())
    assert torch.equal(logits(ours.base, batch), logits(adapters, batch))
    assert not torch.equal(logits(ours, batch), logits(ours.base, batch))
    alone = copy.deepcopy(ours)
    use_adapters(alone.base, [])
    prefix.prefix.load_state_dict(ours.prefix.state_dict())
    assert torch.equal(logits(alone, batch), logits(prefix, batch))


def test_mix_and_match_goes_to_disk_as_two_adapters(tiny_llama, batch, tmp_path):
    model = mix_and_match(tiny_llama(), 3, 5, DynamicCache)
    for parameter in trainable_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    save_adapter(model.base, tmp_path / "adapter")
    save_prefix(model, tmp_path / "prefix")
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter")
    loaded = load_prefix(loaded, tmp_path / "prefix", DynamicCache)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_mix_and_matchs_parts_have_a_rate_each():
    from labs_lib.models.base import load_base
    from labs_lib.training.adapt import METHODS
    from labs_lib.training.sweeps import Arm

    sizes = {"tokens": 2, "bottleneck": 4}
    made = METHODS["mix_and_match"](
        load_base("tiny")[0], Arm("MAM", options=sizes | {"prefix_rate": 10}), 0, 10
    )
    adapters, prefix = made.optimizer(1e-3).param_groups
    assert (adapters["lr"], prefix["lr"]) == (1e-3, pytest.approx(1e-2))
    assert [id(p) for p in prefix["params"]] == [id(made.model.prefix.weight)]
    both = [id(p) for group in (adapters, prefix) for p in group["params"]]
    assert sorted(both) == sorted(id(p) for p in trainable_parameters(made.model))
    assert METHODS["mix_and_match"](load_base("tiny")[0], Arm("MAM", options=sizes), 0, 10).optimizer is None


def test_mix_and_match_runs_in_a_sweep(monkeypatch):
    from labs_lib.training import sweep
    from labs_lib.training.sweeps import Arm, Task

    monkeypatch.setattr(sweep, "KNOWN_FACTS_PROBED", 8)
    arm = Arm("MAM", method="mix_and_match", options={"tokens": 2, "bottleneck": 4, "scale": 2.0})
    task = Task("facts", "knowledge", steps=3, batch=8, facts=16)
    point = task.settings() | {"arm": arm.to_dict(), "stage": "sweep", "seed": 0, "lr": 1e-2}
    row = sweep.run_point(point, "tiny")
    assert row["params"] == 2 * 4 * 2 * 64 + 4 * (2 * 64 * 4 + 4 + 64)
    assert row["loss"] > 0
