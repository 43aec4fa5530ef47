"""Bottleneck adapters against an independent reference (hooks on a stock model), and stacks and fusions of them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from labs_lib.errors import LabsError
from labs_lib.methods.adapters import (
    PLACEMENTS,
    AdaptedSublayer,
    AdapterFusion,
    BottleneckAdapter,
    adapted_sublayers,
    adapter_names,
    adapter_state_dict,
    count_adapters,
    fuse_adapters,
    init_adapter,
    inject_adapters,
    remove_adapters,
    train_adapter,
    use_adapters,
)
from labs_lib.methods.adapters_io import load_adapter, save_adapter
from labs_lib.methods.lora import trainable_parameters

from .parity import assert_close, assert_same, logits, quantised, weights

FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
ENDS = {"houlsby": ["self_attn", "mlp"], "pfeiffer": ["mlp"], "parallel": ["mlp"]}


def noisy(model, name="default", seed=3):
    """Every tensor of one adapter random: at its start it does (almost) nothing."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state_dict(model, name).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def inject(model, placement="pfeiffer", name="default", bottleneck=5, seed=3, **options):
    return noisy(inject_adapters(model, bottleneck, placement, name, **options), name, seed)


# --- the reference: a stock model, its sub-layers' outputs changed by hooks


def reference(model, adapters):
    """Hang adapters on a stock model's sub-layers: [(tensors by name, placement, activation, scale)], in order.

    Shares nothing with what is tested but the names of the tensors. Returns the model.
    """
    model.requires_grad_(False)
    for block in model.model.layers:
        for end in ("self_attn", "mlp"):
            here = [each for each in adapters if end in ENDS[each[1]]]
            getattr(block, end).register_forward_hook(hook_for(model, block, end, here), with_kwargs=True)
    return model


def hook_for(model, block, end, here):
    where = f"model.layers.{list(model.model.layers).index(block)}.{end}"

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        h = output[0] if end == "self_attn" else output
        for tensors, placement, activation, scale in here:
            read = x if placement == "parallel" else h
            middle = read @ tensors[f"{where}.down.weight"].T + tensors[f"{where}.down.bias"]
            middle = FUNCTIONS[activation](middle)
            h = h + scale * (middle @ tensors[f"{where}.up.weight"].T + tensors[f"{where}.up.bias"])
        return (h, output[1]) if end == "self_attn" else h

    return hook


def leaves(model, name="default"):
    """The adapter's tensors, copied, as parameters of the reference."""
    return {key: nn.Parameter(value.clone()) for key, value in adapter_state_dict(model, name).items()}


# --- the pieces


def test_adapter_by_hand():
    adapter = BottleneckAdapter(2, 1, scale=4)
    adapter.down.weight.data, adapter.down.bias.data = torch.tensor([[1.0, 2]]), torch.tensor([-1.0])
    adapter.up.weight.data, adapter.up.bias.data = torch.tensor([[3.0], [5]]), torch.tensor([0.5, 0])
    x = torch.tensor([[1.0, 1], [0, 0]])  # 1 + 2 - 1 = 2 passes; 0 + 0 - 1 is cut off
    assert adapter(x).tolist() == [[4 * 6.5, 40], [2, 0]]


def test_near_identity_start_is_normal_cut_off_at_two_deviations():
    down, up = init_adapter(300, 40, std=0.05, generator=torch.Generator().manual_seed(0))
    assert down.weight.shape == (40, 300) and up.weight.shape == (300, 40)
    for layer in (down, up):
        assert layer.weight.abs().max() <= 0.1
        assert layer.weight.std().item() == pytest.approx(0.05 * 0.8796, rel=0.02)  # what cutting off leaves
        assert torch.count_nonzero(layer.bias) == 0


def test_exact_start_is_loras():
    down, up = init_adapter(400, 8, exact=True, generator=torch.Generator().manual_seed(0))
    assert (
        torch.count_nonzero(up.weight) == torch.count_nonzero(up.bias) == torch.count_nonzero(down.bias) == 0
    )
    assert down.weight.abs().max() <= 0.05
    assert down.weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.03)


def test_the_weights_come_from_the_generator_only():
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(init_adapter(6, 3, generator=torch.Generator().manual_seed(9))[0].weight)
    assert torch.equal(*draws)


def test_what_an_adapter_adds_at_the_start_shrinks_with_the_square_of_std():
    torch.manual_seed(0)
    x, sizes = torch.randn(50, 128), []
    for std in (0.01, 0.1):
        adapter = BottleneckAdapter(128, 16, std=std, generator=torch.Generator().manual_seed(0))
        sizes.append(adapter(x).norm().item())
    assert sizes[1] / sizes[0] == pytest.approx(100, rel=0.01)
    assert sizes[0] / x.norm().item() < 1e-2


