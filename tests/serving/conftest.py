"""A small Llama with adapters of every kind we serve, each with the tokens that its own merged model gives."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from labs_lib.serving.adapter import preflight

VOCABULARY = 97
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "attention": {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": ["q_proj", "up_proj", "gate_proj"],
        "rank_pattern": {"up_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 30},
    },
    "one-layer": {
        "r": 5,
        "lora_alpha": 20,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "layers_to_transform": [1],
    },
    "dora": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True},
    "rank-one": {"r": 1, "lora_alpha": 8, "target_modules": "all-linear"},
}


def small_model(seed: int = 0) -> LlamaForCausalLM:
    """Random weights, large enough that logits differ clearly; grouped-query attention, so that KV heads are fewer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Zoo:
    """Adapters on disk by name, and the truth about each: greedy tokens of its own merged model."""

    folders: dict[str, Path]
    shas: dict[str, str]
    names: dict[str | None, str]
    _merged: dict = field(default_factory=dict)
    _tokens: dict = field(default_factory=dict)

    def folder_of(self, sha: str) -> Path:
        return self.folders[self.names[sha]]

    def merged(self, name: str) -> LlamaForCausalLM:
        if name not in self._merged:
            model = small_model()
            if name != "base":
                model = PeftModel.from_pretrained(model, self.folders[name]).merge_and_unload()
            self._merged[name] = model.eval()
        return self._merged[name]

    @torch.inference_mode()
    def truth(self, name: str, prompt: list[int], count: int) -> list[int]:
        """The first `count` greedy tokens; computed without any cache, one row at a time."""
        known = self._tokens.setdefault((name, tuple(prompt)), [])
        while len(known) < count:
            logits = self.merged(name)(input_ids=torch.tensor([prompt + known]), use_cache=False).logits
            known.append(int(logits[0, -1].argmax()))
        return known[:count]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Zoo:
    root = tmp_path_factory.mktemp("zoo")
    folders, shas = {}, {}
    for i, (name, settings) in enumerate(CONFIGS.items()):
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        base = small_model()
        torch.manual_seed(100 + i)
        model = get_peft_model(base, config)
        for key, parameter in model.named_parameters():
            if "magnitude" in key:  # as initialised, DoRA's gains are all 1
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        model.save_pretrained(root / name)
        folders[name] = root / name
        shas[name] = preflight(root / name).sha256
    return Zoo(folders, shas, {sha: name for name, sha in shas.items()})


@pytest.fixture
def model() -> LlamaForCausalLM:
    return small_model()
