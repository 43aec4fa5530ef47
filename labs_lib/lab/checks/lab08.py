"""Lab 08's checks: what a wrong soft prompt looks like from outside, with the mistakes that each must tell apart."""

import torch
from torch import nn

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits, told_apart
from labs_lib.methods import prompt_tuning
from labs_lib.methods.prompt_tuning import PromptTuning, prepend

# --- init_prompt


def _draw(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@exercise(
    "init_prompt",
    reference="labs_lib.methods.prompt_tuning:init_prompt",
    hints=[
        "random: std * torch.randn(tokens, width, generator=generator).",
        "vocab: torch.randint(0, size, (tokens,), generator=generator) are ids; embedding(ids) are their rows.",
        "text: [ids[i % len(ids)] for i in range(tokens)] repeats them. Detach the rows, and make them float.",
    ],
)
def check_init_prompt(candidate, ref):
    table = nn.Embedding(40, 6).bfloat16()
    got = candidate(table, 5, "random", std=0.5, generator=_draw())
    expect(got is not None, "init_prompt returns None: is a `return` missing?")
    wrong = {
        "std is ignored: the numbers are std times normal ones.": ref(table, 5, "random", generator=_draw()),
        "std is a spread, not a variance: multiply by std itself.": ref(
            table, 5, "random", std=0.5**0.5, generator=_draw()
        ),
    }
    told_apart(got, ref(table, 5, "random", std=0.5, generator=_draw()), "the random prompt", wrong)
    rows = candidate(table, 30, "vocab", generator=_draw())
    expect(not rows.requires_grad, "The rows still hang on the table: detach them, the prompt is a copy.")
    expect(rows.dtype == torch.float32, f"The prompt is {rows.dtype}: it trains in float32 on any base.")
    if torch.equal(rows, table.weight[:30].float()):
        raise Diagnosis("Those are the table's first rows: draw ids uniformly from the whole vocabulary.")
    again = candidate(table, 30, "vocab", generator=_draw())
    expect(
        torch.equal(rows, again), "Two draws with the same seed differ: hand the generator to torch.randint."
    )
    close(rows, ref(table, 30, "vocab", generator=_draw()), "the prompt from the vocabulary")
    for ids, length in (([7, 3], 5), ([7, 3, 9, 1], 3)):
        text = fits(
            lambda ids=ids, length=length: candidate(table, length, "text", ids=ids),
            "The text does not fit: repeat its ids until there are enough, then cut.",
        )
        expect(len(text) == length, f"A text of {len(ids)} ids makes {len(text)} soft tokens, not {length}.")
        right, stuck = (
            ref(table, length, "text", ids=each) for each in (ids, (ids + ids[-1:] * length)[:length])
        )
        if torch.equal(text, stuck) and not torch.equal(right, stuck):
            raise Diagnosis("The last id is repeated: start over with the first.")
        close(text, right, "the prompt from a text")


def _rows(embedding, ids):
    return embedding(ids).detach().float()


@mutant("init_prompt", says="std is ignored")
def always_size_one(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, 1.0, generator)


@mutant("init_prompt", says="not a variance")
def variance(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, std**0.5, generator)


@mutant("init_prompt", says="detach them")
def attached(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    if init == "vocab":
        return embedding(torch.randint(0, len(embedding.weight), (tokens,), generator=generator)).float()
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, std, generator)


@mutant("init_prompt", says="trains in float32")
def keeps_the_dtype(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    prompt = prompt_tuning.init_prompt(embedding, tokens, init, ids, std, generator)
    return prompt if init == "random" else prompt.to(embedding.weight.dtype)


@mutant("init_prompt", says="first rows")
def first_rows(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    if init == "vocab":
        return _rows(embedding, torch.arange(tokens))
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, std, generator)


@mutant("init_prompt", says="hand the generator")
def own_draw(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    if init == "vocab":
        return _rows(embedding, torch.randint(0, len(embedding.weight), (tokens,)))
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, std, generator)


@mutant("init_prompt", says="makes 2 soft tokens")
def not_repeated(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    if init == "text":
        return _rows(embedding, torch.tensor(ids[:tokens]))
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, std, generator)


@mutant("init_prompt", says="start over")
def last_repeated(embedding, tokens, init="vocab", ids=(), std=1.0, generator=None):
    ids = (list(ids) + list(ids[-1:]) * tokens)[:tokens]
    return prompt_tuning.init_prompt(embedding, tokens, init, ids, std, generator)


# --- prepend


@exercise(
    "prepend",
    reference="labs_lib.methods.prompt_tuning:prepend",
    hints=[
        "One prompt per row: prompt.to(embeds.dtype).expand(batch, -1, -1); then torch.cat([front, embeds], dim=1).",
        "mask.new_ones(batch, tokens) and labels.new_full((batch, tokens), -100) go in front.",
        "positions: torch.arange(tokens) for every row, then positions + tokens. Only keys that were given.",
    ],
)
def check_prepend(candidate, ref):
    prompt, embeds = torch.randn(3, 6), torch.randn(2, 5, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 8, 9], [-100, 5, 6, 7, 8]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = fits(
        lambda: candidate(prompt, embeds), "The prompt has no batch: give every row its copy (expand)."
    )
    expect(isinstance(got, dict), f"return a dict of what the model reads, not {type(got).__name__}")
    right = ref(prompt, embeds, mask, labels, positions)
    told_apart(
        got.get("inputs_embeds"),
        right["inputs_embeds"],
        "inputs_embeds",
        {
            "The prompt stands behind the text: a causal model never looks back from there.": torch.cat(
                [embeds, prompt.expand(2, -1, -1)], dim=1
            )
        },
    )
    expect(
        list(got) == ["inputs_embeds"],
        f"Nothing else was given, and yet there is {sorted(set(got) - {'inputs_embeds'})}: only what was given grows.",
    )
    got = candidate(prompt, embeds.bfloat16(), mask, labels, positions)
    expect(
        got["inputs_embeds"].dtype == torch.bfloat16,
        "On a bfloat16 model the text turned float32: take the prompt to embeds' dtype.",
    )
    _check_mask(got.get("attention_mask"), right["attention_mask"])
    _check_labels(got.get("labels"), right["labels"], labels)
    _check_positions(got.get("position_ids"), right["position_ids"], positions)


def _check_mask(mask, right) -> None:
    expect(mask is not None, "A mask was given and none came back: it grows as well.")
    expect(mask.shape == right.shape, f"the mask is {tuple(mask.shape)}, the input {tuple(right.shape)}")
    expect(mask[:, :3].any(), "The mask hides the prompt: zeros before it, so no token looks there.")
    expect(
        torch.equal(mask, right),
        "The mask's ones are at the wrong end: the prompt's come first, pads and all.",
    )


def _check_labels(got, right, labels) -> None:
    expect(got is not None, "Labels were given and none came back: they grow as well.")
    expect(
        got.shape != labels.shape,
        "The labels kept their length: logits will be longer, and every label sits beside the wrong one.",
    )
    expect(
        (got[:, :3] == -100).all(),
        f"The prompt is to be predicted as {got[0, 0]}: -100 tells the loss to leave it out.",
    )
    expect(
        torch.equal(got, right), f"labels of the first row: {got[0].tolist()}, expected {right[0].tolist()}"
    )


def _check_positions(got, right, positions) -> None:
    expect(got is not None, "Positions were given and none came back as position_ids.")
    expect(
        not torch.equal(got[:, 3:], positions),
        "The text starts at position 0, as the prompt does: move its positions on by the prompt's length.",
    )
    expect(
        torch.equal(got[:, :3], right[:, :3]),
        f"The prompt's positions are {got[0, :3].tolist()}, not 0, 1, 2: it comes first.",
    )
    expect(torch.equal(got, right), f"positions: {got.tolist()}, expected {right.tolist()}")


@mutant("prepend", says="has no batch")
def without_batch(prompt, embeds, mask=None, labels=None, positions=None):
    return {"inputs_embeds": torch.cat([prompt, embeds], dim=1)}


@mutant("prepend", says="behind the text")
def appended(prompt, embeds, mask=None, labels=None, positions=None):
    return {"inputs_embeds": torch.cat([embeds, prompt.expand(len(embeds), -1, -1)], dim=1)}


@mutant("prepend", says="only what was given grows")
def mask_made_up(prompt, embeds, mask=None, labels=None, positions=None):
    mask = torch.ones(embeds.shape[:2]).long() if mask is None else mask
    return prepend(prompt, embeds, mask, labels, positions)


@mutant("prepend", says="take the prompt to embeds' dtype")
def in_float32(prompt, embeds, mask=None, labels=None, positions=None):
    return prepend(prompt, embeds.float(), mask, labels, positions)


@mutant("prepend", says="hides the prompt")
def hidden(prompt, embeds, mask=None, labels=None, positions=None):
    read = prepend(prompt, embeds, mask, labels, positions)
    if mask is not None:
        read["attention_mask"][:, : len(prompt)] = 0
    return read


@mutant("prepend", says="at the wrong end")
def mask_behind(prompt, embeds, mask=None, labels=None, positions=None):
    read = prepend(prompt, embeds, mask, labels, positions)
    if mask is not None:
        read["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), len(prompt))], dim=1)
    return read


@mutant("prepend", says="kept their length")
def labels_kept(prompt, embeds, mask=None, labels=None, positions=None):
    read = prepend(prompt, embeds, mask, labels, positions)
    return read | ({} if labels is None else {"labels": labels})


@mutant("prepend", says="-100 tells the loss")
def labels_zero(prompt, embeds, mask=None, labels=None, positions=None):
    read = prepend(prompt, embeds, mask, labels, positions)
    if labels is not None:
        read["labels"][:, : len(prompt)] = 0
    return read


@mutant("prepend", says="starts at position 0")
def positions_kept(prompt, embeds, mask=None, labels=None, positions=None):
    read = prepend(prompt, embeds, mask, labels, positions)
    if positions is not None:
        read["position_ids"][:, len(prompt) :] -= len(prompt)
    return read


@mutant("prepend", says="not 0, 1, 2")
def positions_zero(prompt, embeds, mask=None, labels=None, positions=None):
    read = prepend(prompt, embeds, mask, labels, positions)
    if positions is not None:
        read["position_ids"][:, : len(prompt)] = 0
    return read


# --- PromptTuning


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=2, initializer_range=0.4, pad_token_id=0)
    ).eval()


@exercise(
    "PromptTuning",
    reference="labs_lib.methods.prompt_tuning:PromptTuning",
    hints=[
        "__init__: base.requires_grad_(False), and self.prompt = nn.Parameter(prompt.detach().clone()).",
        "forward: read = prepend(self.prompt, inputs_embeds, ...) with everything given; self.base(**read, **more).",
        "A filled cache (past.get_seq_length() > 0): cut the prompt off again, [:, n:], from all but the mask.",
        "generate: self.base.generate(input_ids=input_ids, **prepend(...), **options); no mask given means ones.",
    ],
)
def check_prompt_tuning(candidate, ref):
    start, ids = torch.randn(3, 16), torch.randint(1, 23, (2, 7))
    model, right = candidate(_llama(), start), ref(_llama(), start)
    _check_parts(model, start)
    output = fits(
        lambda: model(input_ids=ids, labels=ids),
        "The model could not read it: embed input_ids, then prepend the prompt to everything.",
    )
    expect(output is not None, "forward returns None: is a `return` missing?")
    expected = right(input_ids=ids, labels=ids)
    plain = right.base(input_ids=ids).logits
    if output.logits.shape == plain.shape and torch.allclose(output.logits, plain, atol=1e-5):
        raise Diagnosis("The answer is the base's: the model read input_ids, without the prompt.")
    close(output.logits, expected.logits, "the logits")
    expect(
        output.loss is not None, "Labels were given and there is no loss: hand what prepend made of them on."
    )
    close(output.loss, expected.loss, "the loss")
    output.loss.backward()
    expect(
        model.prompt.grad is not None and model.prompt.grad.any(),
        "No gradient reaches the prompt: use self.prompt itself, not .data, not a detached copy.",
    )
    _check_padding(model, right, ids)
    _check_cache(model, right, ids)
    _check_generate(model, right, ids)


def _check_parts(model: nn.Module, start: torch.Tensor) -> None:
    prompt = getattr(model, "prompt", None)
    expect(
        isinstance(prompt, nn.Parameter),
        "prompt should be an nn.Parameter: without that no optimizer finds it.",
    )
    expect(
        not any(each.requires_grad for each in model.base.parameters()),
        "The base still trains: freeze it, nothing but the prompt moves.",
    )
    close(prompt, start, "the prompt's start")
    expect(
        prompt.data_ptr() != start.data_ptr(),
        "prompt shares its memory with what was given: training would change the caller's tensor. Clone it.",
    )


@torch.no_grad()
def _check_padding(model, right, ids) -> None:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    settings = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    got, expected = model(**settings).logits[0, 5:], right(**settings).logits[0, 5:]
    blind = right(input_ids=ids, attention_mask=mask).logits[0, 5:]
    if torch.allclose(got, blind, atol=1e-6):
        raise Diagnosis(
            "position_ids are not used: with padding on the left, the prompt drifts off the text."
        )
    close(got, expected, "with padding on the left, the logits")


@torch.no_grad()
def _check_cache(model, right, ids) -> None:
    past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    expect(past is not None, "use_cache is ignored: hand what else is given (**more) on to the base.")
    step = {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids)}
    step["position_ids"] = torch.full((2, 1), 6)
    logits = model(**step, past_key_values=past).logits
    expect(
        logits.shape[1] == 1,
        f"One token read with a cache gives {logits.shape[1]} positions: the cache has the prompt already.",
    )
    close(logits[:, -1], right(input_ids=ids).logits[:, -1], "reading on with a cache, the last logits")


