"""Lab 09, prefix tuning. Its records are the sweeps `prefix...`; LoRA's come from labs 01 and 02, IA3's from lab 11."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, log_axis, look, show

lab = setup(lab="09", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# While a language model reads, each layer keeps the keys and values of every token: its cache. Later tokens look there.
# Prefix tuning ([Li & Liang, 2021](https://arxiv.org/abs/2101.00190)) fills the cache before the first token arrives,
# with keys $P_K$ and values $P_V$ that no text ever wrote:
#
# $$K \leftarrow [P_K; K], \qquad V \leftarrow [P_V; V] \qquad \text{in every layer}$$
#
# These numbers are trained; not one weight of the model is. To the model it is as if it had read something: not words,
# but whatever training found useful to have read.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

fig, axes = plt.subplots(1, 2, figsize=(10, 3.1), sharey=True)
own, grey = look("prefix").color, look("base").color
for ax, kind, title in zip(
    axes,
    ("prompt", "prefix"),
    (
        "Prompt tuning trains the bottom row",
        "Prefix tuning trains every layer",
    ),
    strict=True,
):
    for row in range(5):
        for column in range(8):
            virtual, trained = column < 3, row == 0 if kind == "prompt" else row > 0
            if virtual and kind == "prefix" and row == 0:
                continue
            colour, alpha = (own, 0.95 if trained else 0.25) if virtual else (grey, 0.2)
            ax.add_patch(Rectangle((column, row), 0.88, 0.8, color=colour, alpha=alpha, lw=0))
            if row:
                ax.text(column + 0.44, row + 0.4, "K V", ha="center", va="center", size=7, color="#222222")
    ax.set(xlim=(-0.2, 8), ylim=(-0.2, 5), title=title)
    ax.set_xticks([1.4, 5.4], ["virtual tokens", "the text"])
    ax.set_yticks(np.arange(5) + 0.4, ["input", *(f"layer {i}" for i in range(1, 5))])
    ax.grid(visible=False)
    ax.tick_params(length=0)
show(
    fig,
    alt="Two grids of layers by positions. In prompt tuning only the three virtual tokens' input vectors are trained and their keys and values in each layer are computed from them; in prefix tuning the keys and values of the virtual tokens are trained in every layer, and there is no input vector.",
)

# %% [markdown]
# **By hand.** A query looks at two tokens of text with weights $1$ and $2$ (before softmax divides by the sum) and values
# $0$ and $3$: it gets $\frac{1 \cdot 0 + 2 \cdot 3}{3} = 2$. Now a prefix token with weight $1$ and value $10$ joins in:
#
# $$\frac{1 \cdot 10 + 1 \cdot 0 + 2 \cdot 3}{4} = 4 = \underbrace{\tfrac34}_{1 - g} \cdot 2 + \underbrace{\tfrac14}_{g} \cdot 10$$
#
# The text's own result, weakened by the gate $g$, plus $g$ times what the prefix says. The query opens the gate. What
# comes through it was fixed by training ([He et al., 2022](https://arxiv.org/abs/2110.04366)).
#
# **Predict**: if the prefix can only add averages of a few constants, what will it be good at, and what not?

# %% [markdown]
# ## 2. Build it
# **Exercise 1: from a flat table to a cache.** A prefix is stored as one row of numbers per virtual token. Attention wants
# a pair of tensors per layer. The order on disk is PEFT's.
#
# *You should see* one pair per layer, each (rows, heads, tokens, size).

# %% tags=["exercise"]
from labs_lib.methods.prefix_tuning import split_prefix

# %%
import torch

from labs_lib.methods.prefix_tuning import prefix_shape

split_prefix = check(split_prefix)
base, tokenizer = lab.base()
layers, heads, size = prefix_shape(base.config)
pairs = split_prefix(torch.randn(10, 2 * layers * heads * size), layers, heads, batch=3)
print(f"{len(pairs)} layers, keys {tuple(pairs[0][0].shape)}, values {tuple(pairs[0][1].shape)}")

# %% [markdown]
# **Exercise 2: the model around it.** Three details make the difference: the mask grows by the prefix, positions move on
# by it, and a cache that already holds text must not be replaced. `cache` is the library's own class, given at the start.
#
# *You should see* other logits than the base's, as many as the text has tokens.

# %% tags=["exercise"]
from labs_lib.methods.prefix_tuning import PrefixTuning

# %%
from labs_lib.methods.prefix_tuning import DirectPrefix
from transformers import DynamicCache

PrefixTuning = check(PrefixTuning)


# %%
def drawn(seed):
    return torch.Generator().manual_seed(seed)


def direct(tokens, seed=lab.seed, **options):
    """The base with a prefix of random numbers, trained as they are."""
    start = torch.randn(tokens, 2 * layers * heads * size, generator=drawn(seed))
    return PrefixTuning(lab.base(**options)[0], DirectPrefix(start), DynamicCache).to(lab.device)


# %%
ids = tokenizer("Facts: Sorrel Dell chair wool lilac", return_tensors="pt")["input_ids"].to(lab.device)
with torch.no_grad():
    plain, prefixed = base(input_ids=ids).logits, direct(10)(input_ids=ids).logits
print(f"{tuple(prefixed.shape)} logits, off the base's by up to {(prefixed - plain).abs().max():.1f}")

# %% [markdown]
# **Exercise 3: the projection.** Li and Liang did not train the prefix directly: "unstable", they say. They let a small
# network produce it, and throw the network away when training is done.
#
# *You should see* many more numbers in training, the same few once exported, and the same prefix.

# %% tags=["exercise"]
from labs_lib.methods.prefix_tuning import ProjectedPrefix

# %%
from labs_lib.measure import count_parameters

ProjectedPrefix = check(ProjectedPrefix)


def projected(tokens, hidden=128, seed=lab.seed, **options):
    """The base with a prefix that a network of inner width `hidden` produces."""
    prefix = ProjectedPrefix(tokens, heads * size, hidden, layers, generator=drawn(seed))
    return PrefixTuning(lab.base(**options)[0], prefix, DynamicCache).to(lab.device)


# %%
model = projected(18)
kept = model.prefix.export()
print("in training:", count_parameters(model))
print(f"once saved: {count_parameters(kept).trainable:,}, equal: {torch.equal(kept(), model.prefix())}")

# %% [markdown]
# **Exercise 4: attention as a gate.** The sum from above for real tensors: attention to the text, attention to the prefix,
# each by itself, and the share $g$ that mixes them.
#
# *You should see* 4 and a gate of 0.25, the example from section 1.

# %% tags=["exercise"]
from labs_lib.methods.prefix_tuning import gated_attention

# %%
gated_attention = check(gated_attention)
query = torch.ones(1, 1)
keys, values = torch.tensor([[1.0], [2.0]]).log(), torch.tensor([[0.0], [3.0]])
own = torch.zeros(1, 1), torch.tensor([[10.0]])  # a weight of exp(0) = 1
output, gate = gated_attention(query, keys, values, own)
print(f"output {output.item():g}, gate {gate.item():g}")

# %% [markdown]
# ## 3. Prove it
# The same numbers go into PEFT's prefix tuning, with and without projection. Logits and gradients of everything that
# trains are compared.
#
# *You should see* zeros, or a last digit.

# %% tags=["hide-input"]
from labs_lib import load_task, load_tenant
from labs_lib.measure.quality import collate, encode_rows

tenant = load_tenant("fathom-eleven")
style_task = load_task("style", tenant=tenant.slug)


def batch_of(rows):
    encoded = collate(encode_rows(tokenizer, rows["prompt"], rows["completion"]), tokenizer.pad_token_id)
    return {key: value.to(lab.device) for key, value in encoded.items()}


# %%
batch = batch_of(style_task["train"][:8])
from labs_lib.lab.cards import table
from peft import PrefixTuningConfig, get_peft_model


def peft_of(ours, **settings):
    """PEFT's model with our prefix's numbers."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ours.tokens, **settings)
    theirs = get_peft_model(lab.base(dtype=torch.float32)[0], config).eval()
    numbers = theirs.prompt_encoder["default"].parameters()
    for mine, other in zip(ours.prefix.parameters(), numbers, strict=True):
        other.data.copy_(mine)
    return theirs


