"""Lab 09's checks: what a wrong prefix looks like from outside. Beside each stand the mistakes it must tell apart."""

import torch
from torch import nn

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits, told_apart
from labs_lib.methods.prefix_tuning import (
    DirectPrefix,
    PrefixTuning,
    ProjectedPrefix,
    check_call,
    fresh_linear,
    gated_attention,
    split_prefix,
)

# --- split_prefix


@exercise(
    "split_prefix",
    reference="labs_lib.methods.prefix_tuning:split_prefix",
    hints=[
        "parts = flat.view(tokens, 2 * layers, heads, -1).permute(1, 2, 0, 3): the token index goes behind the heads.",
        "part.expand(batch, -1, -1, -1) repeats without copying.",
        "parts[0::2] are the keys, parts[1::2] the values; list(zip(..., strict=True)).",
    ],
)
def check_split_prefix(candidate, ref):
    tokens, layers, heads, size, batch = 3, 4, 2, 5, 6
    flat = torch.randn(tokens, 2 * layers * heads * size)
    got = fits(
        lambda: candidate(flat, layers, heads, batch),
        "The numbers do not fit: a row of `flat` is 2 x layers x heads x size numbers.",
    )
    expect(got is not None, "split_prefix returns None: is a `return` missing?")
    got = list(got)
    expect(len(got) == layers, f"{len(got)} entries for {layers} layers: one (keys, values) pair per layer")
    expect(all(len(pair) == 2 for pair in got), "each layer gets a pair: keys and values")
    right = ref(flat, layers, heads, batch)
    shape, wanted = tuple(got[1][0].shape), (batch, heads, tokens, size)
    expect(
        shape != (1, *wanted[1:]) and shape != wanted[1:],
        f"the keys are {shape}: every row of the batch needs its own copy, expand to {wanted}",
    )
    expect(
        shape == wanted,
        f"the keys of a layer are {shape}; a cache has (batch, heads, tokens, size), {wanted}",
    )
    parts = flat.view(2 * layers, heads, tokens, size)
    halves = flat.view(tokens, 2, layers, heads, size).permute(1, 2, 3, 0, 4)
    told_apart(
        torch.stack([torch.stack(list(pair)) for pair in got])[:, :, 0],
        torch.stack([torch.stack(pair) for pair in right])[:, :, 0],
        "keys and values",
        {
            "Keys and values are swapped: in each layer the keys come first.": torch.stack(
                [torch.stack(pair[::-1]) for pair in right]
            )[:, :, 0],
            "Numbers of several tokens are mixed: view cuts a row in the order it is stored, so view as (tokens, ...) "
            "first, and reorder with permute.": torch.stack([parts[0::2], parts[1::2]], dim=1),
            "All keys first, then all values: the layout is layer by layer, keys then values in each.": (
                halves.transpose(0, 1)
            ),
        },
    )


@mutant("split_prefix", says="every row of the batch")
def one_row(flat, layers, heads, batch):
    return split_prefix(flat, layers, heads, 1)


@mutant("split_prefix", says="swapped")
def values_first(flat, layers, heads, batch):
    return [(values, keys) for keys, values in split_prefix(flat, layers, heads, batch)]


@mutant("split_prefix", says="reorder with permute")
def viewed_only(flat, layers, heads, batch):
    parts = flat.view(2 * layers, heads, len(flat), -1)
    parts = [part.expand(batch, -1, -1, -1) for part in parts]
    return list(zip(parts[0::2], parts[1::2], strict=True))


@mutant("split_prefix", says="layer by layer")
def keys_of_all_layers_first(flat, layers, heads, batch):
    parts = flat.view(len(flat), 2, layers, heads, -1).permute(1, 2, 3, 0, 4)
    return [tuple(each.expand(batch, -1, -1, -1) for each in parts[:, layer]) for layer in range(layers)]


@mutant("split_prefix", says="a cache has")
def token_before_head(flat, layers, heads, batch):
    return [tuple(each.transpose(1, 2) for each in pair) for pair in split_prefix(flat, layers, heads, batch)]


# --- PrefixTuning

_GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def _toy() -> nn.Module:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, use_cache=True))
    return model.eval()


@exercise(
    "PrefixTuning",
    reference="labs_lib.methods.prefix_tuning:PrefixTuning",
    hints=[
        "fill: layers, heads, _ = prefix_shape(self.config), then self.cache(split_prefix(..., layers, heads, batch)).",
        "forward: torch.cat([attention_mask.new_ones(batch, self.tokens), attention_mask], dim=1), if one is given.",
        "forward: past_key_values.get_seq_length() is 0 while the caller's cache is empty: only then self.fill(batch).",
        "generate: as many rows as input_ids has, times num_beams or num_return_sequences.",
    ],
)
def check_prefix_tuning(candidate, ref):
    from transformers import DynamicCache

    base, tokens = _toy(), 3
    flat = torch.randn(tokens, 2 * 2 * 8)
    mine, right = (kind(base, DirectPrefix(flat), DynamicCache) for kind in (candidate, ref))
    ids = torch.randint(1, 31, (2, 6))
    with torch.no_grad():
        bare = base(input_ids=ids).logits
        got = fits(lambda: mine(input_ids=ids), "The prefix does not fit the cache: see split_prefix.")
        expect(got is not None, "forward returns None: is a `return` missing?")
        told_apart(
            got.logits,
            right(input_ids=ids).logits,
            "logits",
            {"The prefix never arrives: hand the filled cache to base as past_key_values.": bare},
        )
        again = mine(input_ids=ids).logits
        expect(
            again.shape == got.logits.shape and torch.allclose(again, got.logits, atol=1e-5),
            "a second call gives other logits: the first one's text is still in the cache. Fill a new one every time.",
        )
        _check_mask_and_positions(mine, right, ids)
        _check_reading_on(mine, right, ids)
    mine(input_ids=ids, labels=ids).loss.backward()
    expect(
        mine.prefix.weight.grad is not None and mine.prefix.weight.grad.any(),
        "No gradient reaches the prefix: use what self.prefix() gives, without detach and without torch.no_grad.",
    )
    _check_generate(mine, right, ids)


def _check_mask_and_positions(mine, right, ids) -> None:
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], dim=1)
    mask = (padded != 0).long()
    says = "The cache is longer than the mask: put `tokens` ones in front of it, for the prefix."
    inputs = {"input_ids": padded, "attention_mask": mask}
    try:
        got = mine(**inputs).logits
    except (RuntimeError, IndexError) as error:
        raise Diagnosis(says) from error
    short = right.base(**inputs, past_key_values=right.fill(len(ids))).logits
    told_apart(got[:, 2:], right(**inputs).logits[:, 2:], "with a mask, the logits", {says: short[:, 2:]})
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = right(**inputs, position_ids=positions).logits[:, 2:]
    told_apart(
        mine(**inputs, position_ids=positions).logits[:, 2:],
        wanted,
        "with positions, the logits",
        {
            "The given positions count from the text's start, but the prefix stands before it: move them on by "
            "`tokens`.": right(**inputs, position_ids=positions - right.tokens).logits[:, 2:],
            "The given positions are dropped: hand them on, moved by `tokens`.": right(**inputs).logits[
                :, 2:
            ],
        },
    )