# --- into a model


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_start(tiny_llama, batch, placement):
    base = logits(tiny_llama(), batch)
    exact = inject_adapters(tiny_llama(), 5, placement, exact=True)
    assert torch.equal(logits(exact, batch), base)
    near = inject_adapters(tiny_llama(), 5, placement)
    change = (logits(near, batch) - base).abs().max()
    # a parallel one reads what the norm has made large, next to which this random model's own states are small
    assert 0 < change < (0.05 if placement == "parallel" else 1e-3)
    assert (logits(noisy(near), batch) - base).abs().max() > 3 * change


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("activation, scale", [("relu", 1.0), ("gelu", 4.0), ("silu", 0.5)])
def test_outputs_and_gradients_equal_the_reference(tiny_llama, batch, placement, activation, scale):
    ours = inject(tiny_llama(), placement, activation=activation, scale=scale)
    tensors = leaves(ours)
    theirs = reference(tiny_llama(), [(tensors, placement, activation, scale)])
    outputs = [model(**batch) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    mine = {
        f"{where}.{name}": parameter.grad
        for where, site in adapted_sublayers(ours).items()
        for name, parameter in site.adapters["default"].named_parameters()
    }
    assert_close(mine, {key: tensor.grad for key, tensor in tensors.items()})
    assert all(torch.count_nonzero(gradient) > 0 for gradient in mine.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ten_training_steps_equal_the_references(tiny_llama, batch, placement):
    ours = inject(tiny_llama(), placement)
    tensors = leaves(ours)
    theirs = reference(tiny_llama(), [(tensors, placement, "relu", 1.0)])
    losses = []
    for model, parameters in ((ours, trainable_parameters(ours)), (theirs, tensors.values())):
        optimiser = torch.optim.AdamW(parameters, lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert_close(adapter_state_dict(ours), {key: value.detach() for key, value in tensors.items()}, atol=1e-5)
    assert_same(weights(remove_adapters(ours)), weights(tiny_llama()))  # the base is untouched


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_position_in_the_block(tiny_llama, placement):
    """One block written out: norms, sub-layers, sums, and the adapters where the papers' figures draw them."""
    model = inject(tiny_llama(), placement)
    block, x = model.model.layers[0], torch.randn(2, 6, 32)
    rotary = model.model.rotary_emb(x, torch.arange(6)[None].expand(2, -1))
    got = block(x, position_embeddings=rotary)

    stock = tiny_llama().model.layers[0]
    sites = {end: getattr(block, end) for end in ENDS[placement]}
    adapt = {end: site.adapters["default"] for end, site in sites.items()}
    attended, _ = stock.self_attn(stock.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
    if placement == "houlsby":
        attended = attended + adapt["self_attn"](attended)
    x = x + attended  # the block's own sum comes after the adapter
    normed = stock.post_attention_layernorm(x)
    made = stock.mlp(normed)
    made = made + adapt["mlp"](normed if placement == "parallel" else made)
    torch.testing.assert_close(got, x + made, rtol=0, atol=1e-6)


def test_only_the_adapter_trains(tiny_llama, batch):
    model = inject(tiny_llama(), "houlsby")
    expected = count_adapters(32, 5, layers=2, placement="houlsby")
    assert sum(p.numel() for p in trainable_parameters(model)) == expected == 4 * (2 * 32 * 5 + 32 + 5)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name)


def test_the_formula_on_llama_2_7b():
    from labs_lib.models.twins import random_like

    model = random_like("llama-2-7b")
    for placement in PLACEMENTS:
        with torch.device("meta"):
            inject_adapters(model, 64, placement)
        got = sum(p.numel() for p in trainable_parameters(model))
        assert got == count_adapters(4096, 64, 32, placement)
        assert got == {"houlsby": 33_820_672}.get(placement, 16_910_336)  # 0.50 % and 0.25 % of 6.74 billion
        remove_adapters(model)


def test_half_precision_base_keeps_its_dtype_and_trains_in_float32(tiny_llama, batch):
    model = inject(tiny_llama(dtype=torch.bfloat16), "houlsby")
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in trainable_parameters(model)} == {torch.float32}


def test_on_a_quantised_base_the_adapters_are_float32_and_train(tiny_llama, batch):
    expected = logits(quantised(tiny_llama()), batch)
    model = inject_adapters(quantised(tiny_llama()), 5, "houlsby", exact=True)
    assert torch.equal(logits(model, batch), expected)
    noisy(model)(**batch).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.any() for p in trainable_parameters(model))


def test_generating_with_a_cache_and_without_is_the_same(tiny_llama, batch):
    model = inject(tiny_llama(), "houlsby").eval()
    ids = batch["input_ids"][:1]
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(*(model.generate(ids, use_cache=use, **arguments) for use in (True, False)))


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama, batch):
    gradients = []
    for saving in (False, True):
        model = inject(tiny_llama(), "houlsby").train()
        if saving:
            model.gradient_checkpointing_enable()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({i: p.grad for i, p in enumerate(trainable_parameters(model))})
    assert_close(*gradients)


