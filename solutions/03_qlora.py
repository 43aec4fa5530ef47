"""Lab 03, QLoRA. Its records: `labs sweep qlora` and `labs sweep qlora_style`, and sweeps of labs 01, 02 and 07."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, look, show

lab = setup(lab="03", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# LoRA freezes $W$. A weight that never changes need not be stored in a form that can change: QLoRA
# ([Dettmers et al., 2023](https://arxiv.org/abs/2305.14314)) keeps it in 4 bits and turns it back into numbers each
# time it is used.
#
# $$y = \text{dequantise}(\text{codes}, \text{scales})\, x + \tfrac{\alpha}{r} B A x$$
#
# Four bits tell 16 values apart. Which 16? Weights of a trained network are close to normally distributed, so
# 4-bit NormalFloat (NF4) takes quantiles of the normal distribution: dense where the weights are, sparse where they
# are few. Each block of 64 weights is first divided by its largest, so that all lie between $-1$ and $1$.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch

from labs_lib.methods.lora import target_names
from labs_lib.methods.qlora import integer_codebook
from labs_lib.methods.qlora import nf4_codebook as nf4_levels

base, tokenizer = lab.base()
names = target_names(base, "all-linear")
flat = torch.cat([base.get_submodule(name).weight.detach().float().cpu().view(-1) for name in names])
flat = flat[: flat.numel() // 64 * 64].view(-1, 64)
scaled = (flat / flat.abs().amax(1, keepdim=True)).view(-1)
fig, ax = plt.subplots(figsize=(7.2, 3.2))
heights, _, _ = ax.hist(scaled.numpy(), bins=80, density=True, color=look("base").color, alpha=0.35)
rows = (
    ("NF4", nf4_levels(), look("qlora").color, -0.12),
    ("integers", integer_codebook(4), "#D55E00", -0.28),
)
for label, levels, color, y in rows:
    ax.plot(levels, [y] * len(levels), "|", color=color, markersize=12, markeredgewidth=2)
    ax.annotate(label, (1.04, y), color=color, va="center", annotation_clip=False)
share = (scaled.abs() < 0.5).float().mean().item()
inner = [int((levels.abs() < 0.5).sum()) for _, levels, _, _ in rows]
ax.set(xlim=(-1.03, 1.03), ylim=(-0.38, None), yticks=(0, 0.5, 1))
title = f"The inner half: {share:.0%} of the weights, {inner[0]} NF4 values, {inner[1]} integers"
finding(ax, title, "weight over its block's largest", "density")
show(
    fig,
    alt="Histogram of scaled weights, bell-shaped around zero; NF4's 16 levels are dense in the middle, integers even.",
)

# %% [markdown]
# **By hand.** One block of four weights: $(0.5, -0.2, 0.1, 0)$. Its scale is the largest absolute value, $0.5$. Scaled:
# $(1, -0.4, 0.2, 0)$. The nearest of the 16 values are $1$, $-0.395$, $0.161$ and $0$: numbers 15, 3, 9 and 7 of the
# list. Stored are these four codes and $0.5$. Dequantised: $(0.5, -0.197, 0.080, 0)$.
#
# Two weights came back exactly: the largest of a block and zero always do.

# %% [markdown]
# ## 2. Build it
# **Exercise 1: the 16 values.** Quantiles at even steps have equal probability between them, so every code is used
# about equally often. Zero must be one of the values, which leaves 15: seven negative, eight positive.
#
# *You should see* $-1$, $0$ and $1$ in the list, and values closer together around zero.

# %% tags=["exercise"]
from labs_lib.methods.qlora import nf4_codebook

# %%
nf4_codebook = check(nf4_codebook)
print([round(value, 3) for value in nf4_codebook().tolist()])

# %% [markdown]
# **Exercise 2: block by block.** One scale for a whole matrix would let one large weight squeeze all others into a few
# codes. With a scale per block, an outlier spoils 63 neighbours only.
#
# *You should see* the codes and the numbers from above.

# %% tags=["exercise"]
from labs_lib.methods.qlora import quantise_blockwise

# %%
from labs_lib.methods.qlora import dequantise_blockwise

quantise_blockwise = check(quantise_blockwise)
codes, scales = quantise_blockwise(torch.tensor([0.5, -0.2, 0.1, 0.0]), nf4_codebook(), block=4)
back = dequantise_blockwise(codes, scales, nf4_codebook(), block=4)
print("codes", codes.tolist(), "scale", scales.tolist(), "back", [round(w, 3) for w in back.tolist()])

# %% [markdown]
# **Exercise 3: scales of scales.** A float32 scale for 64 weights costs half a bit per weight. There are many scales,
# so they are quantised as well, to 8 bits in blocks of 256. They are all positive: subtract their mean first.
#
# *You should see* the scales come back with an error well under a percent.

# %% tags=["exercise"]
from labs_lib.methods.qlora import double_quantise

# %%
from labs_lib.methods.qlora import double_dequantise

double_quantise = check(double_quantise)
weight = base.get_submodule(names[0]).weight.detach().cpu()
codes, scales = quantise_blockwise(weight, nf4_codebook())
again = double_dequantise(*double_quantise(scales))
print(f"{len(scales)} scales, off by {((again - scales).abs() / scales).mean():.2%} on average")

# %% [markdown]
# **Your turn.** How many bits does one weight take in all: its code, its share of an 8-bit scale for 64 weights, and its
# share of one float32 number for 256 scales?

# %%
### BEGIN SOLUTION
### STUB: bits = ...  # bits per weight
bits = 4 + 8 / 64 + 32 / (64 * 256)
### END SOLUTION
bits = check(bits, "lab03.bits")

# %% [markdown]
# **Exercise 4: the layer.** It stores codes and scales, and dequantises in `forward`. The product is made by
# `FrozenMatmul`, a given: plain `F.linear` would keep the dequantised weight until the backward pass, and nothing would
# be saved. `FrozenMatmul` keeps the 4-bit layer and dequantises a second time.
#
# *You should see* an output near the float layer's, a gradient for $x$, and no parameters.

# %% tags=["exercise"]
from labs_lib.methods.qlora import NF4Linear

# %%
from torch.nn import functional as F

from labs_lib.measure import peak_memory, tensor_bytes

NF4Linear = check(NF4Linear)
linear = torch.nn.Linear(1024, 1024, bias=False)
layer, x = NF4Linear(linear), torch.randn(1, 1024, requires_grad=True)
print(f"output off by {(layer(x) - linear(x)).norm() / linear(x).norm():.1%}")

# %%
print(f"bytes: {tensor_bytes(linear):,} in float32, {tensor_bytes(layer):,} in 4 bits")
ways = {"F.linear": lambda: F.linear(x, layer.weight), "NF4Linear": lambda: layer(x)}
for how, product in ways.items():
    held = peak_memory(product, linear, layer, x)
    print(f"{how:10s} holds {held.after - held.before:,} bytes more until the backward pass")

# %% [markdown]
# The rest of QLoRA is lab 01's `LoRALinear` around this layer. `inject_qlora` puts both into a model: every linear layer
# but the head in 4 bits, LoRA on the targets.

# %%
from labs_lib.measure import count_parameters
from labs_lib.methods.lora import lora_layers
from labs_lib.methods.qlora import inject_qlora

ours, _ = lab.base(dtype=torch.float32)
before = tensor_bytes(ours)
inject_qlora(ours, "all-linear", rank=8, alpha=16)
print(count_parameters(ours), "(4-bit weights are buffers, so not in this total)")
print(f"bytes: {before:,} before, {tensor_bytes(ours):,} with the adapter")

# %% [markdown]
# ## 3. Prove it
# bitsandbytes is the library behind every QLoRA. First its kernels, on each weight of the base. *You should see* equal
# codes, and dequantised weights that agree to $10^{-6}$.

# %%
from bitsandbytes import functional as kernels


four_bit, _ = lab.base(dtype=torch.float32, quantise="nf4")

# %%
equal, off = [], []
for name in names:
    theirs = four_bit.get_submodule(name).weight
    if theirs.dtype == torch.uint8:
        mine = ours.get_submodule(name).base
        equal.append(torch.equal(mine.packed, theirs.data.view(-1)))
        expected = kernels.dequantize_4bit(theirs.data, theirs.quant_state)
        off.append((mine.weight - expected).abs().max().item())
print(
    f"codes equal in {sum(equal)} of {len(equal)} layers; dequantised weights differ by at most {max(off):.1g}"
)
same = all(equal) and max(off) <= 1e-6
assert same or lab.device != "cpu"

# %% [markdown]
# Then the whole model: PEFT's LoRA on bitsandbytes' 4-bit layers, the same $A$ and $B$ in both. *You should see*
# differences of zero or a few units in the last digit.

# %%
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from labs_lib import load_task, load_tenant
from labs_lib.measure.quality import collate, encode_rows
from labs_lib.methods.lora import lora_state_dict

for layer in lora_layers(ours).values():
    torch.nn.init.normal_(layer.lora_B, std=0.02)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
peft_model = get_peft_model(four_bit, config).eval()
loaded = set_peft_model_state_dict(peft_model, lora_state_dict(ours))

# %%
tenant = load_tenant("fathom-eleven")
style = load_task("style", tenant=tenant.slug)
texts = style["train"][:8]
batch = collate(encode_rows(tokenizer, texts["prompt"], texts["completion"]), tokenizer.pad_token_id)
batch = {key: value.to(lab.device) for key, value in batch.items()}

# %%
outputs = [model(**batch) for model in (ours, peft_model)]
for output in outputs:
    output.loss.backward()
differences = {"logits": [outputs[0].logits - outputs[1].logits]}
for factor in ("lora_A", "lora_B"):
    differences[f"gradient of {factor[-1]}"] = [
        getattr(layer, factor).grad
        - getattr(peft_model.base_model.model.get_submodule(name), factor).default.weight.grad
        for name, layer in lora_layers(ours).items()
    ]

# %%
tolerance = 100 * torch.finfo(torch.float32).eps if same else 0.1  # a GPU may break ties otherwise
for what, each in differences.items():
    largest = max(difference.abs().max().item() for difference in each)
    print(f"largest difference in {what:14s} {largest:.1e}")
    assert largest <= tolerance, what

# %% [markdown]
# The adapter's file is a LoRA file: nothing in it says "4 bits". *You should see* that an adapter saved by PEFT from its
# 4-bit model loads into ours, and the reverse.

# %%
import tempfile
from pathlib import Path

from labs_lib.methods.io import read_adapter, save_lora
from labs_lib.methods.lora import load_lora_state_dict
from peft import PeftModel

shelf = tempfile.TemporaryDirectory()
folder = Path(shelf.name)
save_lora(ours, folder / "ours", base="shipped")
peft_model.save_pretrained(folder / "theirs")

# %%
there = PeftModel.from_pretrained(lab.base(dtype=torch.float32, quantise="nf4")[0], folder / "ours").eval()
back = inject_qlora(lab.base(dtype=torch.float32)[0], "all-linear", rank=8, alpha=16)
load_lora_state_dict(back, read_adapter(folder / "theirs")[1])
with torch.no_grad():
    logits = ours(**batch).logits
    for which, model in (("ours in theirs", there), ("theirs in ours", back)):
        print(f"{which}: logits differ by {(model(**batch).logits - logits).abs().max():.1g}")

# %% [markdown] tags=["takeaway"]
# QLoRA is two separate things: a way to store a frozen weight, and the LoRA you know. The adapter does not know how its
# base is stored, which makes it easy to put it on another base than the one it was trained on. Remember that for the
# merge.

# %% [markdown]
# ## 4. Train it
# **What do 4 bits cost the base?** We store the base in four data types and several block sizes and compare its
# predictions with those of the float base (KL divergence, on facts that it knows). **Predict**: which 4-bit type
# comes first, and does a small block help more than a better type?

# %%
import copy

from labs_lib.measure.quality import divergence
from labs_lib.methods.qlora import fp4_codebook
from labs_lib.world.tasks import known_facts

known = known_facts()[: lab.rows(192)]
known = {column: [fact[column] for fact in known] for column in ("prompt", "completion")}
stored = copy.deepcopy(base)


def store(codebook, block):
    """Put what is left of each weight after quantising into `stored`; returns the mean relative error."""
    codebook, errors = codebook.to(lab.device), []
    for name in names:
        weight = base.get_submodule(name).weight.detach()
        codes, scales = quantise_blockwise(weight, codebook, block)
        back = dequantise_blockwise(codes, scales, codebook, block).view_as(weight)
        errors.append(((back - weight).norm() / weight.norm()).item())
        stored.get_submodule(name).weight.data.copy_(back)
    return sum(errors) / len(errors)


# %%
types = {
    "NF4": nf4_codebook(),
    "4-bit float": fp4_codebook(),
    "4-bit integer": integer_codebook(4),
    "8-bit integer": integer_codebook(8),
}
blocks = lab.grid([32, 64, 128, 256, 1024, 4096])

# %%
errors, shifts = {}, {}
for label, codebook in types.items():
    for block in blocks:
        errors[label, block] = store(codebook, block)
        shifts[label, block] = divergence(base, stored, tokenizer, known)
for label in types:
    print(
        f"{label:14s} block 64 or the nearest tried: error {errors[label, min(blocks, key=lambda b: abs(b - 64))]:.1%}"
    )

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7))
colours = {
    "NF4": look("qlora").color,
    "4-bit float": "#D55E00",
    "4-bit integer": "#E69F00",
    "8-bit integer": "#5F5F5F",
}
for (label, colour), marker in zip(colours.items(), "soD^", strict=True):
    left.plot(blocks, [100 * errors[label, b] for b in blocks], color=colour, marker=marker, label=label)
    per_weight = [(8 if label[0] == "8" else 4) + 32 / b for b in blocks]
    right.plot(per_weight, [shifts[label, b] for b in blocks], color=colour, marker=marker, label=label)
left.set(xscale="log", yscale="log")
left.set_xticks(blocks, [str(b) for b in blocks])
left.set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
left.minorticks_off()
right.set(yscale="log")
left.legend(fontsize=8)
largest = max(blocks)
gain = errors["4-bit float", largest] / errors["NF4", largest]
finding(
    left,
    f"NF4 errs least of the 4-bit types ({gain:.2f} x less)",
    "weights per block",
    "error (% of the weight's norm)",
)
ratio = shifts["NF4", largest] / shifts["8-bit integer", largest]
finding(
    right,
    "Four bits more buy what no type does",
    "bits per weight, scales in float32",
    "KL from the float base (nats)",
)
show(
    fig,
    alt="Left, error against block size: NF4 lowest of the 4-bit types at every size, 8-bit integers far lower. "
    "Right, KL divergence from the float base against bits per weight: falls with smaller blocks and most with 8 bits.",
)

# %% [markdown]
# **Does the adapter make up for it?** It is trained through the 4-bit base, so it sees the errors and can correct them.
# Three methods, each with its own sweep of learning rates: full fine-tuning, LoRA on the float base, and QLoRA on
# real bitsandbytes layers (`labs sweep qlora`, `labs sweep qlora_style`).
#
# **Predict**: by how many points will QLoRA's recall of new facts differ from LoRA's? Below zero means worse.

# %%
### BEGIN SOLUTION
### STUB: predict_gap = ...  # points, QLoRA minus LoRA
predict_gap = -3
### END SOLUTION
predict_gap = check(predict_gap, "lab03.predict_gap")

# %% tags=["hide-input"]
from labs_lib.measure import load_record, mean_ci, paired_difference

FACTS, STYLE = "knowledge, 512 facts", "style"
equal_steps = load_record("sweep_adalora", device="cpu")  # full fine-tuning for as many steps as the others
sources = {
    ("lora", FACTS): ("sweep_tune_lora", "LoRA r8, all linear"),
    ("lora", STYLE): ("sweep_tune_lora_style", "LoRA r8, all linear"),
    ("full", FACTS): ("sweep_adalora" if equal_steps.rows else "sweep_lora_rank", "full fine-tuning"),
    ("full", STYLE): ("sweep_tune_lora_style", "full fine-tuning"),
    ("qlora", FACTS): ("sweep_qlora", "QLoRA r8, all linear"),
    ("qlora", STYLE): ("sweep_qlora_style", "QLoRA r8, all linear"),
}
records = {
    name: load_record(name, device="cpu") for name in dict.fromkeys(name for name, _ in sources.values())
}
for record in records.values():
    print(record)


def runs(method, task, stage="final"):
    """Recorded runs of a method on a task: the first stage by rate, or fresh seeds at the best rate."""
    record, arm = sources[method, task]
    rows = [
        r for r in records[record].rows if (r["arm"]["name"], r["label"], r["stage"]) == (arm, task, stage)
    ]
    return sorted(rows, key=lambda row: (row["seed"], row["lr"]))


# %% tags=["hide-input"]
from labs_lib.lab.cards import table
from labs_lib.methods.tuning import pick_rate

MEASURES = {
    FACTS: {"score": "recalled %", "kept": "old facts kept %"},
    STYLE: {
        "score": "exact %",
        "compliance": "compliance %",
        "fidelity": "fidelity %",
        "kept": "old facts kept %",
    },
}


def results(task):
    """One row per method that is recorded: mean and 95 % interval over its fresh seeds."""
    lines = []
    for method, where in sources:
        rows = runs(method, where)
        if where != task or not rows:
            continue
        _, edge = pick_rate({row["lr"]: row["score"] for row in runs(method, task, "sweep")})
        line = {
            "": look(method).label,
            "trained": f"{rows[0]['params']:,}",
            "steps": rows[0]["steps"],
            "seeds": len(rows),
            "rate": f"{rows[0]['lr']:g}{' (edge)' if edge else ''}",
        }
        for key, title in MEASURES[task].items():
            share = mean_ci([100 * row[key] for row in rows])
            line[title] = f"{share.value:.0f} [{share.lo:.0f}, {share.hi:.0f}]"
        lines.append(line)
    return lines or [{"": "not recorded"}]


# %% [markdown]
# 512 new facts; each method at its own best rate, mean and 95 % interval of its fresh
# seeds. *Edge* marks a best rate at
# the end of the grid: beyond it the method might do better still.

# %%
table(results(FACTS))

# %% [markdown]
# One customer's style.

# %%
table(results(STYLE))

# %% tags=["hide-input"]
from statistics import fmean

gaps = {}
for task in (FACTS, STYLE):
    pair = [{row["seed"]: 100 * row["score"] for row in runs(method, task)} for method in ("qlora", "lora")]
    shared = sorted(pair[0].keys() & pair[1].keys())
    if len(shared) > 1:
        gaps[task] = paired_difference(*([scores[seed] for seed in shared] for scores in pair))
        print(
            f"{task}: QLoRA minus LoRA {gaps[task]} points, {len(shared)} paired seeds; you said {predict_gap:g}"
        )


def draw_rates():
    fig, axes = plt.subplots(1, len(gaps), figsize=(4.6 * len(gaps), 3.6), sharey=True, squeeze=False)
    axes = axes[0]
    for ax, task in zip(axes, gaps, strict=True):
        for method in ("lora", "qlora", "full"):
            drawn, chosen = look(method), runs(method, task)
            if not chosen or chosen[0]["steps"] != runs("qlora", task)[0]["steps"]:
                continue
            points = {row["lr"]: 100 * row["score"] for row in runs(method, task, "sweep")}
            line = {"color": drawn.color, "linestyle": drawn.linestyle, "marker": drawn.marker}
            ax.plot(points.keys(), points.values(), label=drawn.label, **line)
            fresh = [100 * row["score"] for row in chosen]
            ax.plot([row["lr"] for row in chosen], fresh, "_", color=drawn.color, markersize=10)
        ax.set_xscale("log")
        told = not gaps[task].lo <= 0 <= gaps[task].hi
        what = {FACTS: "Facts", STYLE: "Style"}[task]
        word = f"QLoRA {gaps[task].value:+.0f} points to LoRA" if told else "QLoRA and LoRA not told apart"
        finding(ax, f"{what}: {word}", "learning rate", "score (%)")
    axes[1].legend(fontsize=8, loc="lower right")
    listed = "; ".join(f"{task}: QLoRA minus LoRA {gap}" for task, gap in gaps.items())
    show(
        fig,
        alt=f"Score against learning rate for LoRA, QLoRA and full fine-tuning, facts and style. {listed}.",
    )


if gaps:
    draw_rates()

# %% [markdown]
# **One run live**, the style, on real bitsandbytes layers: lab 01's `inject_lora` finds them, since they are linear
# layers. It repeats a run of the record with its seed. *You should see* the recorded score on the model of the record.

# %%
from labs_lib import fit
from labs_lib.measure.quality import style_quality
from labs_lib.methods.lora import inject_lora

recorded = runs("qlora", STYLE)
lr, seed = (recorded[0]["lr"], recorded[0]["seed"]) if recorded else (5e-3, 1)
lr *= min(1, 128 / base.config.hidden_size)  # wider models take smaller steps
trained, _ = lab.base(quantise="nf4")
inject_lora(trained, "all-linear", rank=8, alpha=16, generator=torch.Generator().manual_seed(seed))
run = fit(trained, tokenizer, style["train"][:], steps=lab.steps(60), lr=lr, seed=seed)

# %%
test = style["test"][: lab.rows(48)]
score = style_quality(trained, tokenizer, test, tenant)
told = f"recorded {recorded[0]['score']:.1%}" if recorded else "nothing recorded"
print(
    f"exact {score.exact:.1%}, compliance {score.compliance:.1%}, fidelity {score.fidelity:.1%}; {told} on small"
)

# %% [markdown]
# **What a step costs.** The 4-bit layers are dequantised twice per step. That is no multiplication of matrices, so it
# does not show in FLOPs, only on the clock. **Predict** the ratio of the step times.

# %%
from labs_lib.measure import count_flops, time_ratio

float_lora, _ = lab.base()
inject_lora(float_lora, "all-linear", rank=8, alpha=16)
steps = {
    name: lambda m=model: m(**batch).loss.backward() for name, model in (("lora", float_lora), ("ours", ours))
}
print(f"FLOPs of a QLoRA step over LoRA's: {count_flops(steps['ours']) / count_flops(steps['lora']):.3f}")
four_bit_step = time_ratio(lambda: trained(**batch).loss.backward(), steps["lora"], rounds=lab.rows(11))
print(f"time of a step with bitsandbytes over LoRA's, forward and backward: {four_bit_step}")

# %% [markdown]
# **States in 8 bits.** QLoRA is often run with an 8-bit, *paged* AdamW: its two states per parameter in one byte each,
# block-wise again, and moved to the host's memory when the GPU's is full. How much does that save here?
#
# **Your turn.** LoRA of rank 16 on all linear layers of Llama-2-7B has 39,976,960 parameters. How many gigabytes
# ($10^9$ bytes) are AdamW's states in float32?

# %%
### BEGIN SOLUTION
### STUB: adam_gigabytes = ...  # GB
adam_gigabytes = 2 * 4 * 39_976_960 / 1e9
### END SOLUTION
adam_gigabytes = check(adam_gigabytes, "lab03.adam_gigabytes")

# %%
import warnings

import bitsandbytes
from labs_lib.measure import optimizer_state_bytes

adapter = [parameter for parameter in trained.parameters() if parameter.requires_grad]
kinds = {
    "AdamW": lambda: torch.optim.AdamW(adapter),
    "AdamW8bit": lambda: bitsandbytes.optim.AdamW8bit(adapter),
    "AdamW8bit, min_8bit_size=1": lambda: bitsandbytes.optim.AdamW8bit(adapter, min_8bit_size=1),
    "PagedAdamW8bit, min_8bit_size=1": lambda: bitsandbytes.optim.PagedAdamW8bit(adapter, min_8bit_size=1),
}
before = [parameter.detach().clone() for parameter in adapter]
for name, make in kinds.items():
    optimizer = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()  # the states are made in the first step
    said = "; warns: " + str(caught[0].message) if caught else ""
    print(f"{name:32s} {optimizer_state_bytes(optimizer):9,d} bytes of states{said}")
for parameter, value in zip(adapter, before, strict=True):
    parameter.data.copy_(value)

# %% [markdown]
# Two surprises. By default nothing is saved: bitsandbytes keeps tensors under 4,096 numbers in 32 bits, and here every
# factor is smaller. And on a CPU nothing is paged. On a 7B model the 8 bits do apply, but for an adapter they save
# a quarter of a gigabyte of some five.
#
# Do they cost quality? One run of the style with 8-bit states in every tensor, one seed, so a smoke test and no proof.
# *You should see* nearly the same text quality.

# %%
eight, _ = lab.base(quantise="nf4")
inject_lora(eight, "all-linear", rank=8, alpha=16, generator=torch.Generator().manual_seed(seed))
adapter = [parameter for parameter in eight.parameters() if parameter.requires_grad]
optimizer = bitsandbytes.optim.AdamW8bit(adapter, lr=lr, weight_decay=0.0, min_8bit_size=1)
plan = {"steps": lab.steps(60), "lr": lr, "seed": seed, "optimizer": optimizer}
eight_run = fit(eight, tokenizer, style["train"][:], **plan)
eight_score = style_quality(eight, tokenizer, test, tenant)
print(f"loss {eight_run.final_loss:.4f} against {run.final_loss:.4f} with 32-bit states")
print(f"exact {eight_score.exact:.1%} against {score.exact:.1%}")

# %% [markdown] tags=["takeaway"]
# Training through a 4-bit base costs time and saves memory. These few seeds show no loss of quality, and their intervals
# are wide: on facts they exclude neither a large loss nor a gain. The adapter's optimizer is small either way; it is the
# base's 4 bits that pay.

# %% [markdown]
# ## 5. The chapter on trial
# **Claim 7.** The chapter prints a piece of code under the comment "the adapter trains in float16 while the base stays in
# 4-bit NormalFloat". We run it as printed, on a base in float16, and look.

# %%
half, _ = lab.base(dtype=torch.float16)
dora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_dropout=0.05,
    use_dora=True,
    task_type="CAUSAL_LM",
)

# %%
as_printed = get_peft_model(half, dora_config)
projection = as_printed.base_model.model.model.layers[0].self_attn.q_proj
kinds = {"base": projection.base_layer.weight.dtype, "adapter": projection.lora_A.default.weight.dtype}
print(
    "as printed:",
    kinds,
    "| with quantization_config:",
    peft_model.base_model.model.get_submodule(names[0]).base_layer.weight.dtype,
)
claim(7).observe(
    parts={"base": kinds["base"] == torch.uint8, "adapter": kinds["adapter"] == torch.float16},
    note="The code has no quantization_config; PEFT raises adapters of half-precision bases to float32.",
)

# %% [markdown]
# The 4 bits come from the *loading* of the base, `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
# bnb_4bit_use_double_quant=True)`, of which the chapter's code has nothing.
#
# **Claim 29**: a merged adapter costs nothing, QLoRA's included. Lab 01 confirmed it for LoRA. With a 4-bit base there is
# a choice: quantise the sum $W + \Delta W$ to 4 bits again, or leave it in floating point.
#
# **Predict**: QLoRA recalls most of its new facts. What percentage is left after merging in 4 bits?

# %%
### BEGIN SOLUTION
### STUB: predict_recall_merged = ...  # percent of the facts
predict_recall_merged = 60
### END SOLUTION
predict_recall_merged = check(predict_recall_merged, "lab03.predict_recall_merged")

# %% [markdown]
# The adapter that you trained live goes into our own 4-bit model and is merged both ways. *You should see* the same
# texts from the float merge, and other texts from the 4-bit one.

# %%
from labs_lib.methods.qlora import merge_qlora

apart = inject_qlora(lab.base(dtype=torch.float32)[0], "all-linear", rank=8, alpha=16)
load_lora_state_dict(apart, lora_state_dict(trained))
merged = {
    "in 4 bits": merge_qlora(copy.deepcopy(apart), four_bit=True),
    "dequantised, float32": merge_qlora(copy.deepcopy(apart), four_bit=False),
}

# %%
moved = {}
for name, model in merged.items():
    score_merged = style_quality(model, tokenizer, test, tenant)
    moved[name] = divergence(apart, model, tokenizer, test)
    print(
        f"merged {name:21s} KL {moved[name]:.1e} nats, exact {score_merged.exact:.0%}; apart {score.exact:.0%}"
    )
codes = [
    apart.get_submodule(n).base.packed != merged["in 4 bits"].get_submodule(n).packed
    for n in names
    if hasattr(merged["in 4 bits"].get_submodule(n), "packed")
]
changed = torch.cat([code.view(-1) for code in codes]).float().mean()
print(f"bytes of two codes that the 4-bit merge changed: {changed:.0%}")

# %% tags=["hide-input"]
WAYS = {
    "nf4": "sum in 4 bits again",
    "original": "on the original floats",
    "bfloat16": "dequantised, bfloat16",
    "float32": "dequantised, float32",
}


def merges(task, way, key):
    """A measurement of one way to merge, one number per recorded seed."""
    return [row["merge"][way][key] for row in runs("qlora", task)]


recalls = {way: fmean(merges(FACTS, way, "recall")) for way in WAYS if runs("qlora", FACTS)}
for way, share in recalls.items():
    print(f"{WAYS[way]:22s} recall after merging {share:.0%}; you said {predict_recall_merged} % in 4 bits")


# %% tags=["hide-input"]
def draw_merges():
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    dots = {FACTS: ("kl_facts", "s", look("qlora").color, -0.13), STYLE: ("kl_style", "o", "#D55E00", 0.13)}
    dots = {task: dot for task, dot in dots.items() if runs("qlora", task)}
    for y, way in enumerate(WAYS):
        for task, (key, marker, colour, shift) in dots.items():
            values = [max(value, 1e-14) for value in merges(task, way, key)]
            label = f"{key[3:]} adapter" if y == 0 else None
            left.plot(values, [y + shift] * len(values), marker, color=colour, alpha=0.7, label=label)
        recall = [100 * share for share in merges(FACTS, way, "recall")]
        right.plot(recall, [y] * len(recall), "s", color=look("qlora").color, alpha=0.4)
        right.plot(100 * recalls[way], y, "|", color="#000000", markersize=18)
    left.axvline(1e-3, color="#5F5F5F", linestyle="--", linewidth=1)
    left.annotate("0.001", (1e-3, -0.45), xytext=(3, 0), textcoords="offset points", size=8.5, va="center")
    left.set(xscale="log", ylim=(3.5, -0.6))
    left.set_yticks(range(len(WAYS)), list(WAYS.values()))
    left.legend(fontsize=8)
    right.set_xlim(0, 100)
    for ax in (left, right):
        ax.grid(axis="x")
    lost = 100 * (recalls["float32"] - recalls["nf4"])
    finding(left, "Merged in 4 bits, it is another model", "KL from the model not merged (nats)")
    finding(right, f"and recalls {lost:.0f} points less", "new facts recalled after merging (%)")
    listed = "; ".join(f"{WAYS[way]} {share:.0%}" for way, share in recalls.items())
    show(
        fig,
        alt=f"Left, KL divergence of each way to merge, log scale. Right, recall after merging: {listed}.",
    )


if recalls:
    draw_merges()

# %% [markdown]
# Different is not always worse: a style can survive a 4-bit merge, as your live run shows. Facts, of which nothing can
# be guessed, suffer first. The second way, adding the update to the *original* weights, is the common mistake: the adapter
# was trained on the dequantised ones and had corrected their errors, which are not there any more.

# %%
from labs_lib import random_like

llama = random_like("llama-2-7b")
bytes_of = {"bfloat16": tensor_bytes(llama)}
total = count_parameters(llama).total
inject_qlora(llama, "all-linear", rank=16, alpha=32)
adapter_7b = count_parameters(llama).trainable
bytes_of["4 bits"] = tensor_bytes(llama) - 4 * adapter_7b
print(
    f"Llama-2-7B: {bytes_of['bfloat16'] / 1e9:.2f} GB in bfloat16, {bytes_of['4 bits'] / 1e9:.2f} GB in 4 bits"
)

# %%
base_bytes = tensor_bytes(merge_qlora(copy.deepcopy(apart), four_bit=True))
quality = {f"{name}, style, live": value for name, value in moved.items()}
for task, key in ((FACTS, "kl_facts"), (STYLE, "kl_style")):
    for row in runs("qlora", task):  # exact for each trained model, so each seed is judged by itself
        for way in ("nf4", "bfloat16", "float32"):
            where = f"{WAYS[way]}, {task.split(',')[0]}, seed {row['seed']}"
            quality[where] = row["merge"][way][key]
claim(29).observe(
    parts={
        "qlora_quality": quality,
        "qlora_memory": {
            "4 bits again": tensor_bytes(merged["in 4 bits"]) / base_bytes,
            "dequantised to float32, this base": tensor_bytes(merged["dequantised, float32"]) / base_bytes,
            "dequantised to bfloat16, Llama-2-7B": bytes_of["bfloat16"] / bytes_of["4 bits"],
        },
    }
)

# %% [markdown]
# **What fits where?** The arithmetic for Llama-2-7B, between two steps (activations come on top). Adapter, gradients
# and states are in float32, as PEFT keeps them; full fine-tuning has bfloat16 weights and gradients and
# float32 states.

# %%
weight_4 = bytes_of["4 bits"] / 1e9
weight_plain = weight_4 + (32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8 * (total - 2 * 32000 * 4096) / 1e9
small = adapter_7b * 4 / 1e9
budget = {  # base, adapter, gradients, states in GB
    "full fine-tuning": (2 * total / 1e9, 0, 2 * total / 1e9, 8 * total / 1e9),
    "LoRA r16": (2 * total / 1e9, small, small, 2 * small),
    "QLoRA, float32 scales": (weight_plain, small, small, 2 * small),
    "QLoRA, double quantisation": (weight_4, small, small, 2 * small),
    "QLoRA, 8-bit states": (weight_4, small, small, 2 * small / 4),
}
for name, parts in budget.items():
    print(
        f"{name:27s} {sum(parts):6.2f} GB: base {parts[0]:.2f}, adapter {parts[1]:.2f}, gradients {parts[2]:.2f}, states {parts[3]:.2f}"
    )

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.2, 2.9))
shades = (
    ("base", look("base").color),
    ("adapter", look("lora").color),
    ("gradients", "#E69F00"),
    ("Adam's states", "#D55E00"),
)
left_end = [0.0] * len(budget)
for i, (part, colour) in enumerate(shades):
    widths = [parts[i] for parts in budget.values()]
    ax.barh(list(budget), widths, left=left_end, color=colour, height=0.6, label=part)
    left_end = [start + width for start, width in zip(left_end, widths, strict=True)]
for y, end in enumerate(left_end):
    ax.annotate(f"{end:.1f}", (end, y), xytext=(4, 0), textcoords="offset points", va="center", size=9)
ax.axvline(24, color="#333333", linewidth=1, linestyle="--")
ax.annotate("a 24 GB card", (24, 3.5), xytext=(4, 0), textcoords="offset points", size=8.5)
ax.invert_yaxis()
ax.grid(axis="x")
ax.grid(visible=False, axis="y")
ax.margins(x=0.1)
ax.legend(loc="lower right", fontsize=8)
saved = budget["LoRA r16"][0] - budget["QLoRA, double quantisation"][0]
finding(
    ax,
    f"4 bits save {saved:.1f} GB of the base; 8-bit states {1.5 * small:.2f} GB",
    "GB held between steps, Llama-2-7B",
)
listed = "; ".join(f"{name} {sum(parts):.1f} GB" for name, parts in budget.items())
show(fig, alt=f"Stacked bars of memory for Llama-2-7B. {listed}.")

# %%
print("GPU record of the sweep:", load_record("sweep_qlora", device="gpu"))

# %% [markdown]
# Where somebody has measured it: a training step's peak memory, all of it, and its time over LoRA's; then a decoded token.

# %%
from labs_lib.measure.sides import side_by_side, step_cost, token_cost

named = ["LoRA r16", "QLoRA r16"]
steps = side_by_side("bench_training", named, step_cost, "labs bench training", checkpointing=False)
print(steps)
table(steps.rows)

# %%
named = ["base", "4-bit base", "LoRA", "QLoRA"]
tokens = side_by_side("bench_inference", named, token_cost, "labs bench inference", what="decode", batch=1)
print(tokens)
table(tokens.rows)

# %% [markdown] tags=["takeaway"]
# "Very low memory" holds for training. "Zero overhead after merging" does not hold for QLoRA: either the merged model is
# another model, or it is a model of the full size. Served without merging, it keeps the memory and pays for the adapter
# in every token.

# %% [markdown]
# ## 6. When would you choose it?
# When the base does not fit in float16 and training must happen all the same. If it fits, LoRA is faster and merges
# exactly. Serve a QLoRA adapter on the 4-bit base it was trained on, not merged, or merge it into the dequantised
# base and pay for full-size weights.
#
# **The failures you will meet.** Merging in 4 bits is one: PEFT warns once and does it
# ([1043](https://github.com/huggingface/peft/issues/1043), [1035](https://github.com/huggingface/peft/issues/1035),
# [2321](https://github.com/huggingface/peft/issues/2321), [2502](https://github.com/huggingface/peft/issues/2502)).
# Two more are silent, on the versions locked here and on CPUs. First: a layer whose rows are no whole number of
# blocks is dequantised wrongly.

# %%
for width in (128, 160):  # 2 blocks, 2.5 blocks
    weight = torch.randn(64, width)
    there = kernels.dequantize_4bit(*kernels.quantize_4bit(weight, quant_type="nf4"))
    codes, scales = quantise_blockwise(weight, nf4_codebook())
    here = dequantise_blockwise(codes, scales, nf4_codebook()).view_as(weight)
    errors_of = [((back - weight).norm() / weight.norm()).item() for back in (there, here)]
    print(f"rows of {width}: bitsandbytes errs by {errors_of[0]:.0%}, ours by {errors_of[1]:.0%}")
print("this CPU:", torch.backends.cpu.get_cpu_capability(), "(the fault is in the AVX512 kernel)")

# %% [markdown]
# Second: where a CPU has bfloat16 instructions, one forward pass in eval mode rewrites the packed weight for a faster
# kernel. Anything that dequantises it afterwards, such as a merge, gets garbage, and no gradient passes the layer any
# more. Evaluate, then merge or train on, and the model is gone, without an error. `load_base` switches that kernel off
# and leaves layers with half blocks in float.

# %%
layer = bitsandbytes.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer = layer.to("cpu").eval()


def read_weight():
    return kernels.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


# %%
first = read_weight()
with torch.no_grad():
    layer(torch.randn(2, 128))
print(f"the same weight after one forward pass: off by {(read_weight() - first).norm() / first.norm():.0%}")
print("this CPU has the bfloat16 kernel:", bool(kernels.has_avx512bf16()))

# %% [markdown]
# Others raise, and say why: LoRA's starts that decompose the weights (PiSSA, CorDA) want them in floating point; merging
# AdaLoRA or IA3 into a 4-bit base is refused. LoHa on 4 bits raises too, but about a shape.
#
# **In the unified view** of [He et al. (2022)](https://arxiv.org/abs/2110.04366) every method adds something to a hidden
# state. QLoRA adds what LoRA adds; only the function it is added to has changed.
#
# | Method | what is added to the hidden state | where | scale |
# |---|---|---|---|
# | LoRA | $B A x$, beside $W x$ | any linear layer | $\alpha / r$ |
# | QLoRA | $B A x$, beside $\text{dequantise}(W) x$ | any linear layer | $\alpha / r$ |

# %% [markdown]
# ## 7. Go further
# - **A real model.** Set `PROFILE = "gpu"` and `MODEL_ID = "HuggingFaceTB/SmolLM2-135M"` and run all. The paper reports a
#   65B model fine-tuned on one 48 GB GPU; put its sizes into the budget above.
# - **Open exercise 1.** Merging in 4 bits changes the model. Would 8 bits be enough? Merge into
#   `integer_codebook(8)` with blocks of 64 and measure the KL.
# - **Open exercise 2.** Does a 4-bit merge round the update away? Compare the size of $\Delta W$ with the gap between
#   two values of NF4 at the scale of its block.


# %% tags=["solution-only"]
def merged_in(codebook):
    """The trained adapter merged, with every merged weight stored in `codebook`."""
    model = merge_qlora(copy.deepcopy(apart), four_bit=False)
    for name in names:
        weight = model.get_submodule(name).weight
        codes, scales = quantise_blockwise(weight, codebook)
        weight.data.copy_(dequantise_blockwise(codes, scales, codebook).view_as(weight))
    return model


for label in ("NF4", "8-bit integer"):
    shift = divergence(apart, merged_in(types[label].to(lab.device)), tokenizer, test)
    print(f"merged into {label}: KL {shift:.1e} nats")
updates = [
    merged["dequantised, float32"].get_submodule(name).weight - layer.base.weight
    for name, layer in lora_layers(apart).items()
]
update = torch.cat([each.detach().view(-1) for each in updates])
gap = nf4_codebook().diff().mean().item() * flat.abs().amax(1).mean().item()
print(
    f"a step between two NF4 values is about {gap:.3f} here; the update's standard deviation is {update.std():.3f}"
)

# %% [markdown] tags=["solution-only"]
# **Answers.** Eight bits are sixteen times finer, and the KL falls by about the square of that, below what bfloat16
# costs: a merged 8-bit model is a sound compromise. The update is not rounded away here: it is nearly as large as the
# step between two values, so most codes change. What hurts is rounding everything a second time, an error of
# nine percent of the weight, which the adapter never saw and cannot correct. After a short training at a low rate
# the update is much smaller than a step, and then it does vanish.

# %%
progress()
