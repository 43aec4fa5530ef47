"""Our 4 bits are bitsandbytes', code for code; QLoRA on them is PEFT's, bit for bit; and the library's hazards."""

import copy

import pytest
import torch
from torch import nn

from labs_lib.methods.io import load_lora, read_adapter, save_lora
from labs_lib.methods.lora import LoRALinear, load_lora_state_dict, lora_layers, lora_state_dict, merge_lora
from labs_lib.methods.qlora import (
    FrozenMatmul,
    NF4Linear,
    bits_per_weight,
    dequantise_blockwise,
    double_dequantise,
    double_quantise,
    dynamic_codebook,
    fp4_codebook,
    inject_qlora,
    integer_codebook,
    merge_qlora,
    nf4_codebook,
    pack,
    quantise_blockwise,
    unpack,
)

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

SHAPES = [(128, 128), (320, 128), (128, 320), (64, 33), (512, 1024)]


def numbers(*shape, seed=0, scale=0.02):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the 4 bits, against bitsandbytes' kernels


def test_codebooks_are_the_librarys():
    assert torch.equal(nf4_codebook(), functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(fp4_codebook(), functional.get_4bit_type("fp4", "cpu").unique())
    assert torch.equal(dynamic_codebook(), functional.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [64, 256])
def test_codes_and_scales_equal_the_kernels(shape, block):
    weight = numbers(*shape)
    theirs, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    codes, scales = quantise_blockwise(weight, nf4_codebook(), block)
    assert torch.equal(pack(codes), theirs.view(-1))
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize("seed", range(3))
def test_double_quantised_scales_equal_the_kernels(seed):
    weight = numbers(512, 1024, seed=seed, scale=10.0**-seed)
    _, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    _, scales = quantise_blockwise(weight, nf4_codebook())
    codes, outer, mean = double_quantise(scales)
    assert torch.equal(codes, state.absmax)
    assert torch.equal(outer, state.state2.absmax)
    assert mean == state.offset
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(double_dequantise(codes, outer, mean), theirs)


@pytest.mark.parametrize("shape", [(128, 128), (320, 128), (128, 320)])
def test_dequantised_weights_equal_the_kernels(shape):
    linear = nn.Linear(shape[1], shape[0])
    packed, state = functional.quantize_4bit(
        linear.weight.detach(), quant_type="nf4", compress_statistics=True
    )
    torch.testing.assert_close(
        NF4Linear(linear).weight, functional.dequantize_4bit(packed, state), rtol=0, atol=1e-6
    )


def test_fp4_dequantises_to_the_librarys_values():
    weight = numbers(128, 128)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="fp4"))
    codes, scales = quantise_blockwise(weight, fp4_codebook())
    ours = dequantise_blockwise(codes, scales, fp4_codebook()).view(128, 128)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_nf4_beats_the_other_four_bit_types_on_normal_numbers_and_larger_blocks_lose():
    weight = numbers(256, 1024, scale=1.0)

    def error(codebook, block):
        return (
            dequantise_blockwise(*quantise_blockwise(weight, codebook, block), codebook, block)
            - weight.view(-1)
        ).norm()

    nf4, fp4, int4 = (error(book, 64) for book in (nf4_codebook(), fp4_codebook(), integer_codebook(4)))
    assert nf4 < int4 < fp4
    assert error(integer_codebook(8), 64) < nf4 / 10
    assert error(nf4_codebook(), 64) < error(nf4_codebook(), 256) < error(nf4_codebook(), 4096)


def test_the_error_is_at_most_half_the_widest_gap():
    weight = numbers(64, 64, scale=1.0)
    codes, scales = quantise_blockwise(weight, nf4_codebook())
    back = dequantise_blockwise(codes, scales, nf4_codebook())
    bound = nf4_codebook().diff().max() / 2 * scales.repeat_interleave(64)
    assert ((back - weight.view(-1)).abs() <= bound + 1e-6).all()


