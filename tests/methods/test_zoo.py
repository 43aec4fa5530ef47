"""The zoo's methods are PEFT's: starts, outputs, gradients, training, merging, counts; and what PEFT does silently."""

import ast
import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from labs_lib.methods.lora import inject_lora, lora_layers, target_names, trainable_parameters
from labs_lib.methods.modules import replace
from labs_lib.methods.updates import spectrum, update_of
from labs_lib.methods.zoo import ZOO
from labs_lib.methods.zoo.layer import (
    ZooLinear,
    count_zoo,
    inject_zoo,
    load_zoo_state_dict,
    merge_zoo,
    remove_zoo,
    zoo_layers,
    zoo_state_dict,
)
from labs_lib.methods.zoo.lokr import two_factors

from .parity import assert_close, assert_same, logits, quantised, weights

Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"
# ours, and PEFT's class and arguments for the same; 48 inputs of down_proj are no multiple of MiSS's rank 10
CASES = {
    "vera": ({"rank": 8}, "VeraConfig", {"r": 8, "save_projection": False}),
    "loha": ({"rank": 3, "alpha": 6}, "LoHaConfig", {"r": 3, "alpha": 6}),
    "lokr": ({"rank": 2, "alpha": 6}, "LoKrConfig", {"r": 2, "alpha": 6}),
    "lokr whole": ({"rank": 8, "factor": 4}, "LoKrConfig", {"r": 8, "decompose_factor": 4}),
    "lokr both": (
        {"rank": 1, "alpha": 3, "decompose_both": True},
        "LoKrConfig",
        {"r": 1, "alpha": 3, "decompose_both": True},
    ),
    "oft": ({"block": 8}, "OFTConfig", {"oft_block_size": 8}),
    "oft exact": (
        {"block": 8, "terms": None},
        "OFTConfig",
        {"oft_block_size": 8, "use_cayley_neumann": False},
    ),
    "boft": ({"block": 8}, "BOFTConfig", {"boft_block_size": 8}),
    "boft 3 rounds": (
        {"block": 4, "factors": 3},
        "BOFTConfig",
        {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
    ),
    "miss": ({"rank": 8}, "MissConfig", {"r": 8}),
    "miss uneven": ({"rank": 10}, "MissConfig", {"r": 10}),
    "miss odd": ({"rank": 7}, "MissConfig", {"r": 7}),
}
OURS = {"vera": {"rank": 8}, "oft": {"block": 8}, "boft": {"block": 4, "factors": 2}, "miss": {"rank": 8}}


class BlockDiagonal:
    """What PEFT's CUDA extension for BOFT computes: (rounds, blocks, b, b) as (rounds, n, n) matrices, and back."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    @staticmethod
    def backward(gradient, blocks):
        size = blocks.shape[-1]
        cuts = [gradient[:, i : i + size, i : i + size] for i in range(0, gradient.shape[-1], size)]
        return [torch.stack(cuts, dim=1)]


@pytest.fixture(autouse=True)
def boft_extension(monkeypatch):
    """The extension needs nvcc; without it PEFT does one round, whatever is asked for (a test below)."""
    import peft.tuners.boft.layer as boft

    monkeypatch.setattr(boft, "_FBD_CUDA", BlockDiagonal)


@pytest.fixture
def biased_llama():
    """A tiny Llama with biases everywhere, none of them zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **sizes)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return lambda: copy.deepcopy(model)


def peft_model(base, config, targets="all-linear", **arguments):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, getattr(peft, config)(target_modules=targets, **arguments))


