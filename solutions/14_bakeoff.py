"""Lab 14, the bake-off. Its records are `labs bakeoff` (sweep_bakeoff) and `labs bakeoff --costs` (bakeoff_costs)."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, look, reference, show

lab = setup(lab="14", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# Thirteen labs, each with its own method in the leading part. Which one should you take? Every paper has a table in which
# its method wins, because its authors tuned that one. A table is fair if the *protocol* stands before the results, and
# everybody gets the same.
#
# Ours has five tasks: one customer's style; reviews to classify; new facts, 32, 128 and 512 of them. After each we ask what
# is left of 512 facts that the base knew before (*retention*). And it has 22 arms: each method, at about the size of LoRA
# rank 8 on all linear layers where it has such a size, else of rank 2.

# %% [markdown]
# **The protocol**, for every arm and task:
#
# 1. Steps and batches: the task says how many, whoever trains.
# 2. Three learning rates, half a decade apart, around the one of the method's own lab; one seed; scored on validation rows.
# 3. Is the best at the edge: up to two more rates. Is it below 99 %: also the rates halfway to its neighbours.
# 4. Of equally good rates the lowest, which forgets least.
# 5. Five fresh seeds at that rate, on rows that the choice has not seen. (Facts excepted: nobody can recall a fact that was
#    not trained, so there is nothing to hold out.)
#
# Later: fifteen seeds more on style and reviews, where five left most tied.

# %% [markdown]
# 22 arms, five tasks. **Your turn.** How many runs is that, before any grid grows?

# %%
### BEGIN SOLUTION
### STUB: planned_runs = ...  # a number
planned_runs = 22 * 5 * (3 + 5)
### END SOLUTION
planned_runs = check(planned_runs, "lab14.planned_runs")

# %% [markdown]
# **Predict**, before you see anything. A method is *beaten* if another trains no more parameters and is at least as good on
# average, and better in one of the two. How many of the 22 are beaten by nobody? And PEFT's own benchmark has 15 of these
# methods on a model 3,000 times as large: does it rank them as ours does? (1: the same order. 0: no relation.)

# %%
### BEGIN SOLUTION
### STUB: predict_front = ...  # 1 to 22
### STUB: predict_agreement = ...  # -1 to 1
predict_front = 5
predict_agreement = 0.5
### END SOLUTION
predict_front = check(predict_front, "lab14.predict_front")
predict_agreement = check(predict_agreement, "lab14.predict_agreement")

# %% [markdown]
# ## 2. Build it
# Three tools to read such a table with.
#
# **Exercise 1: the front.** With several costs there is no winner, only methods that nobody beats: the Pareto front.
#
# *You should see* two names. The third costs more than "cheap" and does worse.

# %% tags=["exercise"]
from labs_lib.measure.fronts import pareto_front

# %%
pareto_front = check(pareto_front)
print(pareto_front({"good": (100, 90.0), "bad": (50, 20.0), "cheap": (2, 30.0)}))

# %% [markdown]
# **Exercise 2: again, with other seeds.** Five seeds are five draws. What would the means have been with other draws?
# Resample the seeds you have. All methods saw the same data under a seed, so a seed is drawn for all of them at once:
# what was hard for everyone cancels in a comparison.
#
# *You should see* that B beats A in every repetition, although their ranges overlap.

# %% tags=["exercise"]
from labs_lib.measure.fronts import resampled_means

# %%
import numpy as np

resampled_means = check(resampled_means)
lucky = np.array([[50, 60, 70, 80, 90], [51, 62, 71, 82, 91]])  # methods A and B, five seeds
means = resampled_means(lucky, draws=1000)
print("ranges:", *(f"{low:.0f} to {high:.0f}" for low, high in np.percentile(means, [2.5, 97.5], axis=0).T))
print(f"B above A in {np.mean(means[:, 1] > means[:, 0]):.0%} of the repetitions")

# %% [markdown]
# **Exercise 3: do two rankings agree?** Accuracies of different tasks cannot be compared, places can.
#
# *You should see* 1, -1, and 0.95 where two share a place.

# %% tags=["exercise"]
from labs_lib.measure.fronts import rank_correlation

# %%
rank_correlation = check(rank_correlation)
for other in ([1, 4, 9, 16], [0.4, 0.3, 0.2, 0.1], [1, 2, 2, 7]):
    print(f"{rank_correlation([10, 20, 30, 40], other):.2f}")

# %% [markdown]
# ## 3. Prove it
# The runs took hours, so they are a record: one row per run, with its rate, seed, scores and seconds. Before we believe it,
# three questions.

# %% tags=["hide-input"]
from labs_lib.measure import load_record, mean_ci, paired_difference

runs, costs = (load_record(name, device="cpu") for name in ("sweep_bakeoff", "bakeoff_costs"))
print(runs, costs, sep="\n")

# %% tags=["hide-input"]
finals, tried = {}, {}
for row in sorted(runs.rows, key=lambda row: (row["seed"], row["lr"])):
    into = finals if row["stage"] == "final" else tried
    into.setdefault((row["arm"]["name"], row["label"]), []).append(row)
ARMS = list(dict.fromkeys(row["arm"]["name"] for row in runs.rows))
TASKS = list(dict.fromkeys(row["label"] for row in runs.rows))
FACTS = [task for task in TASKS if task.startswith("knowledge")]
cost = {row["arm"]["name"]: row for row in costs.rows if row["arm"] and row["model"] == "small"}
on_7b = {row["arm"]["name"]: row for row in costs.rows if row["model"] == "llama-2-7b"}

# %% [markdown]
# **Did everybody get the same?** *You should see* one number of steps and batches per task, the same seeds, and at least
# three rates for everyone.

# %%
for task in TASKS:
    of_task = [row for row in runs.rows if row["label"] == task]
    effort = {(row["steps"], row["batch"], row.get("facts")) for row in of_task}
    seeds = {tuple(row["seed"] for row in finals[arm, task]) for arm in ARMS}
    rates = [len(tried[arm, task]) for arm in ARMS]
    assert len(effort) == 1 and len(seeds) == 1 and min(rates) >= 3
    edge = [
        arm
        for arm in ARMS
        if finals[arm, task][0]["lr"] in (tried[arm, task][0]["lr"], tried[arm, task][-1]["lr"])
    ]
    print(
        f"{task:21s} {len(*seeds)} seeds, {min(rates)} to {max(rates)} rates; at an edge: {', '.join(edge) or 'nobody'}"
    )

# %% [markdown]
# Whoever is still at an edge after two more rates might do better beyond it.
#
# **Does a run come out as recorded?** One row again, live, with its own seed.

# %%
from labs_lib.training.sweep import run_point

again = next(row for row in finals["LoRA r8", "knowledge, 32 facts"])
settings = ("arm", "stage", "label", "task", "facts", "batch", "lr", "seed")
point = {key: again[key] for key in settings} | {"steps": lab.steps(again["steps"])}
live = run_point(point, lab.model_id or lab.size, lab.device)
for what in ("score", "kept", "loss"):
    print(f"{what:6s} recorded {again[what]:.4f}, now {live[what]:.4f}")

# %% [markdown]
# **Are the costs right?** Nothing is timed, everything counted: bytes of every tensor alive, multiply-adds of every matrix
# product. So a formula must give the same number. LoRA, not merged, adds two products: $2 \cdot$ parameters FLOPs per token
# read, and a request reads 64 tokens, then writes 32, of which the last is not read.

# %%
for arm in ("LoRA r8", "LoRA r2", "rsLoRA r8"):
    extra = cost[arm]["request_flops"] - cost[arm]["base_request_flops"]
    by_hand = 2 * cost[arm]["params"] * (64 + 32 - 1)
    print(f"{arm:10s} counted {extra:,}, by hand {by_hand:,}")
    assert extra == by_hand

# %% [markdown]
# **Who can be folded in, and who can share a batch?** Each adapter, filled with random numbers, was merged into its base and
# the logits compared. For mixed batches we ask lab 15's interop matrix.
#
# *You should see* two families: what changes weights can be folded in; what adds tokens or a nonlinear layer cannot.

# %% tags=["hide-input"]
from labs_lib.lab.cards import table

rows = []
for arm, row in cost.items():
    requests = row["request_flops"] / row["base_request_flops"]
    merged = row.get("merged_request_flops")
    rows.append(
        {
            "arm": arm,
            "trains": f"{row['params']:,}",
            "stored": f"{row['stored']:,}",
            "optimizer, KB": f"{row['state_bytes'] / 1e3:,.0f}",
            "peak, MB": f"{row['peak_bytes'] / 1e6:.1f}",
            "step, GFLOPs": f"{row['train_flops'] / 1e9:.2f}",
            "request over base": f"{requests:.3f}",
            "merged": f"{merged / row['base_request_flops']:.3f}" if merged else "cannot",
            "off by": f"{row['merge_error']:.0e}" if merged else "",
        }
    )
table(rows)

# %% tags=["hide-input"]
engines = list(cost["LoRA r8"]["engines"])
table([{"one batch, many tenants": arm, **row["engines"]} for arm, row in cost.items()])

# %% [markdown]
# "refused" is an honest answer. "silently wrong" is the one to fear: tokens come, but another tenant's. Only LoRA's own
# format is served everywhere, which may be the strongest argument in this whole lab.
#
# Look at the unmerged requests, too: OFT, LoHa, VeRA, DoRA form whole matrices, or turn whole activations, for every token
# that is read. Merged, all of that is gone; in a batch of many tenants nothing can be merged.

# %% [markdown] tags=["takeaway"]
# A comparison is its protocol. Ask of any table: who tuned whom, how far did the grids reach, how many seeds, and was
# forgetting measured at all?

# %% [markdown]
# ## 4. Train it
# All of it: 22 arms by five tasks, the mean over the seeds in each cell.


# %%
def percent(key, task):
    """(arms, seeds), in percent."""
    return 100 * np.array([[row[key] for row in finals[arm, task]] for arm in ARMS])


def overall(by_task):
    """Style, reviews, and facts (their three amounts together), a third each."""
    facts = np.mean([by_task[task] for task in FACTS], axis=0)
    return np.mean([by_task["style"], by_task["classification"], facts], axis=0)


score = {task: percent("score", task) for task in TASKS}
kept = {task: percent("kept", task) for task in TASKS}
mean = overall({task: values.mean(axis=1) for task, values in score.items()})
order = [ARMS[i] for i in np.argsort(-mean)]

# %%
SEEDS = {task: [row["seed"] for row in finals[ARMS[0], task]] for task in TASKS}
hours = sum(row["cpu_seconds"] for row in runs.rows if "cpu_seconds" in row) / 3600
print(f"{len(runs.rows)} runs, {hours:.2f} CPU-hours")

# %% tags=["hide-input"]
import matplotlib.pyplot as plt


def grid_of(ax, values, title, map_):
    """Arms by tasks as a coloured table of percents."""
    block = np.array([values[task].mean(axis=1) for task in TASKS]).T[[ARMS.index(arm) for arm in order]]
    ax.imshow(block, cmap=map_, vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(block):
        ax.text(
            j, i, f"{value:.0f}", ha="center", va="center", size=8.5, color="white" if value > 60 else "black"
        )
    names = [task.replace("knowledge, ", "").replace("classification", "reviews") for task in TASKS]
    ax.set_xticks(range(len(TASKS)), names, size=9)
    ax.set_yticks(range(len(order)), order, size=9)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    finding(ax, title)


fig, (left, right) = plt.subplots(1, 2, figsize=(10, 7), sharey=True)
best, worst = order[0], order[-1]
grid_of(left, score, f"Task scores (%): {best} leads", "Blues")
gentle = max(ARMS, key=lambda arm: np.mean([kept[task][ARMS.index(arm)].mean() for task in TASKS]))
grid_of(right, kept, f"Old facts kept (%): {gentle} keeps most", "Greens")
show(
    fig,
    alt="Two coloured tables of 22 arms by five tasks, sorted by mean score: "
    + "; ".join(f"{arm} {mean[ARMS.index(arm)]:.0f}" for arm in order)
    + f". Of old facts {gentle} keeps most.",
)

# %% [markdown]
# The mean behind the order counts style, reviews and facts (their three amounts together) as a third each. Is the order
# certain? Repeat the experiment 2,000 times, on paper, each task with its own seeds:

# %%
repeats = overall({task: resampled_means(score[task], 2000, seed=i) for i, task in enumerate(TASKS)})
likely = np.percentile(repeats, [2.5, 97.5], axis=0)
places = (-repeats).argsort(axis=1).argsort(axis=1) + 1
low, high = np.percentile(places, [2.5, 97.5], axis=0)
for arm in order:
    i = ARMS.index(arm)
    print(
        f"{arm:20s} {mean[i]:.1f} [{likely[0, i]:.1f}, {likely[1, i]:.1f}] %  place {low[i]:.0f} to {high[i]:.0f}"
    )

# %% [markdown]
# A few seeds resampled give ranges that are rather too narrow (they could all be lucky; for facts there are five). Where even
# these overlap, nobody should say "better". A wide interval is mostly a seed or two that collapsed: the best rate of a single seed can lie at the
# edge of a cliff, as AdaLoRA's on the reviews and the soft prompt's on the style.
#
# **The fronts.** Three costs, one at a time. The band: where the front lies in 95 % of the repetitions.

# %% tags=["hide-input"]
from labs_lib.measure.fronts import front_heights

KINDS = {"bottleneck": "adapter", "mix_and_match": "parallel_adapter"}


def drawn(arm, **more):
    """Colour and marker of an arm; LoRA r2 is the hollow LoRA."""
    settings = cost[arm]["arm"]
    kind = settings["options"].get("method", settings["method"])
    plain = look(KINDS.get(kind, kind))
    hollow = {"markerfacecolor": "white", "markeredgecolor": plain.color} if arm == "LoRA r2" else {}
    return {"color": plain.color, "marker": plain.marker, "ls": "", "markersize": 7} | hollow | more


def legend(fig):
    """All arms, below the panels."""
    handles = [plt.Line2D([], [], label=arm, **drawn(arm)) for arm in order]
    fig.legend(handles=handles, loc="outside lower center", ncol=6, fontsize=8, frameon=False)


# %% tags=["hide-input"]
AXES = {
    "params": (1, "parameters"),
    "peak_bytes": (1e6, "peak memory of a step (MB)"),
    "train_flops": (1e9, "GFLOPs of a step"),
}


def draw_front(ax, what):
    unit, label = AXES[what]
    price = np.array([cost[arm][what] / unit for arm in ARMS])
    front = pareto_front({arm: (price[i], mean[i]) for i, arm in enumerate(ARMS)})
    sides = np.percentile(front_heights(price, repeats), [2.5, 97.5], axis=0)
    along = np.argsort(price, kind="stable")
    ax.fill_between(price[along], *(100 - sides[:, along]), step="post", color="#888888", alpha=0.3, lw=0)
    ax.step(price[along], 100 - front_heights(price, mean)[along], where="post", color="#555555", lw=1)
    for i, arm in enumerate(ARMS):
        faint = {"alpha": 1 if arm in front else 0.35}
        ends = np.clip(100 - likely[:, i], 0.3, None)
        ax.plot([price[i]] * 2, ends, lw=0.9, color=drawn(arm)["color"], **faint)
        ax.plot(price[i], 100 - mean[i], **drawn(arm), **faint)
    ax.set(xscale="log" if what == "params" else "linear", yscale="log", ylim=(100, 0.5))
    ax.set_yticks([1, 2, 5, 10, 20, 50], ["99", "98", "95", "90", "80", "50"])
    ax.set_yticks([], minor=True)
    finding(ax, f"{label.split(' (')[0].split(' of')[0]}: {len(front)} unbeaten", label)
    return front


fig, axes = plt.subplots(1, 3, figsize=(11, 5.2), sharey=True)
fronts = {what: draw_front(ax, what) for ax, what in zip(axes, AXES, strict=True)}
axes[0].set_ylabel("mean score (%)")
legend(fig)
told = " ".join(f"By {AXES[what][1]}: {', '.join(front)}." for what, front in fronts.items())
show(fig, alt=f"Mean score against three costs, with the Pareto front of each and its band. Unbeaten {told}")
print(told)

# %%
print(f"You predicted {predict_front:g}; by parameters it is {len(fronts['params'])}.")
stays = {}
for draw in repeats[:500]:
    front = pareto_front({arm: (cost[arm]["params"], draw[i]) for i, arm in enumerate(ARMS)})
    for arm in front:
        stays[arm] = stays.get(arm, 0) + 1 / 500
print("On the front of parameters, of 500 repetitions:")
print(", ".join(f"{arm} {share:.0%}" for arm, share in sorted(stays.items(), key=lambda item: -item[1])))

# %% [markdown]
# Fewer parameters are not less memory: what counts is what a step must form and keep. On a base this small a batch is hardly
# larger than a weight, so whoever forms whole matrices in every step (DoRA, BOFT, VeRA) pays for it. Section 5 counts a 7B
# model instead.
#
# **Bits.** A fact is one of 64 answers, drawn at random: 6 bits, and nothing to generalise from. What was recalled beyond
# guessing, by the parameters that were trained:

# %% tags=["hide-input"]
from labs_lib.measure.fronts import stored_bits

sizes = {task: finals[ARMS[0], task][0]["facts"] for task in FACTS}
bits = {
    arm: max(stored_bits(score[task][i].mean() / 100, n) for task, n in sizes.items())
    for i, arm in enumerate(ARMS)
}
density = {arm: bits[arm] / cost[arm]["params"] for arm in ARMS}
dense = max(density, key=density.get)
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(1, 1.25))
for i, arm in enumerate(ARMS):
    means = [score[task][i].mean() for task in FACTS]
    left.plot(list(sizes.values()), means, **drawn(arm, ls="-", lw=0.8))
    right.plot(cost[arm]["params"], bits[arm], **drawn(arm))
left.set_xscale("log")
left.set_xticks(list(sizes.values()), list(sizes.values()))
left.set_xticks([], minor=True)
full = sum(score[FACTS[-1]][i].mean() > 90 for i in range(len(ARMS)))
finding(left, f"{full} of {len(ARMS)} recall over 90 % of {max(sizes.values())}", "new facts", "recalled (%)")
line = np.array([1e3, 5e6])
for each in (0.001, 0.01, 0.1, 1):
    right.plot(line, each * line, ":", color="#999999", lw=0.9)
    at = min(4e3 / each, 1e6)
    right.annotate(f"{each:g} bit", (at, each * at), size=8, color="#666666", ha="right", va="bottom")
reference(right, 6 * max(sizes.values()), "")
right.set(xscale="log", yscale="log", xlim=(1e3, 2.5e6), ylim=(8, 6e3))
finding(
    right, f"{dense}: {density[dense]:.2f} bits per parameter", "parameters", "bits stored (best of three)"
)
legend(fig)
listed = ", ".join(f"{arm} {bits[arm]:.0f}" for arm in sorted(bits, key=bits.get))
show(
    fig,
    alt=f"Left, recall against the number of facts. Right, bits stored against parameters, log axes: {listed}.",
)

# %% [markdown]
# Few parameters are used hard; many lie idle once the facts fit. The number of steps is fixed here: lab 11 shows that IA3
# stores far more when it may train longer. So this is what a method stores *in 150 steps*, not what it could hold.
#
# **Gain and loss.** Every gain was paid for, in old facts.

# %% tags=["hide-input"]
before = next(row["scores"] for row in costs.rows if row["arm"] is None)
fig, axes = plt.subplots(1, 3, figsize=(11, 5), sharey=True)
fair = {}
for ax, task in zip(axes, ("style", "classification", FACTS[-1]), strict=True):
    gain, left_over = score[task].mean(axis=1) - 100 * before[task], kept[task].mean(axis=1)
    fair[task] = pareto_front({arm: (-left_over[i], gain[i]) for i, arm in enumerate(ARMS)})
    for i, arm in enumerate(ARMS):
        ax.plot(gain[i], left_over[i], **drawn(arm, alpha=1 if arm in fair[task] else 0.35))
    ax.set(ylim=(-4, 104))
    finding(ax, f"{task.split(', ')[-1]}: {len(fair[task])} unbeaten", "gain over the base (points)")
axes[0].set_ylabel("old facts kept (%)")
legend(fig)
told = "; ".join(f"{task}: {', '.join(front)}" for task, front in fair.items())
show(fig, alt=f"Old facts kept against gain on three tasks. Unbeaten in both at once: {told}.")
print(told)

# %% [markdown]
# Two methods with the same score can differ by tens of points in what they destroy. No benchmark that reports accuracy alone
# would tell you.
#
# **Is it the method, or its rate?** Our protocol takes the best score, and one review more out of hundreds is enough to take a
# rate three times as high. A careful tuner asks otherwise: the *lowest* rate that is at most four points worse (one text of
# the style's 32 is three). What would that have cost, and kept? (From the runs that chose the rate: one seed.)

# %%
careful = {}
for (arm, task), rows in tried.items():
    chosen = next(row for row in rows if row["lr"] == finals[arm, task][0]["lr"])
    gentle = next(row for row in rows if row["score"] >= chosen["score"] - 0.04)  # rows go by rate
    careful[arm, task] = [100 * (gentle[key] - chosen[key]) for key in ("score", "kept")] + [
        gentle["lr"] < chosen["lr"]
    ]
for task in TASKS:
    points = np.array([careful[arm, task] for arm in ARMS])
    print(
        f"{task:21s} {points[:, 2].sum():.0f} arms would go lower: score {points[:, 0].mean():+5.1f}, kept {points[:, 1].mean():+5.1f} points on average"
    )
arm, task = max(careful, key=lambda at: careful[at][1])
print(f"most of all {arm}, {task}: score {careful[arm, task][0]:+.1f}, kept {careful[arm, task][1]:+.1f}")

# %% [markdown]
# So a good part of "this method forgets" is "this rate forgets". Tune on what you want to keep as well, or you choose it by
# accident.
#
# One expectation to test while we are here: LoRA "learns less and forgets less" than full fine-tuning
# ([Biderman et al., 2024](https://arxiv.org/abs/2405.09673)). LoRA r8 minus full fine-tuning, paired by seed:

# %%
pair = [ARMS.index(arm) for arm in ("LoRA r8", "full fine-tuning")]
for task in TASKS:
    learned, held = (paired_difference(*values[task][pair]) for values in (score, kept))
    print(f"{task:21s} learned {learned}, kept {held} points")

# %% [markdown]
# It learns less where there is much to learn. But it does not forget less here: each at the rate that its score asked for,
# full fine-tuning is gentler. Their result is for far longer training, on large corpora.
#
# **Beside PEFT's benchmark.** MetaMathQA to GSM8K on Llama-3.2-3B, one seed. For each method its best entry:

# %%
from labs_lib.measure import load_published, spearman

published = load_published("method_comparison")
theirs = {}
for row in published["rows"]:
    theirs[row["method"]] = max(row["accuracy"], theirs.get(row["method"], 0))
ours = {}
for i, arm in enumerate(ARMS):
    settings = cost[arm]["arm"]
    kind = settings["options"].get("method", settings["method"])
    if kind in theirs and (kind not in ours or mean[i] > mean[ours[kind]]):
        ours[kind] = i

# %%
both = sorted(ours, key=lambda kind: -mean[ours[kind]])
others, mine = [theirs[kind] for kind in both], [mean[ours[kind]] for kind in both]
agreement = spearman(mine, others)
print(
    f"{len(both)} methods in both; rank correlation {rank_correlation(mine, others):.2f}, p = {agreement.p:.3f}"
)

# %% [markdown]
# How sure is that? Two things could have come out otherwise: our seeds, and which methods somebody chose to compare. The
# second matters more.

# %%
columns = repeats[:, [ours[kind] for kind in both]]
by_seeds = [rank_correlation(draw, others) for draw in columns]
picks = np.random.default_rng(0).integers(len(both), size=(2000, len(both)))
by_methods = [rank_correlation(np.array(mine)[pick], np.array(others)[pick]) for pick in picks]
for what, values in (("other seeds", by_seeds), ("other methods", by_methods)):
    print(f"{what:14s} {np.nanpercentile(values, 2.5):.2f} to {np.nanpercentile(values, 97.5):.2f}")
alone = {task: score[task].mean(axis=1) for task in TASKS}
alone["old facts kept"] = np.mean([kept[task].mean(axis=1) for task in TASKS], axis=0)
for name, values in alone.items():
    part = values[[ours[kind] for kind in both]]
    print(f"  {name:22s} alone: {rank_correlation(part, others):5.2f}")
print(f"You predicted {predict_agreement:g}.")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.5, 5.6))
ranked = sorted(both, key=lambda kind: -theirs[kind])
for kind in both:
    here, there = both.index(kind), ranked.index(kind)
    colour = drawn(ARMS[ours[kind]], ls="-")
    far = abs(here - there) >= 5
    ax.plot([0, 1], [here, there], lw=2 if far else 1, alpha=1 if far else 0.45, **colour)
    ax.text(-0.04, here, f"{ARMS[ours[kind]]}  {mean[ours[kind]]:.0f} %", ha="right", va="center", size=9)
    ax.text(1.04, there, f"{theirs[kind]:.1f} %  {look(kind).label}", va="center", size=9)
ax.set(xlim=(-0.75, 1.75), ylim=(len(both) - 0.4, -1.2))
ax.axis("off")
ax.text(0, -0.9, "this bake-off", ha="center", weight="bold", size=9)
ax.text(1, -0.9, "PEFT, GSM8K", ha="center", weight="bold", size=9)
low, high = np.nanpercentile(by_methods, [2.5, 97.5])
finding(ax, f"Rank correlation {agreement.rho:.2f} [{low:.2f}, {high:.2f}]")
show(
    fig,
    alt=f"Ranks of {len(both)} methods here and in PEFT's benchmark, joined by lines; rank correlation {agreement.rho:.2f}.",
)

# %% [markdown]
# If the ranking travels, then a little: over other methods the interval touches zero. Prompt tuning is last in both; rsLoRA and
# MiSS are in front in both. What moved most may
# have been tuned in one place only: PEFT's file says of its AdaLoRA "probably trained too little", and here every arm had a
# grid of its own. What was kept has no relation to accuracy there.

# %% [markdown] tags=["takeaway"]
# Sort by what you will pay and by what you must keep, not by one score. Most methods tie on easy tasks; they part on facts,
# on forgetting, and on whether anything can serve them.

# %% [markdown]
# ## 5. The chapter on trial
# **Its comparison table** (section 6), cell by cell, on the shapes of Llama-2-7B: a step of 512 tokens in bfloat16, without
# gradient checkpointing. No weight is needed to count.

# %% tags=["hide-input"]
total = on_7b["full fine-tuning"]["params"]
lora_peak = on_7b["LoRA r16"]["peak_bytes"]
BOOK = {  # the chapter's row, its cells, and our arm on 7B and on small
    "LoRA": ("0.1-0.5%", "Low", "Zero (after merge)", "LoRA r16", "LoRA r8"),
    "DoRA": ("0.1-0.5%", "Low", "Zero (after merge)", "DoRA r16", "DoRA r8"),
    "LoRA+": ("0.1-0.5%", "Low", "Zero (after merge)", "LoRA+ r16", "LoRA+ r8"),
    "Prefix Tuning": ("0.1-0.5%", "Low", "Small", "prefix 30", "prefix 18"),
    "Prefix, as configured": ("0.1-0.5%", "Low", "Small", "prefix 30, projected", "prefix 18"),
    "Prompt Tuning": ("<0.01%", "Very Low", "Negligible", "prompt 10", "prompt 20"),
    "Prompt, 200 tokens": ("<0.01%", "Very Low", "Negligible", "prompt 200", None),
    "Adapters": ("0.5-3%", "Medium", "Small", "adapters, 1/16 of the width", "Pfeiffer 18"),
    "IA3": ("<0.01%", "Very Low", "Negligible", "IA3", "IA3"),
}
RANGES = {"0.1-0.5%": (0.1, 0.5), "0.5-3%": (0.5, 3), "<0.01%": (0, 0.01)}
MEMORY = {"Very Low": lambda x: x < 1, "Low": lambda x: x <= 1.05, "Medium": lambda x: x > 1.05}
OVERHEAD = {
    "Zero (after merge)": lambda x: x == 1,
    "Negligible": lambda x: x <= 1.05,
    "Small": lambda x: 1 < x <= 1.2,
}

# %%
rows, cells = [], {"parameters": {}, "memory": {}, "overhead": {}}
for name, (share, memory, overhead, big, small) in BOOK.items():
    percent_of = 100 * on_7b[big]["params"] / total
    peak = on_7b[big]["peak_bytes"] / lora_peak
    low, high = RANGES[share]
    cells["parameters"][name] = low <= percent_of <= high
    cells["memory"][name] = MEMORY[memory](peak)
    row = {
        "row": name,
        "params": f"{percent_of:.4f} % (says {share})",
        "memory over LoRA's": f"{peak:.3f} (says {memory})",
    }
    row["request over base"] = ""
    if small:
        flops = cost[small].get("merged_request_flops") or cost[small]["request_flops"]
        ratio = flops / cost[small]["base_request_flops"]
        cells["overhead"][name] = OVERHEAD[overhead](ratio)
        row["request over base"] = f"{ratio:.3f} (says {overhead})"
    rows.append(row)
table(rows)

# %% [markdown]
# QLoRA's row: the adapter is LoRA's, the base takes a quarter of the bytes. So parameters as LoRA, and memory below it; what
# happens to "zero after merge" is lab 03's (claim 29).

# %%
from labs_lib.methods.qlora import bits_per_weight

quantised = total - 2 * 32000 * 4096  # all but the embeddings and the head
saved = quantised * (2 - bits_per_weight() / 8)
qlora = 1 - saved / lora_peak
print(f"QLoRA's peak over LoRA's: {qlora:.3f}")
cells["parameters"]["QLoRA"] = cells["parameters"]["LoRA"]
cells["memory"]["QLoRA"] = MEMORY["Very Low"](qlora)
for column, held in cells.items():
    print(f"{column}: wrong for", ", ".join(name for name, right in held.items() if not right) or "nobody")
claim(56).observe(parts=cells)

# %% [markdown]
# **Claims 20 and 23**, the two "very low, negligible" rows with their numbers.

# %%
inference = {
    arm: cost[arm]["request_flops"] / cost[arm]["base_request_flops"] for arm in ("IA3", "prompt 20")
}
ratio = {arm: on_7b[arm]["peak_bytes"] / lora_peak for arm in ("IA3", "prompt 10", "prompt 200")}
claim(20).observe(
    parts={"training_memory": {"7B, over LoRA r16": ratio["IA3"]}, "inference": inference["IA3"]}
)
prompts = {f"7B, {arm.split()[1]} tokens": ratio[arm] for arm in ("prompt 10", "prompt 200")}
claim(23).observe(
    parts={"training_memory": prompts, "inference": {"20 tokens, a request of 96": inference["prompt 20"]}}
)

# %% [markdown]
# What training keeps is activations, and those belong to the base: a method with a hundredth of LoRA's parameters saves
# little more than a tenth of its memory. "Negligible" is wrong for prompts: every request has to read the prompt too, and how much that is
# depends on how long the request is itself.
#
# Counted is not measured. A step's peak memory and its time over LoRA r16's, where it was measured, beside the count that
# needs no device:

# %%
from labs_lib.measure.sides import side_by_side, step_cost, token_cost

seen = [name.replace("GaLore r128", "GaLore") for name in on_7b]
seen += [
    "LoRA r16, dropout 0.05",
    "DoRA r16, dropout 0.05",
    "QLoRA r16",
    "AdaLoRA r24 to r16",
    "LLaMA-Adapter 10",
]
count = {name: f"{row['peak_bytes'] / 1e9:.3g} GB" for name, row in zip(seen, on_7b.values(), strict=False)}
steps = side_by_side(
    "bench_training",
    seen,
    step_cost,
    "labs bench training",
    {"counted, llama-2-7b, 1 x 512 tokens": count},
    checkpointing=False,
)
print(steps)
table(steps.rows)

# %% [markdown]
# And a decoded token, its time over the base's, one row at a time:

# %%
seen = [
    "base",
    "LoRA",
    "LoRA, merged",
    "DoRA",
    "DoRA, norms kept",
    "DoRA, merged",
    "IA3",
    "IA3, merged",
    "adapters",
]
seen += ["prefix 30", "prompt 10", "prompt 200", "LLaMA-Adapter 10", "4-bit base", "QLoRA"]
tokens = side_by_side("bench_inference", seen, token_cost, "labs bench inference", what="decode", batch=1)
print(tokens)
table(tokens.rows)

# %% [markdown]
# **Claim 57**: "LoRA or DoRA [...] will substantially outperform these lighter methods", where new knowledge is needed.


# %%
def versus(first, second, task):
    """First minus second in points, paired by seed."""
    return paired_difference(*(score[task][ARMS.index(arm)] for arm in (first, second)))


knows = {
    f"{strong.split()[0]} over {light}, {task.split(', ')[1]}": versus(strong, light, task)
    for strong in ("LoRA r8", "DoRA r8")
    for light in ("IA3", "prompt 20")
    for task in FACTS
}
for pair, points in knows.items():
    print(f"{pair:30s} {points} points")
claim(57).observe(conditions=knows, seeds=SEEDS[FACTS[0]])

# %% [markdown]
# Against the soft prompt always; against IA3 only where there is much to store.
#
# **Claim 21**: IA3 "can match LoRA performance". **Claim 27**: LoRA+ ends at "the same final quality". **Claim 13**: for
# classification, prefix tuning. Each at its own best rate.

# %%
claim(21).observe(conditions={task: versus("IA3", "LoRA r8", task) for task in TASKS})
plus = {}
for task in TASKS:
    pair = (score[task][ARMS.index(arm)] for arm in ("LoRA+ r8", "LoRA r8"))
    plus[task] = paired_difference(*pair, level=0.90)
claim(27).observe(parts={"quality": plus})

# %%
best_other = max(
    (arm for arm in ARMS if arm != "prefix 18"),
    key=lambda arm: score["classification"][ARMS.index(arm)].mean(),
)
print("best other on reviews:", best_other)
claim(13).observe(versus("prefix 18", best_other, "classification"), seeds=SEEDS["classification"])

# %% [markdown]
# **Claim 55**: tuning LoRA matters more than switching the method. Lab 02's record has LoRA in eight settings on the same 512
# facts, steps and seeds; here are all methods, each tuned. Range over range, seed by seed:

# %%
lab02 = load_record("sweep_tune_lora", device="cpu")
spans = []
for k, seed in enumerate(SEEDS[FACTS[-1]]):
    lora = [
        100 * row["score"]
        for row in lab02.rows
        if row["stage"] == "final" and row["seed"] == seed and row["arm"]["method"] == "lora"
    ]
    methods = score[FACTS[-1]][:, k]
    spans.append((max(lora) - min(lora)) / (methods.max() - methods.min()))
claim(55).observe(parts={"tuning_spans_more": {"512 facts": mean_ci(spans)}}, seeds=SEEDS[FACTS[-1]])

# %% [markdown]
# A well-tuned and a badly tuned LoRA are as far apart as the best and the worst method. (The worst LoRA there is the one with
# the rate that recipes for 7B models print.)
#
# **Claim 58**, the table of section 10: who changes what, and what it saves. Three steps each:

# %%
from labs_lib.training.adapt import METHODS
from labs_lib.training.sweeps import Arm
import torch


def changed(method, **options):
    """The share of the base's matrices that three steps change."""
    model = lab.base()[0]
    adapted = METHODS[method](model, Arm(method, method, options=options), 0, 3)
    base = {name: p for name, p in adapted.model.named_parameters() if "lora_" not in name and p.ndim == 2}
    start = {name: p.detach().clone() for name, p in base.items()}
    ids = torch.arange(5, 69, device=lab.device).view(2, 32)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    optimizer = adapted.optimizer(1e-3) if adapted.optimizer else torch.optim.AdamW(trained, 1e-3)
    for _ in range(3):
        adapted.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return np.mean([not torch.equal(p, start[name]) for name, p in base.items()])