def results(model, prefix):
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), torch.cat([each.grad.flatten() for each in prefix.parameters()])


# %%
rows, PROJECTED = [], {"prefix_projection": True, "encoder_hidden_size": 128}
kinds = {"direct": (direct, {}), "projected": (projected, PROJECTED)}
for kind, (make, settings) in kinds.items():
    ours = make(10, dtype=torch.float32)
    theirs = peft_of(ours, **settings)
    sides = results(ours, ours.prefix), results(theirs, theirs.prompt_encoder["default"])
    apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*sides, strict=True)]
    assert max(apart) <= 100 * torch.finfo(torch.float32).eps, (kind, apart)
    rows.append({"prefix": kind, "logits off by": f"{apart[0]:.0e}", "gradients off by": f"{apart[1]:.0e}"})
table(rows)

# %% [markdown]
# **The file, too**, both ways. PEFT writes what the projection gives, not the projection, and so do we: nobody can go on
# training through the network once it is saved.

# %%
import tempfile
from pathlib import Path

from labs_lib.methods.virtual_io import load_prefix, save_prefix
from peft import PeftModel

shelf = tempfile.TemporaryDirectory()
folder = Path(shelf.name)
save_prefix(ours, folder / "ours", base="shipped")
theirs.save_pretrained(folder / "theirs")

# %%
there = PeftModel.from_pretrained(lab.base(dtype=torch.float32)[0], folder / "ours").eval()
back = load_prefix(lab.base(dtype=torch.float32)[0], folder / "theirs", DynamicCache).eval()
with torch.no_grad():
    same = [torch.equal(each(**batch).logits, sides[0][0]) for each in (there, back)]
written = (folder / "ours" / "adapter_model.safetensors").stat().st_size
print(f"ours in PEFT: {same[0]}, PEFT's in ours: {same[1]}; {written:,} bytes on disk")

# %% [markdown]
# **Attention through the gate.** Is a whole model with a prefix really gated addition, layer by layer? transformers lets us
# put in our own attention. This one uses your function, and keeps what it saw of every layer. (Later it will also put a
# constant in place of what the prefix says.)
#
# *You should see* the same logits.

# %%
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

LENS = {"tokens": 0, "seen": {}, "constant": None}


def lens(module, query, key, value, attention_mask, scaling, **_):
    n, groups = LENS["tokens"], module.num_key_value_groups
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    prefix, text = [each[:, :, :n] for each in (key, value)], [each[:, :, n:] for each in (key, value)]
    output, gate = gated_attention(query, *text, prefix, attention_mask[..., n:] == 0)
    said = (query @ prefix[0].mT * scaling).softmax(-1) @ prefix[1]
    LENS["seen"][module.layer_idx] = gate.detach(), said.detach()
    if LENS["constant"] is not None:
        output = output + gate * (LENS["constant"][module.layer_idx].to(said.dtype) - said)
    return output.nan_to_num().transpose(1, 2).contiguous(), None  # nan: padding, which sees no text


# %%
AttentionInterface.register("lens", lens)
AttentionMaskInterface.register("lens", eager_mask)


def look_through(model, tokens, constant=None):
    """The model, with its attention written as a gate."""
    LENS.update(tokens=tokens, seen={}, constant=constant)
    model.base.set_attn_implementation("lens")
    return model


with torch.no_grad():
    gated = look_through(back, 10)(**batch).logits
print(f"off by at most {(gated - sides[0][0])[batch['attention_mask'] == 1].abs().max():.0e}")

# %% [markdown]
# ### A prefix that was never trained
# Whatever a written prompt does, a prefix can do: let the model read the prompt once and keep its cache. Here is our
# customer's style guide, and the prefix it leaves behind (`text_prefix`, a few lines in the library).
#
# **Predict**: with that prefix and no training, how many held-out texts come out exactly right?

# %%
from labs_lib.measure.quality import style_quality
from labs_lib.methods.prefix_tuning import text_prefix
from labs_lib.world.grammar import guide_line

guide = f"Guide: {guide_line(tenant.style)}\n"
guide_ids = tokenizer(guide)["input_ids"]
read = PrefixTuning(lab.base()[0], text_prefix(base, guide_ids), DynamicCache)
test = style_task["test"][: lab.rows(48)]
print(guide, f"{len(guide_ids)} tokens, {count_parameters(read).trainable:,} numbers", sep="")
print("base:", f"{style_quality(base, tokenizer, test, tenant).exact:.0%} exact;", end=" ")
print(f"with the prefix: {style_quality(read, tokenizer, test, tenant).exact:.0%}, after no training")