def test_a_model_with_other_names_for_its_sublayers(batch):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()
    expected = logits(base, batch)
    with pytest.raises(ValueError, match="'self_attn' and 'mlp': say what it calls"):
        inject_adapters(base, 5)
    model = inject_adapters(base, 5, "houlsby", exact=True, attention="attn")
    assert len(adapted_sublayers(model)) == 4
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(noisy(model), batch), expected)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"bottleneck": 0}, "at least 1: got 0"),
        ({"placement": "houlsbi"}, "one of houlsby, pfeiffer, parallel"),
        ({"activation": "tanh"}, "one of relu, gelu, silu"),
        ({"name": "my.adapter"}, "letters, digits and _"),
        ({"name": "keys"}, "no method of a dict"),
        ({"ffn": "ffn"}, "'self_attn' and 'ffn'"),
    ],
)
def test_bad_arguments_are_an_error_and_leave_the_model_alone(tiny_llama, arguments, says):
    model = tiny_llama()
    with pytest.raises(ValueError, match=says):
        inject_adapters(model, **{"bottleneck": 5, **arguments})
    assert not adapted_sublayers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_same_name_twice_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="'default': give the new one another name"):
        inject(inject(tiny_llama()))


def test_a_learners_own_classes_count(tiny_llama, batch):
    class MyAdapter(BottleneckAdapter):
        pass

    class MySublayer(AdaptedSublayer):
        pass

    model = inject_adapters(tiny_llama(), 5, kind=MyAdapter, sublayer=MySublayer)
    sites = adapted_sublayers(model).values()
    assert {type(site) for site in sites} == {MySublayer}
    assert {type(site.adapters["default"]) for site in sites} == {MyAdapter}
    model(**batch).loss.backward()
    assert_same(weights(remove_adapters(model)), weights(tiny_llama()))


# --- composition


def two(tiny_llama, first="houlsby", second="pfeiffer"):
    """Two adapters, as if trained one after the other, each alone on the base."""
    model = inject(tiny_llama(), first, "style", seed=1)
    return inject(model, second, "domain", bottleneck=3, seed=2, activation="gelu")