# %%
share = {method: changed(method) for method in ("lora", "rslora", "galore")}
print("base matrices changed:", {method: f"{part:.0%}" for method, part in share.items()})
state = {arm: on_7b[arm]["state_bytes"] for arm in ("full fine-tuning", "GaLore r128", "LoRA r16")}
print("optimizer bytes on 7B:", {arm: f"{each / 1e9:.2f} GB" for arm, each in state.items()})
claim(58).observe(
    parts={
        "trained": {arm: 100 * on_7b[arm]["params"] / total for arm in ("LoRA r16", "rsLoRA r16")},
        "optimizer": state["GaLore r128"] / state["full fine-tuning"],
        "base_weights": (share["lora"], share["rslora"], share["galore"]) == (0, 0, 1),
    }
)

# %% [markdown]
# ## 6. When would you choose it?
# Ask in this order, and stop at the first answer that decides:
#
# 1. **Must many tenants share a batch, on an engine you did not write?** LoRA, plain.
# 2. **Must nothing be forgotten?** Look at the right half of the first figure before anything else.
# 3. **Is there much to store?** Then parameters decide, and steps.
# 4. **Is it an easy task?** Then everything works; take the smallest thing that your engine merges.
#
# From the record, by numbers instead of by taste:


# %%
def first(candidates, by):
    name = max(candidates, key=by)
    return f"{name} ({by(name):.0f} %)"