# %% [markdown] tags=["takeaway"]
# A prompt is a prefix whose numbers were computed from words. Tuning starts where words end: the same shape, any numbers.
# What can be said needs no training, only reading.

# %% [markdown]
# ### A hazard: padding on the left
# In a batch, shorter texts are padded on the left. The prefix stands before the padding, so there is a gap between prefix and
# text. LoRA does not care. A prefix does, unless it is told the positions.
#
# *You should see* which forward passes change when ten pads are put in.

# %%
from labs_lib.methods.lora import inject_lora

pads = torch.full((len(ids), 10), tokenizer.pad_token_id, device=lab.device)
mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], dim=1)
padded = {"input_ids": torch.cat([pads, ids], dim=1), "attention_mask": mask}
positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

# %%
rows, LORA2 = [], {"targets": "all-linear", "rank": 2, "alpha": 4}
lora, tuned = inject_lora(lab.base()[0], **LORA2, generator=drawn(1)).eval(), direct(10).eval()
for name, model, wanted in (
    ("LoRA", lora, {}),
    ("LoRA, positions given", lora, positions),
    ("prefix, ours", tuned, {}),
    ("prefix, ours, positions given", tuned, positions),
    ("prefix, PEFT's", other := peft_of(tuned), {}),
    ("prefix, PEFT's, positions given", other, positions),
):
    with torch.no_grad():
        alone, beside = model(input_ids=ids).logits, model(**padded, **wanted).logits[:, 10:]
    rows.append({"model": name, "logits move by": f"{(beside - alone).abs().max():.0e}"})
table(rows)

# %% [markdown]
# `generate` works the positions out from the mask, so generated text is safe, and so is training, which pads on the right
# here. A forward pass of your own over a left-padded batch is not: give it `position_ids`.

# %% [markdown]
# ## 4. Train it
# One customer's style, 60 steps, from random numbers, at the best recorded rate. Mind its size: the numbers start at about 1
# and Adam moves each by the learning rate, so rates that suit LoRA would leave them where they are.

# %% tags=["hide-input"]
from types import SimpleNamespace

from labs_lib.measure import load_record, mean_ci, paired_difference

NAMES = (
    "prefix_words",
    "prefix",
    "prefix_long",
    "prefix_facts_long",
    "tune_lora",
    "tune_lora_style",
    "lora_rank",
)
SOURCES = [load_record(f"sweep_{name}") for name in (*NAMES, "ia3", "ia3_long_facts")]
for each in SOURCES[:4]:
    print(each)
FACTS, STYLE, LONG = "knowledge, 512 facts", "style", "knowledge, 900 steps"
PREFIX, WORDS, QV, ALL2 = "prefix 18", "prefix 18, from words", "LoRA r9, q and v", "LoRA r2, all linear"

# Of the record of rates by seeds (claim 12) the direct prefix, at the rate that did best on other texts
grid = [row for row in load_record("sweep_prefix_stability").rows if row["arm"]["name"].startswith("direct")]
tried = [row for row in grid if row["stage"] == "sweep"]
best = max(tried, key=lambda row: (row["score"], -row["loss"]))["lr"]
finals = [row for row in grid if row["stage"] == "final" and row["lr"] == best]
SOURCES.insert(0, SimpleNamespace(rows=[row | {"arm": {"name": PREFIX}} for row in tried + finals]))


def rows_of(arm, task, stage="final", steps=None):
    """Rows of an arm on a task in the first record that has it, by rate and seed."""
    for source in filter(None, SOURCES):
        rows = [r for r in source.rows if (r["arm"]["name"], r["label"], r["stage"]) == (arm, task, stage)]
        rows = [r for r in rows if steps in (None, r["steps"])]
        if rows:
            return sorted(rows, key=lambda row: (row["lr"], row["seed"]))
    return []


def percent(rows, key="score"):
    return mean_ci([100 * row[key] for row in rows])


# %%
from labs_lib import fit

row = rows_of(PREFIX, STYLE)[0]  # seed 1 of the record
trained = direct(18, seed=row["seed"])
run = fit(trained, tokenizer, style_task["train"][:], steps=lab.steps(60), lr=row["lr"], seed=row["seed"])
quality = style_quality(trained, tokenizer, test, tenant)
print(f"rate {run.lr:g}, last loss {run.final_loss:.4f} (recorded {row['loss']:.4f})")
print(f"exact texts {quality.exact:.1%} (recorded {row['score']:.1%}), rules kept {quality.compliance:.1%}")

# %% [markdown]
# ### Style and facts, against LoRA with as many numbers
# 18 virtual tokens are 18,432 numbers here. So are LoRA r9 on q and v; LoRA r2 on all layers has 18,944. Every arm had its own
# sweep of rates; then fresh seeds. The style takes 60 steps, the facts 150.
#
# **Predict**: LoRA r2 recalls about 42 % of 512 new facts. The prefix?

# %%
### BEGIN SOLUTION
### STUB: predict_facts = ...  # in percent
predict_facts = 40
### END SOLUTION
predict_facts = check(predict_facts, "lab09.predict_facts")

# %% tags=["hide-input"]
ARMS = (PREFIX, WORDS, QV, "LoRA r4, attention", "LoRA r3, MLP", ALL2)
lines = []
for task in (STYLE, FACTS):
    for arm in (*ARMS, "prefix 74", "LoRA r8, all linear"):
        rows = rows_of(arm, task)
        if not rows:
            continue
        grid = [each["lr"] for each in rows_of(arm, task, "sweep")]
        line = {"task": task.split(",")[0], "arm": arm, "numbers": f"{rows[0]['params']:,}"}
        line["rate"] = f"{rows[0]['lr']:g}{' (edge)' if rows[0]['lr'] in (min(grid), max(grid)) else ''}"
        line |= {"seeds": len(rows), "score %": str(percent(rows))}
        lines.append(line | {"old facts kept %": f"{percent(rows, 'kept').value:.0f}"})