def test_a_new_adapter_acts_and_trains_alone(tiny_llama, batch):
    model = two(tiny_llama)
    assert adapter_names(model) == ["style", "domain"]
    alone = inject(tiny_llama(), "pfeiffer", "domain", bottleneck=3, seed=2, activation="gelu")
    assert torch.equal(logits(model, batch), logits(alone, batch))
    assert all(".adapters.domain." in name for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(logits(use_adapters(model, []), batch), logits(tiny_llama(), batch))
    train_adapter(model, "style")
    assert all(".adapters.style." in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("second", PLACEMENTS)
def test_a_stack_equals_the_reference(tiny_llama, batch, second):
    model = two(tiny_llama, second=second)
    parts = {
        "style": (adapter_state_dict(model, "style"), "houlsby", "relu", 1.0),
        "domain": (adapter_state_dict(model, "domain"), second, "gelu", 1.0),
    }
    for order in (["style", "domain"], ["domain", "style"]):
        expected = logits(reference(tiny_llama(), [parts[name] for name in order]), batch)
        torch.testing.assert_close(logits(use_adapters(model, order), batch), expected, rtol=0, atol=1e-6)


def test_the_order_of_a_stack_matters_unless_they_are_parallel(tiny_llama, batch):
    for placement, same in (("pfeiffer", False), ("parallel", True)):
        model = two(tiny_llama, placement, placement)
        ab, ba = (
            logits(use_adapters(model, order), batch) for order in (["style", "domain"], ["domain", "style"])
        )
        assert torch.allclose(ab, ba, atol=1e-6) == same


def test_a_stacked_adapter_can_be_trained_over_a_frozen_one(tiny_llama, batch):
    model = use_adapters(two(tiny_llama), ["style", "domain"])
    style = {key: value.clone() for key, value in adapter_state_dict(model, "style").items()}
    domain = {key: value.clone() for key, value in adapter_state_dict(model, "domain").items()}
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    model(**batch).loss.backward()
    optimiser.step()
    assert_same(adapter_state_dict(model, "style"), style)
    assert all(
        not torch.equal(value, domain[key]) for key, value in adapter_state_dict(model, "domain").items()
    )


def test_fusion_by_hand():
    """Scores 0 and ln 3, so weights 1/4 and 3/4; at its start the value matrix is the identity."""
    fusion = AdapterFusion(2)
    assert torch.equal(fusion.value.weight, torch.eye(2))
    fusion.query.weight.data, fusion.key.weight.data = torch.eye(2), torch.tensor([[0.0, 0], [0, 1]])
    h, ln3 = torch.tensor([[1.0, 1]]), torch.tensor(3.0).log().item()
    changes = torch.tensor([[[8.0, 0], [4, ln3]]])
    torch.testing.assert_close(fusion.weights(h, changes), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(fusion(h, changes), torch.tensor([[5.0, 0.75 * ln3]]))


@pytest.mark.parametrize(
    "placements", [("houlsby", "pfeiffer"), ("parallel", "parallel"), ("pfeiffer", "parallel")]
)
@torch.no_grad()
def test_a_fused_sublayer_equals_a_loop_over_tokens(tiny_llama, placements):
    model = fuse_adapters(two(tiny_llama, *placements), ["style", "domain"], torch.Generator().manual_seed(5))
    site = adapted_sublayers(model)["model.layers.1.mlp"]
    for tensor in site.fusion.state_dict().values():
        tensor.normal_(std=0.5)
    x = torch.randn(2, 3, 32)
    got, plain = site(x), site.base(x)
    query, key, value = (site.fusion.get_submodule(name).weight for name in ("query", "key", "value"))
    for row in range(2):
        for t in range(3):
            h = plain[row, t]
            made = [
                site.adapters[name](x[row, t] if placement == "parallel" else h)
                for name, placement in zip(("style", "domain"), placements, strict=True)
            ]
            scores = torch.stack([(query @ h) @ (key @ change) for change in made])
            mixture = sum(w * (value @ change) for w, change in zip(scores.softmax(0), made, strict=True))
            torch.testing.assert_close(got[row, t], h + mixture, rtol=0, atol=1e-4)


def test_a_fusion_starts_near_the_mean_and_trains_alone(tiny_llama, batch):
    model = two(tiny_llama, "pfeiffer", "pfeiffer")
    model = fuse_adapters(model, ["style", "domain"], torch.Generator().manual_seed(5))
    assert all(".fusion." in name for name, p in model.named_parameters() if p.requires_grad)
    assert sum(p.numel() for p in trainable_parameters(model)) == 2 * 3 * 32 * 32
    site, x = adapted_sublayers(model)["model.layers.0.mlp"], torch.randn(4, 32)
    changes = torch.stack([site.adapters[name](x) for name in ("style", "domain")], dim=-2)
    mean = changes.mean(dim=-2)
    assert (site.fusion(x, changes) - mean).norm() < 0.1 * mean.norm()
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(model))


def test_a_fusion_learns_which_adapter_is_right(tiny_llama, batch):
    """The target is what one of the two adapters alone would say."""
    model = two(tiny_llama, "pfeiffer", "pfeiffer")
    target = logits(use_adapters(model, ["domain"]), batch)
    model = fuse_adapters(model, ["style", "domain"], torch.Generator().manual_seed(5))
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(input_ids=batch["input_ids"]).logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_switching_between_fused_stacked_and_base(tiny_llama, batch):
    model = two(tiny_llama)
    names = ["style", "domain"]
    stacked = logits(use_adapters(model, names), batch)
    fused = logits(fuse_adapters(model, names), batch)
    assert not torch.allclose(stacked, fused)
    assert torch.equal(logits(use_adapters(model, names), batch), stacked)
    assert torch.equal(logits(use_adapters(model, names, fused=True), batch), fused)
    assert torch.equal(logits(use_adapters(model, [], fused=True), batch), logits(tiny_llama(), batch))


@pytest.mark.parametrize(
    "names, fused, says",
    [
        (["style", "domane"], False, "'domane'; this model has: style, domain"),
        ("style", False, "list of different adapters"),
        (["style", "style"], False, "list of different adapters"),
        (["style", "domain"], True, "call fuse_adapters first"),
    ],
)
def test_bad_combinations_are_an_error_and_change_nothing(tiny_llama, batch, names, fused, says):
    model = two(tiny_llama)
    before = logits(model, batch)
    with pytest.raises(ValueError, match=says):
        use_adapters(model, names, fused)
    assert torch.equal(logits(model, batch), before)


def test_a_fusion_of_one_is_an_error(tiny_llama):
    model = two(tiny_llama)
    with pytest.raises(ValueError, match="at least two adapters"):
        fuse_adapters(model, ["style"])
    with pytest.raises(ValueError, match="'nobody'"):
        train_adapter(model, "nobody")
    with pytest.raises(ValueError, match="has: none"):
        use_adapters(tiny_llama(), ["style"])


def test_remove_gives_the_base_back(tiny_llama):
    model = fuse_adapters(two(tiny_llama), ["style", "domain"])
    assert_same(weights(remove_adapters(model)), weights(tiny_llama()))


# --- on disk


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_there_and_back(tiny_llama, batch, tmp_path, placement):
    model = inject(tiny_llama(), placement, activation="silu", scale=2.5)
    save_adapter(model, tmp_path / "a", base="data/base/small")
    again = load_adapter(tiny_llama(), tmp_path / "a")
    assert torch.equal(logits(again, batch), logits(model, batch))
    save_adapter(again, tmp_path / "b", base="data/base/small")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again(**batch).loss.backward()  # what is loaded can be trained on
    assert all(parameter.grad is not None for parameter in trainable_parameters(again))


def test_two_trained_adapters_are_loaded_side_by_side_and_stacked(tiny_llama, batch, tmp_path):
    model = two(tiny_llama)
    for name in ("style", "domain"):
        save_adapter(model, tmp_path / name, name)
    loaded = tiny_llama()
    for name in ("style", "domain"):
        load_adapter(loaded, tmp_path / name, name)
    for names in (["style"], ["domain"], ["domain", "style"]):
        ours, theirs = (logits(use_adapters(each, names), batch) for each in (model, loaded))
        assert torch.equal(ours, theirs)


def change(edit):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def setting(**more):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return damage


KEY = "model.layers.1.mlp.up.weight"


@pytest.mark.parametrize(
    "damage, says",
    [
        (change(lambda tensors: tensors.pop(KEY)), "up.weight is missing"),
        (change(lambda tensors: tensors.update({KEY: torch.ones(3, 3)})), r"is \(3, 3\), expected \(32, 5\)"),
        (setting(placement="houlsby"), "self_attn.down.bias is missing"),
        (setting(placement="there"), "no placement or activation"),
        (setting(activation="tanh"), "no placement or activation"),
        (setting(bottleneck=None), "expected"),
        (setting(peft_type="IA3"), "IA3, not BOTTLENECK"),
    ],
)
def test_a_misfit_says_why_and_leaves_the_model_alone(tiny_llama, tmp_path, damage, says):
    save_adapter(inject(tiny_llama()), tmp_path)
    damage(tmp_path)
    model = tiny_llama()
    with pytest.raises(LabsError, match=says):
        load_adapter(model, tmp_path)
    assert not adapted_sublayers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_save_and_no_place_to_load(tiny_llama, tmp_path):
    with pytest.raises(LabsError, match="no adapter called 'default'"):
        save_adapter(tiny_llama(), tmp_path)
    save_adapter(inject(tiny_llama()), tmp_path)
    with pytest.raises(LabsError, match="another name"):
        load_adapter(inject(tiny_llama()), tmp_path)
    with pytest.raises(LabsError, match="say what it calls"):
        load_adapter(tiny_llama(), tmp_path, ffn="ffn")


# --- what PEFT 0.21 has, and has not


def test_peft_has_no_bottleneck_adapters_and_refuses_ours(tiny_llama, tmp_path):
    from peft import PeftModel, PeftType

    assert not [
        kind for kind in PeftType if any(word in kind.value for word in ("BOTTLENECK", "HOULSBY", "PFEIFFER"))
    ]
    save_adapter(inject(tiny_llama()), tmp_path)
    with pytest.raises(KeyError, match="BOTTLENECK"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_an_adapter_is_no_weight(tiny_llama):
    """Why there is no merge: an adapter of a sum is not the sum of the adapters, a weight's would be."""
    adapter = adapted_sublayers(inject(tiny_llama()))["model.layers.0.mlp"].adapters["default"]
    torch.manual_seed(0)
    x, y, zero = torch.randn(5, 32), torch.randn(5, 32), torch.zeros(5, 32)
    apart = adapter(x) + adapter(y) - adapter(zero)
    assert not torch.allclose(adapter(x + y), apart, atol=1e-3)
    linear = copy.deepcopy(adapter)
    linear.activation = lambda each: each
    torch.testing.assert_close(linear(x + y), linear(x) + linear(y) - linear(zero))