at = {arm: i for i, arm in enumerate(ARMS)}
everywhere = [arm for arm in ARMS if set(cost[arm]["engines"].values()) == {"accepted"}]
folds = [arm for arm in ARMS if cost[arm]["mergeable"]]
tiny = [arm for arm in ARMS if cost[arm]["params"] < 20_000]
keeps = {arm: np.mean([kept[task][at[arm]].mean() for task in TASKS]) for arm in ARMS}
print("served by all five engines:", ", ".join(everywhere))
print("best of those:             ", first(everywhere, lambda arm: mean[at[arm]]))
print("best that folds in:        ", first(folds, lambda arm: mean[at[arm]]))
print("best under 20,000 numbers: ", first(tiny, lambda arm: mean[at[arm]]))
print("keeps most old facts:      ", first(ARMS, lambda arm: keeps[arm]))
print(
    "keeps most, of those with a mean score of 90 %:",
    first([arm for arm in ARMS if mean[at[arm]] >= 90] or ARMS, lambda arm: keeps[arm]),
)

# %% [markdown]
# **The failure you will meet**: a comparison at one rate for all. Here it is, made from the same runs: everyone at LoRA's best
# rate. Many methods would have been written off.

# %%
task, common = "style", finals["LoRA r8", "style"][0]["lr"]
rows = []
for arm in ARMS:
    there = [row for row in tried[arm, task] if abs(row["lr"] / common - 1) < 0.2]
    if there:
        own = max(row["score"] for row in tried[arm, task])
        rows.append(
            {
                "arm": arm,
                f"at {common:g}": f"{100 * there[0]['score']:.0f} %",
                "at its own best": f"{100 * own:.0f} %",
            }
        )
