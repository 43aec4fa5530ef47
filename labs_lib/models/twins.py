"""Random-weight twins of public models: the exact architecture of a 7B model without its 13 GB.

A twin on the meta device has shapes but no numbers, so parameters, optimizer bytes and adapter sizes are
counted exactly in milliseconds. With random weights on a GPU it measures memory and speed. Nothing is ever
downloaded.
"""

import copy
from typing import TYPE_CHECKING

import torch

from labs_lib.errors import LabsError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

# The numbers that decide sizes, from the config.json published with each model on huggingface.co:
# meta-llama's Llama-2-7b-hf, Llama-2-13b-hf, Meta-Llama-3-8B, Llama-3.2-1B and -3B,
# mistralai/Mistral-7B-v0.1, Qwen/Qwen2.5-0.5B and -7B, HuggingFaceTB/SmolLM2-135M and -1.7B. Rotary and norm
# constants, which have no size, keep the defaults. `parameters` is the count in the published safetensors; a
# test holds that the twin has exactly as many.
_COLUMNS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "parameters",
)
# fmt: off
_ROWS = {
    "llama-2-7b":   ("llama",   4096, 11008, 32, 32, 32,  32000,   4096, False,  6_738_415_616),
    "llama-2-13b":  ("llama",   5120, 13824, 40, 40, 40,  32000,   4096, False, 13_015_864_320),
    "llama-3-8b":   ("llama",   4096, 14336, 32, 32,  8, 128256,   8192, False,  8_030_261_248),
    "llama-3.2-1b": ("llama",   2048,  8192, 16, 32,  8, 128256, 131072, True,   1_235_814_400),
    "llama-3.2-3b": ("llama",   3072,  8192, 28, 24,  8, 128256, 131072, True,   3_212_749_824),
    "mistral-7b":   ("mistral", 4096, 14336, 32, 32,  8,  32000,  32768, False,  7_241_732_096),
    "qwen2.5-0.5b": ("qwen2",    896,  4864, 24, 14,  2, 151936,  32768, True,     494_032_768),
    "qwen2.5-7b":   ("qwen2",   3584, 18944, 28, 28,  4, 152064, 131072, False,  7_615_616_512),
    "smollm2-135m": ("llama",    576,  1536, 30,  9,  3,  49152,   8192, True,     134_515_008),
    "smollm2-1.7b": ("llama",   2048,  8192, 24, 32, 32,  49152,   8192, True,   1_711_376_384),
}
# fmt: on
TWINS = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}


def random_like(
    name: str, device: str | torch.device = "meta", dtype: torch.dtype = torch.bfloat16
) -> "PreTrainedModel":
    """A public model's architecture with no weights ("meta") or random ones (any other device).

    `name` is one of TWINS. Returns the transformers model in eval mode. Random weights come from torch's
    global random state and say nothing sensible. A fresh LoRA on top adds exactly nothing, because B is zero:
    fill B with noise before comparing the outputs of adapters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in TWINS:
        raise LabsError(f"No twin is called {name!r}; there are: {', '.join(TWINS)}.")
    row = {column: value for column, value in TWINS[name].items() if column != "parameters"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**row), dtype=dtype).eval()


def peft_parameter_count(twin: "PreTrainedModel", peft_config: "PeftConfig") -> int:
    """How many parameters train when PEFT adapts `twin` with `peft_config`: exact, and free on a meta twin.

    Both arguments are left as they were (PEFT itself changes the model and the config it is given).
    """
    from peft import get_peft_model

    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(twin), copy.deepcopy(peft_config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