def _check_reading_on(mine, right, ids) -> None:
    past = mine(input_ids=ids[:, :-1], use_cache=True).past_key_values
    step = mine(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
    length, wanted = step.past_key_values.get_seq_length(), right.tokens + ids.shape[1]
    expect(
        length != right.tokens + 1,
        "A cache that holds text is replaced by the prefix alone, so what was read is lost: keep the caller's cache.",
    )
    expect(
        length <= wanted,
        f"After reading on, the cache holds {length} positions, not {wanted}: one prefix is enough",
    )
    close(step.logits[:, -1], right(input_ids=ids).logits[:, -1], "reading on with a cache, the logits")


def _check_generate(mine, right, ids) -> None:
    wanted = right.generate(ids, **_GREEDY)
    got = fits(
        lambda: mine.generate(ids, **_GREEDY), "generate breaks: is the mask `tokens` longer than the text?"
    )
    expect(got is not None, "generate returns None: is a `return` missing?")
    expect(
        not torch.equal(got, mine.base.generate(ids, **_GREEDY)) or torch.equal(got, wanted),
        "generate writes what the base alone would: hand it the filled cache.",
    )
    expect(torch.equal(got, wanted), f"generate wrote {got[0].tolist()}, expected {wanted[0].tolist()}")
    beams = {"num_beams": 2, "num_return_sequences": 2}
    got = fits(
        lambda: mine.generate(ids, **_GREEDY, **beams),
        "With beams it breaks: every beam is a row of the cache, so fill rows x beams of them.",
    )
    expect(
        torch.equal(got, right.generate(ids, **_GREEDY, **beams)), "with two beams it writes something else"
    )


@mutant("PrefixTuning", says="never arrives")
class Empty(PrefixTuning):
    def fill(self, batch):
        return self.cache()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        return self.base(input_ids=input_ids, past_key_values=past_key_values, **more)


@mutant("PrefixTuning", says="second call")
class FilledOnce(PrefixTuning):
    def fill(self, batch):
        if not hasattr(self, "kept"):
            self.kept = super().fill(batch)
        return self.kept


@mutant("PrefixTuning", says="ones in front")
class MaskOfTheText(PrefixTuning):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        if past_key_values is None or not past_key_values.get_seq_length():
            past_key_values = self.fill(len(input_ids))
        more |= {"attention_mask": attention_mask, "position_ids": position_ids}
        return self.base(input_ids=input_ids, past_key_values=past_key_values, **more)


@mutant("PrefixTuning", says="move them on")
class PositionsOfTheText(PrefixTuning):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        if position_ids is not None:
            position_ids = position_ids - self.tokens
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **more)


@mutant("PrefixTuning", says="positions are dropped")
class PositionsDropped(PrefixTuning):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        return super().forward(input_ids, attention_mask, None, past_key_values, **more)


@mutant("PrefixTuning", says="what was read is lost")
class CacheReplaced(PrefixTuning):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        return super().forward(input_ids, attention_mask, position_ids, None, **more)


@mutant("PrefixTuning", says="No gradient reaches")
class Detached(PrefixTuning):
    @torch.no_grad()
    def fill(self, batch):
        return super().fill(batch)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = None if output.get("loss") is None else output.loss + 0 * self.prefix.weight.sum()
        return output


@mutant("PrefixTuning", says="base alone")
class GeneratesWithout(PrefixTuning):
    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, **options):
        return self.base.generate(input_ids=input_ids, attention_mask=attention_mask, **options)


@mutant("PrefixTuning", says="every beam is a row")
class OneRowPerText(PrefixTuning):
    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, **options):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(len(mask), self.tokens), mask], dim=1)
        cache = self.fill(check_call(self.base, input_ids, **options))
        return self.base.generate(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **options)


# --- ProjectedPrefix


@exercise(
    "ProjectedPrefix",
    reference="labs_lib.methods.prefix_tuning:ProjectedPrefix",
    hints=[
        "self.embedding = nn.Parameter(torch.randn(tokens, width, generator=generator)).",
        "self.transform = nn.Sequential(fresh_linear(width, hidden, ...), nn.Tanh(), fresh_linear(hidden, ...)).",
        "export: return DirectPrefix(self()), under torch.no_grad.",
    ],
)
def check_projected_prefix(candidate, ref):
    tokens, width, hidden, layers = 3, 4, 7, 2
    mine, right = (
        kind(tokens, width, hidden, layers, generator=torch.Generator().manual_seed(1))
        for kind in (candidate, ref)
    )
    counts = [sum(each.numel() for each in prefix.parameters()) for prefix in (mine, right)]
    expect(
        counts[0] != counts[1] - tokens * width,
        "The embedding does not train: make it an nn.Parameter.",
    )
    expect(
        counts[0] == counts[1],
        f"{counts[0]} numbers train, expected {counts[1]}: embedding and two linear layers",
    )
    got = fits(mine, "The layers do not fit: width to hidden, hidden to 2 x layers x width.")
    expect(got is not None, "forward returns None: is a `return` missing?")
    first, last = right.transform[0], right.transform[-1]
    told_apart(
        got.detach(),
        right().detach(),
        "what the prefix gives, with the same seed,",
        {
            "Two linear layers without tanh between are one linear layer: put it in.": last(
                first(right.embedding)
            ),
            "tanh belongs between the layers, not behind them: it would keep every number below 1.": (
                torch.tanh(last(first(right.embedding)))
            ),
        },
    )
    direct = mine.export()
    expect(direct is not None, "export returns None: is a `return` missing?")
    expect(
        isinstance(direct, DirectPrefix),
        f"export gives a {type(direct).__name__}: a DirectPrefix, which needs no network any more",
    )
    told_apart(
        direct().detach(),
        got.detach(),
        "what export gives",
        {"export hands out the embedding: hand out what comes out of the network.": right.embedding.detach()},
    )


