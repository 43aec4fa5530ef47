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
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(twin_config(name), dtype=dtype).eval()


def twin_config(name: str):
    """The config of a twin: one of TWINS, or `random:HIDDENxLAYERS`, a Llama of that size with 32,000 tokens."""
    from transformers import AutoConfig

    if name.startswith("random:"):
        return AutoConfig.for_model(**_free_size(name))
    if name not in TWINS:
        raise LabsError(
            f"No twin is called {name!r}; there are: {', '.join(TWINS)}, and random:HIDDENxLAYERS."
        )
    return AutoConfig.for_model(**{key: value for key, value in TWINS[name].items() if key != "parameters"})


def _free_size(name: str) -> dict:
    """Llama's proportions at another width: heads of 128 (one, below that), an FFN of 8/3 of the width."""
    try:
        hidden, layers = (int(word) for word in name.removeprefix("random:").split("x"))
    except ValueError:
        hidden = layers = 0
    if min(hidden, layers) < 1 or hidden % max(1, hidden // 128) or hidden % 2:
        raise LabsError(f"{name}: write it as random:4096x32 (hidden size, a multiple of 128, x layers).")
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": -(-8 * hidden // 3 // 256) * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 128),
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def random_packed(name: str, device: str | torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    """A twin whose linear layers bitsandbytes holds in 4 bits (NF4, double quantisation), made layer by layer.

    At no time is more than one block there in full: a 7B model needs 4 GB. The head and the embeddings stay in
    `dtype`, in which the 4-bit layers also compute.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM

    whole, first = twin_config(name), twin_config(name)
    first.num_hidden_layers = 1
    if getattr(first, "layer_types", None):
        first.layer_types = first.layer_types[:1]
    with torch.device(device):
        model = pack_linears(AutoModelForCausalLM.from_config(first, dtype=dtype), dtype)
        blocks = model.model.layers
        for index in range(1, whole.num_hidden_layers):
            block = _in_dtype(dtype, type(blocks[0]), whole, index)
            blocks.append(pack_linears(block, dtype))
    for module in model.modules():
        if getattr(module, "config", None) is first:
            module.config = whole
    whole._attn_implementation = first._attn_implementation
    return model.eval()


def _in_dtype(dtype: torch.dtype, make, *args):
    """`make(*args)` with `dtype` as torch's default, so that nothing is made in float32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make(*args)
    finally:
        torch.set_default_dtype(before)


def pack_linears(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Put bitsandbytes' 4-bit layers in the place of every linear layer but the head, one after the other; in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or linear is head:
            continue
        packed = Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            dtype,
            quant_type="nf4",
            device="meta",
        )
        settings = {"requires_grad": False, "quant_type": "nf4", "module": packed}
        packed.weight = Params4bit(linear.weight.data, **settings).to(linear.weight.device)
        packed.bias = linear.bias
        packed.support_avx512bf16_for_cpu = False  # see load_base: float32 on CPU, in eval mode too
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    return model.requires_grad_(False)


def peft_parameter_count(twin: "PreTrainedModel", peft_config: "PeftConfig") -> int:
    """How many parameters train when PEFT adapts `twin` with `peft_config`: exact, and free on a meta twin.

    Both arguments are left as they were (PEFT itself changes the model and the config it is given).
    """
    from peft import get_peft_model

    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(twin), copy.deepcopy(peft_config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
