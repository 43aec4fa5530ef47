"""Prefix tuning from scratch: trained keys and values that every layer's attention finds before the text's own.

A language model keeps, for each layer, the keys and values of what it has read: its cache. A prefix is a cache
that no text ever wrote. It holds, for each of `tokens` virtual tokens, 2 x layers x width numbers, where width is
key-value heads x head size. They are trained directly, or through a small network (the projection) that is dropped
once training is done. Names, layout and files are PEFT's.

Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, section 4.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from labs_lib.methods.prompt_tuning import check_base, leave_base_out


def prefix_shape(config) -> tuple[int, int, int]:
    """(layers, key-value heads, head size) of a model's cache, from its config.

    With grouped-query attention there are fewer key-value heads than attention heads.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def split_prefix(
    flat: torch.Tensor, layers: int, heads: int, batch: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A flat prefix (tokens, 2 x layers x heads x size) as one (keys, values) pair per layer.

    Each is (batch, heads, tokens, size), the shape that a cache has. A row of `flat` is: keys of layer 0, values of
    layer 0, keys of layer 1, and so on; within each, head after head. This is PEFT's layout on disk.

    Steps:
    1. View `flat` as (tokens, 2 * layers, heads, size).
    2. Reorder to (2 * layers, heads, tokens, size) and expand each to `batch` equal rows.
    3. Even entries are keys, odd ones values: pair them up, layer by layer.
    """
    tokens, width = flat.shape
    if width % (2 * layers * heads):
        raise ValueError(f"{width} numbers per token do not divide into 2 x {layers} layers x {heads} heads.")
    parts = flat.view(tokens, 2 * layers, heads, -1).permute(1, 2, 0, 3)
    parts = [part.expand(batch, -1, -1, -1) for part in parts]
    return list(zip(parts[0::2], parts[1::2], strict=True))


class DirectPrefix(nn.Module):
    """A prefix trained as it is: called without arguments, it gives its numbers, (tokens, 2 x layers x width)."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.detach().clone())

    def forward(self) -> torch.Tensor:
        return self.weight


def fresh_linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """nn.Linear with its usual start, uniform within 1 / sqrt(inputs), drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.empty(0).device)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


class ProjectedPrefix(nn.Module):
    """A prefix that comes out of a small network: a vector per virtual token, two linear layers, tanh between.

    `embedding` is (tokens, width), N(0, 1); `transform` maps width to `hidden` to 2 x layers x width. All train.
    Source: Li and Liang 2021, section 4.3, who found training the numbers themselves unstable.

    Steps:
    1. __init__: draw the embedding, then the transform's layers with fresh_linear, first to last.
    2. forward: the transform of the embedding, (tokens, 2 x layers x width).
    3. export: a DirectPrefix that starts at what forward gives now; the network is not needed to use it.
    """

    def __init__(self, tokens: int, width: int, hidden: int, layers: int, generator=None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, width, generator=generator))
        self.transform = nn.Sequential(
            fresh_linear(width, hidden, generator),
            nn.Tanh(),
            fresh_linear(hidden, 2 * layers * width, generator),
        )

    def forward(self) -> torch.Tensor:
        return self.transform(self.embedding)

    @torch.no_grad()
    def export(self) -> DirectPrefix:
        return DirectPrefix(self())


class PrefixTuning(nn.Module):
    """A frozen causal language model of transformers whose attention finds a trained prefix before every input.

    Called as `base` is; the logits keep their length. `prefix` is a DirectPrefix or a ProjectedPrefix; `cache`
    makes the library's cache from (keys, values) pairs: transformers.DynamicCache. Source: Li and Liang 2021.

    Steps:
    1. fill: split what `prefix` gives, in base's dtype, and hand the pairs to `cache`: a new cache every time.
    2. forward: check_call gives the rows; `tokens` ones before the mask, positions moved on by `tokens`, a filled
       cache as past_key_values, unless the caller's own holds something: then the prefix is in it already.
    3. generate: base.generate with that cache and mask; each beam or returned sequence is a row of the cache.
    """

    def __init__(self, base: nn.Module, prefix: nn.Module, cache: Callable) -> None:  # keep
        super().__init__()
        self.base, self.config = base.requires_grad_(False), base.config
        self.prefix, self.cache, self.tokens = prefix, cache, len(prefix())

    def fill(self, batch: int):
        layers, heads, _ = prefix_shape(self.config)
        return self.cache(split_prefix(self.prefix().to(self.base.dtype), layers, heads, batch))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        batch = check_call(self.base, input_ids, more.get("inputs_embeds"))
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(batch, self.tokens), attention_mask], dim=1)
        if position_ids is not None:
            position_ids = position_ids + self.tokens
        if past_key_values is None or not past_key_values.get_seq_length():
            past_key_values = self.fill(batch)
        more |= {"attention_mask": attention_mask, "position_ids": position_ids}
        return self.base(input_ids=input_ids, past_key_values=past_key_values, **more)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, **options):
        copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(len(mask), self.tokens), mask], dim=1)
        cache = self.fill(check_call(self.base, input_ids, **options) * copies)
        return self.base.generate(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **options)


def check_call(base: nn.Module, input_ids=None, inputs_embeds=None, use_cache=True, **_) -> int:
    """The number of rows of a call; an error where the prefix would get lost: no input, or no cache to live in."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give the model input_ids or inputs_embeds, exactly one of the two.")
    if use_cache is False:
        raise ValueError("The prefix lives in the cache: keep use_cache=True.")
    if base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(
            "Gradient checkpointing throws the cache away, and the prefix with it: turn it off "
            "(base.gradient_checkpointing_disable()) and save memory with smaller batches."
        )
    return len(inputs_embeds if input_ids is None else input_ids)


