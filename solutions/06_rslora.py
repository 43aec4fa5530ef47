"""Lab 06, rsLoRA. Its records are `labs sweep rslora_grid`, `rslora`, `rslora_sgd` and `rslora_flag`."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, log_axis, look, show, style

lab = setup(lab="06", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# LoRA multiplies its update by $s = \alpha / r$. rsLoRA ([Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732))
# changes one character: $s = \alpha / \sqrt{r}$. The promise: a learning rate that is right at one rank stays right at
# every rank ("rank-stabilised").
#
# **By hand**, $\alpha = 16$:
#
# | rank $r$ | LoRA $16/r$ | rsLoRA $16/\sqrt r$ | rsLoRA over LoRA |
# |---|---|---|---|
# | 4 | 4 | 8 | 2 |
# | 16 | 1 | 4 | 4 |
# | 64 | 0.25 | 2 | 8 |
#
# Switching the flag on at the same $\alpha$ also makes every update $\sqrt r$ times stronger. Keep that in mind.

# %% [markdown]
# **Which is stable?** At first $B = 0$, so the first step moves only $B$, by $dB$, and the output by $s\,dB\,Ax$. Its
# gradient is $s\,g\,(Ax)^\top$, and $Ax$ holds $r$ numbers of a fixed size.
#
# - **SGD** steps by the gradient: the output moves by $s \cdot s \cdot |Ax|^2$, so like $s^2 r$.
# - **Adam** divides the gradient by its own size, $s$ included: each entry moves by the learning rate, the output by
#   $s \sum_i |(Ax)_i|$, so like $s\,r$.
#
# **Your turn.** With $s = \alpha/r$, SGD's step shrinks like $r^{-1}$; with $\alpha/\sqrt r$ it is $r^0$: stable. What
# power of $r$ is Adam's step with $\alpha/\sqrt r$?

# %%
### BEGIN SOLUTION
### STUB: adam_power = ...  # the exponent of r
adam_power = 0.5
### END SOLUTION
adam_power = check(adam_power, "lab06.adam_power")

# %% [markdown]
# ## 2. Build it
# **Exercise 1: both scales.** *You should see* the table from above.

# %% tags=["exercise"]
from labs_lib.methods.rslora import adapter_scale

# %%
adapter_scale = check(adapter_scale)
for rank in (4, 16, 64):
    print(f"rank {rank:2d}: {adapter_scale(16, rank):g} and {adapter_scale(16, rank, rslora=True):g}")

# %% [markdown]
# **Exercise 2: nothing new.** rsLoRA is LoRA with another $\alpha$. Which one?
#
# *You should see* 32 for $\alpha = 16$ at rank 4, and the same scale both ways.

# %% tags=["exercise"]
from labs_lib.methods.rslora import same_alpha

# %%
same_alpha = check(same_alpha)
print(same_alpha(16, 4), adapter_scale(same_alpha(16, 4), 4) == adapter_scale(16, 4, rslora=True))

# %% [markdown]
# **Exercise 3: a power law's exponent.** To say "grows like the root of $r$" with a number, measure the slope on
# log-log axes. *You should see* 0.5 for $\sqrt r$ and 0 for a constant.

# %% tags=["exercise"]
from labs_lib.methods.rslora import log_slope

# %%
log_slope = check(log_slope)
ranks = [2, 8, 32, 128]
print(f"{log_slope(ranks, [r**0.5 for r in ranks]):.2f}", f"{log_slope(ranks, [7.0] * 4):.2f}")

# %% [markdown]
# **Exercise 4: between the points.** A sweep tries five rates; the best of them is off by up to half a grid step. Lay a
# parabola through the best and its neighbours. *You should see* 5e-3, which is no point of this grid.

# %% tags=["exercise"]
from labs_lib.methods.rslora import best_between

# %%
import math

best_between = check(best_between)
print(f"{best_between({rate: math.log(rate / 5e-3) ** 2 for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}):.3g}")

# %% [markdown]
# ## 3. Prove it
# Models with the same $A$: our rsLoRA (twice), our LoRA of $\alpha\sqrt r$, PEFT with `use_rslora=True`, PEFT's LoRA of
# $\alpha\sqrt r$. Ten steps of AdamW on real text. *You should see* the same losses and factors, bit for bit.

# %%
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from labs_lib import load_task
from labs_lib.measure.quality import collate, encode_rows
from labs_lib.methods.lora import inject_lora, lora_state_dict, trainable_parameters
from labs_lib.methods.rslora import inject_rslora

facts = load_task("knowledge", facts=256)
base, tokenizer = lab.base(dtype=torch.float32)  # bfloat16 hides what one small step moves
rows = facts["train"][:32]
batch = collate(encode_rows(tokenizer, rows["prompt"], rows["completion"]), tokenizer.pad_token_id)
batch = {key: value.to(lab.device) for key, value in batch.items()}
RANK, ALPHA = 8, 16


def ours(inject, alpha):
    generator = torch.Generator().manual_seed(lab.seed)
    return inject(lab.base(dtype=torch.float32)[0], "all-linear", RANK, alpha, generator=generator)


def theirs(alpha, rslora):
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_rslora": rslora}
    model = get_peft_model(lab.base(dtype=torch.float32)[0], LoraConfig(r=RANK, lora_alpha=alpha, **options))
    set_peft_model_state_dict(model, lora_state_dict(ours(inject_rslora, ALPHA)))
    return model


# %%
def ten_steps(model):
    optimizer, losses = torch.optim.AdamW(trainable_parameters(model), lr=5e-3), []
    for _ in range(10):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


models = {
    "our rsLoRA": ours(inject_rslora, ALPHA),
    "our rsLoRA, again": ours(inject_rslora, ALPHA),
    "our LoRA, other alpha": ours(inject_lora, ALPHA * RANK**0.5),
    "PEFT, use_rslora": theirs(ALPHA, True),
    "PEFT's LoRA, other alpha": theirs(ALPHA * RANK**0.5, False),
}
losses = {name: ten_steps(model) for name, model in models.items()}
first, far = lora_state_dict(models["our rsLoRA"]), {}
for name, model in models.items():
    other = lora_state_dict(model) if name.startswith("our") else get_peft_model_state_dict(model)
    far[name] = max((tensor - other[key]).abs().max().item() for key, tensor in first.items())
    print(f"{name:25s} last loss {losses[name][-1]:.6f}, factors differ by {far[name]:.0e}")
    assert far[name] <= max(1e-5, 10 * far.get("our rsLoRA, again", 0))  # a GPU need not add up in one order

# %% [markdown]
# **The file, too.** Ours is saved as the LoRA that it is; PEFT's comes with `use_rslora` in its config. *You should see*
# the same logits either way, and merged.

# %%
import tempfile
from pathlib import Path

from labs_lib.methods.io import load_lora, save_lora
from labs_lib.methods.lora import merge_lora
from peft import PeftModel

shelf = tempfile.TemporaryDirectory()
folder = Path(shelf.name)
save_lora(models["our rsLoRA"], folder / "ours", base="shipped")
models["PEFT, use_rslora"].save_pretrained(folder / "theirs")
there = PeftModel.from_pretrained(lab.base(dtype=torch.float32)[0], folder / "ours").eval()
back = load_lora(lab.base(dtype=torch.float32)[0], folder / "theirs").eval()
with torch.no_grad():
    logits = models["our rsLoRA"].eval()(**batch).logits
    print("equal:", torch.equal(there(**batch).logits, logits), torch.equal(back(**batch).logits, logits))
    print(f"merged, off by {(merge_lora(back)(**batch).logits - logits).abs().max():.0e}")

# %% [markdown] tags=["takeaway"]
# rsLoRA is a rule for choosing $\alpha$, not another method: LoRA with $\alpha\sqrt r$ is rsLoRA with $\alpha$, to the
# last bit. Whatever it gains or costs, a LoRA user can have by turning $\alpha$, or, under Adam, the rate.

# %% [markdown]
# ## 4. Train it
# **One step on the real model.** A tiny step, each scaling, each optimizer, ranks from 2 to 128. How far do the logits
# move? **Predict** which two of the four curves are flat.

# %%
import copy

with torch.no_grad():
    before = base(**batch).logits
answers = batch["labels"][:, 1:] != -100


def moved(rank, rslora, kind, lr, seed):
    """Root mean square change of the logits at the answers' positions after one step; norm of the gradient."""
    generator = torch.Generator().manual_seed(seed)
    alpha = same_alpha(16, rank) if rslora else 16
    model = inject_lora(copy.deepcopy(base), "all-linear", rank, alpha, generator=generator)
    parameters = trainable_parameters(model)
    optimizer = kind(parameters, lr=lr)
    model(**batch).loss.backward()
    size = sum(p.grad.square().sum() for p in parameters).sqrt().item()
    optimizer.step()
    with torch.no_grad():
        change = (model(**batch).logits - before)[:, :-1][answers]
    return change.square().mean().sqrt().item(), size


