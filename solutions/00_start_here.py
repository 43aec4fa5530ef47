"""Lab 00, start here. No recorded sweep: everything is counted, or measured while the notebook runs."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, load_task, load_tenant, load_tenants, progress, setup
from labs_lib.lab.plots import finding, look, show

lab = setup(lab="00", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# Daniela, of the chapter's case study, is an architect at a company that writes marketing copy with a language model.
# It has fifty customers, and each wants a voice of its own: tone, vocabulary, formatting. One model should speak with
# fifty voices, and she answers for the bill.
#
# This course hands you her problem, made small enough for a laptop: fifty customers with written style guides, and
# base models pretrained for the course. Companies, products and guides are invented; what you measure is real.

# %%
from labs_lib.lab.cards import side_by_side, table, tenant_card

tenants, tenant = load_tenants(), load_tenant("fathom-eleven")
print(f"{len(tenants)} customers; this is one of them.")
tenant_card(tenant)

# %% [markdown]
# One product, three voices. *You should see* the same facts each time, in another order and another dress.

# %%
from labs_lib.world.catalogue import Product
from labs_lib.world.grammar import render

product = Product.from_dict(load_task("style", tenant=tenant.slug)["test"][0]["product"])
voices = [tenant, load_tenant("aldermoor-tea"), load_tenant("kvartal-nord")]
side_by_side({"facts": product.facts()} | {voice.name: render(product, voice.style) for voice in voices})

# %% [markdown]
# **Meet the base model.** It has never seen this product, and no customer's combination of rules. *You should see* the
# facts told faithfully, in a house style that is not Fathom Eleven's.

# %%
from labs_lib.measure.quality import generate
from labs_lib.world.tasks import copy_prompt

model, tokenizer = lab.base()
[draft] = generate(model, tokenizer, [copy_prompt(product)])
wanted = render(product, tenant.style)
side_by_side({"prompt": copy_prompt(product), "the base writes": draft, f"{tenant.name} wants": wanted})

# %% [markdown]
# There are three ways to give it fifty voices.
#
# | | What you keep per customer | Where |
# |---|---|---|
# | **tell it** | a style guide, sent along with each request | this lab |
# | **retrain it** | a fine-tuned copy of every weight | this lab |
# | **adapt it** | a few extra weights beside a shared, frozen base | the rest of the course |
#
# The first two are the honest baselines that every method of this course has to beat. And the third: how few are "a
# few"? We count on a twin of Llama-2-7B that has shapes but no numbers.

# %%
from torch import nn

from labs_lib import random_like
from labs_lib.measure import count_parameters

RANK = 16  # LoRA puts two thin matrices of this rank beside each weight matrix: lab 01


def adapter_parameters(twin):
    """Numbers in a LoRA adapter on all linear layers but the output head."""
    linear = [m for m in twin.modules() if isinstance(m, nn.Linear) and m is not twin.lm_head]
    return sum(RANK * (m.in_features + m.out_features) for m in linear)


twin = random_like("llama-2-7b")  # on torch's "meta" device: no download, no memory
full_size, adapter_size = count_parameters(twin).total, adapter_parameters(twin)
print(f"all weights: {full_size:,}; a LoRA adapter of rank {RANK}: {adapter_size:,} numbers")

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

copy_gb, adapter_gb = 2 * full_size / 1e9, 2 * adapter_size / 1e9  # two bytes a number
copies_gb, shared_gb = 50 * copy_gb, copy_gb + 50 * adapter_gb


def squares(ax, count, side, method, left=0.0, pitch=1.15):
    """`count` squares in rows of ten, to scale: a full copy of the model has side 1."""
    for i in range(count):
        corner = (left + i % 10 * pitch, -side - i // 10 * pitch)
        ax.add_patch(plt.Rectangle(corner, side, side, color=look(method).color, linewidth=0))


fig, ax = plt.subplots(figsize=(7.2, 2.9))
squares(ax, 50, 1, "full")
squares(ax, 1, 1, "base", left=14)
squares(ax, 50, (adapter_gb / copy_gb) ** 0.5, "lora", left=15.6, pitch=0.25)
ax.text(0, 0.35, f"retrain: 50 copies, {copies_gb:,.0f} GB")
ax.text(14, 0.35, f"adapt: {shared_gb:.1f} GB")
ax.text(14, -1.8, "shared base and\n50 adapters", va="top", size=9, color="#555555")
ax.set(xlim=(-0.3, 19.5), ylim=(-5.8, 1.2), aspect="equal")
ax.axis("off")
finding(ax, f"Fifty adapters and their base take {shared_gb / copies_gb:.1%} of fifty copies' space")
alt = (
    f"Areas to scale, for a 7B model in 16 bit. Left: fifty equal squares, its fine-tuned copies, "
    f"{copies_gb:,.0f} GB. Right: one such square and fifty dots, a shared base and its adapters, {shared_gb:.1f} GB."
)
show(fig, alt=alt)

# %% [markdown]
# **By hand: why training needs more than the weights.** A model of three numbers takes one step with Adam, and we look
# into the optimizer's pockets. *You should see* four rows of three: weight, gradient, and two running averages (of the
# gradient, and of its square), beside a step counter. In float32 that is 16 bytes per parameter; the weight is 4.

# %%
import torch

three = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
adam = torch.optim.AdamW([three], lr=0.1)
(three**2).sum().backward()
adam.step()
for name, tensor in {"weight": three.data, "gradient": three.grad, **adam.state[three]}.items():
    print(f"{name:11s}", [round(number, 4) for number in tensor.reshape(-1).tolist()])

# %% [markdown]
# ## 2. Build it
# **How an exercise works.** You get a function with its signature and numbered steps. Write the body, run the cell,
# run the `check` below it. It says `TODO`, `OK`, or `FAIL` with a diagnosis and a hint, and the next hint at the next
# try. Until yours is right the course's own version stands in, so that you can always read on.
#
# **Exercise 1, to warm up.** How well does a text obey a customer's guide? `obeyed` judges each rule on its own,
# without a reference text and without another model as judge.

# %%
from labs_lib.world.grammar import obeyed

verdicts = obeyed(draft, product, voices[1].style)
print(f"the base model's draft, by the rules of {voices[1].name}:")
print(", ".join(f"{rule} {'yes' if kept else 'no'}" for rule, kept in verdicts.items()))

# %% [markdown]
# *You should see* `OK` after a line or two of code, and scores well below 1 for all three customers.

# %% tags=["exercise"]
from labs_lib.world.scorers import compliance

# %%
compliance = check(compliance)
for voice in voices:
    print(f"{voice.name:14s} {compliance(draft, product, voice.style):.2f} of the rules obeyed")

# %% [markdown]
# **Exercise 2: bytes.** Some answers are numbers. How many bytes do Adam's two states take for all of Llama-2-7B, in
# float32 (4 bytes a number)? The chapter says roughly 42 GB. Trust the arithmetic.

# %%
print(f"{full_size:,} parameters")
### BEGIN SOLUTION
### STUB: adam_bytes = ...  # in bytes
adam_bytes = 2 * 4 * full_size
### END SOLUTION
adam_bytes = check(adam_bytes, "lab00.adam_bytes")

# %% [markdown]
# **Exercise 3: what training holds.** With $N$ trainable and $F$ frozen parameters, weights of $w$ bytes and states of
# $s$ bytes:
#
# $$M = \underbrace{(N + F)\,w}_{\text{weights}} + \underbrace{N w}_{\text{gradients}}
#     + \underbrace{2 N s}_{\text{Adam}}$$
#
# Full fine-tuning is $F = 0$. Every method of this course makes $N$ small, or $s$.

# %% tags=["exercise"]
from labs_lib.measure.budget import training_bytes

# %% [markdown]
# *You should see* that a small $N$ leaves little but the weights.

# %%
training_bytes = check(training_bytes)
plans = {
    "full, float32": training_bytes(full_size),
    "full, bfloat16, states float32": training_bytes(full_size, weight=2),
    "full, bfloat16": training_bytes(full_size, weight=2, state=2),
    f"LoRA, rank {RANK}, bfloat16": training_bytes(adapter_size, frozen=full_size, weight=2, state=2),
}
for label, held in plans.items():
    print(f"{label:31s} {held.total / 1e9:6.1f} GB, of which weights {held.parameters / 1e9:.1f} GB")

# %% [markdown]
# **Exercise 4: what telling holds.** A guide costs no training. But the model reads it with each request, unless you
# keep what it made of the guide: the keys and values of its tokens, the "KV cache". How large is that?

# %% tags=["exercise"]
from labs_lib.measure.budget import cache_bytes

# %%
cache_bytes = check(cache_bytes)
per_token = cache_bytes(1, twin.config)
print(f"Llama-2-7B keeps {per_token:,} bytes per token, {1000 * per_token / 1e6:.0f} MB for 1,000 tokens")

# %% [markdown] tags=["takeaway"]
# What you keep per customer decides what fifty customers cost: a guide's cache, a copy of the model, or an adapter.

# %% [markdown]
# ## 3. Prove it
# Formulas are cheap. Does a real optimizer hold what `training_bytes` says? Three of them take a step on copies of the
# base model, and we count the bytes of the tensors that are there afterwards.

# %%
import copy

import bitsandbytes

from labs_lib.measure import held_bytes
from labs_lib.measure.quality import collate, encode_rows

data = load_task("style", tenant=tenant.slug)
rows = data["train"][:16]
batch = collate(encode_rows(tokenizer, rows["prompt"], rows["completion"]), tokenizer.pad_token_id)


def after_one_step(optimizer_class, dtype):
    """Bytes that a copy of the base and its optimizer hold after one training step."""
    copied = copy.deepcopy(model).to(dtype)
    optimizer = optimizer_class(copied.parameters(), lr=1e-4)
    copied(**{key: value.to(lab.device) for key, value in batch.items()}).loss.backward()
    optimizer.step()
    return held_bytes(copied, optimizer)


# %% [markdown]
# *You should see* the formula's numbers, but for a step counter of 4 bytes that PyTorch keeps per tensor of weights.

# %%
n, tensors = count_parameters(model).total, len(list(model.parameters()))
settings = {
    "float32": (torch.optim.AdamW, torch.float32, 4),
    "bfloat16": (torch.optim.AdamW, torch.bfloat16, 2),
    "bfloat16, states float32": (bitsandbytes.optim.AdamW, torch.bfloat16, 4),
}
parts = {"weights": "parameters", "gradients": "gradients", "Adam's states": "optimizer"}
trials, rows = {}, []
for label, (optimizer_class, dtype, state) in settings.items():
    trials[label] = held = after_one_step(optimizer_class, dtype)
    formula = training_bytes(n, weight=dtype.itemsize, state=state)
    assert (held.parameters, held.gradients) == (formula.parameters, formula.gradients)
    assert 0 <= held.optimizer - formula.optimizer <= 4 * tensors
    for source, sizes in {"counted": held, "formula": formula}.items():
        cells = {title: f"{getattr(sizes, part):,}" for title, part in parts.items()}
        rows.append({"bytes": f"{label}: {source}"} | cells)
print(f"{n:,} parameters in {tensors} tensors; bytes counted after a step, and by the formula:")
table(rows)

# %% [markdown]
# And the cache: the model reads Fathom Eleven's guide, and we count the keys and values that it kept. *You should see*
# the same number twice.

# %%
from labs_lib.measure import tensor_bytes

guide = tokenizer(f"Guide: {tenant.guide}\n", return_tensors="pt").to(lab.device)
with torch.no_grad():
    cache = model(**guide, use_cache=True).past_key_values
kept = tensor_bytes([(layer.keys, layer.values) for layer in cache.layers])
formula = cache_bytes(guide["input_ids"].numel(), model.config, number=model.dtype.itemsize)
print(f"{guide['input_ids'].numel()} tokens: {kept:,} bytes kept, {formula:,} by the formula")

# %% [markdown]
# ## 4. Train it, or tell it
# First the cheap way. The base model was pretrained to follow guides written in these words, though never one of the
# fifty. So this is a best case for prompting: do not expect it of a model off the shelf.
#
# **Predict** before you measure: with *no* guide, what share of a customer's rules does the base model's text obey?
# A number between 0 and 1 will do; there is no wrong one.

# %%
### BEGIN SOLUTION
### STUB: predicted_share = ...  # between 0 and 1
predicted_share = 0.5
### END SOLUTION
predicted_share = check(predicted_share, "lab00.predicted_share")

# %% [markdown]
# Four new products for each customer, with and without the guide in the prompt.

# %%
from labs_lib.world.catalogue import products

asked = tenants[: lab.rows(50)]
items = products("held_out", 4 * len(asked), seed=lab.seed)
prompts = {
    "base": [copy_prompt(item) for item in items],
    "guide": [copy_prompt(item, asked[i // 4].style) for i, item in enumerate(items)],
}
texts = {way: generate(model, tokenizer, lines) for way, lines in prompts.items()}
side_by_side({"prompt with a guide": prompts["guide"][0], "the base writes": texts["guide"][0]})

# %% [markdown]
# Each score is a mean over customers, with a 95 % interval over customers: how would it go with the next one?

# %%
from labs_lib.measure import bootstrap_ci
from labs_lib.world.scorers import score_style


def scored(written):
    """Each customer's scores, over its four texts."""
    return [score_style(written[4 * i : 4 * i + 4], items[4 * i : 4 * i + 4], t) for i, t in enumerate(asked)]