def add_prefix(
    base: nn.Module,
    tokens: int,
    cache: Callable,
    hidden: int | None = None,
    init: str = "random",
    std: float = 1.0,
    generator: torch.Generator | None = None,
    kind: type[nn.Module] = PrefixTuning,
) -> nn.Module:
    """Freeze `base` and give it a prefix; returns a PrefixTuning (or your own `kind`) around it.

    `cache` is transformers.DynamicCache. `hidden` is the width of the projection; None trains the numbers
    themselves. `init` is "random" (N(0, std); the projection's own start) or "zero" (PEFT's init_weights="zero",
    which is not "no change": zero keys still draw attention). Its weights stay: `model.base` is the way back.
    """
    check_base(base, tokens)
    if init not in ("random", "zero"):
        raise ValueError(
            f"init={init!r} is not known: 'random' or 'zero', or start from text_prefix(base, ids)."
        )
    if hidden is not None and hidden < 1:
        raise ValueError(
            f"hidden is the width of the projection, at least 1 (None is no projection): {hidden}."
        )
    layers, heads, size = prefix_shape(base.config)
    width, device = heads * size, base.get_input_embeddings().weight.device
    with torch.device("meta" if device.type == "meta" else "cpu"):  # where random numbers are drawn
        if hidden is None:
            prefix = DirectPrefix(std * torch.randn(tokens, 2 * layers * width, generator=generator))
            last = [prefix.weight]
        else:
            prefix = ProjectedPrefix(tokens, width, hidden, layers, generator)
            last = list(prefix.transform[-1].parameters())
    if init == "zero":
        for parameter in last:
            nn.init.zeros_(parameter)
    return leave_base_out(kind(base, prefix.to(device), cache))


@torch.no_grad()
def text_prefix(base: nn.Module, ids: Sequence[int]) -> DirectPrefix:
    """The prefix that a text leaves behind: the keys and values of its tokens, as `base` computes them.

    With it, the model continues as if it had read the text: whatever a written prompt does, a prefix can do.
    Source: Li and Liang 2021, section 7.4: with little data, real words are the better start.

    Steps:
    1. Run `base` on the ids as a batch of one, with use_cache=True; its past_key_values gives (keys, values, ...)
       per layer, each (1, heads, tokens, size).
    2. Stack keys and values of all layers to (2 * layers, heads, tokens, size).
    3. Reorder to (tokens, 2 * layers, heads, size) and flatten all but the first: split_prefix's inverse.
    """
    if not len(ids):
        raise ValueError("text_prefix needs the ids of a text: tokenizer(text)['input_ids'].")
    device = base.get_input_embeddings().weight.device
    past = base(input_ids=torch.tensor([list(ids)], device=device), use_cache=True).past_key_values
    parts = torch.cat([each for keys, values, *_ in past for each in (keys, values)])
    return DirectPrefix(parts.permute(2, 0, 1, 3).flatten(1).float())


def export_prefix(model: nn.Module) -> nn.Module:
    """Drop the projection of a trained PrefixTuning, in place: its prefix becomes the numbers it stands for."""
    if not hasattr(model.prefix, "export"):
        raise ValueError("This prefix has no projection: there is nothing to drop.")
    model.prefix = model.prefix.export()
    return model


def gated_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a prefix as a gated addition: (1 - gate) x attention to the text + gate x attention to the prefix.

    `queries` is (..., n, size), `keys` and `values` (..., m, size), `prefix` a pair (..., tokens, size); `visible`
    (n, m) is True where a query may look. Returns the output (..., n, size) and the gate (..., n, 1): the share of
    its attention that a query gives to the prefix. The text moves it, the prefix alone decides what it lets in.
    Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", section 3.1.

    Steps:
    1. Scores of the text, queries @ keys^T / sqrt(size), -inf where not visible; and scores of the prefix.
    2. Two attentions, each by itself: softmax of its scores times its values.
    3. gate = sigmoid(logsumexp of the prefix's scores - logsumexp of the text's scores), one per query.
    4. (1 - gate) times the text's attention plus gate times the prefix's.
    """
    scale = queries.shape[-1] ** -0.5
    text = queries @ keys.transpose(-1, -2) * scale
    if visible is not None:
        text = text.masked_fill(~visible, -torch.inf)
    own = queries @ prefix[0].transpose(-1, -2) * scale
    gate = torch.sigmoid(own.logsumexp(-1, keepdim=True) - text.logsumexp(-1, keepdim=True))
    return (1 - gate) * (text.softmax(-1) @ values) + gate * (own.softmax(-1) @ prefix[1]), gate
