"""What `labs bench training` measures: the arms, sized to the model, and each one made ready to take steps.

The arms of a Llama-2-7B are those that `labs bakeoff --costs` counts without a single weight, under the same names, so
that what was counted can be set beside what was measured; and some that only a device can tell.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from labs_lib.errors import LabsError
from labs_lib.training.adapt import METHODS, Adapted
from labs_lib.training.sweeps import Arm

if TYPE_CHECKING:
    from torch import nn

RATE = 1e-6  # small, so that no number of steps changes what a step costs
STEPS = 60  # AdaLoRA's schedule: it prunes from step 7 to step 40
NOISE = 0.02  # on everything an adapter trains: no matrix is zero, B included


@dataclass(frozen=True)
class BenchArm:
    """One way to train.

    Attributes:
        arm: the method, as in a sweep.
        by: "ours"; "peft" for PEFT's own LoRA and DoRA; "by hand" for QLoRA without bitsandbytes.
        update: "step" after backward; "backward": parameter by parameter within it (methods.galore.update_in_backward).
        eight_bit: GaLore's states in 8 bits (training.galore.FixedGaLoreAdamW8bit).
        packed: the base is held in 4 bits.
        autocast: products in the base's half precision, whatever the adapters are kept in.
        dropout: of LoRA and DoRA.
    """

    arm: Arm
    by: str = "ours"
    update: str = "step"
    eight_bit: bool = False
    packed: bool = False
    autocast: bool = False
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """The arm's own; GaLore's without the rank, which follows the model's width."""
        return self.arm.name.replace(f"GaLore r{self.arm.rank}", "GaLore")

    @property
    def touches_base(self) -> bool:
        """Whether the base's own weights train."""
        return self.arm.method in ("full", "galore")

    def settings(self) -> dict:
        """What tells this arm from the others, as a record has it."""
        found = {"arm": self.name, "method": self.arm.method, "by": self.by}
        if self.arm.method == "galore":
            found["rank"] = self.arm.rank
        return found | {
            key: value
            for key in ("update", "eight_bit", "packed", "autocast", "dropout")
            if (value := getattr(self, key)) not in (False, 0.0, "step")
        }


def _lora(name: str, dropout: float = 0.0, method: str = "lora", **more) -> BenchArm:
    options = {"dropout": dropout} if method == "dora" and dropout else {}
    return BenchArm(Arm(name, method, rank=16, alpha=32, options=options), dropout=dropout, **more)


LORA = _lora("LoRA r16")
_LORAS = (
    LORA,
    _lora("LoRA r16, dropout 0.05", 0.05),
    _lora("LoRA r16, PEFT", by="peft"),
    _lora("LoRA r16, dropout 0.05, PEFT", 0.05, by="peft"),
)
_CAST = (
    _lora("LoRA r16, autocast", autocast=True),
    _lora("LoRA r16, dropout 0.05, autocast", 0.05, autocast=True),
)


def reference(arm: BenchArm) -> BenchArm:
    """The LoRA that an arm's time is divided by: r16, with DoRA's own dropout, precision of products, and library."""
    if arm.arm.method != "dora":
        return LORA
    key = arm.dropout, arm.by, arm.autocast
    return next(each for each in (*_LORAS, *_CAST) if (each.dropout, each.by, each.autocast) == key)


