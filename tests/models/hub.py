"""Folders in hub layout with random weights: what `MODEL_ID` may name, one per family that learners bring."""

import torch

from labs_lib.models.base import load_base

CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
#: family: (config class, what is special about it)
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "smollm": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),  # biases on q, k, v
    # Like the real one's 4,096 tokens, the window is longer than any text of a lab.
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 256}),
}


def hub_folder(path, family):
    """Write a random model of a family, in several safetensors files, with a tokenizer that has a chat template."""
    import transformers

    name, special = FAMILIES[family]
    tokenizer = load_base("tiny")[1]
    ids = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, name)(vocab_size=len(tokenizer), **SHAPE | special | ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, max_shard_size="300KB")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path