# %%
ranks, steps = lab.grid([2, 8, 32, 128]), {}
for optimizer, kind, lr in (("SGD", torch.optim.SGD, 1e-3), ("Adam", torch.optim.Adam, 1e-4)):
    for method in ("lora", "rslora"):
        runs = [[moved(r, method == "rslora", kind, lr, seed) for seed in lab.seeds(2)] for r in ranks]
        change, gradient = ([sum(run[i] for run in each) / len(each) for each in runs] for i in (0, 1))
        steps[optimizer, method] = change
        print(
            f"{optimizer:4s} {look(method).label:6s} logits move like r^{log_slope(ranks, change):+.2f}, "
            f"the gradient's norm is like r^{log_slope(ranks, gradient):+.2f}"
        )

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for ax, optimizer, stable in zip(axes, ("SGD", "Adam"), ("rslora", "lora"), strict=True):
    for method in ("lora", "rslora"):
        change = steps[optimizer, method]
        slope = log_slope(ranks, change)
        scale = r"$\alpha/\sqrt{r}$" if method == "rslora" else r"$\alpha/r$"
        ax.plot(ranks, change, **style(method, label=f"{look(method).label}, {scale}: $r^{{{slope:+.2f}}}$"))
    log_axis(ax, ranks)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.legend()
    finding(ax, f"{optimizer}: {look(stable).label} is stable", "rank", "change of the logits (rms)")