def fill(model, seed=3, size=0.2):
    """Noise on every trained number: at its start the method is its base, and every comparison vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in zoo_state_dict(model).values():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return model


def ours_and_pefts(case, make):
    """Our model and PEFT's on equal bases with equal numbers, none of them those of the start."""
    from peft import set_peft_model_state_dict

    options, config, arguments = CASES[case]
    ours = fill(inject_zoo(make(), ZOO[case.split()[0]], **options))
    theirs = peft_model(make(), config, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # VeRA: "relying on PRNG initialisation"
        missing = set_peft_model_state_dict(theirs, zoo_state_dict(ours))
    assert not missing.unexpected_keys
    return ours.train(), theirs.train()


def peft_state(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def gradients(model):
    """By the names on disk."""
    if zoo_layers(model):
        found = {}
        for name, layer in zoo_layers(model).items():
            for tensor, value in layer.named_parameters():
                if value.requires_grad:
                    found[f"base_model.model.{name}.{tensor}"] = value.grad
        return found
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def make_ours(method, base, generator=None, **options):
    return inject_zoo(base, ZOO[method], generator=generator, **{**OURS.get(method, {}), **options})


# --- each of them


def code_lines(kind) -> int:
    """Lines of a class that are neither blank, nor comment, nor docstring."""
    source = inspect.getsource(kind)
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("method", ZOO)
def test_a_method_is_no_more_than_25_lines(method):
    assert 5 < code_lines(ZOO[method]) <= 25


@pytest.mark.parametrize("method", ZOO)
def test_at_the_start_nothing_changes_exactly(biased_llama, batch, method):
    base = biased_llama()
    model = make_ours(method, biased_llama())
    assert len(zoo_layers(model)) == 14
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert all(not layer.delta().any() for layer in zoo_layers(model).values())
    assert {id(p) for p in trainable_parameters(model)} == {
        id(p) for layer in zoo_layers(model).values() for n, p in layer.named_parameters() if "base" not in n
    }
    assert_same(weights(merge_zoo(model)), weights(base))


@pytest.mark.parametrize("method", ZOO)
def test_a_training_step_moves_the_model_and_not_its_base(biased_llama, batch, method):
    model = make_ours(method, biased_llama())
    before = logits(model, batch)
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=0.1)
    model(**batch).loss.backward()
    optimiser.step()
    assert (logits(model, batch) - before).abs().max() > 1e-4
    assert_same(weights(remove_zoo(model)), weights(biased_llama()))


@pytest.mark.parametrize("method", ZOO)
def test_merging_gives_a_plain_model_with_the_same_outputs(biased_llama, batch, method):
    model = fill(make_ours(method, biased_llama()))
    expected = logits(model, batch)
    merged = merge_zoo(model)
    assert weights(merged).keys() == weights(biased_llama()).keys()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", ZOO)
def test_half_precision_keeps_its_dtype_and_trains_in_float32(tiny_llama, batch, method):
    model = make_ours(method, tiny_llama(dtype=torch.bfloat16))
    assert torch.equal(logits(model, batch), logits(tiny_llama(dtype=torch.bfloat16), batch))
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("method", ZOO)
def test_a_quantised_base_trains_and_is_not_merged_into(tiny_llama, batch, method):
    base = quantised(tiny_llama())
    model = make_ours(method, base)
    assert torch.equal(logits(model, batch), logits(quantised(tiny_llama()), batch))
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model))
    with pytest.raises(ValueError, match="quantised"):
        merge_zoo(model)


@pytest.mark.parametrize("method", ZOO)
def test_tensors_go_out_and_come_back(tiny_llama, batch, method):
    model = fill(make_ours(method, tiny_llama()))
    other = make_ours(method, tiny_llama(), generator=torch.Generator().manual_seed(5))
    load_zoo_state_dict(other, {key: value.clone() for key, value in zoo_state_dict(model).items()})
    assert_same(zoo_state_dict(other), zoo_state_dict(model))
    assert torch.equal(logits(other, batch), logits(model, batch))
    state = zoo_state_dict(model)
    key = next(iter(state))
    with pytest.raises(ValueError, match="differ in 1 tensors"):
        load_zoo_state_dict(other, {name: value for name, value in state.items() if name != key})
    with pytest.raises(ValueError, match="in the adapter"):
        load_zoo_state_dict(other, state | {key: torch.zeros(1, 2, 3)})


