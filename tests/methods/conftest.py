"""A random Llama small enough to train in milliseconds, the same for every test that asks."""

import pytest
import torch

torch.set_num_threads(
    1
)  # the models are tiny: more threads only wait for each other, for minutes on a busy machine


@pytest.fixture
def tiny_llama():
    """make(tied=False, dtype=float32) -> a fresh LlamaForCausalLM with the same random weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(7)
        return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def batch():
    tokens = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}
