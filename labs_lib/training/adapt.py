"""How each arm of a sweep makes a base model trainable: one short function per method, in `METHODS`.

Our own method where it is as fast as PEFT's, else PEFT's, to which the tests prove ours equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from labs_lib.training.sweeps import Arm


@dataclass
class Adapted:
    """A model to train: only what the method trains requires a gradient.

    Attributes:
        optimizer: makes the optimiser from the learning rate; None is AdamW over what requires a gradient.
        callbacks: for the Trainer, for methods that act between steps.
        finish: called once after training, before the scores; returns what the method wants recorded.
    """

    model: "torch.nn.Module"
    optimizer: "Callable[[float], torch.optim.Optimizer] | None" = None
    callbacks: list = field(default_factory=list)
    finish: Callable[[], dict] = dict


def full(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    return Adapted(model.requires_grad_(True))


def lora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    import torch

    from labs_lib.methods.lora import inject_lora

    generator = torch.Generator().manual_seed(seed)
    return Adapted(inject_lora(model, arm.targets, arm.rank, arm.alpha, generator=generator))


def dora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our DoRA; with the same seed it starts from the same A as LoRA does, so that paired runs share it."""
    import torch

    from labs_lib.methods.dora import inject_dora

    generator = torch.Generator().manual_seed(seed)
    return Adapted(inject_dora(model, arm.targets, arm.rank, arm.alpha, generator=generator, **arm.options))


def rslora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """rsLoRA; by AdamW, or with `momentum` among the arm's options by SGD."""
    import torch

    from labs_lib.methods.lora import trainable_parameters
    from labs_lib.methods.rslora import inject_rslora

    generator = torch.Generator().manual_seed(seed)
    model = inject_rslora(model, arm.targets, arm.rank, arm.alpha, generator=generator)
    if "momentum" not in arm.options:
        return Adapted(model)
    parameters, momentum = trainable_parameters(model), arm.options["momentum"]
    return Adapted(model, optimizer=lambda lr: torch.optim.SGD(parameters, lr=lr, momentum=momentum))


def lora_plus(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """LoRA with its learning rate for A and `ratio` times that for B; `ratio` is in the arm's options."""
    from labs_lib.methods.lora_plus import lora_plus_optimizer

    model = lora(model, arm, seed, steps).model
    return Adapted(model, optimizer=lambda lr: lora_plus_optimizer(model, lr, arm.options["ratio"]))


def adalora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our AdaLoRA, pruned from `init` ranks per layer to `arm.rank` on average, and the ranks that each layer keeps.

    Options: `init`; `prune` (False: the SVD form alone); `plant`, a block whose weights are damaged before training.
    """
    import torch
    from transformers import TrainerCallback

    from labs_lib.methods.adalora import RankAllocator, Schedule, inject_adalora, penalise, ranks

    start, prune = arm.options["init"], arm.options.get("prune", True)
    if "plant" in arm.options:
        damage(model, seed=seed, **arm.options["plant"])
    generator = torch.Generator().manual_seed(seed)
    model = inject_adalora(model, arm.targets, start, arm.alpha, generator=generator)
    penalise(model)
    schedule = Schedule(steps, warmup=steps // 10, final=steps // 3, interval=max(1, steps // 30))
    allocator = RankAllocator(model, arm.rank, schedule)
    losses = []

    class Prune(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            losses.append(model.cross_entropy.item())
            if prune:
                allocator.step(state.global_step + 1)

    def finish() -> dict:
        tail = losses[-max(1, steps // 10) :]
        return {"cross_entropy": sum(tail) / len(tail), "ranks": ranks(model)}

    return Adapted(model, callbacks=[Prune()], finish=finish)


def damage(model, block: int, size: float, rank: int, seed: int) -> None:
    """Add noise of `rank` to every linear layer of one block, `size` times as large as the weight (Frobenius norm)."""
    import torch

    generator = torch.Generator().manual_seed(1000 + seed)
    for module in model.model.layers[block].modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            wide = torch.randn(rank, weight.shape[1], generator=generator)
            noise = torch.randn(weight.shape[0], rank, generator=generator) @ wide
            weight += size * weight.norm() / noise.norm() * noise


def qlora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our LoRA on a base that bitsandbytes holds in 4 bits (`Arm.quantise`), and what each way to merge it would do.

    That is measured for the fresh seeds only, not for seed 0, which chooses the rate.
    """

    def finish() -> dict:
        from labs_lib.models.base import load_base
        from labs_lib.training.merges import merge_report
        from labs_lib.training.sweeps import TENANT
        from labs_lib.world.tasks import load_task

        facts, style = load_task("knowledge", facts=512), load_task("style", tenant=TENANT)
        texts = {"facts": facts["test"][:256], "style": style["test"][:32]}
        tokenizer = load_base(model.name_or_path)[1]
        return {"merge": merge_report(model, tokenizer, texts)}

    model = lora(model, arm, seed, steps).model
    return Adapted(model, finish=finish if seed else dict)


def ia3(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    from peft import IA3Config

    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return peft(model, IA3Config(task_type="CAUSAL_LM", **targets), seed)


def peft(model, config, seed: int) -> Adapted:
    """Any PEFT method by its configuration."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    return Adapted(get_peft_model(model, config))


METHODS: "dict[str, Callable[..., Adapted]]" = {
    each.__name__: each for each in (full, lora, dora, rslora, lora_plus, adalora, qlora, ia3)
}
