"""Lab 15, serving many adapters. Its record is `labs bench serving`; the engine is labs_lib/serving."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, log_axis, look, show

lab = setup(lab="15", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# Fifty customers, fifty adapters, one base model. Their requests arrive together, and a processor is only fast when it
# works on many rows at once. Can one batch hold rows of different customers?
#
# Write down what row $i$ of a linear layer needs, if its request belongs to tenant $t_i$:
#
# $$y_i = W x_i + B_{t_i} A_{t_i} x_i$$
#
# The first term has no tenant in it: all rows go through $W$ together. Only the second, thin one differs from row to
# row. ($\frac{\alpha}{r}$ is folded into $B$ from here on.) Merging would give that up: a merged $W + B_t A_t$ serves one
# tenant.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

colors = {"tenant 1": look("lora").color, "tenant 2": look("dora").color, "base": look("base").color}
rows = ["tenant 1", "base", "tenant 2", "tenant 1", "tenant 2"]
fig, ax = plt.subplots(figsize=(8, 3))
for i, tenant in enumerate(rows):
    y = 4 - i
    ax.add_patch(Rectangle((0, y + 0.1), 3, 0.8, color=colors[tenant], alpha=0.75, lw=0))
    ax.text(1.5, y + 0.5, f"$x_{i + 1}$: {tenant}", ha="center", va="center", color="white", size=9)
    if tenant == "base":
        ax.text(12.6, y + 0.5, "nothing to add", ha="center", va="center", size=9)
        continue
    number = tenant[-1]
    ax.text(10.1, y + 0.5, "+", ha="center", va="center", size=13)
    ax.add_patch(Rectangle((10.7, y + 0.3), 1.7, 0.4, color=colors[tenant], lw=0))
    ax.add_patch(Rectangle((12.8, y + 0.3), 1.7, 0.4, color=colors[tenant], alpha=0.5, lw=0))
    ax.text(11.55, y + 0.5, f"$A_{number}$", ha="center", va="center", color="white", size=9)
    ax.text(13.65, y + 0.5, f"$B_{number}$", ha="center", va="center", size=9)
ax.add_patch(Rectangle((4.6, 0.1), 4.8, 4.8, color=look("base").color, alpha=0.3, lw=0))
ax.text(7, 2.5, "$W$\none product\nfor all rows", ha="center", va="center")
ax.annotate("", (4.5, 2.5), (3.1, 2.5), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.1, 14.7), ylim=(0, 5.1))
ax.axis("off")
finding(ax, "Five rows, two tenants and the base: $W$ once, a thin $A$ and $B$ for each row")
show(
    fig,
    alt="Five rows of a batch, of two tenants and the base model, all pass one large matrix W; beside it each tenant's "
    "row gets its own thin A and B, the base row nothing.",
)

# %% [markdown]
# **By hand.** One input, one output, rank 1, $W = 2$. Tenant 1 has $A = 1, B = 3$; tenant 2 has $A = -1, B = 1$. Three
# rows: $x = 1$ of tenant 2, $x = 2$ of the base, $x = 4$ of tenant 1.
#
# $$2 \cdot 1 + 1 \cdot (-1) \cdot 1 = 1, \qquad 2 \cdot 2 = 4, \qquad 2 \cdot 4 + 3 \cdot 1 \cdot 4 = 20$$
#
# On a machine: put the adapters into numbered **slots** and give slot 0, the base, zeros. Then the whole batch is one
# line, without an `if`.

# %%
import torch

W, x = 2.0, torch.tensor([1.0, 2.0, 4.0])
A, B = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 3.0, 1.0])  # by slot: base, tenant 1, tenant 2
slot = torch.tensor([2, 0, 1])  # of each row
print((W * x + B[slot] * A[slot] * x).tolist())

# %% [markdown]
# That line is the idea of this lab. Here is the road to it, in five ways that you will meet, each faster or smaller than
# the one before:
#
# | Way | A forward pass serves | What lies in memory |
# |---|---|---|
# | a merged model per tenant | one tenant | $N$ models |
# | PEFT `set_adapter` | one tenant at a time | one model, $N$ adapters |
# | PEFT `adapter_names` | every row; each layer loops over the tenants | the same |
# | **gather** | every row; each layer does two batched products | and a copy of an adapter per row |
# | **segments** | every row; each layer does two products per tenant | nothing is copied |

# %% [markdown]
# ## 2. Build it
# **Exercise 1: the slot map.** Requests name adapters; the batch needs numbers. Slot 0 is the base. What about an
# adapter that is not on the device? A default would be *some* answer, in somebody's voice.
#
# *You should see* a slot for each row, and a refusal for a stranger.

# %% tags=["exercise"]
from labs_lib.serving.lesson import slot_map

# %%
from labs_lib.errors import LabsError

slot_map = check(slot_map)
resident = {"fathom": 1, "quill": 2}
print("decoding:", slot_map(["quill", None, "fathom", "quill"], resident))
print("prefill of three tokens each:", slot_map(["quill", None], resident, tokens=3))
try:
    slot_map(["stranger"], resident)
except LabsError as error:
    print("refused:", error)

# %% [markdown]
# **Mixed ranks.** Tenants choose their own rank. So memory is cut into **pages**: page $p$ is one rank of some
# adapter, a row of its $A$ (`a[p]`) and the matching column of its $B$ (`b[p]`). An adapter of rank $r$ is any $r$
# pages. A table lists the pages of each slot, filled up with page 0, which is zeros for ever.
#
# The engine's `Index` looks the table up for a batch. *You should see* one line of pages per row; the base's are all 0.

# %%
from labs_lib.serving.batch import Index

table = torch.tensor([[0, 0, 0], [7, 2, 0], [4, 0, 0], [9, 1, 6]])  # slots 1, 2, 3: ranks 2, 1, 3
index = Index([2, 0, 1, 2], table)
print(index.row_pages.tolist())

# %% [markdown]
# **Exercise 2: gather.** Copy, for each row, the pages of its adapter; then two batched products, the first into the
# rank, the second out of it. `out` is what the base layer computed: the update is added to it in place.
#
# *You should see* rounding errors against the engine's `loop`, which computes row by row.

# %% tags=["exercise"]
from labs_lib.serving.ops import gather

# %%
from labs_lib.serving.ops import loop

gather = check(gather)
a, b, x = torch.randn(10, 64), torch.randn(10, 48), torch.randn(4, 64)
a[0], b[0] = 0, 0
difference = (gather(x, a, b, index) - loop(x, a, b, index)).abs().max().item()
print(f"largest difference {difference:.1g}; base row changed: {bool(gather(x, a, b, index)[1].any())}")

# %% [markdown]
# **What does the copying cost?** A layer of a 7B model is 4096 x 4096. Thirty-two rows decode together, each with its
# own adapter of rank 16, in half precision. **Your turn**: how many megabytes ($10^6$ bytes) does `gather` copy for this
# one layer? ($W$ itself is 33.6 MB.)

# %%
### BEGIN SOLUTION
### STUB: gather_megabytes = ...  # a number
gather_megabytes = 32 * 16 * (4096 + 4096) * 2 / 1e6
### END SOLUTION
gather_megabytes = check(gather_megabytes, "lab15.gather_megabytes")
share = gather_megabytes / (4096 * 4096 * 2 / 1e6)
print(f"32 rows copy {share:.2f} times W; a prefill of 512 rows would copy {16 * share:.0f} times W")

# %% [markdown]
# **Exercise 3: segments.** In prefill, hundreds of rows share one adapter: a prompt's tokens. So sort the rows by slot
# and cut them into **segments**, all of one slot: then each tenant is two ordinary matrix products, and no weight is
# copied. `index.order` sorts, `index.segments` cuts, `index.back` puts back.
#
# *You should see* three segments, nothing to add for the base's, and the same answer as before.

# %% tags=["exercise"]
from labs_lib.serving.ops import segments

# %%
segments = check(segments)
for segment in index.segments:
    what = "nothing to add" if segment.pages is None else "two products"
    print(f"slot {segment.slot}: sorted rows {segment.start} to {segment.stop - 1}, {what}")
difference = (segments(x, a, b, index) - gather(x, a, b, index)).abs().max().item()
print(f"largest difference between your two ops: {difference:.1g}")

# %% [markdown]
# The engine has more of these (`labs_lib/serving/ops.py`, a page each): `blocks` reads a slot's pages in place where they
# lie side by side, `grouped` is PyTorch's grouped matrix product, `sgmv` a Triton kernel that follows the page table by
# itself ([Punica](https://arxiv.org/abs/2310.18547)'s operation). All have your signature and must give your answer.

# %% [markdown]
# ## 3. Prove it
# **First, tenants.** Two customers get a style adapter, trained here for a few seconds with lab 01's own LoRA and
# learning rate.

# %%
import tempfile
from pathlib import Path

from labs_lib import fit, load_task
from labs_lib.methods.io import save_lora
from labs_lib.methods.lora import inject_lora

shelf = tempfile.TemporaryDirectory()
root = Path(shelf.name)
base, tokenizer = lab.base(dtype=torch.float32)
rate = 5e-3 * min(1, 128 / base.config.hidden_size)
styles = {slug: load_task("style", tenant=slug) for slug in ("fathom-eleven", "quillfeather-post")}
folders = {}
for slug, style in styles.items():
    pupil = inject_lora(lab.base(dtype=torch.float32)[0], "all-linear", rank=8, alpha=16)
    fit(pupil, tokenizer, style["train"][:], steps=lab.steps(60), lr=rate, seed=lab.seed)
    folders[slug] = save_lora(pupil, root / slug)

# %% [markdown]
# Four more are saved by PEFT itself, with random weights and what customers come with: a low rank on attention alone,
# rsLoRA's scale, two ranks in one adapter, DoRA.

# %%
from peft import LoraConfig, get_peft_model

everywhere, mlp = "all-linear", ["up_proj", "down_proj"]
odd = {
    "low-rank": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "target_modules": everywhere, "use_rslora": True},
    "two-ranks": {"r": 3, "lora_alpha": 6, "target_modules": mlp, "rank_pattern": {"down_proj": 6}},
    "dora": {"r": 4, "lora_alpha": 4, "target_modules": everywhere, "use_dora": True},
}
for name, settings in odd.items():
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = get_peft_model(lab.base(dtype=torch.float32)[0], config)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:  # DoRA starts at the base's own magnitudes: move them, or they prove nothing
            parameter.data *= torch.empty_like(parameter).uniform_(0.7, 1.3)
    model.save_pretrained(root / name)
    folders[name] = root / name

# %% [markdown]
# **Into the engine's memory.** `read_pages` checks a PEFT folder and turns it into pages, the scale folded in; a `Pool`
# keeps them. An adapter is named by the SHA-256 of its files, so a name can never come to mean other weights.
#
# *You should see* six adapters of different sizes side by side. DoRA takes one page more: its gains.

# %%
from labs_lib.serving.adapter import read_pages
from labs_lib.serving.layout import Layout
from labs_lib.serving.pool import Pool

layout = Layout.of(base)
pool = Pool(layout, slots=8, max_pages=17, kv_tokens=16, device=base.device)
sha = {None: None}
for name, folder in folders.items():
    manifest, pages = read_pages(folder, layout, lambda layer: base.get_submodule(layer).weight)
    place = pool.fill(manifest.sha256, manifest.pages, pages, manifest.dora, tenant=name)
    sha[name] = manifest.sha256
    what = f"rank {manifest.rank:2d}, {manifest.pages:2d} pages, {manifest.nbytes / 1e3:4.0f} KB"
    print(f"slot {place.number}: {name:17s} {manifest.sha256[:8]}  {what}")

# %% [markdown]
# **One batch of all of them**, base rows among them and no two neighbours alike. The model is transformers' own; `install`
# puts the engine's layer around each linear one, and the layer calls your op.
#
# The truth for each row is another model: the base with that row's adapter merged in by PEFT.

# %%
from labs_lib.serving import arms
from labs_lib.serving.layers import Step, install, uninstall
from labs_lib.serving.ops import OPS

OPS.update(gather=gather, segments=segments)  # yours, from here on
asked = [None, *folders, "fathom-eleven", None]
prompt = styles["fathom-eleven"]["test"]["prompt"][0]
batch = tokenizer([prompt] * len(asked), return_tensors="pt").input_ids.to(base.device)
slots = slot_map([sha[name] for name in asked], {s.adapter: s.number for s in pool.resident}, batch.shape[1])
index = Index(slots, pool.table, pool.contiguous, base.device)
truth = {name: arms.merged(base, folder) for name, folder in folders.items()} | {None: base}


@torch.inference_mode()
def mixed_logits(op):
    gains = pool.gain_page[torch.tensor(slots)].to(base.device)
    install(base, Step(pool.adapters.data, layout, op, index, gains))
    try:
        return base(batch).logits
    finally:
        uninstall(base)


# %% [markdown]
# *You should see* differences at the seventh digit, for both ops, and logits that differ a lot between tenants.

# %%
from labs_lib.lab.cards import table as show_table

results = []
with torch.inference_mode():
    expected = {name: model(batch[:1]).logits[0] for name, model in truth.items()}
for op in ("gather", "segments"):
    for row, name, logits in zip(range(len(asked)), asked, mixed_logits(op), strict=True):
        away = (logits - expected[name]).abs().max().item() / expected[name].abs().max().item()
        assert away < 1e-5, (op, name)
        if op == "gather":
            results.append({"row": row, "tenant": name or "base"})
            results[-1]["slot"] = slots[row * batch.shape[1]]
            results[-1]["from the base's logits"] = f"{(logits - expected[None]).abs().max().item():.2g}"
        results[row][f"{op}, from its own model"] = f"{away:.0e}"
show_table(results)

# %% [markdown]
# **And the texts.** The real engine now, with keys and values in a cache and one token per row and step; the op is yours.
# Each tenant's tokens are compared with what its merged model writes alone.

# %%
from labs_lib.serving.engine import Engine
from labs_lib.serving.types import Request

folder_of = {sha[name]: folder for name, folder in folders.items()}
ids, ends = batch[0].tolist(), (tokenizer.eos_token_id,)
requests = [Request(ids, name or "base", sha[name], max_tokens=64, stop_ids=ends) for name in asked]
with Engine(arms.share(base), folder_of.__getitem__, max_rank=17, op="gather") as engine:
    answers = engine.generate(requests)
same = []
for name, result in zip(asked, answers, strict=True):
    alone = truth[name].generate(batch[:1], max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    same.append(result.tokens == [token for token in alone if token not in ends])
print(f"{sum(same)} of {len(same)} rows have the tokens of their own merged model")

# %%
from labs_lib.lab.cards import side_by_side

print(prompt)
chosen = (None, "fathom-eleven", "quillfeather-post")
texts = {name or "base": tokenizer.decode(answers[asked.index(name)].tokens) for name in chosen}
side_by_side(texts)

# %% [markdown] tags=["takeaway"]
# One forward pass, six adapters of different ranks and kinds and the base: every row gets its own model's tokens. Mixing
# tenants in a batch is exact; it is not an approximation that you trade for speed.

# %% [markdown]
# ## 4. Measure
# **Which op, when?** Eight tenants share a batch of $T$ rows. Gather copies an adapter for every row; segments starts two
# products for every tenant. **Predict**: from how many rows on is segments the faster one?

# %%
### BEGIN SOLUTION
### STUB: predict_crossover = ...  # a number of rows
predict_crossover = 64
### END SOLUTION
predict_crossover = check(predict_crossover, "lab15.predict_crossover")

# %%
from labs_lib.serving.opbench import bench

torch.set_num_threads(1)  # products this small are slower on two threads: `labs bench serving` measures both
names, counts = ("loop", "gather", "segments", "blocks"), lab.grid([8, 16, 32, 64, 128, 256])
points = {}
for width in (128, 512):
    shapes = [(rows, 8, 8, width, width) for rows in counts]
    device = {"device": lab.device, "dtype": lab.dtype}
    points[width] = bench(shapes, names, order="mixed", rounds=5, min_seconds=0.002, layers=4, **device)


def crossover(rows):
    """The first number of rows at which segments is faster than gather."""
    time = {(row["T"], row["op"]): row["microseconds"] for row in rows}
    return next((T for T in counts if time[T, "segments"] < time[T, "gather"]), None)


found = {width: crossover(rows) for width, rows in points.items()}
print(f"you predicted {predict_crossover} rows; by width of the layer: {found}")

# %% tags=["hide-input"]
styles_of = {
    "loop": ("#000000", "x", ":", "loop over tenants"),
    "gather": (look("lora").color, "o", "-", "gather"),
    "segments": (look("dora").color, "s", "--", "segments"),
    "blocks": (look("prefix").color, "^", "-.", "blocks"),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for ax, (width, rows) in zip(axes, points.items(), strict=True):
    for op, (color, marker, line, label) in styles_of.items():
        mine = [row for row in rows if row["op"] == op]
        times = [row["microseconds"] for row in mine]
        ax.plot(counts, times, color=color, marker=marker, linestyle=line, label=label)
    base_times = [row["base"] for row in rows if row["op"] == "gather"]
    ax.plot(counts, base_times, color=look("base").color, linewidth=3, alpha=0.5, label="the layer itself")
    ax.set_yscale("log")
    log_axis(ax, counts)
    when = f"from {found[width]} rows on" if found[width] else "nowhere here"
    finding(
        ax, f"Width {width}: segments wins {when}", "rows in the batch, 8 tenants", "microseconds per layer"
    )
axes[0].legend(fontsize=8)
show(
    fig,
    alt="Time per layer against rows in the batch for four ways to add eight adapters, at widths "
    f"{' and '.join(f'{width}: segments beats gather at {rows} rows' for width, rows in found.items())}.",
)

# %% [markdown]
# So no op is the best one. The engine's `op="auto"` chooses by shape, layer by layer; decoding is on the left of these
# figures, prefill on the right.

# %% [markdown]
# **The whole step.** What matters is not one layer but a decode step: one token for every row. Six arms run in the same
# continuous batching with the same cache (`labs_lib/serving/arms.py`), each row with its own adapter of rank 8.
#
# **Predict**: what percentage of the base's throughput is left with an adapter on every row, in this engine?

# %%
### BEGIN SOLUTION
### STUB: predict_share = ...  # a percentage
predict_share = 60
### END SOLUTION
predict_share = check(predict_share, "lab15.predict_share")

# %%
from labs_lib.serving.workload import random_adapters

tenants = min(32, lab.rows(32))
model, _ = lab.base()
crowd = random_adapters(model, tenants, root / "crowd", rank=8)
setup_ = arms.Setup(model, crowd, batch=tenants, slots=tenants, rank=8, kv_tokens=256 * tenants)
labels = {
    "base": "base model alone",
    "engine": "this engine",
    "engine:gather": "this engine, your gather",
    "peft_mixed": "PEFT adapter_names",
    "peft_switch": "PEFT set_adapter",
    "merged": "a merged copy each",
}
engines = {name: arms.build(name, setup_) for name in labels}

# %% [markdown]
# **Verified before it is timed**: a fast wrong answer is worth nothing. Each arm answers a few tokens; an oracle that
# shares no code with it replays them on merged models.


# %%
def asks(name, tokens):
    who = [None] * tenants if name == "base" else list(crowd)
    return [Request(ids, f"tenant-{i}", each, tokens, ignore_eos=True) for i, each in enumerate(who)]


oracle = arms.Oracle(model, crowd)
for name, engine in engines.items():
    verdict = oracle.verify(engine.generate(asks(name, 4)), adapters=8)
    print(f"{labels[name]:25s} {verdict}")
    assert verdict.right, name

# %% [markdown]
# Now the time of a decode step. The arms take turns, so that a busy machine slows all of them alike; what counts is the
# ratio. `set_adapter` decodes batches of one adapter, as serving with it does: one row here, the others wait.

# %%
from labs_lib.measure.timing import time_ratios

for name, engine in engines.items():
    for request in asks(name, 200):
        engine.submit(request)
    for _ in range(3):
        engine.step()
rows = {name: len(engine.running) for name, engine in engines.items()}
steps = {name: engine.step for name, engine in engines.items()}
measured = time_ratios(steps, "base", rounds=lab.rows(11), warmup=1, min_seconds=0.001)
for name, engine in engines.items():
    assert len(engine.running) == rows[name], "a row ended while the clock ran"
    engine.close()
share = {name: 100 * rows[name] / tenants / each.ratio.value for name, each in measured.items()}
print(f"you predicted {predict_share} % of the base's throughput; this engine has {share['engine']:.0f} %")

# %% tags=["hide-input"]
order = sorted(share, key=share.get)
paint = {"base": look("base").color, "engine": look("lora").color, "engine:gather": look("rslora").color}
fig, ax = plt.subplots(figsize=(7.6, 3))
for row, name in enumerate(order):
    ax.barh(row, share[name], color=paint.get(name, "#000000"), height=0.65)
    said = f"{share[name]:.1f} %: {measured[name].seconds * 1e3:.3g} ms for {rows[name]} tokens"
    ax.annotate(said, (share[name], row), xytext=(4, 0), textcoords="offset points", va="center", size=9)
ax.set_yticks(range(len(order)), [labels[name] for name in order])
ax.set_xlim(0, 150)
ax.grid(axis="x")
ax.grid(visible=False, axis="y")
times = share["engine"] / share["peft_mixed"]
title = f"{tenants} tenants in one batch: {times:.0f} times PEFT's adapter_names"
finding(ax, title, "throughput of a decode step (% of the base alone)")
listed = "; ".join(f"{labels[name]} {share[name]:.0f} percent" for name in reversed(order))
show(fig, alt=f"Throughput of a decode step with {tenants} tenants, of the base model's alone: {listed}.")

# %% [markdown]
# One step is not a service: requests come and go, and prompts have to be read. The recorded benchmark (`labs bench
# serving`) decodes 32 distinct adapters like you just did, and plays whole traces of 50, each adapter alike (uniform) or
# some far more popular than others (Zipf).
#
# *You should see* your live shares near the recorded ones, if this machine is like the recorded one.

# %%
from labs_lib.measure import load_record

record = load_record("bench_serving", device="cpu")
print(record)
recorded = {(row.get("pattern", "a step"), row["arm"]): row for row in record.rows if row.get("of_base")}
results = []
for name in reversed(order):
    results.append({"% of the base alone": labels[name], "a step, live": f"{share[name]:.1f}"})
    for what in ("a step", "uniform", "zipf"):
        row = recorded.get((what, name))
        said = "" if row is None else "{of_base:.1%} [{of_base_lo:.1%}, {of_base_hi:.1%}]".format(**row)
        results[-1][f"{what}, recorded"] = said.replace("%", "")
show_table(results)

# %% [markdown]
# **What each way holds and starts**, for fifty tenants with 32 of them in the batch. 7B is arithmetic on Llama-2-7B, rank
# 16 on all linear layers, two bytes per number. Look at the last column beside the times above: for products as thin as
# these, starting one costs more than its arithmetic.

# %%
from labs_lib import random_like
from labs_lib.measure import count_parameters, tensor_bytes
from labs_lib.models.twins import peft_parameter_count

llama = random_like("llama-2-7b")
everything = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
seven, adapter7 = count_parameters(llama).total, peft_parameter_count(llama, everything)
ours = tensor_bytes(list(model.parameters())), 8 * layout.width * 4
held = {
    "a merged model each": (50, 0, "32"),
    "set_adapter": (1, 50, "3 x 32"),
    "adapter_names": (1, 50, "1 + 2 x 32"),
}
held |= {"gather, 32 slots": (1, 33, "1 + 2"), "segments, 32 slots": (1, 33, "1 + 2 x 32")}
weights = sum(spec.in_features * spec.out_features for spec in layout.linears)
print(f"rank 8 adds {ours[1] / 4 / weights:.0%} to this base's multiplications in the linear layers")
results = []
for way, (models, adapters, products) in held.items():
    here = (models * ours[0] + adapters * ours[1]) / 1e6
    there = 2 * (models * seven + adapters * adapter7) / 1e9
    results.append({"way": way, "this base, MB": f"{here:.1f}", "7B, GB": f"{there:.1f}"})
    results[-1]["products per layer and step"] = products
show_table(results)

# %% [markdown]
# The last two hold a *pool*: 32 slots and the base's, whether fifty tenants are registered or five thousand. Who gets a
# slot, and what happens on a miss, is lab 16.

# %% [markdown]
# **Why not merge per request?** Fold the adapter in, answer, take it out. **Predict**: how many forward passes of one
# token does one change of tenant cost?

# %%
from peft import PeftModel

merging = PeftModel.from_pretrained(lab.base()[0], next(iter(crowd.values()))).eval()


def change_tenant():
    merging.merge_adapter()
    merging.unmerge_adapter()


with torch.inference_mode():
    pair = {"token": lambda: model(batch[:1, -1:]), "change": change_tenant}
    cost = time_ratios(pair, "token", rounds=lab.rows(15))["change"]
linear = sum(spec.in_features * spec.out_features for spec in Layout.of(llama).linears)
print(f"here: {cost.ratio.value:.1f} tokens' time for each change of tenant")
print(
    f"7B: {4 * 2 * linear / 1e9:.0f} GB of weights read and written, a token reads {2 * seven / 1e9:.0f} GB"
)

# %% [markdown]
# On a GPU, decoding is bound by memory, so those bytes are the time: about four tokens of one row each, in which nobody
# else is served. And $W$ does not come back. **Predict**: after a thousand changes in bfloat16?

# %%
spec, tensors = layout.linears[0], pages[:4].to(lab.device)
weight = base.get_submodule(spec.name).weight.detach()
update = (layout.b(tensors, spec).T @ layout.a(tensors, spec)).to(weight.device)
W, update = weight.bfloat16(), update.bfloat16()
worn = W.clone()
for _ in range(lab.steps(1000)):
    worn += update
    worn -= update
changed = (worn != W).float().mean().item()
print(
    f"{changed:.0%} of the weights are not what they were, off by up to {(worn - W).abs().max().item():.1g}"
)

# %% [markdown] tags=["takeaway"]
# Serving many adapters is a problem of small operations and of bytes moved, not of arithmetic. Batch over tenants, copy
# little, choose the op by the batch's shape, and check the answers before you time them.

# %% [markdown]
# **On a GPU, with a 7B model**, the same two questions: what is left of the base's throughput, and what does a token take
# longer? Side by side this engine's records, what others report, and the chapter, whose 8 ms are for a whole response.

# %%
from labs_lib.measure import load_published

from labs_lib.serving.sides import serving_sides

sides = serving_sides()
show_table(sides.rows)
print(sides)
published = load_published("serving")["tables"]
for name in ("slora_throughput", "vllm_overhead"):
    entry = published[name]
    mark = "as reported" if entry.get("as_reported") else "published"
    print(f"\n{entry['source']['cite']} ({mark}; {entry['setting']}; {entry['unit']})")
    for row in entry["rows"]:
        who = row.get("arm") or f"{row['engine']}, {row['adapters']} adapters"
        print(f"  {who:28s} {row['throughput']:.2f}")

# %% [markdown]
# ## 5. The chapter on trial
# **Claim 30**: "LoRAX (formerly LoRAX by Predibase)", a former name equal to the present one; and hundreds of adapters on
# one GPU. **Claim 31**: S-LoRA's "tiered memory system (GPU, CPU, disk)".
#
# These are claims about what others wrote, so the evidence is their own text: the READMEs of
# [LoRAX](https://github.com/predibase/lorax) and [S-LoRA](https://github.com/S-LoRA/S-LoRA), read in November 2026.

# %%
lorax = {
    "first README": "Lorax is a framework that allows users to serve over a hundred fine-tuned models on a single GPU",
    "today's README": "LoRAX (LoRA eXchange) is a framework that allows users to serve thousands of fine-tuned models "
    "on a single GPU",
}
slora = (
    "S-LoRA stores all adapters in the main memory and fetches the adapters used by the currently running queries to "
    "the GPU memory."
)

# %%
least = {"over a hundred": 100, "thousands": 1000}
counts_said = {when: next(n for word, n in least.items() if word in text) for when, text in lorax.items()}
names_said = {text.split(" is ")[0].partition(" (")[0].casefold() for text in lorax.values()}
claim(30).observe(parts={"name": len(names_said) > 1, "adapters": counts_said})

# %%
tiers = {"GPU": "GPU memory", "CPU": "main memory", "disk": "disk"}
print({tier: words in slora for tier, words in tiers.items()})
claim(31).observe(all(words in slora for words in tiers.values()))

# %% [markdown]
# The name is a slip: already the first README called it Lorax, for "LoRA Exchange". The three tiers are LoRAX's: that first
# README promises "offloading of adapter weights to CPU and disk". This engine has all three, too: lab 16 is about them.

# %% [markdown]
# **"For all PEFT methods?"** The chapter calls serving "one of the strongest arguments for LoRA over other PEFT methods".
# Try it: PEFT's `adapter_names` takes any model. Two adapters of one type and the base in a batch of three rows; each row
# is compared with its adapter alone.
#
# **Predict**: of the eight types below, how many give a wrong answer *without an error*?

# %%
### BEGIN SOLUTION
### STUB: predict_silent = ...  # a whole number, 0 to 8
predict_silent = 2
### END SOLUTION
predict_silent = check(predict_silent, "lab15.predict_silent")

# %%
import copy

import peft

qv, ends_here = {"target_modules": ["q_proj", "v_proj"]}, {"task_type": "CAUSAL_LM"}
types = {
    "LoRA": peft.LoraConfig(**qv, **ends_here),
    "rsLoRA": peft.LoraConfig(use_rslora=True, **qv, **ends_here),
    "DoRA": peft.LoraConfig(use_dora=True, **qv, **ends_here),
    "IA3": peft.IA3Config(feedforward_modules=[], **qv, **ends_here),
    "LoKr": peft.LoKrConfig(**qv, **ends_here),
    "VeRA": peft.VeraConfig(r=8, **qv, **ends_here),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"], **ends_here),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, **ends_here),
}


# %%
@torch.inference_mode()
def in_one_batch(config):
    """What PEFT answers to rows for adapters acme, bolt and the base."""
    mixed = get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name="acme")
    mixed.add_adapter("bolt", copy.deepcopy(config))
    for name, parameter in mixed.named_parameters():
        if {"acme", "bolt"} & set(name.split(".")):
            parameter += 0.2 * torch.randn_like(parameter)
    mixed.eval()
    alone = {"__base__": base(batch[:1]).logits[0, -1]}
    for name in ("bolt", "acme"):
        mixed.set_adapter(name)
        alone[name] = mixed(batch[:1]).logits[0, -1]
    try:
        logits = mixed(batch[:3], adapter_names=["acme", "bolt", "__base__"]).logits[:, -1]
    except ValueError as error:
        return f"refused: {error}"
    right = [
        torch.allclose(logits[i], alone[name], atol=1e-3)
        for i, name in enumerate(("acme", "bolt", "__base__"))
    ]
    first = all(torch.allclose(row, alone["acme"], atol=1e-3) for row in logits)
    return (
        "right" if all(right) else "SILENTLY WRONG: every row got adapter acme" if first else "SILENTLY WRONG"
    )


torch.manual_seed(lab.seed)
verdicts = {name: in_one_batch(config) for name, config in types.items()}
for name, verdict in verdicts.items():
    print(f"{name:14s} {verdict}")
silent = sum(verdict.startswith("SILENTLY") for verdict in verdicts.values())
print(f"you predicted {predict_silent} silently wrong types; there are {silent}")

# %% [markdown]
# Only LoRA's layers know the argument. Elsewhere it travels down to the model's own forward pass, which takes any keyword
# and ignores it: every tenant gets whichever adapter is active. Nothing in the output shows it.

# %% [markdown]
# **The same question to the servers**: would each of them serve your adapters, refuse them, or *serve them wrong*? The
# course's matrix judges by `adapter_config.json` alone, from tests, from the servers' sources and from their issues.
#
# *You should see* your six adapters first, and that the popular ones are not the careful ones.

# %%
import json

from labs_lib.serving.interop import matrix

configs = {name: json.loads((folder / "adapter_config.json").read_text()) for name, folder in folders.items()}
verdicts = matrix(configs | {name: types[name].to_dict() for name in ("IA3", "VeRA", "prompt tuning")})
verdicts

# %% [markdown]
# Mixed batches were asked of PEFT early ([759](https://github.com/huggingface/peft/issues/759),
# [804](https://github.com/huggingface/peft/issues/804)), and met limits there
# ([2283](https://github.com/huggingface/peft/issues/2283)). Why, for each that would be served wrong (how it
# is known, and where, stands in brackets):

# %%
print(verdicts.reasons("silently wrong"))

# %% [markdown] tags=["takeaway"]
# "Loads without an error" is not "is served right". Of the ways to be wrong, a refusal is the best. Test with a row whose
# answer you know, in a batch with strangers.

# %% [markdown]
# **The chapter's exercise.** "You need to fine-tune a single base model for 50 different customer tenants, each with unique
# data. Which PEFT method would you choose, and why?" Its sketch: LoRA; 10 to 50 MB each, 1/300th of the storage, full
# copies 700 GB, prefix tuning "adds serving latency".
#
# **Your turn**, the number first. How many GB ($10^9$ bytes) are one Llama-2-7B (6,738,415,616 parameters) and fifty
# adapters of rank 16 on all linear layers (39,976,960 each), at two bytes per parameter?

# %%
### BEGIN SOLUTION
### STUB: fifty_tenants_gb = ...  # a number
fifty_tenants_gb = (6_738_415_616 + 50 * 39_976_960) * 2 / 1e9
### END SOLUTION
fifty_tenants_gb = check(fifty_tenants_gb, "lab15.fifty_tenants_gb")

# %%

prefix = peft.PrefixTuningConfig(num_virtual_tokens=30, **ends_here)
ia3 = peft.IA3Config(
    target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **ends_here
)
candidates = {
    "full fine-tuning": seven,
    "LoRA r16, q and v": peft_parameter_count(llama, peft.LoraConfig(r=16, **qv, **ends_here)),
    "LoRA r16, all linear": adapter7,
    "prefix tuning, 30 tokens": peft_parameter_count(llama, prefix),
    "IA3": peft_parameter_count(llama, ia3),
}
results = []
for name, size in candidates.items():
    total = 50 * size + (0 if size == seven else seven)
    row = {"method": name, "MB per tenant": f"{2 * size / 1e6:,.1f}", "1 over": f"{seven / size:,.0f}"}
    results.append(row | {"GB for fifty tenants": f"{2 * total / 1e9:,.1f}"})
show_table(results)

# %% [markdown] tags=["student-only"]
# **Write your answer here**: which method, and why? Use the table, the batch of eight types, and one number of your own
# from section 4.

# %% [markdown] tags=["solution-only"]
# **Answer.** LoRA, but not for its size. By size IA3 wins by far, and everything but full copies fits on one GPU: the
# fifty copies are 674 GB, not 700. The sketch's own figures hold for one choice only: 10 to 50 MB is rank 16 on $q$ and $v$
# in half precision; on all linear layers it is 80 MB, 1/169 of the model and not 1/300.
#
# What decides is what can share a *batch*. LoRA's update is the same two thin products for every tenant, and every engine
# has an op for it. IA3 would be simpler still, a scaling per row, yet PEFT ignores it in a mixed batch.

# %% [markdown] tags=["solution-only"]
# "Prefix tuning adds serving latency" is true of both: a prefix by a longer cache for every request, an adapter by its
# products. Only a merged adapter adds none, and a merged model serves one tenant.
#
# And say the price: with an adapter on every row, a decode step keeps only the share of the base's throughput that section
# 4 measured. If one tenant has most of the traffic, give that one a merged copy, and multiplex the rest.

# %% [markdown]
# ## 6. Over HTTP
# So far a tenant was a string in your code. In the case study it is an API key: the server knows the tenant by the key,
# the tenant's current adapter by the registry, and the caller never names weights. The real gateway, in this notebook, on
# a free port of this machine:

# %%
import httpx

from labs_lib.serving.gateway import create_app
from labs_lib.serving.registry import Registry
from labs_lib.serving.serve import running_server

registry = Registry(root / "registry")
keys = {}
for slug in styles:
    keys[slug] = registry.add_tenant(slug)  # shown once; the registry keeps a hash
    version = registry.publish(slug, folders[slug], note="trained in lab 15")
    print(f"{slug:17s} key {keys[slug][:12]}..., version {version.number}, adapter {version.sha256[:8]}")


# %%
def ask(url, key, model):
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0}
    header = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=header, timeout=60)


# %% [markdown]
# Two tenants ask for the same product at the same moment. The engine is started when both requests wait, so that they
# meet in one batch for certain.
#
# *You should see* two voices, each with the headers that prove whose weights spoke. With the other tenant's name, or a
# made-up key, there is nothing to see.

# %%
import time
from concurrent.futures import ThreadPoolExecutor

with Engine(arms.share(base), registry.folder) as engine:
    app = create_app(engine, registry, tokenizer, admin_key=None, model_name="base")
    with running_server(app) as url, ThreadPoolExecutor(2) as clients:
        calls = {slug: clients.submit(ask, url, keys[slug], slug) for slug in styles}
        while engine.stats()["waiting"] < 2:
            time.sleep(0.01)
        engine.start()
        replies = {slug: call.result() for slug, call in calls.items()}
        wrong = {
            "another's name": ask(url, keys["fathom-eleven"], "quillfeather-post"),
            "a made-up key": ask(url, "sk-x", "base"),
        }
    together = [event.what for event in engine.ledger.events if event.what in ("admit", "end")]
for slug, reply in replies.items():
    print(slug, {name: value[:12] for name, value in reply.headers.items() if name.startswith("x-adapter")})
print({what: f"{reply.status_code} {reply.json()['error']['message']}" for what, reply in wrong.items()})
print("in the engine:", together)

# %%
side_by_side({slug: reply.json()["choices"][0]["text"] for slug, reply in replies.items()})

# %% [markdown]
# `openai.OpenAI(base_url=url + "/v1", api_key=key)` speaks to the same server. Outside a notebook it is
# `labs tenants add fathom-eleven`, `labs tenants publish fathom-eleven FOLDER`, `labs serve`.

# %% [markdown]
# ## 7. When would you choose it?
# Serve adapters unmerged, in one batch, when tenants are many and each asks seldom. Merge when one adapter has most of
# the traffic, or when there is only one: merged costs nothing. Between the two, count: copies cost memory, multiplexing
# costs part of every step.
#
# **The failure you will meet**: the adapter "works" in evaluation, where it is alone, and not in production, where it is
# one of many: a dropped rsLoRA scale, a target the server does not know, an argument it ignores, a base row that got
# somebody's adapter. Keep a canary per tenant: a prompt with a known answer, asked in mixed batches, compared by token.

# %% [markdown]
# **The way out, when you outgrow this engine**: vLLM takes the same folders and the same API, with CUDA kernels for the
# segments. Shown, not run here:
#
# ```
# vllm serve meta-llama/Llama-2-7b-hf --enable-lora --max-loras 32 --max-lora-rank 16 --max-cpu-loras 50 \
#     --lora-modules fathom-eleven=adapters/fathom-eleven quillfeather-post=adapters/quillfeather-post
# ```
#
# `--max-loras` is the number of slots, `--max-cpu-loras` the host tier, `--max-lora-rank` the pages per slot. API keys per
# tenant you put in front of it.

# %% [markdown]
# ## 8. Go further
# - **A real model.** Set `PROFILE = "gpu"` and `MODEL_ID = "HuggingFaceTB/SmolLM2-135M"` in the first cell and run all.
# - **Open exercise 1.** Thirty-one tenants train at rank 4, one at rank 64. Who pays, with gather and with segments?
#   Measure it.
# - **Open exercise 2.** `q_proj`, `k_proj` and `v_proj` read the same input. What could an engine do once instead of three
#   times, and what would it gain where starting an operation is the cost?

# %% [markdown]
# **How much is left to gain?** A step must read the weights once, and the adapters of its rows. Bytes over bandwidth is
# the least it can take, FLOPs over the rate of multiplying likewise, and the larger of the two is the *roofline*
# (Williams et al. 2009, "Roofline", CACM 52(4)). `labs bench kernels` measures all three, on a GPU with the Triton
# kernels too. *You should see* how far each op is from the black line, which no op can cross.

# %%
from labs_lib.serving.kernels_report import of_layers, roofline

record = load_record("bench_kernels")
panels = {rank: rows for (of, rank), rows in of_layers(record.rows).items() if of == "seven linears"}
print(record)
print(f"7B: 32 adapters of rank 16 are {32 * adapter7 / seven:.0%} more bytes to read than the model alone")

# %% tags=["hide-input"]
fig, (axes,) = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.4), sharey=True, squeeze=False)
told = [roofline(ax, panels[rank], rank) for ax, rank in zip(axes, sorted(panels), strict=True)]
axes[0].set_ylabel("microseconds of a layer's seven linears")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
show(fig, alt=" ".join(told))

# %% [markdown] tags=["solution-only"]
# **Answer 1.** With gather everybody: all rows are padded to the largest rank in the batch. With segments the tenant
# alone, whose two products grow.


# %% tags=["solution-only"]
def ranks_in_a_batch(ranks, width=512):
    """Seconds per call of both ops, one row for each rank, against gather with the same ranks."""
    first = 1 + torch.tensor([0, *ranks]).cumsum(0)
    table = torch.zeros(len(ranks) + 1, max(ranks), dtype=torch.long)
    for i, rank in enumerate(ranks):
        table[i + 1, :rank] = torch.arange(first[i], first[i + 1])
    a, b, x = (torch.randn(n, width) for n in (first[-1], first[-1], len(ranks)))
    index = Index(range(1, len(ranks) + 1), table)
    calls = {op.__name__: lambda op=op: op(x, a, b, index) for op in (gather, segments)}
    return {name: each.seconds for name, each in time_ratios(calls, "gather", rounds=5).items()}


even, one_large = ranks_in_a_batch([4] * 32), ranks_in_a_batch([4] * 31 + [64])
for op in even:
    print(f"{op:9s} {one_large[op] / even[op]:.1f} times as long with one tenant at rank 64")

# %% [markdown] tags=["solution-only"]
# **Answer 2.** The shrinks: stack $A_q, A_k, A_v$ and compute all three in one product, as the gate and up projections can
# share theirs. Four shrinks a block instead of seven. Fewer, larger operations is also what CUDA graphs and fused kernels
# buy a GPU engine.

# %%
progress()
