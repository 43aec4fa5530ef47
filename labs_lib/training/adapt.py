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


def peft_lora(model, arm: "Arm", seed: int, steps: int, **more) -> Adapted:
    """PEFT's LoRA with any of its switches."""
    from peft import LoraConfig

    targets = arm.targets if isinstance(arm.targets, str) else list(arm.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=arm.rank, lora_alpha=arm.alpha, target_modules=targets, **more, **arm.options
    )
    return peft(model, config, seed)


def dora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    return peft_lora(model, arm, seed, steps, use_dora=True)


def rslora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    import torch

    from labs_lib.methods.rslora import inject_rslora

    generator = torch.Generator().manual_seed(seed)
    return Adapted(inject_rslora(model, arm.targets, arm.rank, arm.alpha, generator=generator))


def lora_plus(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """LoRA with its learning rate for A and `ratio` times that for B; `ratio` is in the arm's options."""
    from labs_lib.methods.lora_plus import lora_plus_optimizer

    model = lora(model, arm, seed, steps).model
    return Adapted(model, optimizer=lambda lr: lora_plus_optimizer(model, lr, arm.options["ratio"]))


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
    each.__name__: each for each in (full, lora, peft_lora, dora, rslora, lora_plus, ia3)
}