def _check_generate(model, right, ids) -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    got = fits(lambda: model.generate(ids, **options), "generate failed: give base.generate the prompt, too.")
    expected = right.generate(ids, **options)
    plain = right.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    expect(not torch.equal(plain, expected), "the check's own texts do not differ")
    if isinstance(got, torch.Tensor) and torch.equal(got, plain):
        raise Diagnosis("generate writes what the base writes: its embeddings need the prompt in front.")
    if isinstance(got, torch.Tensor) and torch.equal(got, expected[:, ids.shape[1] :]):
        raise Diagnosis(
            "generate leaves the input out: hand input_ids to base.generate beside the embeddings."
        )
    expect(isinstance(got, torch.Tensor) and torch.equal(got, expected), "generate writes another text.")


@mutant("PromptTuning", says="base still trains")
class NotFrozen(PromptTuning):
    def __init__(self, base, prompt):
        super().__init__(base, prompt)
        base.requires_grad_(True)


@mutant("PromptTuning", says="should be an nn.Parameter")
class PlainTensor(PromptTuning):
    def __init__(self, base, prompt):
        nn.Module.__init__(self)
        self.base, self.config = base.requires_grad_(False), base.config
        self.prompt = prompt.clone()


@mutant("PromptTuning", says="Clone it")
class SharedMemory(PromptTuning):
    def __init__(self, base, prompt):
        super().__init__(base, prompt)
        self.prompt = nn.Parameter(prompt.detach())