show(
    fig,
    alt="Change of the logits after one step against the rank, log-log. Under SGD, LoRA falls like 1 over r and rsLoRA is flat; under Adam, LoRA is flat and rsLoRA rises like the root of r.",
)

# %% [markdown]
# The argument for rsLoRA is right, for the gradient: with $\alpha/\sqrt r$ its norm does not depend on the rank. But
# Adam does not use the gradient's size. For its first step plain $\alpha/r$ is the stable one, and $\alpha/\sqrt r$
# grows. Does that last over a whole training?

# %% [markdown]
# **The sweep.** 256 new facts, 100 steps of AdamW, $\alpha = 16$, ranks 4, 16 and 64, five rates for each scaling, one
# seed; then the best point and its neighbours with five (`labs sweep rslora_grid`, `rslora`). **Predict**: from rank 4
# to 64, by what factor does the best rate move under rsLoRA?

# %%
### BEGIN SOLUTION
### STUB: predict_shift = ...  # best rate at rank 64 over best rate at rank 4
predict_shift = 0.25
### END SOLUTION
predict_shift = check(predict_shift, "lab06.predict_shift")

# %%
from labs_lib.measure import load_record, mean_ci, paired_difference

grid, record = load_record("sweep_rslora_grid", device="cpu"), load_record("sweep_rslora", device="cpu")
for each in (grid, record):
    print(f"{each}; {sum(row['seconds'] for row in each.rows) / 60:.0f} minutes of one core")


def loss_of(row):
    return row["loss"] if row["loss"] is not None else math.inf


def by_rate(rows, **wanted):
    """Rate -> row, of the rows whose arm (or seed) is as wanted."""
    fits = [r for r in rows if all(r["arm"].get(k, r.get(k)) == v for k, v in wanted.items())]
    return {row["lr"]: row for row in sorted(fits, key=lambda row: row["lr"])}


RANKS, SEEDS = (4, 16, 64), sorted({row["seed"] for row in record.rows})
best = {}  # (method, rank) -> best rate of every seed
for method in ("lora", "rslora"):
    for rank in RANKS:
        for seed in SEEDS:
            rows = by_rate(record.rows, method=method, rank=rank, seed=seed)
            losses = {lr: loss_of(row) for lr, row in rows.items()}
            best.setdefault((method, rank), []).append(best_between(losses))

# %% tags=["hide-input"]
import numpy as np

fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for ax, method in zip(axes, ("lora", "rslora"), strict=True):
    lines = [by_rate(grid.rows, method=method, rank=rank) for rank in RANKS]
    rates = list(lines[0])
    image = np.array([[loss_of(line[lr]) for lr in rates] for line in lines])
    drawn = ax.imshow(np.log10(image), origin="lower", cmap="viridis_r", aspect="auto", vmin=-1.5, vmax=0.5)
    for y, line in enumerate(lines):
        for x, lr in enumerate(rates):
            colour = "white" if image[y, x] > 0.6 else "black"
            ax.text(x, y, f"{100 * line[lr]['score']:.0f}", ha="center", va="center", color=colour)
        found = math.exp(np.mean(np.log(best[method, RANKS[y]])))
        ax.plot(
            math.log(found / rates[0], 2),
            y - 0.33,
            "^",
            color="#D55E00",
            markersize=9,
            markeredgecolor="white",
        )
    ax.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    ax.set_yticks(range(len(RANKS)), RANKS)
    ax.grid(visible=False)
    ends = [math.exp(np.mean(np.log(best[method, rank]))) for rank in (4, 64)]
    finding(ax, f"{look(method).label}: best rate {ends[0]:.1e} to {ends[1]:.1e}", "learning rate", "rank")
bar = fig.colorbar(drawn, ax=axes, ticks=[-1.5, -1, -0.5, 0, 0.5])
bar.set_label("last loss (nats)")
bar.set_ticklabels([f"{10**tick:.2g}" for tick in (-1.5, -1, -0.5, 0, 0.5)])
show(
    fig,
    alt="Two heat maps of the last training loss over rank and learning rate, with the recall in percent in each cell and a triangle at the best rate. With LoRA the triangles stand one above the other; with rsLoRA they move to lower rates as the rank grows.",
)

# %% [markdown]
# Numbers in the cells are recalled facts in percent, of one seed; triangles are the best rates between the points, mean
# over the record's seeds. *You see*: with $\alpha/r$ they stand nearly one above the other over a factor of 16 in rank. With
# $\alpha/\sqrt r$ they walk to lower rates.

# %%
from labs_lib.lab.cards import table

results = []
for (method, rank), rates in best.items():
    near = [by_rate(record.rows, method=method, rank=rank, seed=seed) for seed in SEEDS]
    tops = [min(rows.values(), key=loss_of) for rows in near]
    entry = {"arm": f"{look(method).label} r{rank}", "trained": f"{tops[0]['params']:,}"}
    entry["best rate"] = f"{mean_ci(rates).value:.2e}"
    tried = by_rate(grid.rows, method=method, rank=rank)
    entry["grid"] = f"{min(tried):g} to {max(tried):g}"
    entry["new facts %"] = f"{mean_ci([100 * row['score'] for row in tops]).value:.1f}"
    results.append(entry | {"old facts kept %": f"{mean_ci([100 * row['kept'] for row in tops]).value:.1f}"})
lab05 = [r for r in load_record("sweep_lora_plus", device="cpu").rows if r["arm"]["method"] == "full"]
if tops := [r for r in lab05 if r["stage"] == "final"]:
    entry = {"arm": "full fine-tuning, 150 steps (lab 05)", "trained": f"{tops[0]['params']:,}"}
    entry |= {
        "best rate": f"{tops[0]['lr']:.2e}",
        "grid": f"{min(r['lr'] for r in lab05):g} to {max(r['lr'] for r in lab05):g}",
    }
    for key, label in (("score", "new facts %"), ("kept", "old facts kept %")):
        entry[label] = f"{mean_ci([100 * r[key] for r in tops]).value:.1f}"
    results.append(entry)
table(results)

# %% [markdown]
# Each at its own best rate, the stronger scale learns at least as much here. That is no merit of the root: a larger
# $\alpha$ gives the same, at any rank.

# %% [markdown]
# **And under SGD**, for which the scaling was derived? rsLoRA with momentum 0.9, ranks 4 and 64 (`labs sweep
# rslora_sgd`). One caution: the Trainer clips the gradient's norm at 1, as most recipes do.

# %%
sgd = load_record("sweep_rslora_sgd", device="cpu")
print(sgd)
for rank in (4, 64) if sgd else ():
    for seed in SEEDS:
        losses = {lr: loss_of(row) for lr, row in by_rate(sgd.rows, rank=rank, seed=seed).items()}
        best.setdefault(("sgd", rank), []).append(best_between(losses))
    top = max(row["score"] for row in sgd.rows if row["arm"]["rank"] == rank)
    print(f"r{rank}: best rates {[f'{lr:.2g}' for lr in best['sgd', rank]]}, best recall {100 * top:.0f} %")