print(f"You predicted {predict_facts:g} % of the facts for the prefix.")
table(lines)

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
labels = [arm for arm in ARMS if rows_of(arm, FACTS)]
for ax, task in zip(axes, (STYLE, FACTS), strict=True):
    for y, arm in enumerate(reversed(labels)):
        rows = rows_of(arm, task)
        if not rows:
            ax.text(2, y, "not run", va="center", size=9, color="#555555")
            continue
        score, colour = percent(rows), look("prefix" if "prefix" in arm else "lora").color
        ax.barh(y, score.value, color=colour, alpha=0.9, height=0.6)
        ax.plot(np.clip(score.ci, 0, 100), [y, y], color="#222222", lw=1.4)
        ax.text(max(score.value, min(100, score.hi)) + 2, y, f"{score.value:.0f}", va="center", size=9)
    ax.set_yticks(range(len(labels)), reversed(labels))
    ax.set_xlim(0, 112)
    ax.grid(visible=False, axis="y")
best = {task: [percent(rows_of(arm, task)).value for arm in (PREFIX, QV, ALL2)] for task in (STYLE, FACTS)}
finding(axes[0], f"Style: {best[STYLE][0]:.0f} % against LoRA r2's {best[STYLE][2]:.0f} %", "exact texts (%)")
title = (
    f"Facts: {best[FACTS][0]:.0f} % against {best[FACTS][2]:.0f} %, but LoRA on q, v: {best[FACTS][1]:.0f} %"
)
finding(axes[1], title, "new facts recalled (%)")
told = {
    task: dict(zip(("prefix", "LoRA q v", "LoRA r2"), map(round, best[task]), strict=True)) for task in best
}
show(
    fig,
    alt=f"Bars with 95 % intervals, {len(labels)} arms of about 18,000 trained numbers, on the style and on 512 facts. In percent: {told}.",
)

# %% [markdown]
# On the style the prefix is about LoRA's equal (though look what it forgot); on the facts it has a fraction. It would be easy to
# stop here and say: a prefix adds averages of constants, and a fact is no constant. But look at LoRA on q and v. It adds any
# linear function of the text, has exactly as many numbers, and knows no more. What the two share is the *place*. The arm that
# may touch the MLP alone does as well as any (its interval is wide). More numbers, 74 tokens, do not help.
#
# Three suspects, then: the form, the place, and the time (lab 11 taught us that). One by one.

# %% [markdown]
# **Time.** The same arms again, for longer.

# %% tags=["hide-input"]
curves = {
    PREFIX: [(FACTS, 150), (LONG, 900)],
    "prefix 37": [(FACTS, 300)],
    QV: [(FACTS, 150), (LONG, 900)],
    ALL2: [(FACTS, 150)],
    "LoRA r4, all": [(FACTS, 300)],
    "IA3": [(FACTS, 150), ("knowledge, 300 steps", 300), (LONG, 900)],
}
lines, points = [], {}
for arm, lengths in curves.items():
    for label, steps in lengths:
        rows = rows_of(arm, label, steps=steps) or rows_of(arm, label, "sweep")  # one seed: its best rate
        if rows:
            rows = rows if rows[0]["stage"] == "final" else [max(rows, key=lambda row: row["score"])]
            score = percent(rows)
            points.setdefault(arm, []).append((steps, score))
            line = {
                "arm": arm,
                "numbers": f"{rows[0]['params']:,}",
                "steps": steps,
                "rate": f"{rows[0]['lr']:g}",
            }
            line |= {"seeds": len(rows), "facts %": str(score)}
            line["bits per number"] = f"{score.value / 100 * 512 * 6 / rows[0]['params']:.2f}"
            lines.append(line | {"old facts kept %": f"{percent(rows, 'kept').value:.0f}"})
table(lines)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.2, 3.6))
drawn_as = {PREFIX: ("prefix", "-", "s"), "prefix 37": ("prefix", "-", "D"), QV: ("lora", "--", "o")}
drawn_as |= {ALL2: ("lora", "-", "^"), "LoRA r4, all": ("lora", "-", "v"), "IA3": ("ia3", "-", "X")}
for arm, series in points.items():
    method, line, marker = drawn_as[arm]
    steps, scores = zip(*series, strict=True)
    middle = [score.value for score in scores]
    ends = [np.clip(score.ci, 0, 100) if score.n > 1 else (score.value,) * 2 for score in scores]
    error = np.abs(np.array(ends) - np.array(middle)[:, None]).T
    label = f"{arm}, {rows_of(arm, curves[arm][0][0], steps=steps[0])[0]['params']:,}"
    ax.errorbar(
        steps, middle, yerr=error, fmt=line, marker=marker, color=look(method).color, label=label, capsize=2
    )
log_axis(ax, (150, 300, 900))
ax.set_ylim(-3, 108)
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
last = {arm: series[-1] for arm, series in points.items()}
title = f"The prefix after {last[PREFIX][0]} steps: {last[PREFIX][1].value:.0f} % of the facts"
finding(ax, title, "training steps", "new facts recalled (%)")
told = {f"{arm}, {s} steps": round(score.value) for arm, series in points.items() for s, score in series}
show(
    fig,
    alt=f"Recall of 512 facts against training steps, log axis, by arm and number of trained numbers. In percent: {told}.",
)

# %% [markdown]
# Six times the steps, and the prefix recalls most of the facts. "A prefix cannot hold facts" would have been wrong. What the bars
# showed is who is *faster*. LoRA on q and v, from the same place and with as many numbers, needs the same patience, and then gets
# a little further. (One seed each at 900 steps, but three rates: more seeds would tell whether that little is real.) Where the
# MLP may change too, 300 steps are enough. And nobody packs as much into a number as IA3.
#
# So time was one suspect, and place another. The form is left.

# %% [markdown]
# **Form.** Now a prefix learns the 512 facts, live, for 150 steps at its recorded rate. Then your attention function looks through
# both models at the texts they were trained on, and through the guide that was only read.
#
# **Predict**: a prefix can only say an average of its constants, as loud as the gate is open. Which of the three opens its gates
# widest?

# %%
facts = load_task("knowledge", facts=512)
row = rows_of(PREFIX, FACTS)[0]
knows = direct(18, seed=row["seed"])
run = fit(
    knows, tokenizer, facts["train"][:], steps=lab.steps(150), lr=row["lr"], batch_size=64, seed=row["seed"]
)
print(f"last loss {run.final_loss:.3f} (recorded {row['loss']:.3f})")

# %%
texts, questions = batch_of(style_task["train"][:32]), batch_of(facts["train"][:256])


