"""QLoRA from scratch: 4-bit NormalFloat, block-wise scales, scales of scales, and LoRA on a base stored that way.

A 4-bit weight is two things: a code (which of 16 values) per number, and a scale per block of numbers. Codes, scales
and dequantised weights equal those of bitsandbytes on CPU, bit for bit.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, sections 2 and 3.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.methods.lora import LoRALinear, lora_delta, lora_layers, target_names
from labs_lib.methods.modules import replace

OUTERMOST = 0.9677083  # the quantile of the outermost value: the mean of 1 - 1/(2 * 15) and 1 - 1/(2 * 16)


def nf4_codebook() -> torch.Tensor:
    """The 16 values of 4-bit NormalFloat: quantiles of a normal distribution, divided by the largest.

    Returns (16,) float32, sorted, from -1 to 1: seven negative values, an exact zero, eight positive ones.
    Source: Dettmers et al. 2023, section 3 and appendix E; OUTERMOST is the constant of the authors' code.

    Steps:
    1. Positive: the normal quantiles (torch.special.ndtri) at 9 even steps, torch.linspace(OUTERMOST, 0.5, 9).
       The last of them is the quantile of 0.5, a zero: leave it out. Take the quantiles in float64.
    2. Negative: the same with 8 steps, so 7 values, with the sign turned.
    3. Join both and one zero, as float32; sort; divide by the largest.
    """
    positive = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:-1].double())
    negative = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:-1].double())
    values = torch.cat([negative, torch.zeros(1), positive]).float().sort().values
    return values / values.max()


def fp4_codebook() -> torch.Tensor:
    """The 15 values of bitsandbytes' 4-bit float (sign, 2 bits of exponent, 1 of mantissa), sorted, from -1 to 1."""
    half = torch.tensor([0.0625, 2, 3, 4, 6, 8, 12]) / 12
    return torch.cat([-half.flip(0), torch.zeros(1), half])


def integer_codebook(bits: int) -> torch.Tensor:
    """Whole numbers, divided by the largest: for 4 bits -7/7, -6/7, ... 7/7, as signed integers do it."""
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1) / largest


def dynamic_codebook() -> torch.Tensor:
    """The 256 values of bitsandbytes' 8-bit data type: seven decades, each with twice the values of the one below.

    Source: Dettmers 2016, arXiv:1511.04561, as bitsandbytes has it. Returns (256,) float32, sorted, up to 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10.0 ** (decade - 6) * middles).tolist() + (-(10.0 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values))


def quantise_blockwise(
    x: torch.Tensor, codebook: torch.Tensor, block: int = 64, grid: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each number of `x` as the index of the nearest value in a sorted `codebook`, scaled block by block.

    Returns codes (x.numel(),) uint8 and the scales (blocks,) float32. `grid`: see step 4.
    Source: Dettmers et al. 2023, section 2, "block-wise k-bit quantization".

    Steps:
    1. Flatten x to float32 and cut it into rows of `block` numbers; fill the last row up with zeros (F.pad).
    2. The scale of a block is its largest absolute value. Multiply each row by 1 / its scale (clamp the scale to at
       least 1e-38 in this division: a block may be all zeros). Now everything lies between -1 and 1.
    3. Nearest value: torch.bucketize by the 15 (255) midpoints between neighbours of the codebook.
    4. If `grid`: before step 3, round to one of grid + 1 even positions from -1 to 1: `on_grid` does it.
    """
    numbers = x.detach().reshape(-1).float()
    rows = F.pad(numbers, (0, -numbers.numel() % block)).view(-1, block)
    scales = rows.abs().amax(dim=1)
    scaled = rows * (1 / scales.clamp(min=1e-38))[:, None]
    if grid:
        scaled = on_grid(scaled, grid)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    codes = torch.bucketize(scaled, midpoints).to(torch.uint8)
    return codes.view(-1)[: numbers.numel()], scales


def on_grid(scaled: torch.Tensor, grid: int) -> torch.Tensor:
    """Numbers from -1 to 1, rounded to the nearest of grid + 1 even positions.

    bitsandbytes' 8-bit kernel on CPU finds codes in a table of 65,536 entries: grid = 65,535 gives its codes exactly.
    """
    return ((scaled + 1) * 0.5 * grid + 0.5).floor() / grid * 2 - 1


def dequantise_blockwise(
    codes: torch.Tensor, scales: torch.Tensor, codebook: torch.Tensor, block: int = 64
) -> torch.Tensor:
    """The way back: codebook[code] times the scale of its block; returns (codes.numel(),) float32."""
    return codebook[codes.long()] * scales.repeat_interleave(block)[: codes.numel()]