def arms_for(config, half: bool) -> tuple[BenchArm, ...]:
    """All arms, sized to a model: widths follow its own, and for Llama-2-7B's they are the chapter's and the papers'.

    `half`: the base is in half precision, so that autocast makes a difference.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    rank = max(1, width // 32)

    def arm(name: str, method: str, options: dict | None = None, **more) -> BenchArm:
        sizes = {key: more.pop(key) for key in ("rank", "alpha") if key in more}
        return BenchArm(Arm(name, method, options=options or {}, **sizes), **more)

    def dora(name: str, dropout: float = 0.0, **more) -> BenchArm:
        return _lora(name, dropout, "dora", **more)

    galore = f"GaLore r{rank}"
    return (  # what is asked for most comes first: a card's time is short
        *_LORAS[:2],
        dora("DoRA r16"),
        dora("DoRA r16, dropout 0.05", 0.05),
        arm("full fine-tuning", "full"),
        arm(galore, "galore", rank=rank),
        arm(f"{galore}, 8-bit", "galore", rank=rank, eight_bit=True),
        arm(f"{galore}, layer by layer", "galore", rank=rank, update="backward"),
        arm(f"{galore}, 8-bit, layer by layer", "galore", rank=rank, update="backward", eight_bit=True),
        arm("IA3", "ia3"),
        arm("prompt 10", "prompt", {"tokens": 10}),
        arm("prompt 200", "prompt", {"tokens": 200}),
        _lora("QLoRA r16", method="qlora", packed=True),
        *(
            (
                *_CAST,
                dora("DoRA r16, autocast", autocast=True),
                dora("DoRA r16, dropout 0.05, autocast", 0.05, autocast=True),
            )
            if half
            else ()
        ),
        arm("prefix 30", "prefix", {"tokens": 30}),
        arm("prefix 30, projected", "prefix", {"tokens": 30, "hidden": max(1, width // 4)}),
        arm(
            "adapters, 1/16 of the width",
            "bottleneck",
            {"placement": "pfeiffer", "bottleneck": max(1, width // 16)},
        ),
        arm("LLaMA-Adapter 10", "llama_adapter", {"prompts": 10, "layers": max(1, layers - 2)}),
        arm("AdaLoRA r24 to r16", "adalora", {"init": 24}, rank=16, alpha=48),
        *_LORAS[2:],
        dora("DoRA r16, PEFT", by="peft"),
        dora("DoRA r16, dropout 0.05, PEFT", 0.05, by="peft"),
        arm("LoRA+ r16", "lora_plus", {"ratio": 8}, rank=16, alpha=32),
        arm("rsLoRA r16", "rslora", rank=16, alpha=32),
    )


# -- a model that takes steps ---------------------------------------------------------------------------------------


@dataclass
class Trainee:
    """A model with its optimisers and one batch; `step()` trains it once and returns nothing.

    `close()` takes its hooks off again: a hook on a parameter holds what holds the parameter, a circle that no garbage
    collection finds.
    """

    model: "nn.Module"
    optimizers: list
    batch: dict
    step: Callable[[], None]
    loss: Callable[[], float]
    close: Callable[[], None]


def share(model: "nn.Module") -> "nn.Module":
    """A second model with modules and parameters of its own, all frozen, over the very same numbers.

    So one base in memory serves arm after arm. An arm that trains the base's own weights changes them for all, by steps
    of 1e-6: what a step costs does not depend on them.
    """
    from torch import nn

    memo: dict[int, Any] = {id(each): each for each in model.buffers()}
    for each in model.parameters():
        packed = each.__class__.__name__ == "Params4bit"
        memo[id(each)] = each if packed else nn.Parameter(each.data, requires_grad=False)
    return copy.deepcopy(model, memo)


def trainee(arm: BenchArm, base: "nn.Module", batch: dict, checkpointing: bool = False) -> Trainee:
    """`base` adapted by `arm`, with its optimiser, ready to train on `batch`; the base's modules stay as they are.

    Raises:
        ImportError: the arm needs a package that is not installed.
    """
    import torch

    if arm.autocast and batch["input_ids"].device.type == "meta":
        raise LabsError("Autocast has no meaning on the meta device: count without it.")
    made = _made(arm, base)
    model = made.model.train()
    device = batch["input_ids"].device
    if checkpointing:
        _checkpoint(model.base if isinstance(getattr(model, "base", None), torch.nn.Module) else model)
    optimizers, remove = _optimizers(arm, model, made)
    callbacks = made.callbacks if device.type != "meta" else []  # they look at numbers
    count, seen = itertools.count(), {}

    def step() -> None:
        with torch.autocast(device.type, dtype=base.dtype) if arm.autocast else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        seen["loss"] = loss.detach()
        if arm.update == "backward":
            return
        for optimizer in optimizers:
            optimizer.step()
        state = SimpleNamespace(global_step=next(count))
        for callback in callbacks:  # AdaLoRA's pruning, which reads the gradients
            callback.on_optimizer_step(None, state, None)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    return Trainee(model, optimizers, batch, step, lambda: float(seen["loss"]), remove)


def adapted(arm: BenchArm, base: "nn.Module") -> "nn.Module":
    """`base` with the arm's adapter, all of whose numbers are random; the base's modules stay as they are."""
    return _made(arm, base).model


def _made(arm: BenchArm, base: "nn.Module") -> Adapted:
    import torch

    made = _adapt(arm, share(base))
    if not arm.touches_base:
        with torch.no_grad():
            for parameter in made.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return made


def _checkpoint(model: "nn.Module") -> None:
    """Compute activations twice instead of keeping them; the method is called otherwise in newer transformers."""
    settings = {
        "use_reentrant": False
    }  # the other kind wants inputs that require gradients: a frozen base has none
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _adapt(arm: BenchArm, view: "nn.Module") -> Adapted:
    """The method's own way to make a model trainable, or PEFT's."""
    from labs_lib.methods.lora import inject_lora
    from labs_lib.methods.qlora import inject_qlora

    if arm.by == "by hand":
        return Adapted(inject_qlora(view, arm.arm.targets, arm.arm.rank, arm.arm.alpha))
    if arm.by == "ours" and arm.dropout and arm.arm.method == "lora":
        return Adapted(inject_lora(view, arm.arm.targets, arm.arm.rank, arm.arm.alpha, arm.dropout))
    if arm.by == "ours":
        return METHODS[arm.arm.method](view, arm.arm, 0, STEPS)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=arm.arm.rank,
        lora_alpha=arm.arm.alpha,
        lora_dropout=arm.dropout,
        use_dora=arm.arm.method == "dora",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return Adapted(get_peft_model(view, config))


def _optimizers(arm: BenchArm, model: "nn.Module", made: Adapted) -> tuple[list, Callable[[], None]]:
    """The arm's optimisers, and what takes their hooks off, if they step within backward()."""
    import torch

    from labs_lib.methods.galore import GaLoreAdamW, galore_groups, update_in_backward

    if arm.arm.method != "galore":
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = made.optimizer(RATE) if made.optimizer else torch.optim.AdamW(trained, lr=RATE)
        if isinstance(optimizer, torch.optim.AdamW) and trained[0].is_cuda:
            for (
                group
            ) in optimizer.param_groups:  # the Trainer's default on a GPU: no temporary copy of all states
                group["fused"] = True
        return [optimizer], lambda: None
    if arm.eight_bit:
        from labs_lib.training.galore import FixedGaLoreAdamW8bit
    kind = FixedGaLoreAdamW8bit if arm.eight_bit else GaLoreAdamW

    def make(groups: list[dict]) -> torch.optim.Optimizer:
        return kind(groups, lr=RATE, eps=1e-8, weight_decay=0.0)

    groups = galore_groups(model, arm.arm.targets, arm.arm.rank)
    if arm.update == "backward":
        optimizers, remove = update_in_backward(groups, make)
        return list(optimizers.values()), remove
    return [make(groups)], lambda: None