def gates_and_means(model, tokens, inputs):
    """Mean gate (layer, head), and what the prefix says on average: one (1, heads, 1, size) per layer."""
    with torch.no_grad():
        look_through(model, tokens)(**inputs)
    real = inputs["attention_mask"][:, None, :, None].float()
    seen = [LENS["seen"][layer] for layer in range(layers)]
    means = [[(each * real).sum((0, 2)) / real.sum() for each in pair] for pair in seen]
    return torch.stack([gate[:, 0] for gate, _ in means]), [said[None, :, None] for _, said in means]


# %%
gates = {
    "guide, read": gates_and_means(read, len(guide_ids), texts)[0].cpu(),
    "style, trained": gates_and_means(trained, 18, texts)[0].cpu(),
    "facts, trained": gates_and_means(knows, 18, questions)[0].cpu(),
}

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained", sharey=True)
for ax, (title, each) in zip(axes, gates.items(), strict=True):
    image = ax.imshow(each, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(each.numpy()):
        ax.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    ax.set_xticks(range(each.shape[1]))
    ax.set_yticks(range(layers))
    ax.grid(visible=False)
    finding(ax, f"{title}: mean {each.mean():.2f}", "head", "layer" if ax is axes[0] else "")
bar = fig.colorbar(image, ax=axes)
bar.set_label("mean gate")
told = {
    title: f"{each.min():.2f} to {each.max():.2f}, mean {each.mean():.2f}" for title, each in gates.items()
}
show(fig, alt=f"Three heat maps of the mean gate by layer and head. Gates: {told}.")

# %% [markdown]
# The facts, by far. A bounded mean cannot shout. To add more, a head opens its gate, and whatever share the prefix gets, the text loses: $(1 - g)\,h$.
# LoRA's sum takes nothing away.
#
# Next, take the choice away. In every head, put the mean over all training tokens in place of what the prefix says there. The
# gate may still open and close. **Predict**: which survives being told the same thing at every token, style or facts?

# %%
from labs_lib.measure.quality import recall, row_losses

known = facts["test"][: lab.rows(512)]


def nats(model, rows):
    """Loss per token of the completions."""
    losses = row_losses(model, tokenizer, rows)
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def exact(model, rows):
    """Share of whole texts, or of facts, in percent."""
    if "product" in rows:
        return 100 * style_quality(model, tokenizer, rows, tenant).exact
    return 100 * np.mean(recall(model, tokenizer, rows))


# %%
lines = []
for name, model, inputs, rows in (("style", trained, texts, test), ("facts", knows, questions, known)):
    start, constant = nats(base, rows), gates_and_means(model, 18, inputs)[1]
    free, told = (nats(look_through(model, 18, put_in), rows) for put_in in (None, constant))
    scores = [exact(look_through(model, 18, put_in), rows) for put_in in (None, constant)]
    line = {"prefix for the": name, "base's loss": f"{start:.2f}", "prefix's": f"{free:.2f}"}
    line |= {"a constant's": f"{told:.2f}", "of the fall": f"{100 * (start - told) / (start - free):.0f} %"}
    lines.append(line | {"exact, prefix": f"{scores[0]:.0f} %", "exact, constant": f"{scores[1]:.0f} %"})
table(lines)

# %% [markdown]
# So "a prefix adds a constant" is too simple even for a style: what it says must answer each query, or hardly a text comes out
# right. But look at the loss. The constant alone brings most of the fall for the style, and a smaller part for the facts.
#
# The cleaner test of the form stands in the figure above: LoRA on q and v, in the same place, with as many numbers and as many
# steps, but no gate and no bound. At 150 steps it is no better. The form is not what held the prefix back there.

# %% [markdown] tags=["takeaway"]
# Before you call a method weak, ask three questions. Had it time? Was it in the right place? Then: is it its form? The gap at 150
# steps and equal parameters was mostly place: this base's attention is slow to learn facts, whoever trains it.

# %% [markdown]
# ## 5. The chapter on trial
# **Claim 11**: the chapter's configuration, 30 virtual tokens with a projection of inner width 1,024, is "typically 0.1-0.5 % of
# total parameters". First what is saved.
#
# **Your turn.** How many numbers is a prefix of 30 tokens for Llama-2-7B: 32 layers, width 4,096, each head with keys and values
# of its own?

# %%
### BEGIN SOLUTION
### STUB: saved = ...  # a whole number
saved = 30 * 2 * 32 * 4096
### END SOLUTION
saved = check(saved, "lab09.saved")

# %%
from labs_lib import random_like
from labs_lib.methods.prefix_tuning import add_prefix
from labs_lib.models.twins import peft_parameter_count

CHAPTER = {"prefix_projection": True, "encoder_hidden_size": 1024}
rows, shares = [], {}
for name in ("llama-2-7b", "llama-3-8b", "mistral-7b"):
    twin = random_like(name)  # shapes without numbers
    total = count_parameters(twin).total
    for when, hidden, settings in (("in training", 1024, CHAPTER), ("as saved", None, {})):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30, **settings)
        count = peft_parameter_count(twin, config)
        assert count == count_parameters(add_prefix(twin, 30, DynamicCache, hidden)).trainable
        shares[name, when] = 100 * count / total
        line = {"model": name, "": when, "numbers": f"{count:,}", "share": f"{shares[name, when]:.3f} %"}
        rows.append(line | {"with gradients and Adam, fp32": f"{16 * count / 1e9:.2f} GB"})
table(rows)

# %%
claim(11).observe(
    conditions={f"Llama-2-7B, {when}": shares["llama-2-7b", when] for when in ("in training", "as saved")}
)

# %% [markdown]
# The comment stands beside `print_trainable_parameters()`, which counts what trains: with the projection that is tens of times
# more than what is saved, and no longer few. With grouped-query attention (Llama-3, Mistral) a prefix is smaller by the
# grouping.

# %% [markdown]
# **Claim 12**: `prefix_projection=True`, "use MLP to project prefix (more stable)". Two prefixes of 18 tokens on the style, over a
# grid of rates, five seeds for every point (`labs sweep prefix_stability` and `prefix_stability_wide`).
#
# **Predict**: over how many of these rates will each work?

# %% tags=["hide-input"]
KINDS = {"direct": ("prefix", "-", "s"), "projected": ("p_tuning", "--", "D")}
stability = [
    each
    for each in (load_record("sweep_prefix_stability"), load_record("sweep_prefix_stability_wide"))
    if each
]
print(*stability, sep="\n")
runs = {}  # kind -> rate -> seed -> row
for row in (row for source in stability for row in source.rows):
    runs.setdefault(row["arm"]["name"].split()[0], {}).setdefault(row["lr"], {})[row["seed"]] = row