def double_quantise(
    scales: torch.Tensor, block: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise the scales themselves to 8 bits: their mean is taken off first, since scales are all positive.

    Returns codes (scales,) uint8, the scales of the scales (blocks of `block`,) float32, and the mean.
    Source: Dettmers et al. 2023, section 3, "Double Quantization"; the 8-bit type is bitsandbytes' own.

    Steps:
    1. Take the mean of the scales off, so that both signs of the 8-bit type are used.
    2. quantise_blockwise what is left with dynamic_codebook(), blocks of `block` and grid=65535.
    """
    mean = scales.mean()
    codebook = dynamic_codebook().to(scales.device)
    codes, outer = quantise_blockwise(scales - mean, codebook, block, grid=65535)
    return codes, outer, mean


def double_dequantise(
    codes: torch.Tensor, outer: torch.Tensor, mean: torch.Tensor, block: int = 256
) -> torch.Tensor:
    """The scales back from double_quantise, (codes.numel(),) float32."""
    return dequantise_blockwise(codes, outer, dynamic_codebook().to(codes.device), block) + mean


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes per byte, the first in the high half; an odd number is filled up with a zero."""
    codes = F.pad(codes, (0, codes.numel() % 2))
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` codes out of `pack`'s bytes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]


class FrozenMatmul(torch.autograd.Function):
    """x times a frozen 4-bit weight. Between forward and backward it keeps the 4-bit layer, not the dequantised weight.

    Plain F.linear would keep every dequantised weight until the backward pass, and the 4 bits would save nothing.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: "NF4Linear") -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


class NF4Linear(nn.Module):
    """A linear layer whose frozen weight is stored in 4 bits and dequantised each time it is used.

    Takes x (..., in) to (..., out). Nothing in it trains; gradients pass through to x. Its tensors are buffers.
    Source: Dettmers et al. 2023, section 3, equations 5 and 6.

    Steps:
    1. __init__: quantise linear.weight with nf4_codebook(); keep pack(codes) and double_quantise(scales) as buffers.
    2. weight: undo it: double_dequantise the scales, dequantise_blockwise the codes (unpack them), give it its shape.
    3. forward: FrozenMatmul.apply(x, self), plus the bias if there is one.
    """

    def __init__(self, linear: nn.Linear, block: int = 64) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block = linear.in_features, linear.out_features, block
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.register_buffer("codebook", nf4_codebook().to(linear.weight.device))
        codes, scales = quantise_blockwise(linear.weight, self.codebook, block)
        self.register_buffer("packed", pack(codes))
        for name, part in zip(("scale_codes", "outer", "mean"), double_quantise(scales), strict=True):
            self.register_buffer(name, part)

    @property
    def weight(self) -> torch.Tensor:
        scales = double_dequantise(self.scale_codes, self.outer, self.mean)
        codes = unpack(self.packed, self.out_features * self.in_features)
        return dequantise_blockwise(codes, scales, self.codebook, self.block).view(self.out_features, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = FrozenMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias


def inject_qlora(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    block: int = 64,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Store every linear layer but the head in 4 bits and put LoRA on the `targets`, in place; returns the model.

    `targets` as in `lora.target_names`. Only A and B train. A layer that is not a target is quantised all the same; one
    whose rows are no whole number of blocks stays as it is.

    Steps:
    1. Freeze the model.
    2. Replace each layer of target_names(model, "all-linear") by its NF4Linear.
    3. Wrap those that are targets in a LoRALinear.
    """
    adapted = set(target_names(model, targets))
    names = target_names(model, "all-linear")
    if missed := adapted - set(names):
        raise ValueError(f"{min(missed)} stays in full precision: QLoRA does not quantise the output head.")
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        if layer.in_features % block == 0:
            layer = NF4Linear(layer, block)
        if name in adapted:
            layer = LoRALinear(layer, rank, alpha, dropout, generator)
        replace(model, name, layer)
    return model


def merge_qlora(model: nn.Module, four_bit: bool) -> nn.Module:
    """Fold every update into its base weight, in place; returns the model without wrappers.

    `four_bit` quantises the sum again: as small as before, but most of a small update is rounded away. Without it the
    layers become float32 nn.Linear: exact, at eight times the bytes. Layers without an update stay as they are.

    Steps:
    1. The sum: the dequantised weight plus lora_delta, in float32, in a new nn.Linear.
    2. If `four_bit`, make an NF4Linear of it, with the blocks of the old one.
    3. Put it in the wrapper's place.
    """
    for name, layer in lora_layers(model).items():
        base = layer.base
        total = base.weight + lora_delta(layer.lora_A, layer.lora_B, layer.alpha, layer.rank).detach()
        linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        linear.weight = nn.Parameter(total, requires_grad=False)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        back = four_bit and isinstance(base, NF4Linear)
        replace(model, name, NF4Linear(linear, base.block) if back else linear)
    return model


def bits_per_weight(block: int = 64, double: int | None = 256) -> float:
    """Bits that a 4-bit weight takes with its share of the scales; `double=None` leaves the scales in float32.

    Source: Dettmers et al. 2023, section 3: 32/64 = 0.5 bits of scales, or 8/64 + 32/(64 * 256) = 0.127.

    Steps:
    1. 4 bits for the code.
    2. A block shares one scale: 32 bits, or 8 if the scales are quantised too.
    3. Then `double` scales share one scale of scales, of 32 bits.
    """
    if double is None:
        return 4 + 32 / block
    return 4 + 8 / block + 32 / (block * double)
