"""Lab 03's checks: what a wrong 4-bit weight looks like from outside, and the mistakes each check must tell apart."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.methods.qlora import (
    NF4Linear,
    bits_per_weight,
    double_quantise,
    dynamic_codebook,
    nf4_codebook,
    quantise_blockwise,
)

# --- nf4_codebook


def _sides(positive: int, negative: int, outermost: float = 0.9677083) -> torch.Tensor:
    """A codebook made like NF4's, of other numbers of values."""
    up = torch.special.ndtri(torch.linspace(outermost, 0.5, positive + 1)[:-1].double())
    down = -torch.special.ndtri(torch.linspace(outermost, 0.5, negative + 1)[:-1].double())
    return torch.cat([down, torch.zeros(1), up]).float().sort().values


def _even() -> torch.Tensor:
    """Sixteen values with a zero, evenly spaced on each side."""
    return torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]])


@exercise(
    "nf4_codebook",
    reference="labs_lib.methods.qlora:nf4_codebook",
    hints=[
        "torch.special.ndtri is the inverse of the normal distribution function: ndtri(0.5) is 0.",
        "linspace(OUTERMOST, 0.5, 9)[:-1] has 8 steps for the positive side, linspace(OUTERMOST, 0.5, 8)[:-1] has 7.",
        "torch.cat([negative, torch.zeros(1), positive]).float().sort().values, divided by its max().",
    ],
)
def check_nf4_codebook(candidate, ref):
    got = candidate()
    expect(isinstance(got, torch.Tensor), "Return a tensor of 16 values.")
    expect(
        got.numel() == 16,
        f"There are {got.numel()} values; 4 bits tell 16 apart: 7 negative, one zero, 8 positive.",
    )
    expect(bool((got.diff() > 0).all()), "The values are not sorted, or one is there twice: sort, one zero.")
    expect(bool((got == 0).any()), "There is no exact zero: padding and pruned weights need one.")
    expect(
        not torch.allclose(got.float(), _even(), atol=0.02),
        "The values are evenly spaced: those are integers. NF4 takes quantiles, dense around zero.",
    )
    expect(
        not torch.allclose(got.float(), _sides(8, 7), atol=1e-3),
        "The largest is not 1: divide by it, since every block is scaled to lie between -1 and 1.",
    )
    expect(
        not torch.allclose(got.float(), -ref().flip(0), atol=1e-3),
        "The sides are swapped: eight values are positive, seven negative.",
    )
    expect(got.dtype == torch.float32, f"The values are {got.dtype}; return float32.")
    close(got, ref(), "the codebook", tolerance=1e-6)


@mutant("nf4_codebook", says="evenly spaced")
def even_steps():
    return _even()


@mutant("nf4_codebook", says="not 1")
def not_normalised():
    return _sides(8, 7)


@mutant("nf4_codebook", says="sides are swapped")
def swapped_sides():
    return -nf4_codebook().flip(0)


@mutant("nf4_codebook", says="7 negative, one zero, 8 positive")
def eight_on_both_sides():
    values = _sides(8, 8)
    return values / values.max()


@mutant("nf4_codebook", says="not sorted")
def unsorted():
    return nf4_codebook().roll(3)


@mutant("nf4_codebook", says="no exact zero")
def no_zero():
    values = torch.special.ndtri(torch.linspace(1 - 0.9677083, 0.9677083, 16))
    return values / values.max()


# --- quantise_blockwise