@mutant("PromptTuning", says="The answer is the base's")
class WithoutPrompt(PromptTuning):
    def forward(self, input_ids=None, **more):
        return self.base(input_ids=input_ids, **more)


@mutant("PromptTuning", says="there is no loss")
class WithoutLabels(PromptTuning):
    def forward(self, input_ids=None, labels=None, **more):
        return super().forward(input_ids, **more)


@mutant("PromptTuning", says="No gradient reaches")
class Detached(PromptTuning):
    def forward(self, input_ids=None, attention_mask=None, labels=None, position_ids=None, **more):
        embeds = self.base.get_input_embeddings()(input_ids).requires_grad_()
        read = prepend(self.prompt.detach(), embeds, attention_mask, labels, position_ids)
        return self.base(**read, **more)


@mutant("PromptTuning", says="position_ids are not used")
class WithoutPositions(PromptTuning):
    def forward(self, input_ids=None, position_ids=None, **more):
        return super().forward(input_ids, **more)


@mutant("PromptTuning", says="has the prompt already")
class ReadsItAgain(PromptTuning):
    def forward(self, input_ids=None, attention_mask=None, labels=None, position_ids=None, **more):
        embeds = self.base.get_input_embeddings()(input_ids)
        return self.base(**prepend(self.prompt, embeds, attention_mask, labels, position_ids), **more)