@contextmanager
def random_bases() -> Iterator[None]:
    """While it lasts, GaLore takes a random basis instead of a gradient's own.

    Neither bytes nor time of an ordinary step depend on which basis it is, and the decomposition, every 200 steps,
    takes minutes for a 7B model: it is measured by itself (`refresh_costs`).
    """
    import torch

    from labs_lib.methods.galore import Projector, projection_side

    def refresh(self, gradient) -> None:
        side = projection_side(gradient.shape, self.proj_type)
        rows, columns = gradient.shape
        rank = min(self.rank, rows, columns)
        like = {"device": gradient.device, "dtype": gradient.dtype}
        self.left = None if side == "right" else torch.randn(rows, rank, **like) / rows**0.5
        self.right = None if side == "left" else torch.randn(rank, columns, **like) / columns**0.5

    kept, Projector.refresh = Projector.refresh, refresh
    try:
        yield
    finally:
        Projector.refresh = kept


def refresh_costs(base: "nn.Module", rank: int, seconds: float) -> dict:
    """What computing all of GaLore's bases once takes: a decomposition of each shape is timed, the others are alike.

    Args:
        seconds: no further shape is begun after so long; then only `refresh_shapes` is told.

    Returns:
        `refresh_s`, the sum over all projected matrices; `refresh_extra_bytes`, the most that one of them needs beside
        its gradient; `refresh_shapes`, (rows, columns, how many, seconds) each.
    """
    import time
    from collections import Counter

    import torch

    from labs_lib.measure.memory import peak_memory
    from labs_lib.methods.galore import Projector
    from labs_lib.methods.lora import target_names

    counts = Counter(
        tuple(base.get_submodule(name).weight.shape) for name in target_names(base, "all-linear")
    )
    weight = next(base.parameters())
    Projector(1).refresh(torch.randn(64, 64, device=weight.device))  # the library loads
    shapes, extra, started = [], 0, time.perf_counter()
    for shape, count in sorted(counts.items(), key=lambda each: each[0][0] * each[0][1]):
        if time.perf_counter() - started > seconds:
            return {"refresh_shapes": shapes}
        gradient = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        begun = time.perf_counter()
        peak = peak_memory(lambda g=gradient: Projector(rank).refresh(g), gradient, device=weight.device)
        shapes.append((*shape, count, time.perf_counter() - begun))
        extra = max(extra, peak.extra)
    whole = sum(count * each for *_, count, each in shapes)
    return {"refresh_s": whole, "refresh_extra_bytes": extra, "refresh_shapes": shapes}