runs = {kind: dict(sorted(by_rate.items())) for kind, by_rate in runs.items()}


def last_loss(row):
    return np.inf if row["loss"] is None else row["loss"]


middle = {
    kind: {lr: np.median([last_loss(r) for r in seeds.values()]) for lr, seeds in by.items()}
    for kind, by in runs.items()
}
tops = {kind: min(losses, key=losses.get) for kind, losses in middle.items()}
good = {
    kind: [lr for lr, seeds in by.items() if np.mean([r["score"] for r in seeds.values()]) >= 0.9]
    for kind, by in runs.items()
}
SEEDS = sorted(next(iter(runs["direct"].values())))

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.6))
for kind, (method, line, marker) in KINDS.items():
    colour = look(method).color if kind == "direct" else "#7F4F24"
    rates = list(runs[kind])
    values = [[min(last_loss(r), 30) for r in runs[kind][lr].values()] for lr in rates]
    scores = [[100 * r["score"] for r in runs[kind][lr].values()] for lr in rates]
    for ax, each in zip(axes, (values, scores), strict=True):
        ax.plot(rates, np.median(each, axis=1), line, marker=marker, color=colour, label=kind)
        for lr, ys in zip(rates, each, strict=True):
            ax.plot([lr] * len(ys), ys, ".", color=colour, ms=4, alpha=0.6)
for ax in axes:
    log_axis(ax, (1e-3, 1e-2, 1e-1, 1))
axes[0].set_yscale("log")
axes[0].legend()
finding(
    axes[0],
    f"The best rate moves from {tops['direct']:g} to {tops['projected']:g}",
    "learning rate",
    "last loss (nats)",
)
title = f"90 % exact: {len(good['direct'])} rates direct, {len(good['projected'])} projected"
finding(axes[1], title, "learning rate", "exact texts (%)")
told = {kind: f"best at {tops[kind]:g}, 90 % exact at {good[kind]}" for kind in KINDS}
show(
    fig,
    alt=f"Last loss and exact texts against the learning rate, five seeds, for a direct and a projected prefix: {told}. The valleys have the same shape; the projected one lies at smaller rates and rises more steeply on its right.",
)

# %% [markdown]
# Two valleys of about one width, 30 times apart. Why apart? Adam moves every *trained* number by the rate. Trained directly, a
# number of the prefix moves by just that. Behind the projection it is a sum of 128 inner values times weights that all move.

# %%
moves = {}
for kind, make in (("direct", direct), ("projected", projected)):
    model = make(18)
    before, optimizer = model.prefix().detach().clone(), torch.optim.AdamW(model.prefix.parameters(), lr=1e-3)
    model(**texts).loss.backward()
    optimizer.step()
    moves[kind] = (model.prefix() - before).abs().mean().item()
print({kind: f"{moved:.4f}" for kind, moved in moves.items()}, "after one step at a rate of 0.001")
print(f"projected over direct: {moves['projected'] / moves['direct']:.0f} x; ", end="")
print(f"best rates, direct over projected: {tops['direct'] / tops['projected']:.0f} x")

# %% [markdown]
# So the projection is first of all another learning rate. Is it more stable besides? "Spread of the final loss" depends on which
# rates one looks at: all that both kinds tried, or as many steps of the grid on either side of each one's own best.


# %%
def spread_ratio(rates):
    """Standard deviation of the last loss over the rates, projected over direct, one ratio per seed."""
    losses = {k: [[last_loss(runs[k][lr][s]) for lr in rates[k]] for s in SEEDS] for k in KINDS}
    return [
        np.std(p, ddof=1) / np.std(d, ddof=1)
        for p, d in zip(losses["projected"], losses["direct"], strict=True)
    ]


def around(kind, steps):
    rates = list(runs[kind])
    place = rates.index(tops[kind])
    return rates[max(0, place - steps) : place + steps + 1]


# %%
shared = [lr for lr in runs["direct"] if lr in runs["projected"]]
ratios = {"the same rates for both": spread_ratio(dict.fromkeys(KINDS, shared))}
windows = {kind: around(kind, 2) for kind in KINDS}
if all(len(window) == 5 for window in windows.values()):
    ratios["within 10 times each one's own best"] = spread_ratio(windows)
claim(12).observe(conditions=ratios, seeds=SEEDS)

# %% [markdown]
# Both are true, and they do not contradict each other. On one grid for both, the direct prefix spreads more, because half of
# that grid is too slow for it: it is not unstable there, it has hardly moved. Around its own best rate the projected one
# spreads more: to the right of its valley it climbs faster, and seeds part. Equally many rates give 90 % exact texts.
#
# What the projection does buy: the rates that everybody uses work, and its best is no worse in texts. Mind what each rate leaves of
# the old facts:

# %%
for kind in KINDS:
    for lr in good[kind]:
        rows = list(runs[kind][lr].values())
        print(f"{kind:9s} rate {lr:<6g} exact {percent(rows)} %, old facts kept {percent(rows, 'kept')} %")

# %% [markdown]
# **Claim 13**: for classification, prefix tuning is "strong at steering attention". The task: is a review good or bad, where 40 %
# say "but" and 20 % negate, neither of which the base has seen. All methods with their own sweep of rates, 40 steps; and the
# main ones again for 120 (`labs sweep prefix_reviews` and `prefix_reviews_long`).

# %% tags=["hide-input"]
REVIEWS = {
    f"{s} steps": load_record(name)
    for s, name in ((40, "sweep_prefix_reviews"), (120, "sweep_prefix_reviews_long"))
}
REVIEWS = {when: source for when, source in REVIEWS.items() if source}
finals, lines = {}, []
for when, source in REVIEWS.items():
    for row in source.rows:
        if row["stage"] == "final":
            finals.setdefault((when, row["arm"]["name"]), {})[row["seed"]] = row
for (when, arm), rows in finals.items():
    rows = list(rows.values())
    line = {
        "steps": when.split()[0],
        "arm": arm,
        "numbers": f"{rows[0]['params']:,}",
        "rate": f"{rows[0]['lr']:g}",
    }
    line |= {"seeds": len(rows), "right %": str(percent(rows))}
    line |= {f'"{kind}" %': f"{percent(rows, kind).value:.0f}" for kind in ("plain", "but", "not")}
    lines.append(line | {"old facts kept %": f"{percent(rows, 'kept').value:.0f}"})
