"""GaLore beyond torch: galore_torch's 8-bit optimiser mended, and what a step holds, measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bitsandbytes.optim.optimizer import Optimizer2State
from galore_torch import GaLoreAdamW8bit

from labs_lib.measure.count import tensor_bytes
from labs_lib.measure.memory import peak_memory
from labs_lib.methods.galore import DEFAULTS, Projector, update_in_backward


class FixedGaLoreAdamW8bit(GaLoreAdamW8bit):
    """galore_torch 1.0's GaLoreAdamW8bit without its two bugs on today's bitsandbytes.

    1. It passes bitsandbytes' settings by position. bitsandbytes 0.50 dropped two of them, so that
       percentile_clipping=100 arrives as max_unorm and block_wise=True as skip_zeros. max_unorm limits the step to so
       many times the norm of the weights; for the step's sake galore_torch puts zeros in the weight's place; so the
       limit is 0. States under 4,096 numbers, which stay in float32, obey it: those weights are frozen.
    2. It calls torch.cuda.synchronize() whatever the device.

    Steps:
    1. __init__: call Optimizer2State.__init__ (not galore_torch's own) with the name "adam", params and the settings as
       keywords: lr, betas, eps, weight_decay, optim_bits=8, min_8bit_size, is_paged.
    2. step, for every parameter with a gradient. Without a rank: init_state if "state1" is missing, then update_step.
       With a rank: the same in the projected space, by _projected_step.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        Optimizer2State.__init__(
            self, "adam", params, **settings, optim_bits=8, min_8bit_size=min_8bit_size, is_paged=is_paged
        )

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        with torch.enable_grad():
            loss = closure() if closure else None
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for i, group in enumerate(self.param_groups):
            for j, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    (self._projected_step if "rank" in group else self._plain_step)(group, weight, i, j)
                    if weight.is_cuda:
                        torch.cuda.synchronize(weight.device)
        return loss

    def _plain_step(self, group: dict, weight: torch.nn.Parameter, i: int, j: int) -> None:
        if "state1" not in self.state[weight]:
            self.init_state(group, weight, i, j)
        self.prefetch_state(weight)
        self.update_step(group, weight, i, j)

    def _projected_step(self, group: dict, weight: torch.nn.Parameter, i: int, j: int) -> None:
        """bitsandbytes steps a tensor of zeros in the weight's place: what it leaves there is the update.

        The weight gets its own tensor and its own gradient back, whatever happens.
        """
        state, data, gradient = self.state[weight], weight.data, weight.grad
        if "projector" not in state:
            state["projector"] = Projector(group["rank"], *(group[name] for name in DEFAULTS))
        low = state["projector"].project(gradient, state.get("step", 0)).to(data.dtype)
        weight.grad = None  # torch checks the shape of a gradient against its weight's
        try:
            weight.data, weight.grad = torch.zeros_like(low), low
            self._plain_step(group | {"weight_decay": 0.0}, weight, i, j)
            update = weight.data
        finally:
            weight.grad = None
            weight.data, weight.grad = data, gradient
        data.add_(state["projector"].project_back(update))
        data.sub_(data, alpha=group["lr"] * group["weight_decay"])


@dataclass(frozen=True)
class StepBytes:
    """What a training step held, in bytes, measured.

    Attributes:
        gradients: the most that existed at once.
        states: of the optimiser, projectors included, after the step.
        first: the peak of the first step beyond weights and batch; with GaLore, the SVD's matrices included.
        later: the same of the second step, which computes no SVD unless the gap is 1.
    """

    weights: int
    gradients: int
    states: int
    first: int
    later: int


def measure_step(
    model: torch.nn.Module,
    batch: dict,
    groups: list[dict],
    make: Callable[[list[dict]], torch.optim.Optimizer],
    per_layer: bool = False,
) -> StepBytes:
    """Train `model` for two steps, by one optimiser or by one per parameter within backward(), and count the bytes.

    The peaks hold activations too: a short batch shows the rest. Hooks are taken off again; gradients are dropped.
    """
    most, remove = 0, None
    parameters = list(model.parameters())

    def count(_) -> None:
        nonlocal most
        most = max(most, tensor_bytes([each.grad for each in parameters if each.grad is not None]))

    handles = [each.register_post_accumulate_grad_hook(count) for each in parameters if each.requires_grad]
    if per_layer:
        optimizers, remove = update_in_backward(groups, make)
        optimizers = list(optimizers.values())
    else:
        optimizers = [make(groups)]

    def step() -> None:
        model(**batch).loss.backward()
        if not per_layer:
            optimizers[0].step()
            optimizers[0].zero_grad()

    try:
        peaks = [peak_memory(step, model, optimizers, batch) for _ in range(2)]
    finally:
        for handle in handles:
            handle.remove()
        if remove:
            remove()
    held = tensor_bytes(model, batch)
    return StepBytes(
        weights=tensor_bytes(parameters),
        gradients=most,
        states=tensor_bytes(optimizers),
        first=peaks[0].peak - held,
        later=peaks[1].peak - held,
    )
