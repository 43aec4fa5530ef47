"""A fleet: the LoRA adapters of many tenants trained at once, as rows of one batch over one frozen base.

The layout is the serving engine's (`labs_lib.serving`): tenant k's factors are the pages of slot k, slot 0 is the base
and stays zero, and one of the engine's own ops gives every row its own B A x; here with gradients. Nothing couples the
tenants: each has its own rows, its own loss, its own clipping, and AdamW works entry by entry. So every adapter comes
out as `fit` would have trained it alone, with the same batches in the same order; the tests hold that to 1e-5.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labs_lib.errors import LabsError
from labs_lib.methods.io import PREFIX, write_folder
from labs_lib.methods.lora import init_lora, target_names
from labs_lib.methods.modules import replace
from labs_lib.serving.batch import Index
from labs_lib.serving.ops import OPS, choose

CLIP = 1.0  # the Trainer's, per tenant


@dataclass(frozen=True)
class Recipe:
    """How each adapter of a fleet is trained; `seed` draws A (the same for all tenants) and the order of the rows.

    The defaults are those of the smallest adapter on all linear layers in `sweep_tune_lora_style`, which writes as
    well as rank 8 does; steps, batch and rate are the record's too.
    """

    rank: int = 2
    alpha: float = 4
    steps: int = 60
    batch: int = 16
    lr: float = 1e-2
    warmup: float = 0.06
    seed: int = 0

    def to_dict(self) -> dict:
        return asdict(self)


# -- what keeps tenants apart ----------------------------------------------------------------------------------------


def tenant_losses(token_losses: Tensor, owners: Tensor, tenants: int) -> Tensor:
    """Each tenant's own loss: the mean over its own tokens. Their sum is what a fleet minimises.

    Args:
        token_losses: (tokens,) cross-entropy of each completion token in the batch, of all tenants.
        owners: (tokens,) whose token it is, 0 to tenants - 1.

    Returns:
        (tenants,)

    Steps:
        1. Add up each tenant's token losses: `index_add` into zeros (tenants,).
        2. Count each tenant's tokens: torch.bincount(owners, minlength=tenants).
        3. Divide. Not by the number of all tokens: then a tenant's step would depend on how long others' texts are.
    """
    sums = token_losses.new_zeros(tenants).index_add(0, owners, token_losses)
    return sums / torch.bincount(owners, minlength=tenants)


@torch.no_grad()
def clip_each(gradients: Sequence[Tensor], largest: float = CLIP) -> Tensor:
    """Scale each tenant's gradient down, in place, to a norm of at most `largest`; returns the norms before.

    Args:
        gradients: of each layer's factors, (tenants, ...): row t is tenant t's.

    Steps:
        1. A tenant's norm (tenants,): the root of the sum of all squares in its row, over all layers.
        2. Its factor is largest / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_ has it, but at most 1.
        3. Multiply each tenant's row by that tenant's factor. One norm over the fleet would let a tenant whose
           gradient explodes shrink everybody's step.
    """
    squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients)
    norms = squares.sqrt()
    factors = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient *= factors.view(-1, *[1] * (gradient.dim() - 1))
    return norms


# -- the layers ------------------------------------------------------------------------------------------------------


class FleetLinear(nn.Module):
    """A frozen linear layer and every tenant's factors, as pages of the engine: (slots * rank, in) and (.., out).

    Takes x (..., in) to (..., out), as `base` does; `fleet.index` says which slot each row of x belongs to.
    """

    def __init__(self, base: nn.Linear, fleet: "Fleet", generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.fleet = base, (fleet,)  # in a tuple: it is no submodule
        rank, slots = fleet.recipe.rank, len(fleet.tenants) + 1
        A, _ = init_lora(base.in_features, base.out_features, rank, generator)
        a = torch.zeros(slots, rank, base.in_features)
        a[1:] = A
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # never train in half precision
        self.a = nn.Parameter(a.flatten(0, 1).to(base.weight.device, dtype))
        self.b = nn.Parameter(self.a.new_zeros(slots * rank, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        (fleet,) = self.fleet
        y, rows = self.base(x), x.reshape(-1, x.shape[-1]).to(self.a.dtype)
        name = fleet.op or choose(fleet.index, rows, self.base.in_features, self.base.out_features)
        out = y.to(self.a.dtype)  # the same tensor, unless the base is in half precision
        OPS[name](rows, self.a, self.b * fleet.scale, fleet.index, out=out.view(-1, y.shape[-1]))
        return out.to(y.dtype)


class Fleet:
    """The tenants' adapters in training, in place of the model's linear layers until `close()`.

    Args:
        model: a Llama-family transformers model; its own weights are frozen.
        tenants: their names, in the order of the batch.
        op: the name of one of the engine's ops; "" chooses by shape on a CPU, and is "blocks" on a GPU, where the
            engine's own choice, the Triton kernel, has no gradient.
    """

    def __init__(self, model, tenants: Sequence[str], recipe: Recipe, op: str = "") -> None:
        if not tenants or len(set(tenants)) < len(tenants):
            raise LabsError("A fleet needs at least one tenant, and each of them once.")
        self.model, self.tenants, self.recipe = model, list(tenants), recipe
        self.op = op or ("" if model.device.type == "cpu" else "blocks")
        self.scale, self.index = recipe.alpha / recipe.rank, None
        rank, slots = recipe.rank, len(tenants) + 1
        self._pages = torch.arange(slots * rank).view(slots, rank).clone()
        self._pages[0] = 0
        generator = torch.Generator().manual_seed(recipe.seed)
        self.layers: dict[str, FleetLinear] = {}
        for name in target_names(model, "all-linear"):
            self.layers[name] = FleetLinear(model.get_submodule(name), self, generator)
        model.requires_grad_(False)
        for name, layer in self.layers.items():
            replace(model, name, layer.requires_grad_(True))
            layer.base.requires_grad_(False)
        self.parameters = [each for layer in self.layers.values() for each in (layer.a, layer.b)]

    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(tenants,) each tenant's loss, for a batch of equally many rows of each tenant, in the fleet's order.

        Rows are padded on the right, so that the causal mask alone keeps padding out. The head sees only the
        positions whose next token counts.
        """
        ids, labels = batch["input_ids"], batch["labels"][:, 1:]
        rows, length = ids.shape
        each = rows // len(self.tenants)
        slots = [slot for slot in range(1, len(self.tenants) + 1) for _ in range(each * length)]
        self.index = Index(slots, self._pages, contiguous=True, device=ids.device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counts = labels != -100
        logits = self.model.get_output_embeddings()(hidden[counts])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        owners = torch.arange(rows, device=ids.device).div(each, rounding_mode="floor")
        owners = owners[:, None].expand_as(counts)[counts]
        tokens = F.cross_entropy(logits, labels[counts], reduction="none")
        return tenant_losses(tokens, owners, len(self.tenants))

    def clip(self) -> Tensor:
        """Clip each tenant's gradient by its own norm; returns the norms."""
        gradients = [each.grad.view(len(self.tenants) + 1, -1)[1:] for each in self.parameters]
        return clip_each(gradients)

    def state(self, tenant: str) -> dict[str, Tensor]:
        """A tenant's factors under PEFT's names, as copies."""
        rank = self.recipe.rank
        start = (self.tenants.index(tenant) + 1) * rank
        found = {}
        for name, layer in self.layers.items():
            a, b = (each.detach()[start : start + rank].clone() for each in (layer.a, layer.b))
            found[f"{PREFIX}{name}.lora_A.weight"] = a
            found[f"{PREFIX}{name}.lora_B.weight"] = b.T.contiguous()
        return found

    def save(self, tenant: str, folder: str | Path) -> Path:
        """Write a tenant's adapter as an unmodified PEFT directory."""
        return save_adapter(folder, self.state(tenant), self.recipe, self.model.name_or_path)

    def close(self) -> None:
        """Give the model its own layers back."""
        for name, layer in self.layers.items():
            replace(self.model, name, layer.base)


def save_adapter(folder: str | Path, tensors: dict[str, Tensor], recipe: Recipe, base: str = "") -> Path:
    """Write factors as `state` gives them as a PEFT adapter; returns the folder."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return write_folder(folder, config, tensors)


# -- training --------------------------------------------------------------------------------------------------------


def orders(rows: int, recipe: Recipe) -> Iterator[list[int]]:
    """Which of a tenant's rows each step takes, for ever: shuffled anew in each epoch, exactly as `fit` draws them."""
    if rows % recipe.batch:
        raise LabsError(f"{rows} rows do not divide into batches of {recipe.batch}: choose another size.")
    epoch = 0
    while True:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(recipe.seed + epoch)).tolist()
        for start in range(0, rows, recipe.batch):
            yield order[start : start + recipe.batch]
        epoch += 1


