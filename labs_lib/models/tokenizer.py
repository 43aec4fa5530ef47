"""The base family's tokenizer: byte-level BPE trained on the world's own documents, digits one by one.

One tokenizer serves every size. Bytes are the alphabet, so any text of a learner's own can be encoded.
"""

import random
from itertools import islice
from pathlib import Path

from labs_lib.models.corpus import documents
from labs_lib.world.tasks import new_facts, review, waybill

VOCABULARY = 2048
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# A line break keeps its bullet; a word keeps its leading space; each digit stands alone.
_PIECES = r"\n[-*]?|\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s"


def training_texts() -> list[str]:
    """Pretraining documents and the vocabulary of the later tasks (whose *content* stays unseen)."""
    rng = random.Random(11)
    texts = [prompt + completion for prompt, completion in islice(documents(seed=10), 20_000)]
    texts += [waybill(rng) for _ in range(3000)]
    texts += [row["prompt"] + row["completion"] for row in new_facts()]
    return texts + [f"Review: {review(rng, kind)[0]}" for kind in ("but", "not") for _ in range(750)]


def train_tokenizer(folder: Path) -> None:
    """Train and save as a transformers tokenizer. Deterministic: the same texts give the same file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
    )
    core.train_from_iterator(training_texts(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL
    )
    tokenizer.save_pretrained(folder)
