"""`load_base`: the shipped base family, or any causal language model of the hub, through one call."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError
from labs_lib.models.room import check_device, check_room
from labs_lib.paths import data

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The family: width only differs, so that a trend over sizes has one cause. All have 4 layers and heads of 32.
SIZES = {"tiny": 64, "small": 128, "medium": 256, "large": 512, "xlarge": 1024}
LAYERS, HEAD = 4, 32
DEFAULT = "small"


def base_folder(size: str) -> Path:
    return data() / "base" / size


def base_config(size: str):
    """The LlamaConfig of one family member."""
    from transformers import LlamaConfig

    from labs_lib.models.tokenizer import VOCABULARY

    width = SIZES[size]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _quantisation(kind: str | None, dtype: "torch.dtype", skip: tuple[str, ...] = ()):
    """The library's settings for `kind`; layers named in `skip` stay as they are (4 bits only).

    4-bit layers compute in the dtype of the rest, as in the paper: bfloat16 where the base is in bfloat16.
    """
    if kind is None:
        return None
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", *skip],
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise LabsError(f"quantise={kind!r} is not known: None, 'nf4' or 'int8'.")


def load_base(
    name: str = DEFAULT,
    dtype: "torch.dtype | None" = None,
    device: str = "cpu",
    quantise: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model and its tokenizer, ready to be adapted.

    Args:
        name: a size of the family (`labs pretrain` makes `large` and `xlarge`, the others are shipped), a
            folder in hub layout, or a hub id.
        dtype: weights' type, in which 4-bit layers compute as well; float32 by default.
        device: where the weights go.
        quantise: None, `nf4` (4-bit NormalFloat with double quantisation) or `int8`, by bitsandbytes.

    Returns:
        (model in eval mode, tokenizer padding on the left).

    Raises:
        LabsError: a name that is neither, a model that does not fit into memory, or a shipped file that is missing or
            changed. A hub id that cannot be fetched falls back to the shipped base and says so.
    """
    check_device(device)
    if name in SIZES:
        return _load(verified(name), dtype, device, quantise)
    if Path(name).is_dir():
        return _load_foreign(Path(name), dtype, device, quantise)
    if "/" not in name:
        raise LabsError(
            f"No base {name!r}: one of {', '.join(SIZES)}, a folder, or a hub id such as HuggingFaceTB/SmolLM2-135M."
        )
    try:
        return _load_foreign(name, dtype, device, quantise)
    except (OSError, ConnectionError, ImportError) as error:
        reason = str(error).splitlines()[0][:160]
        warnings.warn(
            f"{name} could not be fetched ({reason}): going on with the shipped base '{DEFAULT}'. "
            "Check the name and the network, or download it first with `hf download`.",
            stacklevel=2,
        )
        return _load(verified(DEFAULT), dtype, device, quantise)


def fresh_base(size: str, seed: int) -> "PreTrainedModel":
    """A family member before any training: random weights, drawn by the seed."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(base_config(size)).eval()


def verified(size: str) -> Path:
    from labs_lib.world.build import verify

    folder = base_folder(size)
    if not (folder / "model.safetensors").is_file() and size in ("large", "xlarge"):
        raise LabsError(
            f"The base {size!r} is not shipped: make it with `labs pretrain {size}` on a GPU, or load 'medium'."
        )
    verify(*(f"base/{size}/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")))
    return folder


def _load_foreign(source: Path | str, dtype, device: str, quantise: str | None):
    """A model that is not of the family: of any size, so that it is asked first whether it fits."""
    import torch

    check_room(source, dtype or torch.float32, device, quantise)
    return _load(source, dtype, device, quantise)


def _load(source: Path | str, dtype, device: str, quantise: str | None):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype, skip = dtype or torch.float32, ()
    if quantise == "nf4" and getattr(AutoConfig.from_pretrained(source), "intermediate_size", 0) % 64:
        skip = ("down_proj",)  # bitsandbytes 0.50 on CPU garbles rows that are no whole number of blocks
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        quantization_config=_quantisation(quantise, dtype, skip),
        # A quantised model can't be moved, and without a map transformers would put it on a GPU if there is one.
        device_map={"": device} if quantise else None,
        use_safetensors=True,
    )
    if quantise is None:
        model = model.to(device)
    for module in model.modules() if quantise == "nf4" else ():
        # bitsandbytes 0.50 on CPUs with AVX512-BF16 would take another kernel in eval mode, and repack the weights for
        # it in place, which breaks merging and training afterwards: not here.
        module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer
