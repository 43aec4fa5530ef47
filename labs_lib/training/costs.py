"""What a method costs besides quality: bytes and FLOPs of a training step and of a request, counted, not timed.

Everything runs on the shipped bases and, without a single weight, on the meta-device twin of a 7B model: the same
operators, only shapes. So the figures for 7B are exact counts of tensors and multiply-adds; what they leave out is
what a GPU adds: scratch space in kernels, the allocator's rounding, the context itself.
"""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from labs_lib.training.adapt import METHODS, Adapted
from labs_lib.training.sweeps import ATTENTION, MLP, Arm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NO_FORMAT = "no PEFT format"
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

    4-bit matrix products of bitsandbytes are not FLOPs that torch counts: they are counted on the unpacked base.
    """
    import torch

    from labs_lib.models.base import load_base

    ids = torch.randint(
        3, load_base(size)[0].config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def counted(options: dict) -> dict:
        model = load_base(size, quantise=arm.quantise)[0]
        base = request_flops(model)
        adapted = METHODS[arm.method](model, replace(arm, options=options), 0, 60)
        found = training_costs(adapted, batch) | {"stored": stored(adapted.model, arm)}
        return found | {"request_flops": request_flops(adapted.model), "base_request_flops": base}

    if not arm.quantise:
        return counted(arm.options)
    packed = {name: value for name, value in arm.options.items() if name != "unpack"}
    held, flops = counted(packed), counted(packed | {"unpack": True})
    base = request_flops(load_base(size)[0])
    return flops | {name: held[name] for name in ("state_bytes", "peak_bytes")} | {"base_request_flops": base}


def stored(model: "torch.nn.Module", arm: Arm) -> int:
    """How many numbers a tenant's file holds: all that train, but of AdaLoRA's ranks only those that pruning leaves."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return round(trained * arm.rank / arm.options["init"]) if arm.method == "adalora" else trained


def merged(model: "torch.nn.Module", arm: Arm) -> "torch.nn.Module | None":
    """The model with the arm's adapter folded into its weights, in place; None if the method cannot be folded in.

    A model that was trained as a whole is returned as it is. A 4-bit base must be unpacked.
    """
    from labs_lib.methods.adalora import merge_adalora
    from labs_lib.methods.ia3 import merge_ia3
    from labs_lib.methods.lora import merge_lora
    from labs_lib.methods.zoo.layer import merge_zoo

    fold = {"full": lambda model: model, "galore": lambda model: model, "ia3": merge_ia3, "zoo": merge_zoo}
    fold |= dict.fromkeys(("lora", "qlora", "dora", "rslora", "lora_plus"), merge_lora) | {
        "adalora": merge_adalora
    }
    return fold[arm.method](model) if arm.method in fold else None


def after_merging(arm: Arm, size: str = "small") -> dict:
    """Whether the arm's adapter, made of random numbers, can be folded in, and what a request costs then.

    Returns:
        `mergeable`; if so `merge_error`, the largest change of a logit over the largest logit, and
        `merged_request_flops`. A model that was trained as a whole has nothing to fold: no error, no overhead.
    """
    import torch

    from labs_lib.models.base import load_base

    options = arm.options | ({"unpack": True} if arm.quantise else {})
    model = load_base(size, quantise=arm.quantise)[0]
    model = METHODS[arm.method](model, replace(arm, options=options), 0, 60).model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (2, 24), generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        before = model(input_ids=ids).logits
        plain = merged(model, arm)
        if plain is None:
            return {"mergeable": False}
        error = (plain(input_ids=ids).logits - before).abs().max() / before.abs().max()
    return {"mergeable": True, "merge_error": error.item(), "merged_request_flops": request_flops(plain)}


def peft_config(arm: Arm) -> dict | None:
    """The arm's adapter as PEFT's adapter_config.json has it, as far as serving engines look; None if PEFT has no such.

    LoRA+ is an optimiser and QLoRA a base: what they train is LoRA.
    """
    targets = [*ATTENTION, *MLP] if arm.targets == "all-linear" else arm.targets
    lora = {"peft_type": "LORA", "r": arm.rank, "lora_alpha": arm.alpha, "target_modules": targets}
    kind = arm.options.get("method", arm.method)
    special = {
        "lora": {},
        "qlora": {},
        "lora_plus": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
    }
    if kind in special:
        return lora | special[kind]
    others = {
        "adalora": "ADALORA",
        "prompt": "PROMPT_TUNING",
        "prefix": "PREFIX_TUNING",
        "llama_adapter": "ADAPTION_PROMPT",
        **{name: name.upper() for name in ("ia3", "vera", "loha", "lokr", "oft", "boft", "miss")},
    }
    return {"peft_type": others[kind]} if kind in others else None


def servable(arm: Arm) -> dict[str, str]:
    """Whether a batch may hold tenants of this arm: each engine's answer, in the words of the interop matrix."""
    from labs_lib.serving.interop import judge
    from labs_lib.serving.interop_rules import ENGINES

    config = peft_config(arm)
    return {engine: judge(config, engine).outcome if config else NO_FORMAT for engine in ENGINES}


def twin_costs(arm: Arm, twin: "PreTrainedModel", rows: int = 1, length: int = 512) -> dict[str, int]:
    """Costs of a training step of `rows` x `length` tokens on a meta-device model, which is left as it was.

    Raises:
        LabsError, NotImplementedError or RuntimeError: the method looks at values (an SVD, a quantiser), and there
            are none.
    """
    import torch

    from labs_lib.measure.memory import fused_attention

    model = copy.deepcopy(twin)
    with torch.device("meta"), fused_attention():
        ids = torch.zeros((rows, length), dtype=torch.long)
        adapted = METHODS[arm.method](model, arm, 0, 60)
        return training_costs(adapted, {"input_ids": ids, "labels": ids})