class _Wrong(ProjectedPrefix):
    """A ProjectedPrefix whose layers are put together in another way."""


@mutant("ProjectedPrefix", says="without tanh")
class NoTanh(_Wrong):
    def forward(self):
        return self.transform[-1](self.transform[0](self.embedding))


@mutant("ProjectedPrefix", says="not behind them")
class TanhLast(_Wrong):
    def forward(self):
        return torch.tanh(self.transform[-1](self.transform[0](self.embedding)))


@mutant("ProjectedPrefix", says="does not train")
class FixedEmbedding(_Wrong):
    def __init__(self, *sizes, generator=None):
        super().__init__(*sizes, generator=generator)
        drawn = self.embedding.data
        del self.embedding
        self.embedding = drawn


@mutant("ProjectedPrefix", says="embedding and two linear layers")
class OneLayer(_Wrong):
    def __init__(self, tokens, width, hidden, layers, generator=None):
        super().__init__(tokens, width, hidden, layers, generator)
        self.transform = fresh_linear(width, 2 * layers * width, generator)


@mutant("ProjectedPrefix", says="needs no network")
class ExportsTheNetwork(_Wrong):
    def export(self):
        return self


@mutant("ProjectedPrefix", says="hands out the embedding")
class ExportsTheEmbedding(_Wrong):
    def export(self):
        return DirectPrefix(self.embedding)


# --- gated_attention


@exercise(
    "gated_attention",
    reference="labs_lib.methods.prefix_tuning:gated_attention",
    hints=[
        "scale = queries.shape[-1] ** -0.5; text.masked_fill(~visible, -torch.inf) where visible is given.",
        "Both logsumexp(-1, keepdim=True): the total weight of each side, as a logarithm.",
        "(1 - gate) * (text.softmax(-1) @ values) + gate * (own.softmax(-1) @ prefix[1]), and the gate.",
    ],
)
def check_gated_attention(candidate, ref):
    shapes = ((6, 8), (6, 8), (6, 8), (3, 8), (3, 8))
    queries, keys, values, *prefix = (torch.randn(2, *shape) for shape in shapes)
    visible = torch.ones(6, 6).tril().bool()
    got = fits(
        lambda: candidate(queries, keys, values, prefix, visible),
        "The shapes do not fit: keys transposed, queries @ keys.mT; keepdim=True for the gate.",
    )
    expect(got is not None, "gated_attention returns None: is a `return` missing?")
    expect(isinstance(got, tuple) and len(got) == 2, "return two things: the output and the gate")
    right, gate = ref(queries, keys, values, prefix, visible)
    told_apart(
        got[1],
        gate,
        "the gate",
        {
            "The gate is the text's share: it should be the prefix's, so the other sign.": 1 - gate,
            "Without 1 / sqrt(size) the scores are too large.": ref(
                8**0.5 * queries, keys, values, prefix, visible
            )[1],
            "The gate sees the whole text: use `visible` before the logsumexp.": ref(
                queries, keys, values, prefix
            )[1],
            "That is the largest score, not the sum: logsumexp.": _largest(queries, keys, prefix, visible),
        },
    )
    text, own, _ = _parts(queries, keys, values, prefix, visible)
    told_apart(
        got[0],
        right,
        "the output",
        {
            "The two are added as they are: weigh the text with 1 - gate, the prefix with gate.": text + own,
            "The text keeps its full weight: what the prefix draws, it loses, so weigh it with 1 - gate.": text
            + gate * own,
            "Text and prefix are exchanged: the gate belongs to the prefix.": gate * text + (1 - gate) * own,
        },
    )
    without, _ = candidate(queries, keys, values, prefix)
    close(
        without,
        ref(queries, keys, values, prefix)[0],
        "without `visible` every query sees all the text; the output",
    )


def _parts(queries, keys, values, prefix, visible):
    """Attention to the text alone, to the prefix alone, and the gate."""
    _, gate = gated_attention(queries, keys, values, prefix, visible)
    text = (queries @ keys.mT * queries.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    own = queries @ prefix[0].mT * queries.shape[-1] ** -0.5
    return text.softmax(-1) @ values, own.softmax(-1) @ prefix[1], gate


def _largest(queries, keys, prefix, visible):
    text = (queries @ keys.mT * queries.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    own = queries @ prefix[0].mT * queries.shape[-1] ** -0.5
    return torch.sigmoid(own.amax(-1, keepdim=True) - text.amax(-1, keepdim=True))


@mutant("gated_attention", says="text's share")
def gate_of_the_text(queries, keys, values, prefix, visible=None):
    output, gate = gated_attention(queries, keys, values, prefix, visible)
    return output, 1 - gate


@mutant("gated_attention", says="too large")
def scores_not_scaled(queries, keys, values, prefix, visible=None):
    return gated_attention(queries.shape[-1] ** 0.5 * queries, keys, values, prefix, visible)


@mutant("gated_attention", says="use `visible`")
def sees_everything(queries, keys, values, prefix, visible=None):
    return gated_attention(queries, keys, values, prefix)


@mutant("gated_attention", says="largest score")
def gate_of_the_largest(queries, keys, values, prefix, visible=None):
    visible = torch.ones(queries.shape[-2], keys.shape[-2]).bool() if visible is None else visible
    return gated_attention(queries, keys, values, prefix, visible)[0], _largest(
        queries, keys, prefix, visible
    )


@mutant("gated_attention", says="exchanged")
def exchanged(queries, keys, values, prefix, visible=None):
    visible = torch.ones(queries.shape[-2], keys.shape[-2]).bool() if visible is None else visible
    text, own, gate = _parts(queries, keys, values, prefix, visible)
    return gate * text + (1 - gate) * own, gate


@mutant("gated_attention", says="keeps its full weight")
def added(queries, keys, values, prefix, visible=None):
    visible = torch.ones(queries.shape[-2], keys.shape[-2]).bool() if visible is None else visible
    text, own, gate = _parts(queries, keys, values, prefix, visible)
    return text + gate * own, gate


@mutant("gated_attention", says="the output and the gate")
def output_alone(queries, keys, values, prefix, visible=None):
    return gated_attention(queries, keys, values, prefix, visible)[0]


# --- short answers

answer(
    "lab09.saved",
    reference=lambda: 30 * 2 * 32 * 4096,
    tolerance=0,
    hints=[
        "For one virtual token: how many numbers are its key in one layer? And its value?",
        "tokens x 2 (keys and values) x layers x width.",
    ],
    mistakes={
        30 * 32 * 4096: "keys and values: two vectors per token in every layer",
        30 * 4096: "that is a soft prompt: one vector per token, before the first layer only",
        30 * 2 * 4096: "that is one of the 32 layers",
        30 * 2 * 32 * 4096 * 2: "that is their bytes in fp16; the question is how many numbers",
    },
)
answer(
    "lab09.predict_facts",
    reference=40.0,
    within=(0, 100),
    unit="%",
    hints=["LoRA of rank 2 has about as many numbers, and recalls about 42 % after as many steps."],
)
answer(
    "lab09.predict_slower",
    reference=1.3,
    within=(0.5, 20),
    unit="x",
    hints=["200 positions more to look at, in every layer; but no linear layer has more to do."],
)