def test_values_of_the_codebook_survive_and_zeros_stay_zero():
    codebook = nf4_codebook()
    codes, scales = quantise_blockwise(3 * codebook, codebook, block=16)
    assert codes.tolist() == list(range(16)) and scales.tolist() == [3.0]
    codes, scales = quantise_blockwise(torch.zeros(64), codebook)
    assert torch.count_nonzero(dequantise_blockwise(codes, scales, codebook)) == 0


@pytest.mark.parametrize("count", [1, 8, 63])
def test_packing_halves_and_unpacks(count):
    codes = torch.randint(0, 16, (count,), dtype=torch.uint8)
    assert pack(codes).numel() == (count + 1) // 2
    assert torch.equal(unpack(pack(codes), count), codes)


def test_the_bytes_are_those_of_the_formula():
    layer = NF4Linear(nn.Linear(1024, 1024, bias=False))
    held = sum(b.numel() * b.element_size() for b in layer.buffers()) - 16 * 4 - 4  # codebook and mean
    assert 8 * held / 1024**2 == bits_per_weight()
    assert bits_per_weight(64, None) - bits_per_weight() == pytest.approx(0.373, abs=1e-3)


# --- the layer


def test_gradients_pass_through_the_frozen_layer():
    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(64, 5))
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    mine, x.grad = x.grad, None
    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)
    assert not list(layer.parameters())


def test_no_dequantised_weight_is_kept_for_the_backward_pass():
    from labs_lib.measure import peak_memory

    torch.manual_seed(0)
    layers = nn.Sequential(*(NF4Linear(nn.Linear(256, 256, bias=False)) for _ in range(4)))
    x = torch.randn(1, 256, requires_grad=True)

    def ours():
        layers(x).sum().backward()

    def plain():
        y = x
        for layer in layers:
            y = nn.functional.linear(y, layer.weight)
        y.sum().backward()

    weight = 4 * 256 * 256
    saved = peak_memory(plain, layers, x).extra - peak_memory(ours, layers, x).extra
    assert saved > 2 * weight  # three of four weights, give or take scratch


def test_the_weight_cannot_be_merged_into_by_mistake(tiny_llama):
    model = inject_qlora(tiny_llama(), ["q_proj"], rank=2, alpha=4, block=32)
    with pytest.raises(AttributeError):
        merge_lora(model)


# --- in a model, against PEFT on bitsandbytes


@pytest.fixture(scope="module")
def text():
    from labs_lib.measure.quality import collate, encode_rows
    from labs_lib.models.base import load_base
    from labs_lib.world.tasks import load_task

    tokenizer = load_base("tiny")[1]
    rows = load_task("style", tenant="fathom-eleven")["train"][:4]
    return collate(encode_rows(tokenizer, rows["prompt"], rows["completion"]), tokenizer.pad_token_id)