def test_what_cannot_be_is_said_and_leaves_the_model_alone(tiny_llama):
    model = tiny_llama()
    for method, options, says in [
        ("oft", {"block": 5}, "A block of 5 does not divide 32"),
        ("boft", {"block": 5}, "do not fit 32"),
        ("boft", {"block": 8, "factors": 4}, "4 rounds of blocks of 8 do not fit 32"),
        ("miss", {"rank": 33}, "from 1 to the 32 inputs"),
        ("tied_lora", {"train": "Au"}, "neither B nor v"),
    ]:
        with pytest.raises(ValueError, match=says):
            inject_zoo(model, ZOO[method], **options)
    with pytest.raises(TypeError, match="'rnak'"):
        inject_zoo(model, ZOO["loha"], rnak=3)
    with pytest.raises(ValueError, match="q_proj"):
        inject_zoo(model, ZOO["loha"], "qproj")
    assert not zoo_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="already"):
        inject_zoo(inject_zoo(model, ZOO["loha"]), ZOO["miss"], rank=4)
    tied = inject_zoo(tiny_llama(tied=True), ZOO["loha"], ["lm_head"])
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        merge_zoo(tied)


def test_a_learners_own_method_counts(tiny_llama, batch):
    class Mine(ZooLinear):
        def __init__(self, base, generator=None):
            super().__init__(base)
            self.learn(size=torch.zeros(1))

        def delta(self):
            return self.size * self.base.weight

    model = inject_zoo(tiny_llama(), Mine, ["o_proj"])
    assert count_zoo(tiny_llama(), Mine, ["o_proj"]) == len(trainable_parameters(model)) == 2
    assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
    nn.init.ones_(model.get_submodule("model.layers.0.self_attn.o_proj").size)
    doubled = 2 * tiny_llama().model.layers[0].self_attn.o_proj.weight
    torch.testing.assert_close(merge_zoo(model).model.layers[0].self_attn.o_proj.weight, doubled)


# --- equal to PEFT


