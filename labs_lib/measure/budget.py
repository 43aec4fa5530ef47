"""Memory by arithmetic: what training holds, and what a prompt leaves in the cache. Two formulas of a line each.

`count` measures the same things on real tensors; lab 00 sets the two side by side.
"""

from typing import TYPE_CHECKING

from labs_lib.measure.count import HeldBytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def training_bytes(trainable: int, frozen: int = 0, weight: int = 4, state: int = 4) -> HeldBytes:
    """Bytes that training with Adam holds between two steps; activations come on top.

    `trainable` and `frozen` are numbers of parameters; `weight` is the bytes of one weight (4 in float32, 2 in
    bfloat16), `state` those of one number of Adam's. Returns HeldBytes(parameters, buffers, gradients,
    optimizer), in bytes. Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.

    Steps:
    1. parameters: every weight, trainable or frozen, takes `weight` bytes.
    2. gradients: only what trains gets one, in the type of its weight.
    3. optimizer: Adam keeps two running averages per trainable parameter, each of `state` bytes.
    4. buffers: 0, they are too small to matter.
    """
    return HeldBytes(
        parameters=(trainable + frozen) * weight,
        buffers=0,
        gradients=trainable * weight,
        optimizer=2 * trainable * state,
    )


def cache_bytes(tokens: int, config: "PreTrainedConfig", number: int = 2) -> int:
    """Bytes of the keys and values that `tokens` tokens of one sequence leave in the cache.

    `config` is a transformers config (num_hidden_layers, num_key_value_heads, num_attention_heads,
    hidden_size); `number` is the bytes of one number (2 in bfloat16). Returns bytes.
    Source: Shazeer 2019, arXiv:1911.02150; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.

    Steps:
    1. A head is hidden_size / num_attention_heads wide (use //, so that it stays a whole number).
    2. A token leaves one key and one value per layer and key-value head, of a head's width each.
    """
    head = config.hidden_size // config.num_attention_heads
    return 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * head * number
