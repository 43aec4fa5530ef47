"""Prompt tuning from scratch: a few trained vectors in front of the input, and not one weight of the model touched.

A token is read as a vector of the embedding table. A soft prompt is a few more such vectors, (tokens, width),
that belong to no token: they stand before every input, and training moves them as it would move weights. The
order of operations is PEFT's: outputs, gradients and files agree.

Source: Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
arXiv:2104.08691, section 2.
"""

from collections.abc import Sequence

import torch
from torch import nn


def init_prompt(
    embedding: nn.Embedding,
    tokens: int,
    init: str = "vocab",
    ids: Sequence[int] = (),
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Starting values of a soft prompt: (tokens, width) in float32, where width is that of `embedding`.

    `init` is "random" (PEFT's default, with std 1), "vocab" (PEFT's SAMPLE_VOCAB) or "text", the text's token
    ids in `ids`. Source: Lester et al. 2021, section 3.2: on small models "random" falls far behind.

    Steps:
    1. "random": normal numbers from `generator`, shape (tokens, width), times `std`.
    2. "vocab": draw `tokens` ids uniformly with torch.randint and `generator`; their rows of `embedding`.
    3. "text": repeat `ids` until there are enough, cut to `tokens`; their rows of `embedding`.
    """
    if tokens < 1:
        raise ValueError(f"A soft prompt has at least one virtual token: got {tokens}.")
    size, width = embedding.weight.shape
    if init == "random":
        return (std * torch.randn(tokens, width, generator=generator)).to(embedding.weight.device)
    if init == "vocab":
        ids = torch.randint(0, size, (tokens,), generator=generator)
    elif init == "text":
        if not len(ids) or not all(0 <= each < size for each in ids):
            raise ValueError(
                f"init='text' needs ids=tokenizer(text)['input_ids'], each from 0 to {size - 1}."
            )
        ids = torch.tensor([ids[i % len(ids)] for i in range(tokens)])
    else:
        raise ValueError(f"init={init!r} is not known: 'random', 'vocab' or 'text'.")
    return embedding(ids.to(embedding.weight.device)).detach().float()


def prepend(
    prompt: torch.Tensor,
    embeds: torch.Tensor,
    mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What a model reads when `prompt` (tokens, width) stands before each row of `embeds` (batch, length, width).

    Returns a dict of inputs_embeds and, where given, attention_mask, labels and position_ids, each longer by
    `tokens`. The logits will have as many positions as inputs_embeds: the first `tokens` belong to the prompt.

    Steps:
    1. inputs_embeds: the prompt, in embeds' dtype and once per row, then the embeddings.
    2. attention_mask: ones before the mask: every token may look at the prompt.
    3. labels: -100 before the labels, which the loss leaves out: the prompt itself is not predicted.
    4. position_ids: 0 ... tokens - 1, then the given positions moved on by `tokens`.
    """
    batch, tokens = len(embeds), len(prompt)
    front = prompt.to(embeds.dtype).expand(batch, -1, -1)
    read = {"inputs_embeds": torch.cat([front, embeds], dim=1)}
    if mask is not None:
        read["attention_mask"] = torch.cat([mask.new_ones(batch, tokens), mask], dim=1)
    if labels is not None:
        read["labels"] = torch.cat([labels.new_full((batch, tokens), -100), labels], dim=1)
    if positions is not None:
        first = torch.arange(tokens, device=positions.device).expand(len(positions), -1)
        read["position_ids"] = torch.cat([first, positions + tokens], dim=1)
    return read


class PromptTuning(nn.Module):
    """A frozen causal language model of transformers that reads a trained soft prompt before every input.

    Called as `base` is. Only `prompt` (tokens, width) trains. Left padding puts a gap between prompt and text:
    with position_ids the gap does not count; without, as in PEFT, it shifts the text.
    Source: Lester et al. 2021, section 2.

    Steps:
    1. __init__: freeze `base`; a copy of `prompt` is a parameter.
    2. forward: embed input_ids (self.base.get_input_embeddings()), prepend the prompt, call base with the result.
       A filled `past_key_values` has read the prompt already: then only the mask still counts it.
    3. generate: base.generate with input_ids and what `prepend` gives; without a mask, every token counts.
    """

    def __init__(self, base: nn.Module, prompt: torch.Tensor) -> None:
        super().__init__()
        self.base, self.config = base.requires_grad_(False), base.config
        self.prompt = nn.Parameter(prompt.detach().clone())

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, position_ids=None, **more
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the model input_ids or inputs_embeds, exactly one of the two.")
        if inputs_embeds is None:
            inputs_embeds = self.base.get_input_embeddings()(input_ids)
        read = prepend(self.prompt, inputs_embeds, attention_mask, labels, position_ids)
        past = more.get("past_key_values")
        if past is not None and past.get_seq_length():
            n = len(self.prompt)
            read = {key: each if key == "attention_mask" else each[:, n:] for key, each in read.items()}
        return self.base(**read, **more)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, **options):
        if not options.get("use_cache", True):
            raise ValueError("Generating reads the soft prompt once, into the cache: keep use_cache=True.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = prepend(self.prompt, self.base.get_input_embeddings()(input_ids), mask)
        return self.base.generate(input_ids=input_ids, **read, **options)


def add_prompt(
    base: nn.Module,
    tokens: int,
    init: str = "vocab",
    ids: Sequence[int] = (),
    std: float = 1.0,
    generator: torch.Generator | None = None,
    kind: type[nn.Module] = PromptTuning,
) -> nn.Module:
    """Freeze `base` and give it a soft prompt; returns a PromptTuning (or your own `kind`) around it.

    The base's weights stay as they were: `model.base` is the way back. Other arguments as in init_prompt.
    """
    check_base(base, tokens)
    prompt = init_prompt(base.get_input_embeddings(), tokens, init, ids, std, generator)
    return leave_base_out(kind(base, prompt))


def check_base(base: nn.Module, tokens: int) -> None:
    """Refuse what virtual tokens cannot stand before: an adapted model, an encoder-decoder, a context too short."""
    if tokens < 1:
        raise ValueError(f"At least one virtual token is needed: got {tokens}.")
    if isinstance(getattr(base, "base", None), nn.Module):
        raise ValueError("This model carries virtual tokens already: wrap its `base` instead.")
    if not hasattr(base, "get_input_embeddings") or not hasattr(base, "config"):
        raise ValueError("Virtual tokens need a causal language model of transformers, e.g. load_base()[0].")
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError("This model is an encoder-decoder; the course's virtual tokens need a causal one.")
    room = getattr(base.config, "max_position_embeddings", None)
    if room is not None and tokens >= room:
        raise ValueError(f"{tokens} virtual tokens leave no room for text in {room} positions: take fewer.")


def leave_base_out(model: nn.Module) -> nn.Module:
    """Let the state dict, and so a Trainer's checkpoint, hold what trains alone: the base is stored elsewhere, once."""
    model.register_state_dict_post_hook(_without_base)
    model.register_load_state_dict_post_hook(_not_missing)
    return model


def _without_base(module, state, prefix, _) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        del state[key]


def _not_missing(module, odd) -> None:
    odd.missing_keys[:] = [key for key in odd.missing_keys if not key.startswith("base.")]


@torch.no_grad()
def nearest_tokens(
    vectors: torch.Tensor, table: torch.Tensor, k: int = 1, metric: str = "cosine"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` tokens whose embeddings are nearest to each of `vectors`: what a learned prompt seems to say.

    `vectors` is (n, width), `table` the embedding weight (vocabulary, width). Returns ids and distances, each
    (n, k), nearest first. Source: Lester et al. 2021, section 7, which uses the cosine.

    Steps:
    1. "cosine": 1 - the cosine of the angle between the two: direction alone.
    2. "euclidean": the length of the difference: direction and size.
    3. Of each row of distances, the k smallest.
    """
    if not 1 <= k <= len(table):
        raise ValueError(f"k is from 1 to the vocabulary's {len(table)}: got {k}.")
    vectors, table = vectors.float(), table.float()
    if metric == "cosine":
        unit = nn.functional.normalize
        distances = 1 - unit(vectors, dim=1) @ unit(table, dim=1).T
    elif metric == "euclidean":
        distances = torch.cdist(vectors, table)
    else:
        raise ValueError(f"metric={metric!r} is not known: 'cosine' or 'euclidean'.")
    nearest = distances.topk(k, dim=1, largest=False)
    return nearest.indices, nearest.values