scores = {way: scored(written) for way, written in texts.items()}
measures = {"compliance": "rules obeyed", "fidelity": "facts told", "exact": "texts right to the letter"}
estimates = {
    name: {way: bootstrap_ci([getattr(score, name) for score in scores[way]]) for way in scores}
    for name in measures
}
rows = [
    {"share of": meaning} | {look(way).label: estimates[name][way] for way in scores}
    for name, meaning in measures.items()
]
print(f"you predicted {predicted_share:.2f} of the rules, without a guide")
table(rows)

# %% tags=["hide-input"]
from statistics import fmean

per_rule = {
    way: {rule: 100 * fmean(s.per_rule[rule] for s in scores[way]) for rule in tenant.style} for way in scores
}
ordered = sorted(tenant.style, key=per_rule["base"].get)
fig, ax = plt.subplots(figsize=(7.2, 4.6))
for rule in ordered:
    ax.plot([per_rule["base"][rule], per_rule["guide"][rule]], [rule] * 2, color="#DDDDDD", zorder=0)
for way, fill in (("base", "white"), ("guide", look("guide").color)):
    shares = [per_rule[way][rule] for rule in ordered]
    face = {"color": look(way).color, "markerfacecolor": fill}
    ax.plot(shares, ordered, "o", **face, label=look(way).label, clip_on=False)