@pytest.mark.parametrize("case", CASES)
def test_the_start_is_pefts_from_the_same_seed(tiny_llama, case):
    options, config, arguments = CASES[case]
    generator = torch.Generator().manual_seed(3)
    ours = inject_zoo(tiny_llama(), ZOO[case.split()[0]], generator=generator, **options)
    base = tiny_llama()
    torch.manual_seed(3)
    assert_same(zoo_state_dict(ours), peft_state(peft_model(base, config, **arguments)))


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_merged_weights_equal_pefts(biased_llama, batch, case):
    ours, theirs = ours_and_pefts(case, biased_llama)
    change = (logits(ours, batch) - logits(biased_llama(), batch)).abs().max()
    assert change > 0.01
    outputs = [model(**batch) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    assert_close(gradients(ours), gradients(theirs), atol=1e-6)
    assert all(gradient.any() for gradient in gradients(ours).values())
    assert_close(weights(merge_zoo(ours)), weights(theirs.merge_and_unload()), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_eight_optimiser_steps_equal_pefts(tiny_llama, batch, case):
    ours, theirs = ours_and_pefts(case, tiny_llama)
    losses = []
    for model in (ours, theirs):
        optimiser = torch.optim.SGD(trainable_parameters(model), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(8):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    assert_close(zoo_state_dict(ours), peft_state(theirs), atol=1e-5)
    load_zoo_state_dict(ours, peft_state(theirs))  # and back
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_pefts(tiny_llama, case):
    options, config, arguments = CASES[case]
    kind = ZOO[case.split()[0]]
    theirs = sum(p.numel() for p in trainable_parameters(peft_model(tiny_llama(), config, **arguments)))
    assert count_zoo(tiny_llama(), kind, **options) == theirs
    model = inject_zoo(tiny_llama(), kind, **options)
    assert sum(p.numel() for p in trainable_parameters(model)) == theirs


SEVEN = {  # on q and v of Llama-2-7B
    "vera": ({"rank": 256}, "VeraConfig", {"r": 256}, 278_528),
    "loha": ({"rank": 8}, "LoHaConfig", {"r": 8}, 8_388_608),
    "lokr": ({"rank": 8}, "LoKrConfig", {"r": 8}, 327_680),
    "oft": ({"block": 32}, "OFTConfig", {"oft_block_size": 32}, 4_063_232),
    "boft": ({"block": 4}, "BOFTConfig", {"boft_block_size": 4}, 1_310_720),
    "miss": ({"rank": 64}, "MissConfig", {"r": 64}, 16_777_216),
}


def test_counts_at_7b_equal_pefts():
    import peft

    from labs_lib.models.twins import peft_parameter_count, random_like

    twin = random_like("llama-2-7b")
    for method, (options, config, arguments, expected) in SEVEN.items():
        assert count_zoo(twin, ZOO[method], ["q_proj", "v_proj"], **options) == expected
        targets = ["q_proj", "v_proj"]
        if (
            method == "boft"
        ):  # PEFT's cannot be made on "meta", and fills a matrix of 4096 x 4096 for every layer
            one = peft_model(copy.deepcopy(twin), config, targets, layers_to_transform=[0], **arguments)
            theirs = 32 * sum(p.numel() for p in trainable_parameters(one))
        else:
            theirs = peft_parameter_count(twin, getattr(peft, config)(target_modules=targets, **arguments))
        assert theirs == expected
    two_rounds = count_zoo(twin, ZOO["boft"], ["q_proj", "v_proj"], block=4, factors=2)
    assert two_rounds == 64 * (2 * 1024 * 4 * 4 + 4096) == 2_359_296
    tied = count_zoo(twin, ZOO["tied_lora"], ["q_proj", "v_proj"], rank=8)
    assert tied == 2 * 8 * (4096 + 4096) + 64 * (8 + 4096) == 393_728
    assert not zoo_layers(twin) and all(p.requires_grad for p in twin.parameters())


# --- Tied-LoRA, which PEFT has not


def test_tied_lora_alone_in_its_kind_is_lora(tiny_llama, batch):
    """One layer of a kind, and scales of one: then tying ties nothing."""
    ours = inject_zoo(tiny_llama(), ZOO["tied_lora"], [Q0], rank=4, alpha=12)
    lora = inject_lora(tiny_llama(), [Q0], rank=4, alpha=12)
    shared, layer = ours.get_submodule(Q0).shared, lora.get_submodule(Q0)
    with torch.no_grad():
        nn.init.normal_(layer.lora_B)
        shared.A.copy_(layer.lora_A)
        shared.B.copy_(layer.lora_B)
    torch.testing.assert_close(logits(ours, batch), logits(lora, batch), rtol=0, atol=1e-6)
    for model in (ours, lora):
        model(**batch).loss.backward()
    torch.testing.assert_close(shared.A.grad, layer.lora_A.grad, rtol=0, atol=1e-7)
    torch.testing.assert_close(shared.B.grad, layer.lora_B.grad, rtol=0, atol=1e-7)


def test_tied_lora_shares_within_a_kind_and_scales_each_layer(tiny_llama):
    model = fill(inject_zoo(tiny_llama(), ZOO["tied_lora"], ["q_proj", "v_proj"], rank=4, alpha=8))
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    other = model.get_submodule("model.layers.0.self_attn.v_proj")
    assert first.shared is second.shared and first.shared is not other.shared
    assert first.u is not second.u
    expected = 2.0 * first.v.diag() @ first.shared.B @ first.u.diag() @ first.shared.A
    torch.testing.assert_close(first.delta(), expected)
    assert not torch.equal(first.delta(), second.delta())
    copied = copy.deepcopy(model).double()
    copies = [copied.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1)]
    assert copies[0].shared.A is copies[1].shared.A  # sharing outlives a copy and a cast
    assert len(zoo_state_dict(copied)) == len(zoo_state_dict(model)) == 2 * 2 + 4 * 2


@pytest.mark.parametrize(("train", "count"), [("ABuv", 4272), ("AB", 3712), ("Buv", 2352), ("uv", 560)])
def test_tied_loras_variants_train_what_they_say(tiny_llama, batch, train, count):
    """The paper's selective training; from the start each can learn, and each starts as nothing."""
    model = inject_zoo(tiny_llama(), ZOO["tied_lora"], rank=8, train=train)
    assert sum(p.numel() for p in trainable_parameters(model)) == count
    assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
    model(**batch).loss.backward()
    start = "B" if "B" in train else "v"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any() == (name.rpartition(".")[2] == start)


# --- what the methods promise


@pytest.mark.parametrize("method", [*ZOO, "lora", "dora", "ia3"])
def test_the_update_read_off_a_layer_is_what_merging_adds(biased_llama, method):
    from labs_lib.methods.dora import inject_dora
    from labs_lib.methods.ia3 import ia3_layers, inject_ia3, merge_ia3
    from labs_lib.methods.lora import merge_lora

    if method in ZOO:
        model, merge = fill(make_ours(method, biased_llama())), merge_zoo
    elif method == "ia3":
        model, merge = inject_ia3(biased_llama()), merge_ia3
        for layer in ia3_layers(model).values():
            nn.init.normal_(layer.ia3_l, mean=1, std=0.3)
    else:
        inject = {"lora": inject_lora, "dora": inject_dora}[method]
        model, merge = inject(biased_llama(), "all-linear", rank=4, alpha=8, dropout=0.5), merge_lora
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.1)
    plain = biased_llama()
    found = {name: update_of(model, name) for name in (Q0, DOWN1)}
    assert found[Q0].any() or method == "ia3"
    merged = merge(model)
    for name, update in found.items():
        change = merged.get_submodule(name).weight - plain.get_submodule(name).weight
        torch.testing.assert_close(update.float(), change, rtol=0, atol=1e-6)
    assert not update_of(plain, Q0).any()


def test_an_update_of_what_is_not_linear_is_an_error(tiny_llama):
    class Bent(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x).relu()

    model = tiny_llama()
    replace(model, Q0, Bent(model.get_submodule(Q0)))
    with pytest.raises(ValueError, match="not linear"):
        update_of(model, Q0)


def test_peft_models_updates_can_be_read_too(tiny_llama):
    theirs = ours_and_pefts("loha", tiny_llama)[1]
    name = f"base_model.model.{Q0}"
    expected = theirs.get_submodule(name).get_delta_weight("default")
    torch.testing.assert_close(update_of(theirs, name).float(), expected, rtol=0, atol=1e-6)


def test_a_spectrum_by_hand():
    found = spectrum(torch.tensor([[0.0, 3, 0], [0, 0, -1], [0, 0, 0]]))
    torch.testing.assert_close(found.values, torch.tensor([3.0, 1, 0], dtype=torch.float64))
    assert found.rank == 2
    assert found.stable_rank == pytest.approx(10 / 9)
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()).item()
    assert found.effective_rank == pytest.approx(torch.tensor(entropy).exp().item())
    even = spectrum(torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0])
    assert even.rank == 6 and even.effective_rank == pytest.approx(6) and even.stable_rank == pytest.approx(6)
    assert spectrum(torch.zeros(3, 4))[1:] == (0, 0.0, 0.0)