def both(rank=4, alpha=8, seed=3, size="small"):
    """Ours on our 4 bits, PEFT on bitsandbytes', with the same A and the same B, which is not zero."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    from labs_lib.models.base import load_base

    generator = torch.Generator().manual_seed(seed)
    ours = inject_qlora(load_base(size)[0], "all-linear", rank, alpha, generator=generator)
    for layer in lora_layers(ours).values():
        layer.lora_B.data.normal_(std=0.05, generator=generator)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(load_base(size, quantise="nf4")[0], config).eval()
    assert not set_peft_model_state_dict(theirs, lora_state_dict(ours)).unexpected_keys
    return ours, theirs


def gradients(ours, theirs):
    for name, layer in lora_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        for factor in ("lora_A", "lora_B"):
            yield getattr(layer, factor).grad, getattr(peft, factor).default.weight.grad


@pytest.mark.parametrize("size", ["tiny", "small"])  # tiny's down_proj has half blocks: both leave it alone
def test_a_fresh_adapter_changes_nothing(size, text):
    from labs_lib.models.base import load_base

    ours = inject_qlora(load_base(size)[0], "all-linear", rank=4, alpha=8)
    with torch.no_grad():
        expected = load_base(size, quantise="nf4")[0](**text).logits
        torch.testing.assert_close(ours(**text).logits, expected, rtol=0, atol=1e-5)
    assert {type(layer) for layer in lora_layers(ours).values()} == {LoRALinear}
    assert {name.rpartition(".")[2] for name, p in ours.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_logits_gradients_and_steps_equal_pefts(text):
    ours, theirs = both()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for model in (ours, theirs)
    ]
    for _ in range(3):
        outputs = [model(**text) for model in (ours, theirs)]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
        for a, b in gradients(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()


def test_merging_in_four_bits_gives_pefts_codes(text):
    ours, theirs = both()
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit linear"):
        theirs = theirs.merge_and_unload()
    names = list(lora_layers(ours))
    merged = merge_qlora(copy.deepcopy(ours), four_bit=True)
    for name in names:
        weight = theirs.get_submodule(name).weight
        assert torch.equal(merged.get_submodule(name).packed, weight.data.view(-1)), name
    with torch.no_grad():
        torch.testing.assert_close(merged(**text).logits, theirs(**text).logits, rtol=1e-5, atol=1e-5)


def test_dequantising_first_merges_exactly_and_equals_the_librarys_way(text):
    from peft import PeftModel
    from transformers.utils import logging

    from labs_lib.models.base import load_base

    ours, theirs = both()
    with torch.no_grad():
        apart = ours(**text).logits
    merged = merge_qlora(copy.deepcopy(ours), four_bit=False)
    with torch.no_grad():
        torch.testing.assert_close(merged(**text).logits, apart, rtol=1e-4, atol=1e-4)
    logging.set_verbosity_error()
    plain = load_base("small", quantise="nf4")[0].dequantize()
    for name in lora_layers(ours):
        weight = plain.get_submodule(name).weight
        torch.testing.assert_close(weight, lora_layers(ours)[name].base.weight, rtol=0, atol=1e-6)
    assert isinstance(theirs, PeftModel)


def test_adapters_travel_both_ways(tmp_path, text):
    from peft import PeftModel

    from labs_lib.models.base import load_base

    ours, theirs = both()
    with torch.no_grad():
        expected = ours(**text).logits
        save_lora(ours, tmp_path / "ours", base="shipped")
        there = PeftModel.from_pretrained(load_base("small", quantise="nf4")[0], tmp_path / "ours").eval()
        torch.testing.assert_close(there(**text).logits, expected, rtol=1e-5, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = inject_qlora(load_base("small")[0], "all-linear", rank=4, alpha=8)
        load_lora_state_dict(back, read_adapter(tmp_path / "theirs")[1])
        assert torch.equal(back(**text).logits, expected)
        direct = load_lora(load_base("small", quantise="nf4")[0], tmp_path / "theirs")
        torch.testing.assert_close(direct(**text).logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_are_no_targets_are_quantised_too_and_the_head_never(tiny_llama):
    model = inject_qlora(tiny_llama(), ["q_proj"], rank=2, alpha=4, block=16)
    kinds = {name: type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    assert set(kinds.values()) == {LoRALinear, NF4Linear}
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="output head"):
        inject_qlora(tiny_llama(), ["lm_head"], rank=2, alpha=4)


def test_on_llama_2_7b_parameters_equal_pefts_and_the_base_takes_four_gigabytes():
    from peft import LoraConfig

    from labs_lib.measure import count_parameters, tensor_bytes
    from labs_lib.models.twins import peft_parameter_count, random_like

    twin = random_like("llama-2-7b")
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    expected = peft_parameter_count(twin, config)
    model = inject_qlora(twin, "all-linear", rank=16, alpha=32)
    assert count_parameters(model).trainable == expected == 39_976_960
    adapter = 4 * expected
    linear, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 2 * 32000 * 4096 + 2 * 65 * 4096
    assert tensor_bytes(model) - adapter == pytest.approx(linear * bits_per_weight() / 8 + rest, rel=1e-4)


# --- what merging costs, as the sweep records it


def test_the_report_on_merging_tells_the_ways_apart():
    from labs_lib.models.base import load_base
    from labs_lib.training.adapt import qlora
    from labs_lib.training.merges import WAYS, merge_report
    from labs_lib.training.sweeps import Arm
    from labs_lib.world.tasks import load_task

    model, tokenizer = load_base("small", quantise="nf4")
    model = qlora(model, Arm("", rank=4, alpha=8), seed=0, steps=1).model
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.01)
    report = merge_report(model, tokenizer, {"facts": load_task("knowledge", facts=512)["test"][:16]})
    assert report.keys() == WAYS.keys()
    kl = {way: values["kl_facts"] for way, values in report.items()}
    assert kl["float32"] < 1e-6 < kl["bfloat16"] < kl["nf4"]
    assert torch.is_grad_enabled()


# --- hazards of the locked versions: each test says what happens today


def test_hazard_rows_of_half_blocks_are_garbled_on_avx512():
    """bitsandbytes 0.50 on CPUs with AVX512: each row starts a new block when dequantised, not when quantised."""
    weight = numbers(64, 160, scale=1.0)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    codes, scales = quantise_blockwise(weight, nf4_codebook())
    ours = dequantise_blockwise(codes, scales, nf4_codebook()).view(64, 160)
    assert (ours - weight).norm() / weight.norm() < 0.1
    garbled = (theirs - weight).norm() / weight.norm() > 0.2
    assert garbled == (torch.backends.cpu.get_cpu_capability() == "AVX512")


def test_hazard_a_forward_pass_in_eval_mode_repacks_the_weight_where_the_cpu_has_bfloat16():
    """The packed weight is rewritten in place for a bfloat16 kernel; what dequantises it afterwards gets garbage."""
    layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(numbers(128, 128, scale=1.0), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").eval()
    before = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        layer(torch.randn(2, 128))
    after = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    changed = (after - before).norm() / before.norm() > 0.5
    assert changed == bool(functional.has_avx512bf16())


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered.*")
def test_hazard_after_it_no_gradient_passes_the_layer_in_training():
    layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    x = torch.randn(2, 128, requires_grad=True)
    with torch.no_grad():
        layer.eval()(x.detach())
    layer.train()(x).sum().backward()
    assert (x.grad is None) == bool(functional.has_avx512bf16())


def test_load_base_avoids_both(text):
    from labs_lib.models.base import load_base

    model, _ = load_base("tiny", quantise="nf4")
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.data.clone()
    with torch.no_grad():
        model.eval()(**text)
    assert torch.equal(layer.weight.data, before)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear  # 160 inputs: two and a half blocks


def test_hazard_the_8_bit_optimizer_keeps_small_tensors_in_32_bits():
    small, large = nn.Parameter(torch.zeros(8, 320)), nn.Parameter(torch.zeros(16, 4096))
    for parameter in (small, large):
        parameter.grad = torch.ones_like(parameter)
    optimizer = bnb.optim.AdamW8bit([small, large], lr=1e-3)
    optimizer.step()
    assert optimizer.state[small]["state1"].dtype == torch.float32
    assert optimizer.state[large]["state1"].dtype == torch.uint8
    assert optimizer.param_groups[0]["weight_decay"] == 0.01  # and its default decay is not zero


def test_hazard_paged_states_are_not_paged_on_cpu():
    parameter = nn.Parameter(torch.zeros(16, 4096))
    parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        bnb.optim.PagedAdamW8bit([parameter], lr=1e-3).step()


def test_hazard_the_trainer_refuses_adapters_that_are_not_pefts():
    from transformers.trainer_utils import validate_quantization_for_training

    from labs_lib.methods.lora import inject_lora
    from labs_lib.models.base import load_base

    model = inject_lora(load_base("tiny", quantise="nf4")[0], "all-linear", rank=2, alpha=4)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)


def test_hazard_starts_that_need_the_weights_numbers_are_refused_on_4_bits():
    """PiSSA and CorDA decompose the base's weights: PEFT raises, and says to start from floating point."""
    from peft import LoraConfig, get_peft_model

    from labs_lib.models.base import load_base

    for start in ("pissa", "corda"):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
        with pytest.raises(TypeError, match="float32, float16, or bfloat16"):
            get_peft_model(load_base("tiny", quantise="nf4")[0], config)


def test_frozen_matmul_follows_the_type_of_its_input():
    layer = NF4Linear(nn.Linear(64, 64, bias=False))
    assert FrozenMatmul.apply(torch.randn(2, 64, dtype=torch.bfloat16), layer).dtype == torch.bfloat16