@exercise(
    "quantise_blockwise",
    reference="labs_lib.methods.qlora:quantise_blockwise",
    hints=[
        "numbers = x.detach().reshape(-1).float(); F.pad(numbers, (0, -numbers.numel() % block)).view(-1, block)",
        "scales = rows.abs().amax(dim=1); scaled = rows * (1 / scales.clamp(min=1e-38))[:, None]",
        "midpoints = (codebook[:-1] + codebook[1:]) / 2; torch.bucketize(scaled, midpoints).to(torch.uint8)",
    ],
)
def check_quantise_blockwise(candidate, ref):
    codebook = nf4_codebook()
    x = torch.randn(6, 20) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0, 5.0])[:, None]
    got = candidate(x, codebook, block=8)
    expect(isinstance(got, tuple | list) and len(got) == 2, "Return two tensors, codes and scales.")
    codes, scales = got
    expect(
        scales.numel() != 1 and scales.numel() != 6,
        f"There are {scales.numel()} scales: one per block of the flattened tensor, not one per tensor or row.",
    )
    expect(
        scales.shape == (15,),
        f"scales has shape {tuple(scales.shape)}; 120 numbers in blocks of 8 have (15,).",
    )
    right_codes, right_scales = ref(x, codebook, block=8)
    if torch.allclose(scales, x.reshape(-1, 8).amax(dim=1)):
        raise Diagnosis("The scale is the largest value; it must be the largest absolute value.")
    if torch.allclose(scales, 1 / right_scales):
        raise Diagnosis("The scales are upside down: return absmax, and multiply by its inverse.")
    close(scales, right_scales, "the scales")
    expect(codes.shape == (120,), f"codes has shape {tuple(codes.shape)}; one per number, flattened: (120,).")
    expect(codes.dtype == torch.uint8, f"codes are {codes.dtype}; convert them to torch.uint8.")
    scaled = (x.reshape(-1, 8) / right_scales[:, None]).view(-1)
    if torch.equal(codes.long(), torch.bucketize(scaled, codebook).clamp(max=15)):
        raise Diagnosis("That is the next larger value, not the nearest: bucketize by the midpoints.")
    if torch.equal(codes, ref(x / x.abs().max(), codebook, block=120)[0]):
        raise Diagnosis("The numbers were not scaled by their own block: rows * (1 / scales)[:, None].")
    expect(torch.equal(codes, right_codes), "Some codes are not those of the nearest value of the codebook.")
    odd_codes, odd_scales = candidate(torch.ones(11), codebook, block=8)
    expect(
        odd_codes.shape == (11,) and odd_scales.shape == (2,),
        "With 11 numbers and blocks of 8 there are 2 scales and 11 codes: drop the codes of the filling.",
    )
    empty, _ = candidate(torch.zeros(8), codebook, block=8)
    expect(
        bool((codebook[empty.long()] == 0).all()),
        "A block of zeros must stay zero: clamp the scale to 1e-38.",
    )
    eight = dynamic_codebook()
    near, far = torch.randn(512), ref(torch.randn(1), eight)[0]
    expect(
        torch.equal(candidate(near, eight, 256, grid=65535)[0], ref(near, eight, 256, grid=65535)[0])
        and far.dtype == torch.uint8,
        "grid is ignored: round what is scaled with on_grid(scaled, grid) before looking for the nearest value.",
    )


def _variant(x: torch.Tensor, codebook: torch.Tensor, block: int, grid: int = 0, **how: Any):
    """quantise_blockwise with one thing wrong."""
    numbers = x.detach().reshape(-1).float()
    rows = F.pad(numbers, (0, -numbers.numel() % block)).view(-1, block)
    scales = rows.amax(dim=1) if how.get("signed") else rows.abs().amax(dim=1)
    scaled = rows / (rows.abs().max() if how.get("global_scale") else scales.clamp(min=1e-38)[:, None])
    edges = codebook if how.get("no_midpoints") else (codebook[:-1] + codebook[1:]) / 2
    codes = torch.bucketize(scaled, edges).clamp(max=len(codebook) - 1).to(torch.uint8).view(-1)
    return (codes if how.get("filling") else codes[: numbers.numel()]), scales


@mutant("quantise_blockwise", says="one per block")
def one_scale(x, codebook, block=64, grid=0):
    return quantise_blockwise(x, codebook, block=x.numel())


@mutant("quantise_blockwise", says="largest absolute value")
def signed_scale(x, codebook, block=64, grid=0):
    return _variant(x, codebook, block, signed=True)


@mutant("quantise_blockwise", says="upside down")
def inverse_scale(x, codebook, block=64, grid=0):
    codes, scales = quantise_blockwise(x, codebook, block)
    return codes, 1 / scales


@mutant("quantise_blockwise", says="not the nearest")
def next_larger(x, codebook, block=64, grid=0):
    return _variant(x, codebook, block, no_midpoints=True)