def test_ranks_of_the_updates(tiny_llama):
    """Of a 32 x 32 weight, from how many numbers: the picture that the lab draws."""
    ranks = {}
    for method, options in {
        "vera": {"rank": 4},
        "tied_lora": {"rank": 4},
        "loha": {"rank": 4},
        "lokr": {"rank": 2},
        "oft": {"block": 8},
        "boft": {"block": 8},
        "miss": {"rank": 4},
    }.items():
        model = fill(inject_zoo(tiny_llama(), ZOO[method], [Q0], **options))
        ranks[method] = spectrum(update_of(model, Q0)).rank
    assert ranks["vera"] == ranks["tied_lora"] == ranks["miss"] == 4
    assert ranks["loha"] == 16  # 4 squared
    assert ranks["lokr"] == 4 * 2  # 4 x 8 times 8 x 4: rank of w1 is 4, of w2 is 2
    assert ranks["oft"] == ranks["boft"] == 32


def test_the_kronecker_product_is_as_square_as_pefts():
    from peft.tuners.lokr.layer import factorization

    for size in [*range(1, 200), 1024, 4096, 11008, 14336]:
        for factor in (-1, 2, 3, 4, 8, 16, 100):
            assert two_factors(size, factor) == factorization(size, factor)


# --- OFT and BOFT


def rotations(block, terms, size, seed=0):
    layer = ZOO["oft"](nn.Linear(32, 5), block=block, terms=terms)
    nn.init.normal_(layer.oft_R.weight, std=size, generator=torch.Generator().manual_seed(seed))
    return layer.double().rotations().detach()


def error(R):
    return (R @ R.mT - torch.eye(R.shape[-1])).abs().max().item()


def test_five_terms_are_a_rotation_only_while_it_is_small():
    assert error(rotations(8, None, 1.0)) < 1e-12
    small, large = error(rotations(8, 5, 0.01)), error(rotations(8, 5, 0.3))
    assert small < 2e-5 and large > 0.05
    assert error(rotations(8, 9, 0.01)) < small / 100