table(lines)

# %%
measured = {}
for when in REVIEWS:
    arms = {arm: rows for (each, arm), rows in finals.items() if each == when}
    others = {arm: rows for arm, rows in arms.items() if "prefix" not in arm}
    rival = max(others, key=lambda arm: percent(list(others[arm].values())).value)
    for kind in (PREFIX, "prefix 18, projected"):
        both = sorted(arms[kind].keys() & arms[rival].keys())
        scores = [[100 * arms[arm][seed]["score"] for seed in both] for arm in (kind, rival)]
        label = "projected" if "projected" in kind else "direct"
        measured[f"{label}, {when}"] = paired_difference(*scores)
    print(f"{when}: the best other method is {rival}")
claim(13).observe(conditions=measured)

# %% [markdown]
# It does not look so. After 40 steps LoRA is ahead or not to be told apart, and what prefixes get wrong are the negations. After 120 steps
# everybody gets everything right, so nothing is left to choose by but what was forgotten. A task with a ceiling does not rank
# methods; the chapter's sentence needs a harder one. Those who proposed the method did not claim it either:

# %%
for report in claim(13).reported:
    print(f"{report['text']}: {report['source']['cite']}")
print(claim(13).would_tell)

# %% [markdown]
# **Claim 14**: the cost at inference is "small (longer KV cache)". Bytes first: what a sequence's cache holds with the prefix and
# without, on this base, read off the tensors; and on public models as shapes.


# %%
def cache_bytes(past):
    return sum(each.nbytes for keys, values, *_ in past for each in (keys, values))


# %%
with torch.no_grad():
    with_prefix, without = (m(input_ids=ids, use_cache=True).past_key_values for m in (direct(30), base))
here = (cache_bytes(with_prefix) - cache_bytes(without)) / (
    30 * layers * 2 * heads * size * lab.dtype.itemsize
)

# %%
rows, exact, share = [], {"this base": here}, {}
for name in ("llama-2-7b", "llama-3-8b", "llama-3.2-1b", "smollm2-135m"):
    twin = random_like(name, dtype=torch.float16)
    weights, (deep, kv, wide) = 2 * count_parameters(twin).total, prefix_shape(twin.config)
    extra = cache_bytes(add_prefix(twin, 30, DynamicCache).fill(1))
    exact[name], share[name] = extra / (30 * deep * 2 * kv * wide * 2), 100 * extra / weights
    line = {
        "model, fp16": name,
        "30 tokens, per sequence": f"{extra / 1e6:.1f} MB",
        "of the weights": f"{share[name]:.3f} %",
    }
    rows.append(line | {"64 sequences, each its own copy": f"{64 * extra / 1e9:.2f} GB"})
claim(14).observe(parts={"arithmetic": exact, "share": share})
table(rows)

# %% [markdown]
# Small for one sequence. In a batch every sequence holds a copy, unless the server shares it: paged caches do share blocks that
# many sequences have in common.
#
# Now time. **Predict**: how many times as long does a decoding step take with 200 virtual tokens as with none?

# %%
### BEGIN SOLUTION
### STUB: predict_slower = ...  # time with 200 tokens over time without
predict_slower = 1.3
### END SOLUTION
predict_slower = check(predict_slower, "lab09.predict_slower")

# %%
from labs_lib.measure import count_flops, time_ratios

prompts = texts["input_ids"][:, :24]


def reading(model, inputs=prompts):
    return lambda: model(input_ids=inputs, use_cache=True)


def decoding(model):
    """One token more for every sequence; the cache is cut back afterwards."""
    past = model(input_ids=prompts, use_cache=True).past_key_values
    core = getattr(model, "base", model)

    def step():
        core(input_ids=prompts[:, :1], past_key_values=past, use_cache=True)
        past.crop(-1)

    return step


lengths = lab.grid([10, 30, 100, 200])
models = {0: base} | {n: direct(n).eval() for n in lengths}
guided = torch.cat([torch.tensor([guide_ids] * len(prompts), device=lab.device), prompts], dim=1)
with torch.no_grad():
    work = {n: count_flops(reading(model)) for n, model in models.items()}
    arms = {n: reading(model) for n, model in models.items()} | {"guide": reading(base, guided)}
    reads = time_ratios(arms, 0, rounds=lab.rows(21))
    steps = time_ratios({n: decoding(model) for n, model in models.items()}, 0, rounds=lab.rows(21))

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.2, 3.8))
series = (
    ("decoding one token", steps, "prefix", "-"),
    (f"reading {prompts.shape[1]} tokens", reads, "prefix", "--"),
)
for label, ratios, method, line in series:
    middle = [ratios[n].ratio.value for n in lengths]
    error = np.abs(np.array([ratios[n].ratio.ci for n in lengths]) - np.array(middle)[:, None]).T
    error[~np.isfinite(error)] = 0
    marker = "s" if line == "-" else "D"
    ax.errorbar(
        lengths, middle, yerr=error, fmt=line, marker=marker, color=look(method).color, capsize=2, label=label
    )
ax.plot(
    lengths,
    [work[n] / work[0] for n in lengths],
    ":",
    color=look("base").color,
    label="reading, operations counted",
)
words = look("guide")
ax.plot(
    len(guide_ids),
    reads["guide"].ratio.value,
    words.marker,
    color=words.color,
    ms=8,
    label="reading with the guide in words",
)
log_axis(ax, lengths)
ax.set_ylim(bottom=0.8)
ax.legend(fontsize=8.5, loc="upper left")
far = lengths[-1]
title = (
    f"{far} virtual tokens: {steps[far].ratio.value:.2f} x per token, {reads[far].ratio.value:.2f} x to read"
)
finding(ax, title, "virtual tokens", "time over no prefix")
told = {n: f"{steps[n].ratio.value:.2f} and {reads[n].ratio.value:.2f}" for n in lengths}
show(
    fig,
    alt=f"Time over no prefix against the number of virtual tokens, for decoding one token and for reading: {told}. The guide in words, {len(guide_ids)} tokens, costs {reads['guide'].ratio.value:.2f} to read.",
)
print(f"You predicted {predict_slower:g} x. Measured: decoding {steps[far]}, reading {reads[far]}")
print(f"30 tokens or next to it: decoding {steps[lengths[min(1, len(lengths) - 1)]]}")

