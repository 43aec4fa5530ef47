"""Lab 18, mixture of LoRA experts. Its records are `labs mix tasks`, `labs mix tenants` and `labs mix halves`."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, progress, setup
from labs_lib.lab.plots import finding, show

lab = setup(lab="18", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# Lab 17 has an adapter for every tenant, and an API key that says which one. But what if a request needs *two* of them?
# Or if nobody says which? A **mixture of LoRA experts** puts several trained adapters into one model, frozen, and trains
# only a **gate** $g$, which says for every token how much of each expert it gets:
#
# $$y = W x + \sum_e g_e(h)\, s_e B_e A_e x, \qquad \sum_e g_e = 1$$
#
# Here ([MoLE](https://arxiv.org/abs/2404.13628), [MixLoRA](https://arxiv.org/abs/2404.15159)) each block has its own gate,
# and $h$ is what the block reads. [X-LoRA](https://arxiv.org/abs/2402.07148) has one gate, which reads what the whole model
# made of the text without experts, in a first pass.

# %% [markdown]
# **By hand.** Two experts add $+6$ and $-2$ to a number. Gate logits $(0, 0)$ give the shares $(½, ½)$: together they add
# $½ \cdot 6 - ½ \cdot 2 = 2$. Logits $(\ln 3, 0)$ give $(¾, ¼)$: they add $4$.
#
# Three kinds of request follow you through this lab, each needing two adapters:
#
# | | first adapter | second adapter | the request |
# |---|---|---|---|
# | **tasks** | a customer's style | closed-book facts | either one; the prompt shows which |
# | **tenants** | one customer's style | another's | either one; the prompts look alike |
# | **halves** | eight rules of a guide | the other eight | both at once, in every text |
#
# **Predict**: for which of the three can a gate do what a merge or a key cannot?

# %% [markdown]
# ## 2. Build it
# **Exercise 1: shares.** A softmax; and with `top_k`, zeros for all but the best.
#
# *You should see* ¾ and ¼ from above, then an expert that need not run.

# %% tags=["exercise"]
from labs_lib.methods.mixture import gate_weights

# %%
import math

import torch

gate_weights = check(gate_weights)
print(gate_weights(torch.tensor([math.log(3), 0.0])))
print(gate_weights(torch.tensor([1.0, 2.0, 0.0]), top_k=2))

# %% [markdown]
# **Exercise 2: the layer.** All experts at once, in two steps. *You should see* 4, the number from above: two experts of
# rank 1 that add $+6$ and $-2$.

# %% tags=["exercise"]
from labs_lib.methods.mixture import mixture_delta

# %%
mixture_delta = check(mixture_delta)
A, B = torch.ones(2, 1, 1), torch.tensor([[[6.0]], [[-2.0]]])
print(mixture_delta(torch.ones(1, 1), A, B, gate_weights(torch.tensor([[math.log(3), 0.0]]))))

# %% [markdown]
# **Exercise 3: balance.** Gates like to send everything to whoever was better first. This number is 1 if the work is spread
# evenly and rises to the number of experts if one does it all. *You should see* 1 and 4.

# %% tags=["exercise"]
from labs_lib.methods.mixture import balance_loss

# %%
balance_loss = check(balance_loss)
print(balance_loss(torch.eye(4)), balance_loss(torch.eye(4)[[2, 2, 2, 2]]))

# %% [markdown]
# **Your turn.** The base `small` has 4 blocks of width 128. How many numbers do the gates of two experts have, a bias included?

# %%
### BEGIN SOLUTION
### STUB: gate_numbers = ...
gate_numbers = 4 * 2 * (128 + 1)
### END SOLUTION
gate_numbers = check(gate_numbers, "lab18.gate_numbers")

# %% [markdown]
# ### A failure you will meet
# With `top_k=1` the lone expert's share is 1, whatever its logit. Ask for its gradient: *you should see* zeros. A router
# trained that way never learns. Train with two, run with one.

# %%
for top_k in (1, 2):
    logits = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    gate_weights(logits, top_k)[:, 1].square().sum().backward()
    print(f"top {top_k}: gradient of the logits {logits.grad.tolist()}")

# %% [markdown]
# ## 3. Prove it
# First two experts, trained here: one customer's style, and closed-book facts.

# %%
from labs_lib import fit, load_task
from labs_lib.methods.lora import inject_lora, lora_state_dict

TENANT, RANK, RATE = "fathom-eleven", 8, 5e-3  # the rate that `labs sweep tune_lora` found for this LoRA
style, facts = load_task("style", tenant=TENANT), load_task("knowledge", facts=160)["train"][:]
copy = style["train"][:]


def trained(rows, steps, batch_size):
    model, tokenizer = lab.base(dtype=torch.float32)
    generator = torch.Generator().manual_seed(lab.seed)
    model = inject_lora(model, "all-linear", RANK, 2 * RANK, generator=generator)
    fit(model, tokenizer, rows, steps=lab.steps(steps), lr=RATE, batch_size=batch_size, seed=lab.seed)
    return model


alone = [trained(copy, 60, 16), trained(facts, 150, 32)]
experts = [lora_state_dict(model) for model in alone]

# %% [markdown]
# **One expert alone.** A gate fixed at $(1, 0)$ or $(0, 1)$ must give that adapter back. **PEFT's merge.** Shares of
# $(1, 1)$ add both updates, as `add_weighted_adapter` with `combination_type="cat"` does.
#
# *You should see* differences of rounding.

# %%
import tempfile
from pathlib import Path

from peft import PeftModel

from labs_lib.methods.io import save_lora
from labs_lib.methods.mixture import fix_gates, gates_of, inject_mixture

base, tokenizer = lab.base(dtype=torch.float32)
mixture = inject_mixture(base, experts, [2.0, 2.0])
ids = tokenizer(copy["prompt"][0], return_tensors="pt")["input_ids"].to(lab.device)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits


def furthest(model, other):
    return (logits(model) - logits(other)).abs().max().item()


for name, shares, model in (("style", [1.0, 0.0], alone[0]), ("facts", [0.0, 1.0], alone[1])):
    print(f"gate at {shares}: {furthest(fix_gates(mixture, shares), model):.1e} from the {name} adapter")

# %%
folder = Path(tempfile.mkdtemp())
paths = [str(save_lora(model, folder / str(i))) for i, model in enumerate(alone)]
theirs = PeftModel.from_pretrained(lab.base(dtype=torch.float32)[0], paths[0], adapter_name="0")
theirs.load_adapter(paths[1], adapter_name="1")
theirs.add_weighted_adapter(["0", "1"], [1.0, 1.0], "both", combination_type="cat")
theirs.set_adapter("both")
print(f"gate at [1, 1]: {furthest(fix_gates(mixture, [1.0, 1.0]), theirs):.1e} from PEFT's merge")

# %% [markdown]
# **PEFT's X-LoRA** over the same two folders. Its classifier reads the last hidden state of a first pass; we take the shares
# that it says and give them to our layers. *You should see* the same logits again.

# %%
from peft import XLoraConfig, get_peft_model

plain = lab.base(dtype=torch.float32)[0]
plain.config.use_cache = False  # else PEFT raises: its two passes cannot share a cache
adapters = {"0": paths[0], "1": paths[1]}
config = XLoraConfig(
    hidden_size=plain.config.hidden_size, xlora_depth=1, adapters=adapters, task_type="CAUSAL_LM"
)
xlora = get_peft_model(plain, config).eval()
expected = logits(xlora)
said = xlora.get_latest_scalings()  # (batch, tokens, layers, experts), alike in every layer
ours = logits(fix_gates(mixture, said[:, :, 0].detach()))
print(f"shares of the first tokens: {said[0, :3, 0].tolist()}")
print(f"with X-LoRA's shares: {(ours - expected).abs().max():.1e} from X-LoRA")

# %% [markdown]
# **What a forward pass costs**, counted. Experts that are mixed cannot be merged, so each adds its own work; X-LoRA reads
# every text twice, and without a cache it reads the whole text again for every new token.

# %%
from labs_lib.lab.cards import table
from labs_lib.measure.count import count_flops

fix_gates(mixture, None)
forward = {"base": lab.base()[0], "one adapter": alone[0], "two experts, gated": mixture, "X-LoRA": xlora}
flops = {name: count_flops(logits, model) for name, model in forward.items()}
table(
    [
        {"model": name, "FLOPs over the base's": f"{count / flops['base']:.2f}"}
        for name, count in flops.items()
    ]
)

# %% [markdown]
# ## 4. Train it
# Only the gates train, on a little of both: 64 texts and 64 facts. The facts that are scored later are others.

# %%
practice = {key: copy[key][:64] + facts[key][:64] for key in ("prompt", "completion")}
run = fit(mixture, tokenizer, practice, steps=lab.steps(60), lr=3e-2, batch_size=24, seed=lab.seed)
print(f"{run.trainable_parameters:,} numbers trained, loss {run.losses[0]:.2f} to {run.final_loss:.2f}")

# %% [markdown]
# **What did the gates learn?** For a text and for a question, the facts expert's share in every block, token by token.
#
# **Predict**: will the share depend on the token, or on the whole request?

# %% tags=["hide-input"]
import matplotlib.pyplot as plt


@torch.no_grad()
def shares_of(prompt, completion):
    """(labels of the tokens, the second expert's share (blocks, tokens))."""
    read = tokenizer(prompt + completion, return_tensors="pt")["input_ids"].to(lab.device)
    mixture(input_ids=read)
    told = torch.stack([gate.weights[0, :, 1] for gate in gates_of(mixture).values()])
    return [tokenizer.decode(each).replace("\n", "\\n") or "·" for each in read[0]], told.float().cpu()


seen = {
    "A text to write": shares_of(copy["prompt"][70], copy["completion"][70]),
    "A question to answer": shares_of(facts["prompt"][100], facts["completion"][100]),
}
means = {name: told.mean().item() for name, (_, told) in seen.items()}
fig, axes = plt.subplots(2, 1, figsize=(10, 4.6), constrained_layout=True)
for ax, (name, (tokens, told)) in zip(axes, seen.items(), strict=True):
    shown = min(36, len(tokens))
    image = ax.imshow(told[:, :shown], vmin=0, vmax=1, cmap="cividis", aspect="auto")
    ax.set_xticks(range(shown), tokens[:shown], rotation=90, fontsize=7)
    ax.set_yticks(range(len(told)), range(1, len(told) + 1))
    ax.grid(visible=False)
    finding(ax, f"{name}: the facts expert gets {100 * means[name]:.0f} % on average", "", "block")
fig.colorbar(image, ax=axes, label="share of the facts expert")
show(
    fig,
    alt=f"Two heat maps, blocks by tokens: share of the facts expert while the model reads a text and a question. Means: {', '.join(f'{n}: {m:.2f}' for n, m in means.items())}.",
)

# %% tags=["hide-input"]
from statistics import fmean

from labs_lib.measure.quality import recall, style_quality
from labs_lib.world.tenants import load_tenant


def both(model):
    asked = {key: facts[key][96:] for key in ("prompt", "completion")}
    exact = style_quality(model, tokenizer, style["test"][: lab.rows(24)], load_tenant(TENANT)).exact
    return {
        "texts exact %": f"{100 * exact:.0f}",
        "facts recalled %": f"{100 * fmean(recall(model, tokenizer, asked)):.0f}",
    }


lines = [{"who answers": "style adapter"} | both(alone[0]), {"who answers": "facts adapter"} | both(alone[1])]
lines += [{"who answers": "both added"} | both(fix_gates(mixture, [1.0, 1.0]))]
lines += [{"who answers": "half of each"} | both(fix_gates(mixture, [0.5, 0.5]))]
lines += [{"who answers": "the gates"} | both(fix_gates(mixture, None))]
table(lines)

# %% [markdown]
# ## 5. Three needs on trial
# The chapter says that mixtures combine "the modularity of multi-adapter serving with the capacity of larger models". It
# names no number, so there is no claim to judge; there is a question: *when does a gate pay?* The
# records `labs mix` have every way to answer, for the three kinds of request, with three fresh seeds. What trains sees the
# same little practice, at the best of three rates; except "all of both", one LoRA of the same size as both experts
# together, which trains on everything from the start. Each expert is a LoRA of rank 8. X-LoRA, slow without a cache, has
# run on *tasks* only.

# %% tags=["hide-input"]
from labs_lib.measure.records import load_record
from labs_lib.measure.stats import mean_ci
from labs_lib.training.mixtures import MEANS, RATES

PAIRS = ("tasks", "tenants", "halves")
records = {pair: load_record(f"mix_{pair}") for pair in PAIRS}
print(*records.values(), sep="\n")


def finals(pair, way):
    return [row for row in records[pair].rows if (row["stage"], row["way"]) == ("final", way)]


def scores(pair, way, key="score"):
    """In percent, one per seed. "key" is a router that knows who asks: each need is answered by its own expert."""
    if way != "key":
        return [100 * row[key] for row in finals(pair, way)]
    own = [(finals(pair, "first"), "first"), (finals(pair, "second"), "second")]
    per_need = [[100 * row[need] for row in rows] for rows, need in own]
    return [fmean(each) for each in zip(*per_need, strict=True)]


# "halves" has no key: no request is one expert's alone
WAYS = {pair: [*(["key"] if pair != "halves" else []), *MEANS] for pair in PAIRS}
NAMES = {"key": "each by its own expert, chosen by key"} | MEANS

# %% tags=["hide-input"]
COLOURS = {"key": "#000000", "first": "#5F5F5F", "second": "#5F5F5F", "sum": "#56B4E9", "linear": "#56B4E9"}
COLOURS |= {
    "ties": "#56B4E9",
    "dare": "#56B4E9",
    "gate": "#009E73",
    "top-1": "#009E73",
    "balanced": "#009E73",
}
COLOURS |= {"xlora": "#E69F00", "few": "#0072B2", "one": "#0072B2"}
order = ["key", *MEANS]
fig, axes = plt.subplots(1, 3, figsize=(12, 4.6), sharey=True, constrained_layout=True)
for ax, pair in zip(axes, PAIRS, strict=True):
    told = {way: mean_ci(scores(pair, way)) for way in WAYS[pair] if scores(pair, way)}
    for way, each in told.items():
        at = len(order) - 1 - order.index(way)
        ax.barh(at, each.value, color=COLOURS[way], height=0.7, alpha=0.85)
        ax.plot(scores(pair, way), [at] * each.n, "o", ms=3, color="white", mec="#333333")
    best = max((told[way].value for way in ("sum", "linear", "ties", "dare") if way in told), default=0)
    ax.set_xlim(0, 104)
    headline = f"{pair}: gate {told['gate'].value:.0f} %, best merge {best:.0f} %"
    finding(ax, headline, "score (%)")
    ax.title.set_size(10)
axes[0].set_yticks(range(len(order)), [NAMES[way] for way in reversed(order)], fontsize=8)
spoken = {
    pair: {way: round(mean_ci(scores(pair, way)).value) for way in WAYS[pair] if scores(pair, way)}
    for pair in PAIRS
}
show(
    fig,
    alt=f"Bars of the score in percent for each way to answer and each kind of request, dots are seeds: {spoken}.",
)

# %% [markdown]
# Read each panel against its need.
#
# - **tasks**: the prompt shows what is asked for, and the gate learns to choose. From 64 texts and 64 facts it does what
#   the key does without training, and what one LoRA trained on everything does. Merges spoil both skills.
# - **tenants**: the prompts look alike, so nothing in them says who asks. Gates blend two voices into one that is neither's;
#   hardly a text is exact. The key is near perfect.
# - **halves**: every text needs both, yet not in every token: a headline is one expert's, a bullet the other's. A gate
#   helps here, too, where merging does not; training on both is better still.


# %% tags=["hide-input"]
def line(pair, way):
    rows = finals(pair, way) or finals(pair, "first")
    needs = (
        {"first": scores(pair, way, "first"), "second": scores(pair, way, "second")} if way != "key" else {}
    )
    told = {"requests": pair, "way": NAMES[way], "score %": f"{mean_ci(scores(pair, way))}"}
    told |= {f"{need} need %": f"{fmean(each):.0f}" if each else "-" for need, each in needs.items()} or {
        "first need %": "-",
        "second need %": "-",
    }
    kept = f"{100 * fmean(row['kept'] for row in rows):.0f}" if way != "key" else "-"
    edges = (min(RATES[way]), max(RATES[way])) if way in RATES else ()
    rate = (
        f"{rows[0]['lr']:g}{' (edge)' if rows[0]['lr'] in edges else ''}"
        if rows[0]["lr"] and way != "key"
        else "-"
    )
    return told | {
        "old facts kept %": kept,
        "trained": f"{rows[0]['trained']:,}" if way != "key" else "0",
        "rate": rate,
    }


table([line(pair, way) for pair in PAIRS for way in WAYS[pair] if scores(pair, way)])

# %% [markdown]
# **Does the gate beat the best merge?** Paired by seed: the same two experts, mixed by a gate or merged by the best of the
# four merges for that kind of request (chosen with hindsight, in the merges' favour). Mind the rates that the table
# marks as the edge of their grid: those ways might do better with a rate that was not tried.

# %% tags=["hide-input"]
from labs_lib.measure.stats import paired_difference

MERGES = ("sum", "linear", "ties", "dare")
for pair in PAIRS:
    if records[pair]:
        merge = max(MERGES, key=lambda way: fmean(scores(pair, way)))
        gap = paired_difference(scores(pair, "gate"), scores(pair, merge))
        print(f"{pair}: gate minus best merge ({merge}) {gap} points; ", end="")
        print(
            f"gate minus one LoRA on all of both {paired_difference(scores(pair, 'gate'), scores(pair, 'one'))}"
        )

# %% [markdown] tags=["takeaway"]
# A gate can only know what the text shows. Where the text shows the need, it learns to choose from little practice. Where
# only the key does, use the key: it is free, exact, and a tenant's weights then never touch another's answer.

# %% [markdown]
# ## 6. When would you choose it?
# For experts in *skills* that requests call for visibly, above all if you may not retrain on all the data together. Not for
# tenants: a mixture gives every tenant a share of every other's weights, and the proofs of labs 15 to 17 are void. If two
# skills must act at once and you have the data, compare with one adapter trained on both.
#
# **Failures you will meet**: X-LoRA raises `use_cache must be False`; a gate trained with `top_k=1` learns nothing (section
# 2); TIES and DARE drop entries, and rank 8 has few to spare; a mixture cannot be merged, so every token pays for
# every expert that runs.

# %% [markdown]
# ## 7. Go further
# - Run this lab on a model of the hub: `MODEL_ID` and `PROFILE="gpu"` in the first cell.
# - Give the gates a balance loss (`labs_lib.methods.mixture.balance`) and look at the heat maps again.
# - **Open question.** Put each tenant's name into the prompts of *tenants*. What will the gate do then, and why would you
#   still not serve tenants that way? *(Write your answer before you read on.)*

# %% [markdown] tags=["solution-only"]
# **Answer.** With the name in the prompt the request shows the need, so *tenants* becomes *tasks*: the gate can learn to
# choose. But its share is never exactly 0 or 1, so a trace of the other tenant's weights is in every token; a prompt that
# contains the wrong name moves the shares, so a request could ask for another tenant's style; and no oracle can prove whose
# adapter answered. A key decides outside of the model, where nobody's text can reach it.

# %%
progress()