@mutant("PromptTuning", says="use_cache is ignored")
class DropsTheRest(PromptTuning):
    def forward(self, input_ids=None, attention_mask=None, labels=None, position_ids=None, **more):
        embeds = self.base.get_input_embeddings()(input_ids)
        read = prepend(self.prompt, embeds, attention_mask, labels, position_ids)
        return self.base(**read, use_cache=False)


@mutant("PromptTuning", says="what the base writes")
class GeneratesPlain(PromptTuning):
    def generate(self, input_ids, attention_mask=None, **options):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.base.generate(input_ids=input_ids, attention_mask=mask, **options)


@mutant("PromptTuning", says="leaves the input out")
class GeneratesWithoutInput(PromptTuning):
    def generate(self, input_ids, attention_mask=None, **options):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = prepend(self.prompt, self.base.get_input_embeddings()(input_ids), mask)
        return self.base.generate(**read, **options)


# --- nearest_tokens


@exercise(
    "nearest_tokens",
    reference="labs_lib.methods.prompt_tuning:nearest_tokens",
    hints=[
        "cosine: make every row one long (nn.functional.normalize, dim=1); 1 - vectors @ table.T.",
        "euclidean: torch.cdist(vectors, table).",
        "distances.topk(k, dim=1, largest=False) has .indices and .values.",
    ],
)
def check_nearest_tokens(candidate, ref):
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 0.2], [-3.0, 4.0]])
    vectors = torch.tensor([[9.0, 1.0], [0.1, 0.2], [-2.0, -2.0]])
    for metric in ("cosine", "euclidean"):
        got = candidate(vectors, table, k=2, metric=metric)
        expect(got is not None, "nearest_tokens returns None: is a `return` missing?")
        expect(isinstance(got, tuple) and len(got) == 2, "return two tensors: the ids, then their distances.")
        if torch.is_floating_point(got[0]):
            raise Diagnosis("The distances come first: return the ids, then the distances.")
        ids, distances = ref(vectors, table, k=2, metric=metric)
        expect(
            tuple(got[0].shape) == (3, 2), f"the ids are {tuple(got[0].shape)}: k for each vector, (3, 2)."
        )
        wrong = {
            "Those are the farthest tokens: small distances are near.": ref(vectors, table, 4, metric)[0]
            .flip(1)[:, :2]
            .float(),
            "metric is ignored: the other distance was asked for.": ref(
                vectors, table, 2, "euclidean" if metric == "cosine" else "cosine"
            )[0].float(),
            "Long tokens win everything: divide by the lengths, the cosine is about direction alone.": (
                -(vectors @ table.T)
            )
            .topk(2, dim=1, largest=False)
            .indices.float(),
        }
        told_apart(got[0].float(), ids.float(), f"the nearest by {metric}", wrong)
        told_apart(
            got[1],
            distances,
            f"the {metric} distances",
            {
                "That is the cosine; the distance is 1 - cosine.": 1 - distances,
                "Those are squared distances: take the root.": distances**2,
            },
        )