def test_the_exact_rotation_of_peft_turns_the_other_way():
    """Of the same numbers: an adapter trained with use_cayley_neumann and loaded without is undone, not applied."""
    series, exact = rotations(8, 9, 0.01), rotations(8, None, 0.01)
    torch.testing.assert_close(series, exact.mT, rtol=0, atol=1e-10)
    assert (series - exact).abs().max() > 0.02


def test_pefts_three_terms_are_four(tiny_llama):
    from peft.tuners.oft.layer import OFTRotationModule

    vectors = 0.1 * torch.randn(4, 28, generator=torch.Generator().manual_seed(0))
    rotate = OFTRotationModule(4, 28, 8, 32)._cayley_batch
    found = {n: rotate(vectors, 8, True, n) for n in (2, 3, 4, 5)}
    assert torch.equal(found[3], found[4])
    layer = ZOO["oft"](nn.Linear(32, 5), block=8)
    layer.oft_R.weight.data = vectors
    for terms in (4, 5):
        layer.terms = terms
        torch.testing.assert_close(layer.rotations(), found[terms])


def test_peft_quietly_takes_another_block_size(tiny_llama):
    """Ours refuses a block that does not divide; PEFT takes the nearest that does, with a warning."""
    import peft

    with pytest.warns(UserWarning, match="Adjusted `oft_block_size` to"):
        model = peft.get_peft_model(
            tiny_llama(), peft.OFTConfig(target_modules=["down_proj"], oft_block_size=10)
        )
    assert model.base_model.model.model.layers[0].mlp.down_proj.oft_block_size == {"default": 8}


def test_each_round_of_boft_mixes_twice_as_many_inputs():
    for factors, mixed in ((1, 4), (2, 8), (3, 16), (4, 32)):
        layer = ZOO["boft"](nn.Linear(32, 5), block=4, factors=factors)
        nn.init.normal_(layer.boft_R, generator=torch.Generator().manual_seed(0))
        R = layer.double().rotate(torch.eye(32).double())
        assert error(R) < 1e-12
        assert (R.abs() > 1e-9).sum(dim=0).tolist() == [mixed] * 32


def test_without_its_extension_peft_does_one_round_whatever_is_asked(tiny_llama, monkeypatch):
    """A warning, then another method than the config says; on a machine with nvcc the same file does not fit."""
    import peft
    import peft.tuners.boft.layer as boft

    monkeypatch.setattr(boft, "_FBD_CUDA", None)
    monkeypatch.setattr(boft, "__file__", "/nowhere/layer.py")  # as on a machine that cannot build it
    config = peft.BOFTConfig(target_modules=[Q0], boft_block_size=4, boft_n_butterfly_factor=3)
    with pytest.warns(UserWarning, match="Setting boft_n_butterfly_factor to 1"):
        model = peft.get_peft_model(tiny_llama(), config)
    assert model.peft_config["default"].boft_n_butterfly_factor == 3
    assert model.get_submodule(f"base_model.model.{Q0}").boft_R["default"].shape == (1, 8, 4, 4)


def test_pefts_boft_keeps_its_permutations_as_matrices(tiny_llama):
    """rounds x in x in numbers for each layer: with one round on q and v of a 7B model, 4 GiB that say "identity"."""
    model = peft_model(tiny_llama(), "BOFTConfig", [Q0], boft_block_size=4, boft_n_butterfly_factor=3)
    assert model.get_submodule(f"base_model.model.{Q0}").boft_P.shape == (3, 32, 32)
    assert 64 * 4096**2 * 4 == 4 * 2**30
    assert make_ours("boft", tiny_llama()).get_submodule(Q0).orders.shape == (2, 32)


# --- what PEFT's do not promise, or not keep


def test_pefts_loha_on_four_bits_asks_the_packed_weight_for_its_size(tiny_llama, batch):
    model = peft_model(quantised(tiny_llama()), "LoHaConfig", r=3)
    with pytest.raises(RuntimeError, match="shape"):
        logits(model, batch)


