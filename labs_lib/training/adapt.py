"""How each arm of a sweep makes a base model trainable: one short function per method, in `METHODS`.

Our own method where it is as fast as PEFT's, else PEFT's, to which the tests prove ours equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
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
    """All weights; with the option `matrices` the target layers learn at so many times the rate."""
    import torch

    from labs_lib.methods.galore import galore_groups

    model = model.requires_grad_(True)
    if "matrices" not in arm.options:
        return Adapted(model)
    rest, matrices = (group["params"] for group in galore_groups(model, arm.targets, rank=1))
    factor = arm.options["matrices"]

    def make(lr: float) -> torch.optim.Optimizer:
        groups = [{"params": rest, "lr": lr}, {"params": matrices, "lr": factor * lr}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    return Adapted(model, optimizer=make)


def lora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our LoRA; with the option `rest`, what is no target layer (embeddings, norms) trains too, as under GaLore."""
    import torch

    from labs_lib.methods.lora import inject_lora, lora_layers

    generator = torch.Generator().manual_seed(seed)
    model = inject_lora(model, arm.targets, arm.rank, arm.alpha, generator=generator)
    if arm.options.get("rest"):
        frozen = {id(layer.base.weight) for layer in lora_layers(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
    return Adapted(model)


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
            weight += (size * weight.norm().cpu() / noise.norm() * noise).to(weight)


def qlora(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our LoRA on a base that bitsandbytes holds in 4 bits (`Arm.quantise`), and what each way to merge it would do.

    That is measured for the fresh seeds only, not for seed 0, which chooses the rate. With the option `unpack` the base
    is dequantised once instead of at every step: the same numbers several times as fast, and no report on merging.
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

    unpack = arm.options.get("unpack", False)
    model = lora(unpacked(model) if unpack else model, arm, seed, steps).model
    return Adapted(model, finish=finish if seed and not unpack else dict)


def unpacked(model):
    """Plain layers in place of bitsandbytes' 4-bit ones, with the values and in the dtype that those compute with."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from labs_lib.methods.modules import replace

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype)
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device=weight.device)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            replace(model, name, linear)
    model.is_quantized = False
    return model


def prompt(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our soft prompt, and where in the vocabulary it ended: distances to the nearest token, over the usual one.

    Options: `tokens`; `init`; `std` of "random", or `std_of_table`, in units of the vocabulary's; `text` of "text".
    `init="guide"` starts from the tenant's guide line.
    """
    import torch

    from labs_lib.methods.prompt_tuning import add_prompt, nearest_tokens
    from labs_lib.models.base import load_base
    from labs_lib.training.sweeps import TENANT
    from labs_lib.world.tenants import load_tenant

    def encode(text: str, **more) -> list[int]:
        return load_base(model.name_or_path)[1](text, **more)["input_ids"]

    options = dict(arm.options)
    text, ids = options.pop("text", ""), ()
    if "std_of_table" in options:
        table_std = model.get_input_embeddings().weight.float().std().item()
        options["std"] = options.pop("std_of_table") * table_std
    if options.get("init") == "guide":
        options["init"], ids = "text", encode(f"Guide: {load_tenant(TENANT).guide}\n")
    elif text:
        ids = encode(text, add_special_tokens=False)
    model = add_prompt(model, ids=ids, generator=torch.Generator().manual_seed(seed), **options)
    table = model.base.get_input_embeddings().weight.detach()
    start = model.prompt.detach().clone()

    def finish() -> dict:
        measured = {}
        for metric in ("euclidean", "cosine"):
            usual = nearest_tokens(table, table, k=2, metric=metric)[1][:, 1].median()
            for when, vectors in (("", model.prompt), ("_at_start", start)):
                ratios = nearest_tokens(vectors, table, metric=metric)[1][:, 0] / usual
                measured[f"{metric}{when}"] = ratios.median().item()
        length = (model.prompt.norm(dim=1).median() / table.norm(dim=1).median()).item()
        moved = (model.prompt - start).norm(dim=1).median() / table.norm(dim=1).median()
        return measured | {"length": length, "moved": moved.item()}

    return Adapted(model, finish=finish)


def bottleneck(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our bottleneck adapters. Options: `placement`, `bottleneck` and what else inject_adapters takes."""
    import torch

    from labs_lib.methods.adapters import inject_adapters

    return Adapted(inject_adapters(model, generator=torch.Generator().manual_seed(seed), **arm.options))


def llama_adapter(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our LLaMA-Adapter, and how far its gates opened. Options: `prompts`, `layers`."""
    import torch

    from labs_lib.methods.llama_adapter import inject_llama_adapter, prompted_layers

    model = inject_llama_adapter(model, generator=torch.Generator().manual_seed(seed), **arm.options)

    def finish() -> dict:
        return {"gates": [layer.adaption_gate.item() for layer in prompted_layers(model).values()]}

    return Adapted(model, finish=finish)


def prefix(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our prefix; options: `tokens`, and whatever else `add_prefix` takes, e.g. `hidden` for the projection.

    With the option `text` it starts from the keys and values of that text's first tokens. How far it lies from what
    real tokens leave in the cache (`prefix_distance`) is recorded for the start and for the end.
    """
    import torch
    from transformers import DynamicCache

    from labs_lib.methods.prefix_tuning import DirectPrefix, PrefixTuning, add_prefix, text_prefix
    from labs_lib.methods.prompt_tuning import leave_base_out
    from labs_lib.models.base import load_base
    from labs_lib.world.tasks import load_task

    options = dict(arm.options)
    if text := options.pop("text", ""):
        ids = load_base(model.name_or_path)[1](text)["input_ids"]
        words = text_prefix(model, ids[: options["tokens"]])
        model = leave_base_out(PrefixTuning(model, words, DynamicCache))
    else:
        generator = torch.Generator().manual_seed(seed)
        model = add_prefix(model, cache=DynamicCache, generator=generator, **options)
    start = DirectPrefix(model.prefix())

    def finish() -> dict:
        tokenizer = load_base(model.base.name_or_path)[1]

        def cached(split):
            ids = tokenizer(load_task("retention")[split]["prompt"][::32])["input_ids"]
            return torch.cat([text_prefix(model.base, each).weight.detach() for each in ids])

        real, others = cached("train"), cached("test")
        ends = {"distance_at_start": start(), "distance": model.prefix()}
        return {name: prefix_distance(prefix.detach(), real, others) for name, prefix in ends.items()}

    return Adapted(model, finish=finish)


def prefix_distance(prefix, real, others) -> float:
    """How far virtual tokens lie from the nearest real one, over how far other real ones do (medians).

    `prefix` is (tokens, 2 x layers x width); `real` and `others` are the same for tokens that the base has read.
    """
    from labs_lib.methods.prompt_tuning import nearest_tokens

    far, usual = (nearest_tokens(each, real, metric="euclidean")[1].median() for each in (prefix, others))
    return (far / usual).item()


def ia3(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Our (IA)3 on keys, values and the FFN; the option `feedforward` names other layers that scale their inputs."""
    from labs_lib.methods.ia3 import FEEDFORWARD, inject_ia3

    return Adapted(inject_ia3(model, feedforward=arm.options.get("feedforward", FEEDFORWARD)))


def galore(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """Every weight trains, by our GaLore with the arm's rank. Options: `update_proj_gap`, `scale`, `proj_type`.

    All else is Adam as the other arms have it (eps 1e-8, no decay).
    """
    from labs_lib.methods.galore import DEFAULTS, GaLoreAdamW, galore_groups

    projection = {name: arm.options[name] for name in DEFAULTS if name in arm.options}
    groups = galore_groups(model.requires_grad_(True), arm.targets, arm.rank, **projection)
    return Adapted(model, optimizer=lambda lr: GaLoreAdamW(groups, lr=lr, eps=1e-8))


def zoo(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """A method of the zoo, by its name in the option `method`; the other options are its own.

    The arm's rank and alpha go to those that take them; OFT and BOFT have blocks instead.
    """
    import torch

    from labs_lib.methods.updates import spectrum, update_of
    from labs_lib.methods.zoo import ZOO
    from labs_lib.methods.zoo.layer import inject_zoo, options_of, zoo_layers

    options = dict(arm.options)
    kind = ZOO[options.pop("method")]
    sizes = {"rank": arm.rank, "alpha": arm.alpha}
    options = {name: size for name, size in sizes.items() if name in options_of(kind)} | options
    generator = torch.Generator().manual_seed(seed)
    model = inject_zoo(model, kind, arm.targets, generator=generator, **options)

    def finish() -> dict:
        """Means over the layers: two ranks of the update, and its size over the weight's (Frobenius)."""
        spectra, sizes = [], []
        for name, layer in zoo_layers(model).items():
            update = update_of(model, name)
            spectra.append(spectrum(update))
            sizes.append((update.norm() / layer.base.weight.norm()).item())
        ranks = {
            kind: [getattr(each, kind) for each in spectra] for kind in ("effective_rank", "stable_rank")
        }
        return {kind: round(fmean(values), 3) for kind, values in (ranks | {"change": sizes}).items()}

    return Adapted(model, finish=finish)


def mix_and_match(model, arm: "Arm", seed: int, steps: int) -> Adapted:
    """A prefix for attention and a scaled parallel adapter for the FFN.

    Options: `tokens`, `bottleneck`, `scale`; `prefix_rate` is the prefix's learning rate over the adapters' (1).
    """
    import torch
    from transformers import DynamicCache

    from labs_lib.methods.lora import trainable_parameters
    from labs_lib.methods.unified import mix_and_match

    options = dict(arm.options)
    times, generator = options.pop("prefix_rate", 1), torch.Generator().manual_seed(seed)
    model = mix_and_match(model, cache=DynamicCache, generator=generator, **options)
    groups = [trainable_parameters(part) for part in (model.base, model.prefix)]

    def optimizer(lr: float) -> torch.optim.Optimizer:
        rates = zip(groups, (lr, times * lr), strict=True)
        return torch.optim.AdamW([{"params": each, "lr": rate} for each, rate in rates], weight_decay=0.0)

    return Adapted(model, optimizer=optimizer if times != 1 else None)


def peft(model, config, seed: int) -> Adapted:
    """Any PEFT method by its configuration."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    return Adapted(get_peft_model(model, config))


METHODS: "dict[str, Callable[..., Adapted]]" = {
    each.__name__: each
    for each in (
        full,
        lora,
        dora,
        rslora,
        lora_plus,
        adalora,
        qlora,
        prompt,
        bottleneck,
        llama_adapter,
        prefix,
        ia3,
        galore,
        zoo,
        mix_and_match,
    )
}