@mutant("nearest_tokens", says="farthest tokens")
def farthest(vectors, table, k=1, metric="cosine"):
    ids, distances = prompt_tuning.nearest_tokens(vectors, table, len(table), metric)
    return ids.flip(1)[:, :k], distances.flip(1)[:, :k]


@mutant("nearest_tokens", says="metric is ignored")
def always_euclidean(vectors, table, k=1, metric="cosine"):
    return prompt_tuning.nearest_tokens(vectors, table, k, "euclidean")


@mutant("nearest_tokens", says="Long tokens win")
def dot_product(vectors, table, k=1, metric="cosine"):
    if metric == "euclidean":
        return prompt_tuning.nearest_tokens(vectors, table, k, metric)
    nearest = (-(vectors @ table.T)).topk(k, dim=1, largest=False)
    return nearest.indices, nearest.values


@mutant("nearest_tokens", says="the distance is 1 - cosine")
def similarity(vectors, table, k=1, metric="cosine"):
    ids, distances = prompt_tuning.nearest_tokens(vectors, table, k, metric)
    return ids, 1 - distances if metric == "cosine" else distances


@mutant("nearest_tokens", says="take the root")
def squared(vectors, table, k=1, metric="cosine"):
    ids, distances = prompt_tuning.nearest_tokens(vectors, table, k, metric)
    return ids, distances**2 if metric == "euclidean" else distances