def test_pefts_vera_stores_its_frozen_projections_too(tiny_llama):
    """By default: on q and v of a 7B model at rank 256 that is 8 MiB of random numbers beside 1 MiB of trained ones."""
    from peft import set_peft_model_state_dict

    theirs = peft_model(tiny_llama(), "VeraConfig", r=8)
    assert peft_state(theirs)["base_model.vera_A"].shape == (8, 48)
    assert peft_state(theirs)["base_model.vera_B"].shape == (48, 8)
    ours = inject_zoo(tiny_llama(), ZOO["vera"], rank=8)
    assert torch.equal(ours.get_submodule(Q0).shared.A, peft_state(theirs)["base_model.vera_A"])
    assert torch.equal(ours.get_submodule(Q0).shared.B, peft_state(theirs)["base_model.vera_B"])
    with pytest.raises(ValueError, match="were not present"):
        set_peft_model_state_dict(theirs, zoo_state_dict(ours))


def test_how_many_types_peft_has():
    from peft import PeftType

    assert len(PeftType) == 45


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("FourierFTConfig", {"n_frequency": 20}),
        ("VBLoRAConfig", {"r": 2, "num_vectors": 9, "vector_length": 4}),
    ],
)
def test_these_of_peft_are_no_noops_at_the_start(tiny_llama, batch, config, arguments):
    model = peft_model(tiny_llama(), config, ["q_proj", "v_proj"], **arguments)
    assert (logits(model, batch) - logits(tiny_llama(), batch)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("VeraConfig", {"r": 8}),
        ("LoHaConfig", {"r": 3}),
        ("LoKrConfig", {"r": 3}),
        ("OFTConfig", {"oft_block_size": 8}),
        ("MissConfig", {"r": 8}),
    ],
)
def test_peft_ignores_adapter_names_without_a_word(tiny_llama, batch, config, arguments):
    """A mixed batch of the base model and an adapter gets the adapter throughout."""
    model = peft_model(tiny_llama(), config, init_weights=True, **arguments)
    for parameter in trainable_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    ids = batch["input_ids"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mixed = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
    except TypeError as error:
        pytest.fail(f"it says so now: {error}")
    assert torch.equal(mixed, logits(model, batch))
    with model.disable_adapter():
        assert (mixed - logits(model, batch)).abs().max() > 1e-3


# --- in a sweep


@pytest.mark.parametrize("method", ZOO)
def test_a_sweep_takes_each_of_them(method):
    from labs_lib.models.base import load_base
    from labs_lib.training.adapt import METHODS
    from labs_lib.training.sweeps import Arm

    arm = Arm(method, method="zoo", rank=4, alpha=8, options={"method": method})
    first, second = (METHODS["zoo"](load_base("tiny")[0], arm, seed, 10).model for seed in (0, 1))
    layers = zoo_layers(first)
    assert len(layers) == len(target_names(load_base("tiny")[0], "all-linear"))
    assert {type(layer) for layer in layers.values()} == {ZOO[method]}
    if method in ("loha", "lokr", "tied_lora"):  # the others start without a random number of their own
        assert not all(map(torch.equal, zoo_state_dict(first).values(), zoo_state_dict(second).values()))
    if method == "miss":
        assert layers[Q0].miss_block.shape[0] == 4
    if method == "loha":
        assert layers[Q0].scale == 2


def test_a_point_of_a_sweep_runs(monkeypatch):
    from labs_lib.training import sweep
    from labs_lib.training.sweeps import Arm, Task

    monkeypatch.setattr(sweep, "KNOWN_FACTS_PROBED", 8)
    arm = Arm("LoKr", method="zoo", rank=2, alpha=8, options={"method": "lokr", "factor": 4})
    task = Task("facts", "knowledge", steps=3, batch=8, facts=16)
    point = task.settings() | {"arm": arm.to_dict(), "stage": "sweep", "seed": 0, "lr": 1e-2}
    row = sweep.run_point(point, "tiny")
    assert row["params"] == count_zoo(sweep_base(), ZOO["lokr"], rank=2, alpha=8, factor=4)
    assert row["loss"] > 0 and 0 <= row["score"] <= 1
    assert 1 < row["stable_rank"] <= row["effective_rank"] <= 64 and row["change"] > 0


def sweep_base():
    from labs_lib.models.base import load_base

    return load_base("tiny")[0]