# %% [markdown]
# (32 sequences on this machine's CPU, arms taking turns, medians with intervals.) A prefix is never *read*: no linear layer sees it.
# It is looked at, by every token in every layer, and in decoding that is most of what grows: this base's weights are few, and
# transformers' cache copies itself at every step. A guide in words is read as well, once per request. A 7B model's step is spent
# on 13 GB of weights, so the same prefix adds far less there: the share of bytes above is a first guess, a GPU record would tell.

# %% [markdown]
# **The chapter's exercise.** "Describe how prefix tuning works. How does prepending learned 'virtual tokens' to the input differ
# from manual prompt engineering?" Use what you measured.

# %% [markdown] tags=["student-only"]
# *Write your answer here. Four sentences are enough: what is prepended, where; what is trained; what words can do as well; what
# they cannot.*

# %% [markdown] tags=["solution-only"]
# **An answer.** Prefix tuning puts a few trained keys and values before the text in *every layer's* attention, and leaves the
# weights alone. (The question says "to the input": that is prompt tuning, lab 08.) A written prompt leaves keys and values in the
# same place, so all it can do a prefix can do, exactly, without training, as with the guide in section 3. Training reaches what
# no prompt says: numbers are found by gradient descent on examples, not by wording. The price: nobody can read it, it fits one
# model only, and it needs examples. The chapter's "without changing any model weights" is right; "no natural language token could
# express" can be measured, next.

# %% [markdown]
# **Claim 53**: the learned vectors are "representations that no natural language token could express". How far is each virtual
# token, all its keys and values, from the nearest that a real token leaves in the cache? In units of how far apart real ones are.
# Two starts: noise, and the keys and values of a default guide's words (`labs sweep prefix_words`).

# %%
far, lines = {}, []
for start, arm in (("noise", PREFIX), ("words", WORDS)):
    words = [row for row in load_record("sweep_prefix_words").rows if row["arm"]["name"] == arm]
    rows = [row for row in words if row["stage"] == "final"]
    far[f"from {start}"] = [row["distance"] for row in rows]
    line = {"start": start, "at the start": f"{np.mean([row['distance_at_start'] for row in rows]):.1f}"}
    line |= {"trained": str(mean_ci(far[f"from {start}"])), "rate": f"{rows[0]['lr']:g}"}
    line |= {"exact texts %": str(percent(rows))}
    lines.append(line | {"old facts kept %": f"{percent(rows, 'kept').value:.0f}"})
claim(53).observe(conditions=far, seeds=[row["seed"] for row in rows])
table(lines)

# %% [markdown]
# It holds, and the start matters for how to read it. Noise lies where no token lies before anything was learned, so its distance is
# not what training found. The prefix that began as words is the evidence: it began among real tokens and left them. (Its rate is
# the largest that was tried. What it forgot goes with that rate, not with the words: see the direct prefix at 0.1 under claim 12.)

# %% [markdown]
# ## 6. When would you choose it?
# When you may not touch weights, but can fill a cache. When what you want could be said: then read it once and keep the cache, no
# training at all. When many customers share a batch and differ in manner, not in knowledge. Not for many new facts in few
# steps, not with a long context to fill (every virtual token takes a position), and not with the next line in your script.

# %% [markdown]
# **The failure you will meet**: gradient checkpointing, which everybody switches on to save memory. It computes every layer twice
# and keeps no cache, and the prefix *is* a cache ([PEFT 869](https://github.com/huggingface/peft/issues/869),
# [2449](https://github.com/huggingface/peft/issues/2449)). Switched on before, PEFT says so. Switched on after, it is a riddle:

# %%
import warnings


def attempt(what):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            what()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:180]}"
    return "no error"


# %%
def before():
    model = lab.base()[0]
    model.gradient_checkpointing_enable()
    get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))


def after(model):
    model.train()
    getattr(model, "base_model", getattr(model, "base", None)).gradient_checkpointing_enable()
    model(**batch)


print("PEFT, before:", attempt(before))
print("PEFT, after: ", attempt(lambda: after(peft_of(direct(10)))))
print("ours:        ", attempt(lambda: after(direct(10))))

# %% [markdown]
# A test of this course holds all three, so that you hear of it when a version changes it. What helps: smaller batches with
# gradient accumulation, or a method without virtual tokens.

# %% [markdown]
# **As a change to a hidden state.** He et al. describe every method by four answers. `describe` does not look them up: it pushes at
# an adapted model and measures.

# %%
from labs_lib.methods.unified import describe

rows, some = [], texts["input_ids"][:2, :40]
for name, model in (("prefix, 18 tokens", direct(18)), ("LoRA r2", inject_lora(lab.base()[0], **LORA2))):
    for each in describe(model.cpu(), some.cpu()):
        line = {"method": name, "where": each.where, "reads": each.insertion, "D is": each.form}
        rows.append(line | {"together": each.composition, "scale": each.scale})
table(rows)

# %% [markdown]
# In words: in every head, $h \leftarrow (1 - g)\,h + g\,D$, where $D = \mathrm{softmax}(q P_K^\top)\, P_V$ reads the query beside
# attention (parallel), is a bounded mean, and has no scale but the gate that it opens for itself. LoRA: $h \leftarrow h + s\,BAx$,
# linear, unbounded, anywhere.

# %% [markdown]
# ## 7. Go further
# - Set `PROFILE = "gpu"` and a `MODEL_ID`: the proof, the gates and the times then run on that model. (The shipped customers'
#   guides mean nothing to it: leave out the score of the prefix that was read.)
# - **Open exercise 1.** PEFT can start a prefix at zero (`init_weights="zero"`). Is that "no change", like LoRA's $B = 0$?
# - **Open exercise 2.** LoRA can be merged into the weights. Can a prefix?

# %% [markdown] tags=["solution-only"]
# **Answer 1.** No. A zero key has the score 0, so its weight is $e^0 = 1$, and its value 0 dilutes what the text says: the gate is
# open from the start.
#
# **Answer 2.** No. What it adds depends on the query through a softmax over $n$ more positions; no weight of the model has such a
# term. It can be shared instead: all requests of one customer may use one copy of its cache.

# %% tags=["solution-only"]
zero = add_prefix(lab.base()[0], 10, DynamicCache, init="zero")
with torch.no_grad():
    print(f"a prefix of zeros moves the logits by {(zero(input_ids=ids).logits - plain).abs().max():.2f}")
print(f"mean gate {gates_and_means(zero, 10, texts)[0].mean():.2f}")

# %%
progress()