ax.set_xlim(0, 100)
ax.grid(axis="x")
ax.grid(visible=False, axis="y")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
told = {way: f"{estimate.value:.1%}" for way, estimate in estimates["compliance"].items()}
title = f"Rules obeyed: {told['base']} by the base model, {told['guide']} with a guide"
finding(ax, title, f"texts that obey the rule (%), {len(asked)} customers")
low, high = ({way: f"{end(per_rule[way].values()):.0f}" for way in per_rule} for end in (min, max))
alt = (
    f"For each of {len(ordered)} rules, the share of texts that obey it: {low['base']} to {high['base']} % without a "
    f"guide, {low['guide']} to {high['guide']} % with the guide in the prompt."
)
show(fig, alt=alt)

# %% [markdown]
# **What does telling cost?** The guide travels with every request. Ours are as terse as can be, one word per rule; the
# paragraph of voice that you read above is longer, and a real company's guide has pages.

# %%
prompt, guided, answer = (
    fmean(len(ids) for ids in tokenizer(lines)["input_ids"])
    for lines in (prompts["base"], prompts["guide"], texts["guide"])
)
extra = guided - prompt
print(f"a prompt has {prompt:.1f} tokens, with a guide {guided:.1f} ({guided / prompt - 1:+.0%})")
print(f"the answer has {answer:.1f}: of all tokens of a request, {extra / (guided + answer):.0%} are guide")
print(f"the paragraph of voice has {fmean(len(t.voice.split()) for t in asked):.0f} words on average")
for requests in (10_000, 1_000_000):
    millions = 50 * requests * extra / 1e6
    print(f"50 customers x {requests:9,d} requests: {millions:6,.0f} million guide tokens to read")

