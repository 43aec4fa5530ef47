"""What a method costs besides quality: bytes and FLOPs of a training step and of a request, counted, not timed.

Everything runs on the shipped bases and, without a single weight, on the meta-device twin of a 7B model: the same
operators, only shapes. So the figures for 7B are exact counts of tensors and multiply-adds; what they leave out is
what a GPU adds: scratch space in kernels, the allocator's rounding, the context itself.
"""

import copy
from typing import TYPE_CHECKING

from labs_lib.training.adapt import METHODS, Adapted
from labs_lib.training.sweeps import Arm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPT, ANSWER = 64, 32  # tokens of the request that inference is counted on


def training_costs(adapted: Adapted, batch: "dict[str, torch.Tensor]") -> dict[str, int]:
    """One step of training (forward, backward, update) after one that created the optimiser's states.

    Returns:
        `params` that train; `state_bytes` of the optimiser; `peak_bytes` of all tensors, weights included;
        `train_flops`.
    """
    import torch

    from labs_lib.measure.count import count_flops, count_parameters, optimizer_state_bytes
    from labs_lib.measure.memory import peak_memory

    model = adapted.model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = adapted.optimizer(1e-4) if adapted.optimizer else torch.optim.AdamW(trainable, lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    device = trainable[0].device if trainable[0].is_cuda else "cpu"  # the CPU's count serves meta tensors too
    peak = peak_memory(step, model, optimizer, batch, device=device)
    measured = {"params": count_parameters(model).trainable, "state_bytes": optimizer_state_bytes(optimizer)}
    return measured | {"peak_bytes": peak.peak, "train_flops": count_flops(step)}


def request_flops(model: "PreTrainedModel") -> int:
    """FLOPs of one greedy request: a prompt of `PROMPT` tokens read, `ANSWER` tokens written."""
    import torch

    from labs_lib.measure.count import count_flops

    ids = torch.full((1, PROMPT), 5, device=next(model.parameters()).device)
    settings = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    model.eval()
    with torch.no_grad():
        return count_flops(model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def costs(arm: Arm, size: str = "small", rows: int = 16, length: int = 64) -> dict:
    """Costs of one arm on a shipped base: a training step of `rows` x `length` tokens, a request, and the base's own.

    4-bit matrix products of bitsandbytes are not FLOPs that torch counts: a quantised arm's FLOPs are None.
    """
    import torch

    from labs_lib.models.base import load_base

    model = load_base(size, quantise=arm.quantise)[0]
    ids = torch.randint(
        3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
    )
    base = request_flops(model)
    adapted = METHODS[arm.method](model, arm, 0, 60)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    measured = training_costs(adapted, batch) | {"request_flops": request_flops(adapted.model)}
    if arm.quantise:
        measured |= {"train_flops": None, "request_flops": None}
    return measured | {"base_request_flops": base}


def twin_costs(arm: Arm, twin: "PreTrainedModel", rows: int = 1, length: int = 512) -> dict[str, int]:
    """Costs of a training step of `rows` x `length` tokens on a meta-device model, which is left as it was.

    Raises:
        LabsError, NotImplementedError or RuntimeError: the method looks at values (an SVD, a quantiser), and there
            are none.
    """
    import torch

    model = copy.deepcopy(twin)
    with torch.device("meta"):
        ids = torch.zeros((rows, length), dtype=torch.long)
        adapted = METHODS[arm.method](model, arm, 0, 60)
        return training_costs(adapted, {"input_ids": ids, "labels": ids})