def train_fleet(
    fleet: Fleet,
    tokenizer,
    data: Mapping[str, dict],
    *,
    watch: Callable[[int, Tensor], None] = lambda step, losses: None,
) -> Tensor:
    """Train all adapters of a fleet side by side.

    Args:
        data: of each tenant, rows with `prompt` and `completion`; all tenants have equally many.
        watch: called after each step with its number (from 1) and the tenants' losses.

    Returns:
        (steps, tenants): the losses of every step.

    Raises:
        LabsError: a tenant without rows, or whose loss is not finite (named, with the step).
    """
    from transformers import get_scheduler

    from labs_lib.measure.quality import collate, encode_rows

    recipe, device = fleet.recipe, fleet.model.device
    rows = {
        name: encode_rows(tokenizer, data[name]["prompt"], data[name]["completion"]) for name in fleet.tenants
    }
    counts = {len(each) for each in rows.values()}
    if len(counts) > 1 or 0 in counts:
        raise LabsError(
            f"The tenants of a fleet need equally many rows, at least one: they have {sorted(counts)}."
        )
    optimizer = torch.optim.AdamW(fleet.parameters, lr=recipe.lr, weight_decay=0.0, fused=True)
    warmup = math.ceil(recipe.warmup * recipe.steps)
    schedule = get_scheduler("linear", optimizer, warmup, recipe.steps)
    took, order = [], orders(counts.pop(), recipe)
    fleet.model.train()
    for step in range(1, recipe.steps + 1):
        picked = next(order)
        batch = collate([rows[name][i] for name in fleet.tenants for i in picked], tokenizer.pad_token_id)
        losses = fleet.losses({key: batch[key].to(device) for key in ("input_ids", "labels")})
        losses.sum().backward()
        fleet.clip()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        took.append(losses.detach().cpu())
        broken = [
            name for name, fine in zip(fleet.tenants, took[-1].isfinite().tolist(), strict=True) if not fine
        ]
        if broken:
            raise LabsError(
                f"The loss of {', '.join(broken)} became not finite at step {step}: lower the rate."
            )
        watch(step, took[-1])
    fleet.model.eval()
    return torch.stack(took)


@dataclass(frozen=True)
class Trained:
    """What training gave: adapters by tenant (PEFT's names), each tenant's losses, and the seconds for all of them."""

    adapters: dict[str, dict[str, Tensor]]
    losses: dict[str, list[float]]
    seconds: float
    cpu_seconds: float

    def final_loss(self, tenant: str) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[tenant][-max(1, len(self.losses[tenant]) // 10) :]
        return sum(tail) / len(tail)


def train(
    model, tokenizer, data: Mapping[str, dict], recipe: Recipe | None = None, *, op: str = "", watch=None
) -> Trained:
    """Train one batch of tenants from start to end; the model is given back as it was, but frozen."""
    fleet = Fleet(model, list(data), recipe or Recipe(), op)
    started, worked = time.perf_counter(), time.process_time()
    try:
        losses = train_fleet(fleet, tokenizer, data, **({"watch": watch} if watch else {}))
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        adapters = {name: fleet.state(name) for name in fleet.tenants}
    finally:
        fleet.close()
    return Trained(adapters, dict(zip(fleet.tenants, losses.T.tolist(), strict=True)), seconds, cpu)