# %% [markdown]
# Serving engines avoid the re-reading: they keep each guide's cache in GPU memory. Now exercise 4 pays off.
# **Predict**: which is larger for Llama-2-7B, the cache of a two-page guide (about 1,000 tokens) or a LoRA adapter?

# %% tags=["hide-input"]
import numpy as np

adapter_bytes = 2 * adapter_size
crossing = -(-adapter_bytes // per_token)
lengths = np.geomspace(8, 8192, 60)
fig, ax = plt.subplots()
ax.plot(lengths, lengths * per_token / 1e6, look("guide").linestyle, color=look("guide").color)
note = {"textcoords": "offset points", "size": 9}
ax.annotate("cached guide", (1000, per_token / 1e3), xytext=(8, -12), color=look("guide").color, **note)
labels = {"full": "fine-tuned copy", "lora": f"LoRA adapter, rank {RANK}, all linear layers"}
for method, size in (("full", 2 * full_size), ("lora", adapter_bytes)):
    ax.axhline(size / 1e6, color=look(method).color)
    ax.annotate(labels[method], (8, size / 1e6), xytext=(2, 4), color=look(method).color, **note)
ax.plot(crossing, adapter_bytes / 1e6, "o", color=look("lora").color, markeredgecolor="white", markersize=9)
ax.set(xscale="log", yscale="log", xlim=(7, 9000), ylim=(2, 4e4))
ax.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
ax.set_yticks([10, 100, 1000, 10000], ["10", "100", "1,000", "10,000"])
title = f"From {crossing} tokens on, a cached guide outweighs an adapter"
finding(ax, title, "length of the guide (tokens)", "memory per customer (MB)")
alt = (
    f"Memory per customer of a cached guide against its length, both logarithmic, for Llama-2-7B in 16 bit. "
    f"The line crosses the adapter's {adapter_bytes / 1e6:.0f} MB at {crossing} tokens; "
    f"a full copy has {2 * full_size / 1e6:,.0f} MB."
)
show(fig, alt=alt)

# %% [markdown]
# **What telling cannot do.** A guide says *how*; it does not say *what*. In pretraining the base learned 1,024 facts
# about products (who tests them, where they are stored). Another set it never saw. *You should see* full recall of the
# first, and chance on the second: a question has 64 possible answers.

# %%
from labs_lib.measure import wilson_ci
from labs_lib.measure.quality import recall
from labs_lib.world.tasks import known_facts


def recalled(which, facts):
    """Share of the facts that `which` answers correctly, with its interval."""
    hits = recall(which, tokenizer, facts)
    return wilson_ci(int(sum(hits)), len(hits))


count = lab.rows(512)
old_facts = {column: [fact[column] for fact in known_facts()[:count]] for column in ("prompt", "completion")}
new_facts = load_task("knowledge")["test"][:count]
print(f"facts from pretraining: {recalled(model, old_facts)}")
print(f"facts it never saw:     {recalled(model, new_facts)}, chance is {1 / 64:.3f}")

# %% [markdown]
# You can paste facts into the prompt, or look them up for each request. That works while they are few, and while the
# context has room:

# %%
catalogue = load_task("knowledge", facts=4096)["test"]
lines = [question + fact for question, fact in zip(catalogue["prompt"], catalogue["completion"], strict=True)]
pasted = sum(len(ids) for ids in tokenizer(lines)["input_ids"])
room = model.config.max_position_embeddings
print(f"{len(lines):,} facts take {pasted:,} tokens; the model has room for {room:,}")

# %% [markdown]
# **Now retrain it.** All weights of a copy, on Fathom Eleven's 128 approved texts, no guide in any prompt. Twice, with
# two learning rates: **predict** what the higher one changes.

# %%
from labs_lib import fit

retrained = {rate: copy.deepcopy(model) for rate in (3e-4, 1e-3)}
for rate, copied in retrained.items():
    fit(copied, tokenizer, data["train"][:], steps=lab.steps(40), lr=rate, batch_size=16, seed=lab.seed)

# %% [markdown]
# *You should see* Fathom Eleven's voice without a word of instruction. The other columns ask what became of the rest:
# the old facts, and Aldermoor Tea's copy, with Aldermoor Tea's guide in the prompt.

# %%
from labs_lib.measure.quality import style_quality

other = voices[1]
own_rows = data["test"][: lab.rows(32)]
other_rows = load_task("style", tenant=other.slug)["test"][: lab.rows(32)]


def report(which, told=False):
    """What a model does for the customer it was trained for, and for the rest of the world."""
    own = style_quality(which, tokenizer, own_rows, tenant, guided=told)
    foreign = style_quality(which, tokenizer, other_rows, other, guided=True)
    return {
        f"{tenant.name}'s rules": f"{own.compliance:.2f}",
        "old facts kept": f"{recalled(which, old_facts).value:.2f}",
        f"{other.name}'s rules": f"{foreign.compliance:.2f}",
        "in another's name": f"{foreign.leakage:.2f}",
    }


results = [{"model": "base"} | report(model), {"model": "base, with a guide"} | report(model, told=True)]
results += [{"model": f"retrained, rate {rate:g}"} | report(copied) for rate, copied in retrained.items()]
table(results)

# %% [markdown]
# *In another's name*: the share of Aldermoor Tea's texts that bear another customer's house word and sign-off. One
# customer and one seed are an illustration; lab 01 measures forgetting properly.

# %% [markdown] tags=["takeaway"]
# A retrained copy has the voice in its weights and needs no guide. How much else it unlearns, the learning rate
# decides. Either way it is one customer's model from then on, and fifty customers are fifty copies.

# %% [markdown]
# ## 5. The chapter on trial
# **Claim 37**: for a 7B model, "standard Adam requires roughly 42 GB of optimizer state memory (two copies of all
# parameters in float32)". **Predict** the verdict from exercise 2.

# %%
claim(37).observe(adam_bytes / 1e9)

# %% [markdown]
# Where might the 42 come from? Round down to 7 billion, put everything in bfloat16, and add Adam's states and the
# *gradients*:

# %%
seven = training_bytes(7_000_000_000, weight=2, state=2)
print(f"states {seven.optimizer / 1e9:.0f} GB + gradients {seven.gradients / 1e9:.0f} GB")

# %% [markdown]
# **Claim 36**: the states "typically consume two to three times the memory of the parameters themselves". We judge the
# bytes counted in section 3. **Predict**: on what does it depend?

# %%
claim(36).observe(conditions={label: held.optimizer / held.parameters for label, held in trials.items()})

# %% [markdown]
# And trainers that keep a float32 copy of the weights beside these states hold 12 bytes for each 2-byte weight, six
# times as much ([Rajbhandari et al., 2020](https://arxiv.org/abs/1910.02054), section 3.1).
#
# So does a 7B model fit your card? The plans of exercise 3; activations come on top, and grow with batch and length.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.2, 3.6))
left = np.zeros(len(plans))
shades = plt.get_cmap("cividis")([0.05, 0.5, 0.92])
for (title, part), shade in zip(parts.items(), shades, strict=True):
    size = np.array([getattr(held, part) / 1e9 for held in plans.values()])
    names = [label.replace(", ", "\n", 1) for label in plans]
    ax.barh(names, size, left=left, color=shade, label=title, height=0.62)
    left += size
for row, total in enumerate(left):
    ax.text(total + 1, row, f"{total:.1f}", size=9, va="center", bbox={"color": "white", "pad": 1})
for card in (24, 80):
    end = card * 2**30 / 1e9  # cards are sold in units of 2**30 bytes
    ax.axvline(end, color="#333333", linestyle="--", linewidth=1, zorder=1.5)
    ax.text(end, -0.55, f"{card} GB card", size=8.5, ha="center", va="bottom")
ax.invert_yaxis()
ax.grid(axis="x")
ax.grid(visible=False, axis="y")
ax.margins(x=0.08)
ax.legend(loc="lower center")
fitting = sum(total < 24 * 2**30 / 1e9 for total in left[:3])
title = f"Full fine-tuning of a 7B model: {fitting} of 3 plans fit a 24 GB card\n"
finding(ax, title, "memory held between steps (GB)")
listed = "; ".join(f"{label}: {total:.1f} GB" for label, total in zip(plans, left, strict=True))
show(fig, alt=f"Stacked bars of weights, gradients and Adam's states for Llama-2-7B. {listed}.")

# %% [markdown] tags=["takeaway"]
# Adam's states are twice the weights when both have the same type, four times when the weights are halved and the
# states are not. Weights and gradients come on top.

# %% [markdown]
# ## 6. When would you choose it?
# - **Tell it** while guides are short, the model follows them, and customers change daily: nothing to train, nothing to
#   store. Always try it first.
# - **Retrain it** when one customer needs deep change and pays for a model of its own.
# - **Adapt it** in between: many customers, long guides, or knowledge that no guide can carry.
#
# **The failure you will meet** is a plan that counts only the weights. "7B in 16 bit fits in 24 GB" is true of running
# the model, and wrong by a factor of four for training it.

# %%
held = plans["full, bfloat16"]
print(f"weights {held.parameters / 1e9:.1f} GB, training {held.total / 1e9:.1f} GB")
assert held.total == 4 * held.parameters

# %% [markdown]
# ## 7. Go further
# - Run this lab on a model of the hub: `MODEL_ID = "HuggingFaceTB/SmolLM2-135M"`, on a GPU `PROFILE = "gpu"`. It has
#   never seen our guides: what does telling reach there?
# - **A.** Llama-3-8B shares keys and values among heads. From how many tokens on does a cached guide outweigh an
#   adapter there?
# - **B.** Leave out every second rule of a guide. What does the base write for those?
# - **C.** On which card can Llama-3.2-1B be fully fine-tuned in float32?

# %% [markdown] tags=["student-only"]
# *Your notes:*

# %% tags=["solution-only"]
from labs_lib.world.grammar import DEFAULT_STYLE

llama3, llama1b = random_like("llama-3-8b"), random_like("llama-3.2-1b")
tokens = 2 * adapter_parameters(llama3) / cache_bytes(1, llama3.config)
print(f"A. from {int(np.ceil(tokens)):,} tokens on")

half = dict(list(tenant.style.items())[::2])
[text] = generate(model, tokenizer, [copy_prompt(product, half)])
judged = {"asked for": tenant.style, "of the default style": DEFAULT_STYLE | half}
for label, rules in judged.items():
    left_out = [kept for rule, kept in obeyed(text, product, rules).items() if rule not in half]
    print(f"B. of the {len(left_out)} rules left out, {sum(left_out)} come out as {label}")

memory = training_bytes(count_parameters(llama1b).total).total
print(f"C. {memory / 1e9:.1f} GB before activations: 24 GB, with small batches")

# %%
progress()