# %% tags=["hide-input"]
names = {"lora": "LoRA, Adam", "rslora": "rsLoRA, Adam", "sgd": "rsLoRA, SGD"}
names = {method: name for method, name in names.items() if (method, 64) in best}
shift = {m: [b / a for a, b in zip(best[m, 4], best[m, 64], strict=True)] for m in names}
change = {m: math.exp(np.mean(np.log(each))) for m, each in shift.items()}
fig, ax = plt.subplots(figsize=(7.2, 4))
ax.axhspan(1 / 1.5, 1.5, color="#5F5F5F", alpha=0.12, lw=0, label="within a factor of 1.5")
ax.plot(RANKS, [(4 / rank) ** 0.5 for rank in RANKS], ":", color="#5F5F5F", label=r"like $1/\sqrt{r}$")
for method, label in names.items():
    shown = [rank for rank in RANKS if (method, rank) in best]
    runs = [[b / a for a, b in zip(best[method, 4], best[method, rank], strict=True)] for rank in shown]
    middle = [math.exp(np.mean(np.log(each))) for each in runs]
    plain = style("rslora" if method == "sgd" else method, label=f"{label}: {middle[-1]:.2f} x")
    if method == "sgd":
        plain |= {"color": "#CC79A7", "marker": "s"}
    ax.plot(shown, middle, **plain)
    for rank, each in zip(shown, runs, strict=True):
        ax.plot([rank] * len(each), each, "_", color=plain["color"], markersize=10)
log_axis(ax, RANKS)
ax.set_ylim(0.15, 6)
log_axis(ax, [0.25, 0.5, 1, 2, 4], "y")
ax.legend(loc="lower left", fontsize=8.5)
title = f"Rank 4 to 64: LoRA's best rate moves {change['lora']:.2f} x, rsLoRA's {change['rslora']:.2f} x"
finding(ax, title, "rank", "best rate over that at rank 4")
show(
    fig,
    alt="Best learning rate against rank, relative to rank 4; at rank 64: "
    + ", ".join(f"{name} {change[method]:.2f} times" for method, name in names.items())
    + ".",
)

# %% [markdown]
# So under momentum SGD the best rate moves as well, and upwards. A likely reason is the clipping (not tested here): a
# step of fixed length times a scale that falls like $1/\sqrt r$ asks for a rate that grows like $\sqrt r$, 4 times from
# rank 4 to 64. The theorem is about SGD without it, and about the limit of large ranks.

# %% [markdown]
# **The matched-scale control, live.** If rsLoRA does better or worse than LoRA, is it the method or the strength? Give
# rsLoRA the $\alpha$ with which its scale is LoRA's, $\alpha / \sqrt r$, and train both. *You should see* the same losses at every step, and the recorded recall.

# %%
from labs_lib.training.sweep import run_point

point = next(r for r in grid.rows if r["arm"]["name"] == "lora r16 0.008")
kept_keys = ("arm", "label", "task", "facts", "lr", "seed", "steps", "batch", "stage")
plain = {key: point[key] for key in kept_keys} | {"steps": lab.steps(point["steps"])}
matched = plain | {"arm": plain["arm"] | {"method": "rslora", "alpha": 16 / math.sqrt(16)}}
base_name = lab.model_id or lab.size
runs = [run_point(each, base_name, lab.device) for each in (plain, matched)]
print("losses equal at every step:", runs[0]["losses"] == runs[1]["losses"])
print(f"recall: LoRA {100 * runs[0]['score']:.1f} %, rsLoRA at LoRA's scale {100 * runs[1]['score']:.1f} %")
print(f"recorded on small: {100 * point['score']:.1f} %")

# %% [markdown] tags=["takeaway"]
# Under Adam, $\alpha/r$ already keeps the best rate in place as the rank grows; $\alpha/\sqrt r$ makes it drift. When a
# higher rank "needs rsLoRA", it needed a larger $\alpha$ or a larger rate.

# %% [markdown]
# ## 5. The chapter on trial
# **Its demonstration.** The chapter runs one unseeded input through random $A$ and $B$ and prints norms. One draw is
# noise. The same code, averaged over inputs and draws:


# %%
def chapter_norms(rank, seed, inputs=256, width=4096, alpha=16.0):
    """Mean norm of x A B under no scaling, alpha / r and alpha / sqrt(r), as in the chapter's fragment."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, width, generator=generator)
    A = torch.randn(width, rank, generator=generator) * 0.01
    B = torch.randn(rank, width, generator=generator) * 0.01
    norm = (x @ A @ B).norm(dim=1)
    return [norm.mean().item() * s for s in (1, alpha / rank, alpha / math.sqrt(rank))], norm[
        0
    ].item() * alpha / math.sqrt(rank)


snippet_ranks, draws = [4, 8, 16, 32, 64, 128, 256], [2024 + i for i in range(8)]
norms = {rank: [chapter_norms(rank, seed) for seed in draws] for rank in snippet_ranks}
table(
    [
        {
            "rank": rank,
            "x A B": f"{np.mean([n[0][0] for n in runs]):.2f}",
            "alpha / r": f"{np.mean([n[0][1] for n in runs]):.2f}",
            "alpha / sqrt(r)": f"{np.mean([n[0][2] for n in runs]):.2f}",
            "one draw, one x, as printed": f"{runs[0][1]:.2f}",
        }
        for rank, runs in norms.items()
    ]
)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.2, 3.6))
looks = (
    ({"color": "#5F5F5F", "marker": "x", "linestyle": ":", "label": "x A B, not scaled"}),
    style("lora", label=r"$\alpha/r$"),
    style("rslora", label=r"$\alpha/\sqrt{r}$"),
)
powers = []
for i, plain in enumerate(looks):
    means = [np.mean([n[0][i] for n in norms[rank]]) for rank in snippet_ranks]
    powers.append(log_slope(snippet_ranks, means))
    ax.plot(snippet_ranks, means, **plain | {"label": f"{plain['label']}: $r^{{{powers[-1]:+.2f}}}$"})
single = [norms[rank][0][1] for rank in snippet_ranks]
ax.plot(snippet_ranks, single, "o", color="#D55E00", markersize=5, label="one input, one draw")
log_axis(ax, snippet_ranks)
ax.set_yscale("log")
ax.set_ylim(0.3, 40)
ax.legend(fontsize=8.5, loc="upper left", ncol=2)
finding(ax, "The chapter's code: the root makes the norm constant", "rank", "mean norm of the output")
show(
    fig,
    alt=f"Mean output norm of the chapter's code against rank: unscaled it grows like the root of r, with alpha over r it falls, with alpha over the root of r it is constant (slopes {powers[0]:.2f}, {powers[1]:.2f}, {powers[2]:.2f}); single draws scatter around it.",
)

# %% [markdown]
# **Claim 46**: "the variance of the product $BA$ scales proportionally with $r$ under random initialization." True for
# two random matrices. LoRA is not initialised so: $B$ is zero.

# %%
from labs_lib.methods.lora import init_lora


def variance(rank, own_start):
    generator = torch.Generator().manual_seed(lab.seed)
    A, B = init_lora(1024, 1024, rank, generator)
    if not own_start:
        A, B = (0.01 * torch.randn(factor.shape, generator=generator) for factor in (A, B))
    return (B @ A).var().item()


variances = {own: [variance(rank, own) for rank in snippet_ranks] for own in (False, True)}
print("LoRA's own start:", set(variances[True]))
claim(46).observe(
    conditions={
        "independent entries": log_slope(snippet_ranks, variances[False]),
        "LoRA's own start, B = 0": 0.0,  # the same at every rank: zero
    }
)

# %% [markdown]
# **Claim 47**: with $\alpha/\sqrt r$, doubling the rank "increases [the contribution] by only $\sqrt 2$". **Predict** from
# the figure. (By $\sqrt 2$ grows what is *not* scaled.)

# %%
from itertools import pairwise

pairs = list(pairwise(snippet_ranks))
doubled = [
    [np.mean([norms[b][seed][0][i] / norms[a][seed][0][i] for a, b in pairs]) for seed in range(len(draws))]
    for i in range(3)
]
print("doubling the rank, not scaled:", mean_ci(doubled[0]), "| alpha / r:", mean_ci(doubled[1]))
claim(47).observe(doubled[2], seeds=draws)

# %% [markdown]
# **Claim 48**: "A learning rate and $\alpha$ that work well at rank 16 will also work well at rank 64 or rank 256."
# Right would be: the best rate moves by less than a factor of 1.5 over our ranks.

# %%
print(f"You predicted a factor of {predict_shift:g}.")
print("plain LoRA, for comparison:", mean_ci(shift["lora"]))
optimizers = {"Adam": "rslora", "SGD with momentum": "sgd"}
measured = {name: shift[method] for name, method in optimizers.items() if method in shift}
claim(48).observe(conditions=measured, seeds=SEEDS)

# %% [markdown]
# A ratio from few seeds has a wide interval: if it reaches across the border, the verdict says so, and more seeds would
# tell. Plain LoRA's, beside it, is centred on 1.
#
# How much does the drift cost? Take the rate that is best at rank 4 and use it at rank 64:

# %%
for method in ("lora", "rslora"):
    low = by_rate(grid.rows, method=method, rank=4)
    carried = min(low, key=lambda lr: loss_of(low[lr]))
    high = by_rate(grid.rows, method=method, rank=64)
    own = min(high, key=lambda lr: loss_of(high[lr]))
    print(
        f"{look(method).label:6s} r64: last loss {loss_of(high[carried]):.3f} at rank 4's best rate {carried:g}, "
        f"{loss_of(high[own]):.3f} at its own {own:g}; recall {high[carried]['score']:.0%} and {high[own]['score']:.0%}, old facts kept {high[carried]['kept']:.0%} and {high[own]['kept']:.0%}"
    )

# %% [markdown]
# **Claim 49**: "There is no reason not to enable it for any new LoRA training run." We take the tuned LoRA r8 of lab 02
# and change nothing but the flag: same $\alpha$, rate, data and seeds (`labs sweep rslora_flag`). **Predict** the sign of
# both differences.

# %%
flag, score, kept = load_record("sweep_rslora_flag", device="cpu"), {}, {}
print(flag)
tuned = {"512 facts": "sweep_tune_lora", "style": "sweep_tune_lora_style"}
for label, source in tuned.items() if flag else ():
    off = {
        r["seed"]: r
        for r in load_record(source, device="cpu").rows
        if r["stage"] == "final" and r["arm"]["name"] == "LoRA r8, all linear"
    }
    on = {r["seed"]: r for r in flag.rows if r["stage"] == "final" and label in r["label"]}
    seeds = sorted(on.keys() & off.keys())
    assert {on[s]["lr"] for s in seeds} == {off[s]["lr"] for s in seeds}
    for into, key in ((score, "score"), (kept, "kept")):
        into[label] = paired_difference([100 * on[s][key] for s in seeds], [100 * off[s][key] for s in seeds])
    for key, name in (("score", "score"), ("compliance", "rules kept"), ("fidelity", "facts told")):
        if key in on[seeds[0]]:
            both = [mean_ci([100 * rows[s][key] for s in seeds]) for rows in (off, on)]
            print(f"{label}: {name} off {both[0]} %, on {both[1]} %")
if flag:
    claim(49).observe(parts={"score": score, "retention": kept})

# %% [markdown]
# At a matched scale the flag changes nothing at all (the live control above). So what you see here is the effect of a
# scale $\sqrt 8$ times larger: more may be learned in the same steps, and more of what the base knew is lost. Turning
# up $\alpha$ or the rate does the same. Where the rate was too low, the flag helps most:

# %%
for rank in RANKS:
    low = [by_rate(grid.rows, method=method, rank=rank)[2e-3] for method in ("lora", "rslora")]
    shown = ", ".join(f"{100 * row['score']:.0f} % (kept {100 * row['kept']:.0f} %)" for row in low)
    print(f"r{rank:2d} at rate 0.002, flag off and on: {shown}")

# %%
from labs_lib.measure import load_published

published = load_published("method_comparison")
print(f"{published['title']}: one seed")
for row in published["rows"]:
    if row["method"] in ("lora", "rslora"):
        print(f"  {row['label']:12s} {row['accuracy']:.1f} % right, forgetting {row['forgetting']:.3f}")
print(load_record("sweep_rslora", device="gpu"))

# %% [markdown]
# That benchmark's rsLoRA ran at a scale of 8, its LoRA at 2: read the gap, in accuracy and in forgetting, as a stronger
# update. Others report the same as our grid: with $1/r$ the best rate is about independent of the rank ([LoRA Without
# Regret](https://thinkingmachines.ai/blog/lora/), as reported).

# %% [markdown]
# **At 7B.** The flag costs no parameters and no operations. What it changes is the strength:

# %%
from labs_lib import random_like
from labs_lib.measure import count_flops
from labs_lib.models.twins import peft_parameter_count

llama = random_like("llama-2-7b")
for rank in (16, 64, 256):
    counts = [
        peft_parameter_count(
            llama, LoraConfig(r=rank, use_rslora=on, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for on in (False, True)
    ]
    scales = adapter_scale(2 * rank, rank), adapter_scale(2 * rank, rank, rslora=True)
    print(
        f"r{rank:3d}, alpha 2r: {counts[0]:11,d} and {counts[1]:11,d} parameters, scale {scales[0]:g} and {scales[1]:g}"
    )
work = [
    count_flops(lambda m=models[name]: m(**batch).loss.backward())
    for name in ("our rsLoRA", "our LoRA, other alpha")
]
print(f"FLOPs of a training step over LoRA's: {work[0] / work[1]:.3f}")

# %% [markdown]
# ## 6. When would you choose it?
# When a recipe was tuned with it: the scale is part of the recipe. When you train by SGD, for which it was derived. With
# Adam keep $\alpha/r$ and one $\alpha$ over all ranks, and the rate carries over. Never switch the flag on in a tuned
# recipe without dividing $\alpha$ by $\sqrt r$.
#
# **The failure you will meet**: somebody reads the file without reading the flag. Engines did
# ([TensorRT-LLM 1668](https://github.com/NVIDIA/TensorRT-LLM/issues/1668)), and PEFT itself does when it combines
# adapters ([3761](https://github.com/huggingface/peft/issues/3761)): a copy of one adapter, weight 1, is $\sqrt r$ times too
# strong.

# %%
for rslora in (False, True):
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, "use_rslora": rslora}
    adapted = get_peft_model(lab.base()[0], LoraConfig(r=16, lora_alpha=16, **options))
    adapted.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    layer = next(module for name, module in adapted.named_modules() if name.endswith("q_proj"))
    update, copied = (layer.get_delta_weight(name).norm().item() for name in ("default", "copy"))
    print(f"use_rslora={rslora!s:5}: the copy's update over the original's: {copied / update:.2f}")

# %% [markdown]
# Nothing raises. Until it is fixed, save such an adapter as plain LoRA with $\alpha\sqrt r$ (our `save_lora` does) before
# combining.
#
# **As a change to a hidden state** ([He et al., 2022](https://arxiv.org/abs/2110.04366) describe every method so):
#
# | Method | Where | Change to $h$ | Scale |
# |---|---|---|---|
# | LoRA | any linear layer's output | $h + s\,BAx$ | $s = \alpha / r$ |
# | rsLoRA | the same | the same | $s = \alpha / \sqrt r$ |

# %% [markdown]
# ## 7. Go further
# - Set `PROFILE = "gpu"` and a `MODEL_ID`: the one-step curves and the control then run on that model.
# - **Open exercise 1.** PEFT's `init_lora_weights="gaussian"` draws $A$ with standard deviation $1/r$. What does that do
#   to Adam's first step as the rank grows, with $\alpha/r$?
# - **Open exercise 2.** $\alpha = 2r$ is a common recipe: the scale is then 2 at every rank. How should the best rate
#   move with the rank? Look at lab 02's record.

# %% [markdown] tags=["solution-only"]
# **Answer 1.** $Ax$ shrinks like $1/r$ in every entry, so Adam's first step moves the output by $s\,r \cdot 1/r$, like
# $1/r$: the best rate would have to grow with the rank. The scaling and the start belong together.
#
# **Answer 2.** A constant scale lets Adam's step grow like $r$, so the best rate should fall with the rank. It does, from
# rank 2 to rank 64, though by less than 32 times:

# %% tags=["solution-only"]
lab02 = load_record("sweep_tune_lora", device="cpu")
for rank in (2, 8, 64):
    rows = [
        r for r in lab02.rows if r["arm"]["name"] == f"LoRA r{rank}, all linear" and r["stage"] == "sweep"
    ]
    print(f"r{rank}: best rate {best_between({r['lr']: loss_of(r) for r in rows}):.2g} at scale 2")

# %%
progress()