@mutant("nearest_tokens", says="distances come first")
def swapped(vectors, table, k=1, metric="cosine"):
    return prompt_tuning.nearest_tokens(vectors, table, k, metric)[::-1]


# --- soft_prompt: the chapter's coding exercise

_TEXTS = ("a travel radio", "two chairs from Bari, in wool and lilac")


def _trained(make, **settings) -> torch.Tensor:
    """The soft prompt that `make` ends with, from one and the same random state."""
    from labs_lib.models.base import base_folder

    torch.manual_seed(11)
    model = make(base_folder("tiny"), _TEXTS, **{"tokens": 4, "steps": 2, "lr": 0.1, **settings})
    expect(model is not None, "soft_prompt returns None: is a `return` missing?")
    from peft import PeftModel

    expect(isinstance(model, PeftModel), f"return PEFT's model, not {type(model).__name__}: get_peft_model.")
    config = model.peft_config["default"]
    expect(
        getattr(config.peft_type, "value", config.peft_type) == "PROMPT_TUNING",
        f"That is {config.peft_type}: a soft prompt is a PromptTuningConfig.",
    )
    expect(
        config.task_type == "CAUSAL_LM",
        "The task type is missing: PEFT needs CAUSAL_LM to put the prompt into a causal model.",
    )
    trainable = [each for each in model.parameters() if each.requires_grad]
    expect(
        len(trainable) == 1,
        f"{len(trainable)} tensors train, not one: PEFT froze the base, leave it frozen.",
    )
    return trainable[0].detach()


@exercise(
    "soft_prompt",
    reference="labs_lib.training.soft_prompt:soft_prompt",
    hints=[
        'PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB").',
        'tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")',
        'labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)',
        "AdamW([p for p in model.parameters() if p.requires_grad], lr=lr); model(**batch, labels=labels).loss",
    ],
)
def check_soft_prompt(candidate, ref):
    got = _trained(candidate, steps=0)
    expect(
        got.shape == (4, 64), f"the prompt is {tuple(got.shape)}, expected (4, 64): tokens=4 were asked for"
    )
    expect(
        got.std() < 0.5,
        f"The prompt starts {got.std() / 0.12:.0f} times as large as tokens are: RANDOM. Start from the vocabulary.",
    )
    start, got, right = _trained(ref, steps=0), _trained(candidate), _trained(ref)
    if torch.equal(got, start):
        raise Diagnosis("The prompt did not move: loss.backward(), optimizer.step(), `steps` times.")
    says = {
        "pads": "The loss counts the pads: labels are -100 where the attention mask is 0.",
        "left": "The batch is padded on the left: PEFT shifts the short text off the prompt. Pad on the right.",
        "piled": "The gradients pile up: optimizer.zero_grad() after every step.",
    }
    wrong = {text: _variant(mistake) for mistake, text in says.items()}
    told_apart(got, right, "the trained prompt", wrong)