table(rows)

# %% [markdown]
# Arms that are missing never tried LoRA's rate: their own grids lie a decade or more away.
#
# **What this cannot say.** The base has a million parameters; its tasks are styles, labels and facts, not reasoning. Steps are
# few and equal, which favours what learns fast. One size per method. The rank correlation above is the measure of how far such
# a ranking travels.

# %% [markdown]
# ## 7. Go further
# - `labs bakeoff` runs it all (it resumes where it stopped); `labs bakeoff --costs` counts again.
# - **Open exercise 1.** Equal steps is one choice of "equal". Take equal FLOPs instead: who would gain? Use the record of costs.
# - **Open exercise 2.** Add an arm of your own to `ARMS` in `labs_lib/training/bakeoff.py`, for instance two methods combined.
#   Only its runs are missing: what has to be true of the log for that?

# %% [markdown] tags=["solution-only"]
# **Answer 1.** Cheaper steps than LoRA's mean more of them. Adapters, IA3 and prefixes would gain a little. Full fine-tuning
# and GaLore would lose a quarter of their steps; LoHa and VeRA, at this rank, about half and two thirds.

# %% tags=["solution-only"]
for arm in sorted(ARMS, key=lambda arm: cost[arm]["train_flops"]):
    print(f"{arm:20s} {cost['LoRA r8']['train_flops'] / cost[arm]['train_flops']:.2f} times LoRA r8's steps")

# %% [markdown] tags=["solution-only"]
# **Answer 2.** The log is named after the definition of the whole sweep and the base's weights, so another arm means another
# log: copy the old rows into it. They are still valid if nothing else in the definition or in the code changed.

# %%
progress()
