"""A soft prompt with PEFT, from loading the model to the trained prompt: the chapter's coding exercise."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel


def soft_prompt(
    source: str | Path, texts: Sequence[str], tokens: int = 10, steps: int = 20, lr: float = 0.3
) -> "PeftModel":
    """Give the causal model at `source` (a folder, or a name on the hub) `tokens` soft tokens, and train them.

    Returns PEFT's model; the loss is taken on every token of `texts`. Tuning a model this way needs nothing more.

    Steps:
    1. Loading: AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained.
    2. Config: PromptTuningConfig of task type CAUSAL_LM, started from the vocabulary ("SAMPLE_VOCAB").
    3. get_peft_model freezes the base and puts the prompt in front.
    4. Batch: all texts at once, padded on the right; labels are the ids, and -100 where the attention mask is 0.
    5. Training: AdamW over what requires a gradient; `steps` times forward, backward, step, zero_grad.
    """
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB"
    )
    model = get_peft_model(model, config)
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=lr)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