@mutant("quantise_blockwise", says="their own block")
def scaled_by_all(x, codebook, block=64, grid=0):
    return _variant(x, codebook, block, global_scale=True)


@mutant("quantise_blockwise", says="drop the codes of the filling")
def keeps_the_filling(x, codebook, block=64, grid=0):
    return _variant(x, codebook, block, filling=True)


@mutant("quantise_blockwise", says="grid is ignored")
def no_grid(x, codebook, block=64, grid=0):
    return quantise_blockwise(x, codebook, block)


# --- double_quantise


@exercise(
    "double_quantise",
    reference="labs_lib.methods.qlora:double_quantise",
    hints=[
        "mean = scales.mean(), a tensor with one number; quantise scales - mean.",
        "quantise_blockwise(scales - mean, dynamic_codebook(), block, grid=65535) gives codes and outer scales.",
        "Return codes, outer, mean, in that order.",
    ],
)
def check_double_quantise(candidate, ref):
    scales = 1 + torch.rand(600)
    got = candidate(scales)
    expect(
        isinstance(got, tuple | list) and len(got) == 3, "Return three tensors: codes, outer scales, mean."
    )
    codes, outer, mean = got
    right = ref(scales)
    expect(codes.dtype == torch.uint8 and codes.shape == (600,), "codes is one uint8 per scale.")
    if outer.numel() == 10:
        raise Diagnosis("Blocks of 64: the scales of the scales have blocks of their own, `block` = 256.")
    expect(
        float(mean) != 0,
        "The mean was not taken off: the scales are all positive, half of the codes would never be used.",
    )
    if torch.allclose(outer, ref(scales + 100)[1]) and torch.equal(codes, right[0]):
        close(mean, right[2], "the mean")
        return
    if torch.equal(codes, quantise_blockwise(scales - scales.mean(), dynamic_codebook(), 256)[0]):
        raise Diagnosis("Nearly: bitsandbytes rounds to a grid first, pass grid=65535.")
    if codes.max() < 16:
        raise Diagnosis("The scales are in 4 bits: they are few, give them 8 (dynamic_codebook()).")
    if torch.allclose(outer, scales.view(-1)[:512].view(-1, 256).amax(1).max(), rtol=0.1):
        raise Diagnosis("The mean is returned, but not taken off: quantise scales - mean.")
    raise Diagnosis("The codes are not those of scales - mean in dynamic_codebook().")


@mutant("double_quantise", says="mean was not taken off")
def no_mean(scales, block=256):
    codes, outer = quantise_blockwise(scales, dynamic_codebook(), block, grid=65535)
    return codes, outer, torch.tensor(0.0)


@mutant("double_quantise", says="but not taken off")
def mean_returned_only(scales, block=256):
    codes, outer = quantise_blockwise(scales, dynamic_codebook(), block, grid=65535)
    return codes, outer, scales.mean()


@mutant("double_quantise", says="in 4 bits")
def scales_in_four_bits(scales, block=256):
    codes, outer = quantise_blockwise(scales - scales.mean(), nf4_codebook(), block)
    return codes, outer, scales.mean()


@mutant("double_quantise", says="Blocks of 64")
def blocks_of_64(scales, block=256):
    return double_quantise(scales, block=64)


@mutant("double_quantise", says="grid=65535")
def without_grid(scales, block=256):
    codes, outer = quantise_blockwise(scales - scales.mean(), dynamic_codebook(), block)
    return codes, outer, scales.mean()


# --- NF4Linear