def _variant(mistake: str) -> torch.Tensor:
    return _trained(lambda source, texts, **settings: _faulty(source, texts, mistake, **settings))


def _faulty(source, texts, mistake: str, tokens=10, steps=20, lr=0.3, init="SAMPLE_VOCAB", **config):
    """soft_prompt, with one of its mistakes."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": tokens, "prompt_tuning_init": init} | config
    model = get_peft_model(model, PromptTuningConfig(**settings))
    if mistake == "unfrozen":
        model.requires_grad_(True)
    side = "left" if mistake == "left" else "right"
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side=side)
    labels = batch["input_ids"]
    if mistake != "pads":
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=lr)
    for _ in range(0 if mistake == "untrained" else steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        if mistake != "piled":
            optimizer.zero_grad()
    return model


def _mistaken(says: str, mistake: str = "", **settings):
    def soft_prompt(source, texts, tokens=10, steps=20, lr=0.3):
        return _faulty(source, texts, mistake, **{"tokens": tokens, "steps": steps, "lr": lr} | settings)

    soft_prompt.__name__ = f"soft_prompt_{mistake or '_'.join(settings)}"
    mutant("soft_prompt", says=says)(soft_prompt)


_mistaken("RANDOM", init="RANDOM")
_mistaken("tokens=4 were asked for", tokens=10)
_mistaken("leave it frozen", "unfrozen")
_mistaken("did not move", "untrained")
_mistaken("counts the pads", "pads")
_mistaken("Pad on the right", "left")
_mistaken("pile up", "piled")


@mutant("soft_prompt", says="get_peft_model")
def without_peft(source, texts, tokens=10, steps=20, lr=0.3):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source)


# --- short answers

answer(
    "lab08.by_hand",
    reference=lambda: 0.25 * 2 + 0.75 * 10,
    hints=[
        "Softmax of the scores 0 and ln 3: e^0 = 1 and e^(ln 3) = 3, so 1/4 and 3/4.",
        "One quarter of 2 and three quarters of 10.",
    ],
    mistakes={
        32: "3 is not added but a weight: attention's weights add up to one, 1/4 and 3/4",
        6: "that is the plain mean: the soft token's score is higher",
        4: "the weights are the wrong way round: the soft token has the higher score",
        10: "the text is still there, with a quarter of the weight",
        0.25 * 2 + 0.75 * 2 + 10: "the soft token's value is not added, it is mixed in",
    },
)

answer(
    "lab08.first_logit",
    reference=lambda: 20 + 26 - 1,
    tolerance=0,
    hints=[
        "A position's logits predict the token after it.",
        "The prompt's text ends at position 26 - 1 of the text, and 20 soft tokens stand before it.",
    ],
    mistakes={
        25: "that is right without a soft prompt: 20 more positions come first",
        46: "those logits predict the answer's second token",
        26: "without the soft prompt even 25 would be right; 20 positions come first",
        20: "that is where the text starts",
    },
)

answer(
    "lab08.llama_prompt",
    reference=lambda: 10 * 4096,
    unit="parameters",
    tolerance=0,
    hints=["A soft token is as wide as an embedding.", "10 tokens of 4,096 numbers."],
    mistakes={
        10 * 4096 * 32: "soft tokens stand at the input alone, not in each of the 32 layers",
        10 * 4096 * 32 * 2: "that is a prefix: a key and a value in every layer",
        10 * 32000: "a soft token is a vector of the model's width, not a choice from the vocabulary",
        4096: "that is one token",
    },
)

answer(
    "lab08.predict_style",
    reference=40.0,
    within=(0, 100),
    unit="%",
    hints=["A share of texts between 0 and 100, exact to the letter."],
)

answer(
    "lab08.predict_nearest",
    reference=2.0,
    within=(0, 1000),
    hints=["1 would be the usual distance between a token and the token nearest to it."],
)