@exercise(
    "NF4Linear",
    reference="labs_lib.methods.qlora:NF4Linear",
    hints=[
        "register_buffer(name, tensor) keeps a tensor that moves and is saved with the layer but never trains.",
        "scales = double_dequantise(self.scale_codes, self.outer, self.mean); codes = unpack(self.packed, count)",
        "y = FrozenMatmul.apply(x, self); then add the bias, if there is one.",
    ],
)
def check_nf4_linear(candidate, ref):
    linear = nn.Linear(64, 12)
    with torch.no_grad():
        linear.weight.mul_(torch.linspace(0.5, 3, 12)[:, None])
    got, right = candidate(linear), ref(linear)
    expect(
        not list(got.parameters()),
        "The layer has parameters: its weight is frozen and in 4 bits, register_buffer everything.",
    )
    held = sum(buffer.numel() * buffer.element_size() for buffer in got.buffers())
    expect(
        held < linear.weight.numel() * 2,
        f"The layer holds {held} bytes, its float32 weight had {linear.weight.numel() * 4}: keep pack(codes) "
        "and the double-quantised scales, not the weight.",
    )
    x = torch.randn(3, 64, requires_grad=True)
    y = got(x)
    expect(y is not None, "forward returns nothing.")
    expect(y.shape == (3, 12), f"forward gives {tuple(y.shape)}, expected (3, 12).")
    expect(
        not torch.allclose(y, linear(x), atol=1e-4),
        "The output is exactly the float layer's: forward must use the dequantised weight.",
    )
    if torch.allclose(y, right(x) - linear.bias, atol=1e-4):
        raise Diagnosis("The bias is missing: keep linear.bias and add it.")
    weight = got.weight
    expect(tuple(weight.shape) == (12, 64), f"weight is {tuple(weight.shape)}; shape it to (out, in).")
    close(weight, right.weight, "the dequantised weight")
    close(y.detach(), right(x).detach(), "the output")
    expect(y.requires_grad, "No gradient passes: x must get one, or the layers below never train.")
    y.sum().backward()
    close(x.grad, right.weight.sum(0).expand(3, 64), "the gradient of x")


@mutant("NF4Linear", says="has parameters")
class WeightIsAParameter(NF4Linear):
    def __init__(self, linear, block=64):
        super().__init__(linear, block)
        self.extra = nn.Parameter(torch.zeros(1))


@mutant("NF4Linear", says="not the weight")
class KeepsTheWeight(NF4Linear):
    def __init__(self, linear, block=64):
        super().__init__(linear, block)
        self.register_buffer("original", linear.weight.detach().clone())


@mutant("NF4Linear", says="exactly the float layer's")
class ForwardIgnoresTheCodes(NF4Linear):
    def __init__(self, linear, block=64):
        super().__init__(linear, block)
        object.__setattr__(self, "linear", linear)

    def forward(self, x):
        return F.linear(x, self.linear.weight, self.linear.bias)


@mutant("NF4Linear", says="bias is missing")
class ForgetsTheBias(NF4Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


@mutant("NF4Linear", says="shape it to (out, in)")
class FlatWeight(NF4Linear):
    @property
    def weight(self):
        return super().weight.view(-1)

    def forward(self, x):
        return F.linear(x, super().weight, self.bias)


@mutant("NF4Linear", says="the dequantised weight")
class ForgetsTheMean(NF4Linear):
    def __init__(self, linear, block=64):
        super().__init__(linear, block)
        self.mean = torch.zeros_like(self.mean)


@mutant("NF4Linear", says="No gradient passes")
class NoGradient(NF4Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


# --- short answers and predictions

answer(
    "lab03.bits",
    reference=lambda: bits_per_weight(64, 256),
    unit="bits",
    tolerance=0.0004,
    mistakes={
        4.0: "that is the code alone: a block of 64 also has a scale of 8 bits",
        4.125: "nearly: 256 scales share one float32 scale of their own, 32 / (64 * 256) bits per weight",
        4.5: "that is with scales in float32 (32 / 64 bits per weight); here they are quantised to 8 bits",
        12.0: "a scale is shared by the 64 weights of its block: 8 / 64 bits per weight",
    },
    hints=["4 for the code, 8 / 64 for the scale, and the scale of 256 scales: 32 / (64 * 256)."],
)
answer(
    "lab03.adam_gigabytes",
    reference=lambda: 2 * 39_976_960 * 4 / 1e9,
    unit="GB",
    mistakes={
        0.16: "that is one state; Adam keeps two per parameter",
        2 * 6_738_415_616 * 4 / 1e9: "that is Adam for the whole model: only the adapter trains",
        0.08: "that is one byte per state; float32 takes 4",
    },
    hints=["Two states of 4 bytes for each of the 39,976,960 parameters that train."],
)
answer("lab03.predict_recall_merged", reference=50, within=(0, 100), unit="%")
answer("lab03.predict_gap", reference=0, within=(-100, 100), unit="points")
