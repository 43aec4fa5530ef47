"""Lab 16, paging and scheduling. The engine is labs_lib.serving; `labs bench serving` makes the record it shows."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, log_axis, look, show

lab = setup(lab="16", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# A device has room for few of a thousand adapters, so an engine decides, for every request: *who is in*, *who goes
# next*? And somebody must be able to tell *whose tokens these are*.
#
# | Tier | Holds | Leaves when |
# |---|---|---|
# | disk | every version of every adapter, named by its sha256 | never |
# | host memory | adapters that were read and checked, packed | the byte budget is full: least recently used |
# | device | adapters that requests use, in **slots** | a slot is needed: least recently used and idle |
#
# Device memory is cut into **pages**. One page is *one rank of an adapter across all its layers*: a row of $A$ and a
# column of $B$ for each layer $j$.

# %% [markdown]
# $$\underbrace{\sum_j \left(d^{in}_j + d^{out}_j\right)}_{\text{one rank of an adapter}} \qquad
# \underbrace{2 \cdot \text{layers} \cdot \text{heads}_{KV} \cdot d_{head}}_{\text{keys and values of one token}}$$
#
# An adapter of rank $r$ is $r$ pages, anywhere. Conversations need memory, too: keys and values for each token. If both
# live in pages of one pool ("unified paging", [S-LoRA](https://arxiv.org/abs/2311.03285)), then an adapter that nobody
# uses makes room for longer conversations, and the other way round.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np

from labs_lib.serving.arena import Pages as Books

ADAPTER, CELLS, FREE = look("lora").color, look("prefix").color, "#E2E2E2"
rng = np.random.default_rng(lab.seed)
books, owned = Books(288), {}
for number in range(16):  # adapters come and go, conversations grow between them
    owned[number] = books.take(int(rng.choice([4, 8, 16])), number), ADAPTER
    owned[100 + number] = books.take(int(rng.integers(4, 14)), 100 + number), CELLS
    if number > 4 and number % 2:
        books.give_back(owned.pop(number - 5)[0])
device = np.array([FREE] * 288, dtype=object)
for pages, color in owned.values():
    device[np.array(pages) - 1] = color
here = sum(color == ADAPTER for _, color in owned.values())
fig, axes = plt.subplots(1, 3, figsize=(9, 3.1), width_ratios=(1.3, 0.7, 1.3))
for ax, colors, wide, size, title in (
    (axes[0], [ADAPTER] * 1000, 40, 11, "Disk: 1,000 adapters"),
    (axes[1], [ADAPTER] * 256, 16, 16, "Host: 256"),
    (axes[2], list(device), 24, 42, f"Device: {here} now, in pages"),
):
    ax.scatter(np.arange(len(colors)) % wide, -(np.arange(len(colors)) // wide), c=colors, s=size, marker="s")
    ax.set_title(title)
    ax.axis("off")
for color, label in ((ADAPTER, "adapters"), (CELLS, "keys and values"), (FREE, "free")):
    axes[2].scatter([], [], c=color, marker="s", label=label)
axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, columnspacing=0.8, handletextpad=0.1)
show(
    fig,
    alt=f"A thousand adapters on disk, 256 of them in host memory, and {here} on the device, whose pages adapters and keys and values share in no particular order.",
)

# %% [markdown]
# **By hand.** Two slots, and requests by the tenants A, B, A, C, B.
#
# | request | A | B | A | C | B |
# |---|---|---|---|---|---|
# | in the slots | A | A B | A B | A C | C B |
# | | load | load | hit | load, B leaves | load, A leaves |
#
# At C, B had been idle longest, so B had to go: one hit of five. An oracle would have sent A away, since B comes next.
# Least recently used (LRU) guesses the future from the past.


# %%
def lru_hits(requests, slots):
    inside, hits = [], 0
    for tenant in requests:
        hits += tenant in inside
        inside = [tenant, *(other for other in inside if other != tenant)][:slots]  # the last one falls out
    return hits


print("A B A C B with two slots:", lru_hits("ABACB", slots=2), "hit")

# %% [markdown]
# **Your turn.** Three tenants take turns, A B C, four times over: twelve requests. With three slots there are nine
# hits. How many with two?

# %%
### BEGIN SOLUTION
### STUB: hits = ...  # a whole number
hits = lru_hits("ABC" * 4, slots=2)
### END SOLUTION
hits = check(hits, "lab16.lru_hits")

# %% [markdown]
# One slot too few, and nothing is left of nine hits: that is a *cliff*. Remember it for section 4.
#
# ## 2. Build it
# **Exercise 1: the books of a memory.** Which pages are free, and whose are the others? A few lines, and everything that
# follows trusts them.
#
# *You should see* C on pages that A has left and on new ones, in any order: pages need no neighbours.

# %% tags=["exercise"]
from labs_lib.serving.arena import Pages

# %%
Pages = check(Pages)
books = Pages(8)
a, b = books.take(3, "A"), books.take(2, "B")
books.give_back(a)
print("A had", a, "| B has", b, "| C gets", books.take(4, "C"), "| D asks for 3 and gets", books.take(3, "D"))

# %% [markdown]
# **Exercise 2: who has to go.** Least recently used, but never what a running request reads, and never what somebody
# pinned.
#
# *You should see* C, though B was used longest ago: B is in use. With C pinned it is A.

# %% tags=["exercise"]
from labs_lib.serving.tiers import choose_victim

# %%
from labs_lib.serving.pool import Slot

choose_victim = check(choose_victim)
slots = [Slot(1, adapter="A", used=3), Slot(2, adapter="B", used=1, refs=1), Slot(3, adapter="C", used=2)]
print(choose_victim(slots, pinned=set()).adapter, choose_victim(slots, pinned={"C"}).adapter)

# %% [markdown]
# **Exercise 3: who goes next.** In order of arrival, a tenant who sends a hundred requests makes everybody wait for
# them. Fair is: whoever was served least goes first. Service is counted in tokens, and a token of output in twice,
# since it takes a step of its own.
#
# *You should see* the quiet tenant's two requests go second and fourth, not seventh and eighth.

# %% tags=["exercise"]
from labs_lib.serving.scheduler import Counters

# %%
from types import SimpleNamespace

Counters = check(Counters)
counters, waiting, served = Counters(), [], []
for id, tenant in enumerate(["noisy"] * 6 + ["quiet"] * 2, start=1):
    counters.arrive(tenant)
    waiting.append(SimpleNamespace(id=id, request=SimpleNamespace(tenant=tenant)))
while waiting:
    first = counters.order(waiting)[0]
    waiting.remove(first)
    counters.charge(first.request.tenant, prompt=20, output=10)
    counters.leave(first.request.tenant)
    served.append(f"{first.request.tenant} {first.id}")
print(" > ".join(served))

# %% [markdown]
# **Exercise 4: how fair was it?** One number for how evenly $n$ tenants share: Jain's index.
#
# $$J = \frac{\left(\sum_i x_i\right)^2}{n \sum_i x_i^2}$$
#
# *You should see* 1 for equal shares, 1/4 when one of four has everything, and no change when all double.

# %% tags=["exercise"]
from labs_lib.serving.ledger import jain_index

# %%
jain_index = check(jain_index)
for shares in ([5, 5, 5, 5], [20, 0, 0, 0], [8, 4, 4, 4], [16, 8, 8, 8]):
    print(shares, round(jain_index(shares), 3))

# %% [markdown]
# **What is an adapter worth?** In Llama-2-7B a block has four layers of 4096 x 4096 (q, k, v, o) and three between 4096
# and 11008 (gate, up, down). A token leaves a key and a value of 4096 numbers each in every block.
#
# **Your turn.** The memory of one adapter of rank 16 on all of these holds the keys and values of how many tokens?

# %%
### BEGIN SOLUTION
### STUB: tokens = ...  # a number
rank_of_a_block = 4 * (4096 + 4096) + 3 * (4096 + 11008)
tokens = 16 * rank_of_a_block / (2 * 4096)
### END SOLUTION
tokens = check(tokens, "lab16.adapter_in_tokens")

# %%
from labs_lib import random_like
from labs_lib.serving.layout import Layout

layout = Layout.of(random_like("llama-2-7b"))  # its shapes, without its weights
page, cell = 2 * layout.width, 2 * layout.cell  # bytes in float16
print(f"a page {page / 1e6:.2f} MB, a token {cell / 1e3:.0f} kB: {layout.tokens_per_page} tokens to a page")
room = 80e9 - 2 * 6_738_415_616
most, few = room / (16 * page), 32 * 16 * page
print(f"beside the model on 80 GB: {most:.0f} adapters of rank 16 and not one token, or")
print(f"32 adapters in {few / 1e9:.1f} GB and {(room - few) / cell:,.0f} tokens")

# %% [markdown] tags=["takeaway"]
# An adapter in memory costs a short conversation. A thousand of them do not fit, and would not leave room to serve
# anybody; thirty-two do. So adapters are paged, and the two kinds of memory compete.

# %% [markdown]
# ## 3. Prove it
# From here on the real engine serves: `labs_lib.serving`. Your four pieces go into it.

# %%
from labs_lib.serving import arena, ledger, pool, scheduler, tiers

arena.Pages = pool.Pages = Pages
tiers.choose_victim = choose_victim
scheduler.Counters = Counters
ledger.jain_index = jain_index

# %% [markdown]
# Whose adapters they are matters here, not what they say, so we draw random ones, of ranks 2, 4 and 8. Any two soon
# give different answers. Then a stress test: twelve tenants, visitors of the base model in between, and **pages for two
# adapters of rank 8 and 200 tokens**.

# %%
import tempfile
from pathlib import Path

import torch

from labs_lib.serving.workload import random_adapters

torch.set_num_threads(1)  # steps this small are no faster on two; the other core is for the loader
model, tokenizer = lab.base(dtype=torch.float32)  # so that merged and unmerged weights round alike
shelf = tempfile.TemporaryDirectory()
home, folders = Path(shelf.name), {}
for rank in (2, 4, 8):
    folders |= random_adapters(model, 4, home / f"rank-{rank}", rank=rank, seed=rank)
print(len(folders), "adapters, named by their sha256, for instance", next(iter(folders))[:12])

# %%
from labs_lib.serving.arms import Oracle, share
from labs_lib.serving.engine import Engine
from labs_lib.serving.workload import closed, uniform

vocabulary = model.config.vocab_size
trace = closed(48, uniform(12), prompt=(16, 48), output=(4, 12), base_share=0.15, seed=lab.seed)
tight = {"slots": 2, "max_rank": 8, "max_batch": 4, "kv_tokens": 200, "policy": "unified"}
engine = Engine(share(model), folders.__getitem__, **tight)
results = engine.generate(trace.requests(list(folders), vocabulary))
print(dict(engine.ledger.counts))

# %% [markdown]
# Each answer is now compared, token by token, with a model into which PEFT has merged that tenant's adapter. A proof
# that cannot fail proves nothing, so we also ask the *neighbour's* merged model.
#
# *You should see* no wrong token, although adapters moved out and in all the time (`evict`, `device` above), and most
# tokens wrong by the neighbour.

# %%
from dataclasses import replace

oracle = Oracle(model, folders)
print("judged by its own model:     ", oracle.verify(results))
neighbour = dict(zip(folders, [*list(folders)[1:], next(iter(folders))], strict=True))
swapped = [
    replace(each, request=replace(each.request, adapter=neighbour[each.request.adapter]))
    for each in results
    if each.request.adapter
]
print("judged by a neighbour's model:", oracle.verify(swapped))

# %% [markdown]
# **Whose tokens are these?** Each result carries its *provenance*: adapter, slot, and the slot's *generation*, which
# grows whenever it is filled. Before every step the engine compares it with the slot: a request whose slot was given
# away fails, rather than go on in another tenant's voice.

# %%
busiest = max(folders, key=lambda sha: sum(each.request.adapter == sha for each in results))
for each in results:
    if each.request.adapter == busiest:
        lease = each.provenance
        where = f"slot {lease.slot}, generation {lease.generation}"
        print(f"{each.request.tenant}: adapter {lease.adapter[:12]}, {where}")

# %% [markdown]
# **Nothing stays behind.** A page is zeroed before somebody else gets it. *You should see* zero at the end: neither
# weights nor keys and values of any tenant.

# %%
memory = engine.pool.adapters.data  # unified: adapters, keys and values
print("numbers in memory that are not zero:", int(memory.count_nonzero()))
for slot in engine.pool.resident:
    engine.unload(slot.adapter)
print("without adapters:", int(memory.count_nonzero()), "(prompts, kept for the adapter's next request)")
while engine.kv.drop_idle():
    pass
print("without these:", int(memory.count_nonzero()))
engine.close()

# %% [markdown] tags=["takeaway"]
# Paging changes where an adapter lies, never what a request gets: token for token its own merged model, through any
# number of evictions. What makes it so is small: names that are hashes, leases that are compared, pages that are zeroed.

# %% [markdown]
# ## 4. Run it
# ### The working-set cliff
# The *working set* is the adapters that are in demand now. Eight slots on the device, room for sixteen adapters in host
# memory, and more and more tenants who are equally busy. Prompts of 24 tokens, answers of 8: short, as in labelling or
# routing, so that moving adapters weighs as much as it ever does.
#
# **Predict**: with sixteen busy tenants for eight slots, what percentage of the requests finds its adapter on the
# device?

# %%
### BEGIN SOLUTION
### STUB: predict_hits = ...  # your guess, in percent
predict_hits = 50
### END SOLUTION
predict_hits = check(predict_hits, "lab16.predict_hits")

# %% [markdown]
# **Predict** the price, too: with forty-eight tenants, six times the slots, what percentage of the throughput is left?

# %%
### BEGIN SOLUTION
### STUB: predict_cliff = ...  # your guess, in percent
predict_cliff = 70
### END SOLUTION
predict_cliff = check(predict_cliff, "lab16.predict_cliff")

# %%
from labs_lib.serving.replay import replay

folders |= random_adapters(model, 48, home / "crowd", rank=8)
names = list(folders)[12:]
small = Layout.of(model)
held = 8 * small.width * model.get_input_embeddings().weight.element_size()  # bytes of an adapter of rank 8
setting = {"slots": 8, "max_rank": 8, "max_batch": 8, "kv_tokens": 1024, "host_bytes": 16 * held}


# %%
from labs_lib.serving.twin import Log, recording, simulate


def play(trace):
    """Sixteen requests at any time, eight of them running; the first third fills the tiers and does not count."""
    with Engine(share(model), folders.__getitem__, **setting) as engine:
        requests = trace.requests(names, vocabulary)
        replay(engine, requests[: len(requests) // 3], outstanding=16)
        with recording(engine) as log:  # of how long each step takes, for later
            return replay(engine, requests, outstanding=16), log


def busy(tenants):
    return closed(lab.rows(96), uniform(tenants), prompt=24, output=8, seed=lab.seed)


# %%
tenants = lab.grid([4, 8, 12, 16, 24, 32, 48])
runs = {count: play(busy(count)) for count in tenants}
measured = {count: run.summary() for count, (run, _) in runs.items()}
for count, row in measured.items():
    share_of_hits = f"{row['hits'] / row['requests']:4.0%} hits, {row['loads']:3d} read from disk"
    print(f"{count:3d} tenants: {share_of_hits}, {row['tokens_per_s']:5.0f} tokens/s")

# %% [markdown]
# **A digital twin.** Measuring forty-eight tenants takes seconds; a thousand tenants, a slower disk, another pool size
# would take hours or another machine. The twin runs *the same* scheduler, tiers and books, your four pieces included,
# under a virtual clock. Only what takes time is replaced: each pass and each load costs what a formula says, fitted to
# measured steps. To be honest about its error, each run is predicted from all the *others*.
#
# *You should see* hits within a few points and loads exact: they follow from decisions. Throughput comes out as well as
# the machine was steady while it was measured.


# %%
def fitted(counts):
    """What a pass, a step and a load cost, from the logs of these runs."""
    log = Log()
    for _, found in (runs[count] for count in counts):
        log.submit += found.submit
        for what, steps in found.of.items():
            log.of[what] += steps
    return log.fit()


virtual = setting | {"pages": 8}


def guess(count, costs):
    """What the twin says about the run with so many tenants."""
    trace = busy(count)
    warm = replace(trace, arrivals=trace.arrivals[: len(trace) // 3])
    plays = {"warm": warm, "outstanding": 16, "vocabulary": vocabulary}
    return simulate(trace, costs, small, **plays, **virtual).run.summary()


predicted = {count: guess(count, fitted([other for other in tenants if other != count])) for count in tenants}


# %%
def off(key):
    return [predicted[n][key] - measured[n][key] for n in tenants]


costs = fitted(tenants)
disk = costs.load["call"] + costs.load["byte"] * held
step = costs.decode_seconds(rows=8, adapters=8, past=32)
print(
    f"fitted: a step of 8 rows {1e3 * step:.1f} ms, {1e3 * costs.decode['loading']:.1f} ms more while something loads"
)
print(f"an adapter from disk {1e3 * disk:.1f} ms")
speed = [
    100 * error / measured[n]["tokens_per_s"] for n, error in zip(tenants, off("tokens_per_s"), strict=True)
]
print(f"of {lab.rows(96)} requests: hits off by {off('hits')}, loads by {off('loads')}")
print(f"throughput {min(speed):+.0f} to {max(speed):+.0f} %, in the mean {np.mean(np.abs(speed)):.0f} % off")


# %% tags=["hide-input"]
def mark(ax, at, what):
    """A dotted line where a tier is full."""
    ax.axvline(at, color=look("base").color, linewidth=1, linestyle=":")
    place = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points"}
    ax.annotate(what, (at, 0.02), **place, size=8.5)


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
for rows, options in ((measured, {"marker": "o"}), (predicted, {"linestyle": "--", "color": "#333333"})):
    label = "measured" if rows is measured else "twin"
    left.plot(tenants, [100 * r["hits"] / r["requests"] for r in rows.values()], label=label, **options)
    right.plot(tenants, [r["tokens_per_s"] for r in rows.values()], label=label, **options)
law = [100 * min(1, setting["slots"] / count) for count in tenants]
left.plot(tenants, law, ":", color=look("base").color, label="slots over tenants")
for ax in (left, right):
    log_axis(ax, tenants)
    ax.set_ylim(bottom=0)
    mark(ax, 8, "slots")
    mark(ax, 16, "host")
left.legend()
hit_share = {n: measured[n]["hits"] / measured[n]["requests"] for n in tenants}
first, last = tenants[0], tenants[-1]
share_left = measured[last]["tokens_per_s"] / measured[first]["tokens_per_s"]
title = f"Hits fall from {hit_share[first]:.0%} to {hit_share[last]:.0%}"
finding(left, title, "busy tenants", "found on the device (%)")
finding(right, f"{share_left:.0%} of the throughput is left", "busy tenants", "tokens per second")
alt = f"Hits and throughput against busy tenants, measured and by the twin. {title} past 8 slots; of the throughput "
show(fig, alt=alt + f"{share_left:.0%} is left.")

# %%
at_16 = hit_share.get(16)
print(f"You predicted {predict_hits} % hits; measured {'nothing' if at_16 is None else f'{at_16:.0%}'}.")
print(f"You predicted {predict_cliff} % of the throughput; it is {share_left:.0%}.")

# %% [markdown]
# Two edges, of different height. Past eight tenants hits fall as slots over tenants, whoever is evicted: when all are
# equally busy, the past tells nothing. But throughput hardly notices, since a miss is a copy from host memory. Past
# sixteen a miss is a *file*, and that is the cliff.

# %% [markdown]
# **Thousands.** Now the twin answers what we cannot measure here: thirty-two slots, 256 adapters in host memory, up to
# 2,048 tenants, equally busy or very differently (Zipf: the $k$-th in proportion to $1/k$), and two disks.
#
# *You should see* the edge at the host tier, far beyond the slots, and its height set by the disk.

# %%
from labs_lib.serving.twin import working_set
from labs_lib.serving.workload import zipf

sizes = lab.grid([32, 128, 256, 512, 1024, 2048])
large = virtual | {"slots": 32, "host_bytes": 256 * held}
loads = {"this disk": disk, "20 times slower": 20 * disk}
curves = {}


def crowd(popularity):
    return lambda n: closed(lab.rows(700), popularity(n), prompt=24, output=8, seed=lab.seed)


for label, seconds in loads.items():
    slower = replace(costs, load={"call": seconds, "byte": 0.0})
    for kind, popularity in (("Zipf", zipf), ("uniform", uniform)):
        curves[kind, label] = working_set(crowd(popularity), sizes, slower, small, outstanding=16, **large)
whole = 16 / measured[tenants[0]]["requests_per_s"]
print(f"an adapter comes from this disk in {1e3 * disk:.1f} ms, a request takes {1e3 * whole:.0f} ms")

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
kept = {}
for ax, kind in zip(axes, ("Zipf", "uniform"), strict=True):
    for (which, label), line in zip(curves, ("-", "-", "--", "--"), strict=True):
        if which == kind:
            rows = curves[which, label]
            speed = [row["tokens_per_s"] for row in rows]
            kept[which, label] = speed[-1] / speed[0]
            ax.plot(sizes, speed, line, marker="o", markersize=4, color=look("lora").color, label=label)
    log_axis(ax, sizes)
    ax.set_ylim(bottom=0)
    mark(ax, 32, "slots")
    mark(ax, 256, "host")
    left = kept[kind, "this disk"], kept[kind, "20 times slower"]
    title = f"{kind.capitalize()}: {left[0]:.0%} left, {left[1]:.0%} with the slow disk"
    finding(ax, title, "registered adapters")
axes[0].set_ylabel("tokens per second (twin)")
axes[1].legend()
listed = "; ".join(f"{kind}, {label}: {share:.0%}" for (kind, label), share in kept.items())
show(
    fig,
    alt=f"The twin's throughput from {sizes[0]} to {sizes[-1]} registered adapters with 32 slots. Left of it at the end: {listed}.",
)

# %%
from labs_lib.measure import load_published

published = load_published("serving")["tables"]
slora = published["slora_throughput"]
print(f"S-LoRA, as reported ({slora['setting']}), {slora['unit']}:")
for row in slora["rows"]:
    if row["engine"] == "S-LoRA":
        print(f"  {row['adapters']:5,} adapters {row['throughput']}")

# %% [markdown]
# S-LoRA reports a flat curve on an A100, too: its host memory holds all the adapters, so a miss is a copy, hidden behind
# the work of others.
#
# **Which miss is which?** One request at a time, nothing to hide behind: its adapter on the device, in host memory, or
# on disk. *You should see* the disk cost most: there the files are read, hashed, checked and packed.

# %%
from labs_lib.serving.types import Request

prompt = list(range(3, 27))


def ask(engine, sha):
    (result,) = engine.generate([Request(prompt, "tenant", sha, max_tokens=2, ignore_eos=True)])
    return result.timing


first = {"on the device": [], "in host memory": [], "on disk": []}
with Engine(share(model), folders.__getitem__, **setting | {"slots": 1, "prefix_cache": False}) as engine:
    for _ in range(lab.rows(21)):
        engine.unload(names[0])
        first["on disk"].append(ask(engine, names[0]))
        first["on the device"].append(ask(engine, names[0]))
        ask(engine, names[1])  # takes the only slot
        first["in host memory"].append(ask(engine, names[0]))

# %% tags=["hide-input"]
from statistics import median

from labs_lib.lab.serving_plots import PHASES

fig, ax = plt.subplots(figsize=(7.2, 2.3))
total = {}
for row, (where, timings) in enumerate(first.items()):
    parts = [1e3 * median(getattr(each, part) for each in timings) for part in ("load", "prefill")]
    bar = {"height": 0.6, "label": "waiting for the load"} if not row else {"height": 0.6}
    ax.barh(row, parts[0], color=PHASES["load"][1], **bar)
    bar |= {"label": "copy and prefill"} if not row else {}
    ax.barh(row, parts[1], left=parts[0], color=PHASES["prefill"][1], **bar)
    total[where] = sum(parts)
ax.set_yticks(range(3), list(first))
ax.invert_yaxis()
ax.grid(axis="x")
ax.grid(visible=False, axis="y")
ax.legend()
said = ", ".join(f"{where} {ms:.1f}" for where, ms in total.items())
finding(ax, f"First token (ms): {said}", "time to the first token (ms, median)")
listed = ", ".join(f"{where} {ms:.1f} ms" for where, ms in total.items())
show(fig, alt=f"Time to the first token by where the adapter was: {listed}.")

# %% [markdown]
# **Prefetch.** The engine starts a load when the request *arrives*, not when its turn comes: what waits in the queue
# anyway does not wait for the disk. In the run with the most tenants, how many loads cost nothing?

# %%
read = [each.timing for each in runs[tenants[-1]][0].results if each.timing.load > 0]
hidden = sum(timing.queue > 0.001 for timing in read)
print(f"{len(read)} requests waited for a load; {hidden} of them then waited for a free row anyway")

# %% [markdown]
# Hidden, but not free: while the loader reads, hashes and packs, it takes processor time and Python's lock from the
# steps. What would the run with the most tenants be without that? Nobody can measure it; the twin can say.

# %%
free = {part: getattr(costs, part) | {"loading": 0.0} for part in ("prefill", "decode", "step")}
as_it_is, without = (guess(tenants[-1], each)["tokens_per_s"] for each in (costs, replace(costs, **free)))
print(f"{as_it_is:.0f} tokens/s as it is, {without:.0f} if loading cost the steps nothing")

# %% [markdown]
# **Who was where, and who pushed whom out?** The ledger keeps every move. Here are eight tenants in a house that is too
# small: three slots, and host memory for five.
#
# *You should see* slots change hands every few steps, and adapters return from host memory (grey) without a load.

# %%
from labs_lib.lab.serving_plots import tier_timeline

tiny = setting | {"slots": 3, "host_bytes": 5 * held, "max_batch": 4}
trace = closed(lab.rows(36), zipf(8, 0.7), prompt=24, output=8, seed=lab.seed)
with Engine(share(model), folders.__getitem__, **tiny) as engine:
    replay(engine, trace.requests(names, vocabulary), outstanding=5)
counts = engine.ledger.counts
title = f"{counts['evict']} evictions and {counts['load']} loads for {len(trace)} requests"
fig, alt = tier_timeline(engine.ledger, title=title)
show(fig, alt=alt)

# %% [markdown]
# ### One memory or two
# Two tenants' needs, one after the other: first many tenants with short conversations and small adapters, then one
# tenant with long conversations. The budget is the same both times: four slots of the largest rank and 320 tokens, kept
# apart ("separate"), or as one pool of pages ("unified").
#
# *You should see* the unified pool turn the memory over from one need to the other, and be done in fewer steps.

# %%
few = list(folders)[:12]  # ranks 2, 4 and 8
short = closed(lab.rows(64), uniform(12), prompt=24, output=8, seed=lab.seed).requests(few, vocabulary)
long = closed(lab.rows(32), uniform(1), prompt=(80, 120), output=16, seed=lab.seed).requests(few, vocabulary)


def watch_memory(policy):
    """(percent of the budget in adapters, in keys and values, running sequences) at each step; seconds; evictions."""
    budget = (4 * 8 * small.width + 320 * small.cell) / 100
    size = setting | {"slots": 4, "kv_tokens": 320, "prefix_cache": False, "policy": policy}
    with Engine(share(model), folders.__getitem__, **size) as engine:
        engine.generate(short[:12])
        steps, done = [], []
        for request in [*short, *long]:
            engine.submit(request, on_end=done.append)

        def looked():
            used = sum(len(slot.pages) for slot in engine.pool.resident) * small.width
            cells = sum(len(each.reservation.pages) for each in engine.running) * engine.pool.tokens_per_page
            if engine.running:
                steps.append((used / budget, cells * small.cell / budget, len(engine.running)))
            return len(done) == len(short) + len(long)

        started = engine.clock()
        engine.drive(looked)
        return np.array(steps), engine.clock() - started, engine.ledger.counts["evict"]


pools = {policy: watch_memory(policy) for policy in ("separate", "unified")}

# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, sharey=True)
for ax, (policy, (steps, seconds, evicted)) in zip(axes, pools.items(), strict=True):
    used, cells, rows = steps.T
    x = np.arange(len(steps))
    labels = ["adapters", "keys and values"]
    ax.stackplot(x, used, cells, colors=[ADAPTER, CELLS], labels=labels, alpha=0.9, step="post")
    ax.set_ylim(0, 103)
    said = f"{rows.mean():.1f} requests run together, {evicted} evictions, {seconds:.1f} s"
    finding(ax, f"{policy.capitalize()}: {len(steps)} steps ({said})", y="budget in use (%)")
axes[1].set_xlabel("steps of the engine")
axes[1].legend(loc="upper right")
done = {
    policy: f"{len(steps)} steps, {steps[:, 2].mean():.1f} requests at a time"
    for policy, (steps, *_) in pools.items()
}
alt = (
    "Memory in use by adapters and by keys and values at each step, in two pools or in one of the same size. "
)
show(fig, alt=alt + f"Separate: {done['separate']}; unified: {done['unified']}.")

# %% [markdown] tags=["takeaway"]
# The cliff is not where the adapters stop fitting on the device, but where misses cost more than the work that hides
# them. Size the host tier for the working set; share one pool of pages if ranks and conversations vary; read ahead.

# %% [markdown]
# ### One noisy tenant
# Six tenants use half of what the server can do. Then one of them sends, for a while, half as much again as the server
# can take. Under *first come, first served*, who pays? And with your counters?
#
# *You should see* the noisy tenant's neighbours wait as long as it does, or longer; and then only the noisy one.

# %%
from labs_lib.serving.workload import noisy

capacity = measured[tenants[0]]["requests_per_s"]
whole = lab.rows(140) / capacity  # seconds
burst = {"burst": 1.5 * capacity, "start": 0.1 * whole, "length": 0.3 * whole}
storm = noisy(0.5 * capacity, whole, uniform(6), **burst, prompt=24, output=8, seed=lab.seed)
requests, at = storm.requests(names, vocabulary), [each.at for each in storm]
days, books = {}, {}
for fairness in ("fcfs", "fair"):
    with Engine(share(model), folders.__getitem__, **setting, fairness=fairness, patience=1e9) as engine:
        engine.generate(requests[:12])
        engine.ledger.accounts.clear()  # what came before does not count
        days[fairness], books[fairness] = replay(engine, requests, at), engine.ledger

# %% tags=["hide-input"]
from labs_lib.serving.timeline import breakdown

whos = sorted({request.tenant for request in requests})
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
waits = {}
for ax, (fairness, book) in zip(axes, books.items(), strict=True):
    for each in breakdown(book):
        row, left = whos.index(each.tenant), 0.0
        for phase, (label, color) in PHASES.items():
            value = 1e3 * getattr(each, phase)
            ax.barh(row, value, left=left, color=color, height=0.7, label=None if row else label)
            left += value
        waits[fairness, each.tenant] = left
    ax.set_yticks(range(len(whos)), [f"{who} (noisy)" if who == "tenant-0" else who for who in whos])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
axes[0].invert_yaxis()
quiet = {f: float(np.mean([waits[f, who] for who in whos[1:]] or [0])) for f in books}
finding(axes[0], f"By arrival: the others {quiet['fcfs']:,.0f} ms", "mean time to the last token (ms)")
finding(axes[1], f"Fair: the others {quiet['fair']:,.0f} ms", "mean time to the last token (ms)")
axes[1].legend(loc="lower right")
listed = "; ".join(f"{who} {waits['fcfs', who]:.0f} and {waits['fair', who]:.0f} ms" for who in whos)
show(
    fig,
    alt=f"Mean latency of each tenant, split into queue, load, prefill and decode, by arrival and under fair scheduling: {listed}.",
)

# %% [markdown]
# One number for it? In the end both orders give everybody all that was asked for, so an index over the whole day cannot
# tell them apart. *When* is what fairness is about: we count the tokens that each tenant got while the burst lasted.

# %%
end = burst["start"] + burst["length"]
for fairness, day in days.items():
    storm_tokens, all_tokens = dict.fromkeys(whos, 0), dict.fromkeys(whos, 0)
    for answer in day.answers:
        who = answer.result.request.tenant
        storm_tokens[who] += sum(burst["start"] <= stamp < end for stamp in answer.stamps)
        all_tokens[who] += len(answer.stamps)
    during, over_all = jain_index(list(storm_tokens.values())), jain_index(list(all_tokens.values()))
    print(
        f"{fairness}: Jain's index {during:.2f} in the burst, {over_all:.2f} over the day; {day.throughput:.0f} tokens/s"
    )

# %% [markdown] tags=["takeaway"]
# First come, first served lets one tenant spend everybody's latency. Counters send the bill to whoever makes the
# noise. The work done is the same; only the order changes, so compare the throughputs, too.

# %% [markdown]
# ### A new version, while requests run
# The registry names each version of an adapter by the sha256 of its files. A request gets the version that is current
# when it is *sent*, and keeps it: old ones drain, new ones start on the new, and nobody waits.

# %%
from labs_lib.serving.registry import Registry

registry = Registry(home / "registry", layout=small)
registry.add_tenant("acme")
registry.publish("acme", folders[names[0]], note="spring")
ended = []


def send(tokens):
    sha = registry.current("acme").sha256
    engine.submit(Request(prompt, "acme", sha, max_tokens=tokens, ignore_eos=True), on_end=ended.append)


# %%
engine = Engine(share(model), registry.folder, **setting)
send(tokens=24)
engine.drive(lambda: bool(engine.running) and len(engine.running[0].tokens) >= 8)  # it is in the middle
registry.publish("acme", folders[names[1]], note="summer")
send(tokens=8)
engine.drive(lambda: len(ended) == 2)
registry.rollback("acme")
send(tokens=8)
engine.drive(lambda: len(ended) == 3)
engine.close()

# %% [markdown]
# *You should see* the second request overtake the first on another slot, and the third back on the old version. Each is
# right by its own version's merged model.

# %%
from labs_lib.lab.cards import table

notes = {version.sha256: f"{version.number}, {version.note}" for version in registry.versions("acme")}
versions = Oracle(model, {sha: registry.folder(sha) for sha in notes})
rows = []
for each in ended:
    lease, verdict = each.provenance, versions.verify([each])
    row = {"request": each.id, "version": notes[lease.adapter], "sha256": lease.adapter[:12]}
    row |= {"slot": lease.slot, "tokens": len(each.tokens), "wrong tokens": verdict.wrong}
    rows.append(row)
registry.close()
table(rows)

# %% [markdown]
# ## 5. Who can tell?
# Everything so far came out right. In engines that thousands use it did not always: bugs by which a request is answered
# with other weights than it named have been found in each of the well-known ones. The **isolation fault lab** has such
# bugs to switch on, one at a time.
#
# **Exercise 5: the accuser.** Given one result and the truth, what does it prove to be wrong? Two traps: an accuser who
# believes the provenance, and one who accuses an engine that is healthy.
#
# *You should see* nothing wrong with a healthy engine.

# %% tags=["exercise"]
from labs_lib.serving.verdict import misserved

# %%
from collections import Counter

from labs_lib.serving.fault_lab import harness, score, traffic
from labs_lib.serving.faults import FAULTS

misserved = check(misserved)
proofs = []  # for each engine: what its results proved, and how often


def detects(engine, truth):
    """Send requests of every kind, in waves: does one of them prove that something is wrong?"""
    proofs.append(Counter())
    proofs[-1].update(filter(None, (misserved(result, truth) for result in traffic(engine, truth))))
    return bool(proofs[-1])


# %%
engine, truth = harness()  # a tiny model, two slots, four adapters and a deleted one
with engine:
    print("a healthy engine is accused:", detects(engine, truth))
print(len(FAULTS), "bugs wait to be switched on")

# %% [markdown]
# Now the bugs, each in a fresh engine. **Predict** how many are *silent*: no request fails, and every response names the
# right adapter.

# %%
### BEGIN SOLUTION
### STUB: predict_silent = ...  # your guess
predict_silent = 8
### END SOLUTION
predict_silent = check(predict_silent, "lab16.predict_silent")

# %%
proofs.clear()
outcomes, rows = score(detects), []
for each, proof in zip(outcomes, proofs[1:], strict=True):  # the first engine was a healthy one
    bug = FAULTS[each.fault]
    row = {"bug": each.fault, "who had it": bug.engine, "what a tenant sees": bug.seen}
    row["read"] = bug.source.removeprefix("https://github.com/").partition("/blob/")[0]
    found = ", ".join(f"{n} x {what}" for what, n in proof.items())
    row["proved by"] = found or each.note.partition(":")[0] or "not caught"
    rows.append(row)
silent = sum(set(proof) == {"tokens of other weights"} for proof in proofs[1:])
caught = sum(each.caught for each in outcomes)
print(f"caught: {caught} of {len(FAULTS)}; silent: {silent}, you predicted {predict_silent}")
table(rows)

# %% [markdown]
# Your check knows every answer beforehand, which is what a *test* can do. In production nobody knows them. What can an
# engine watch then?
#
# | Alarm | How it works |
# |---|---|
# | oracle | replays a share of what was served on merged weights, later |
# | canary | a known request per adapter, hidden among the others |
# | audit | looks at books and zeros after a step, knows no answer |
# | neighbours | does a request fail that has done nothing wrong? |

# %%
ALARMS = ("yours", "oracle", "canary", "audit", "neighbours")
seen = {each.fault: ["yours"] * each.caught + list(FAULTS[each.fault].caught_by) for each in outcomes}

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 4.6))
for row, by in enumerate(seen.values()):
    for column, alarm in enumerate(ALARMS):
        caught = alarm in by
        color = (look("full").color if alarm == "yours" else ADAPTER) if caught else "white"
        ax.scatter(column, row, s=95, marker="s", color=color, edgecolor=FREE if not caught else color)
counts = {alarm: sum(alarm in by for by in seen.values()) for alarm in ALARMS}
ax.set_xticks(range(len(ALARMS)), [f"{alarm}\n{counts[alarm]} of {len(seen)}" for alarm in ALARMS])
ax.set_yticks(range(len(seen)), list(seen))
ax.set(xlim=(-0.5, len(ALARMS) - 0.5), ylim=(len(seen) - 0.5, -0.5))
ax.grid(visible=False)
ax.xaxis.tick_top()
title = f"Replayed answers show {counts['oracle']} of {len(seen)} bugs, the engine's books {counts['audit']}"
ax.set_title(title, pad=12)
listed = ", ".join(f"{alarm} {count}" for alarm, count in counts.items())
show(fig, alt=f"Which alarm sees which of {len(seen)} faults: {listed}.")

# %% [markdown] tags=["takeaway"]
# Isolation bugs are silent: status 200, plausible text, right name in the provenance. Only comparing answers with the
# adapter's own weights finds most of them, before the release and, for a sample, every day after it.

# %% [markdown]
# ## 6. The chapter on trial
# **Claim 31**: S-LoRA keeps adapters in "a tiered memory system (GPU, CPU, disk)". **Predict**, then read what its own
# README says.

# %%
readme = published["slora_memory_tiers"]["rows"][0]["text"]
print("S-LoRA", readme)
words = {"GPU": "GPU memory", "CPU": "main memory", "disk": "disk"}
named = {tier: word in readme for tier, word in words.items()}
claim(31).observe(all(named.values()), note=f"named: {', '.join(tier for tier in named if named[tier])}")

# %% [markdown]
# Ours has all three, as the fault lab's deleted file has shown. S-LoRA's design stops at main memory: a miss is then a
# copy, which its scheduler hides.
#
# **Claim 32**: "hundreds of specialized models at the cost of one". **Claim 34**: a median latency only 8 ms above a
# dedicated model's. Both speak of a GPU. The benchmark (`labs bench serving`) plays one trace on every arm and verifies
# every output before it times anything; here is its record, and one point of it live.

# %%
from labs_lib.measure import load_record

from labs_lib.serving.bench_report import tables
from labs_lib.serving.sides import serving_sides

sections = ("throughput", "scale", "latency", "grid", "fleet", "not reached")
for device in ("cpu", "gpu"):
    record = load_record("bench_serving", device=device)
    print(record)
    print(tables([row for row in record.rows if row["section"] in sections]))
print(serving_sides())

# %% [markdown]
# **One point live**, and what the rule says of it. The same requests, first all for the base model alone, then each for
# one of a hundred adapters, three times in turn. **Predict**: on a CPU, what share of the base's throughput is left?

# %%
from labs_lib.serving.arms import Setup, build

folders |= random_adapters(model, 52, home / "more", rank=8, seed=100)
hundred = dict(list(folders.items())[12:])
trace = closed(lab.rows(96), zipf(100), prompt=24, output=16, seed=lab.seed)
live = {"base": [], "engine": []}
for _ in range(3):
    for arm, plays in (("base", trace.base_only()), ("engine", trace)):
        with build(arm, Setup(model, hundred, batch=16, slots=32)) as engine:
            requests = plays.requests(list(hundred), vocabulary)
            replay(engine, requests[:32], outstanding=16)
            run = replay(engine, requests, outstanding=16)
            request = median(each.stamps[-1] - each.at for each in run.answers)
            live[arm].append(run.summary() | {"request": 1e3 * request})

# %%
pairs = list(zip(live["engine"], live["base"], strict=True))
ratios = [ours["tokens_per_s"] / base["tokens_per_s"] for ours, base in pairs]
print("throughput with 100 adapters over the base model's:", ", ".join(f"{ratio:.2f}" for ratio in ratios))
claim(32).observe(conditions={f"100 adapters, {lab.device}, one thread": ratios})
claim(34).observe(
    conditions={
        "per token": [ours["tpot_p50"] - base["tpot_p50"] for ours, base in pairs],
        "per request of 16 tokens": [ours["request"] - base["request"] for ours, base in pairs],
    }
)

# %% [markdown]
# A merged model costs what the base costs (lab 01), so the base alone stands for "a dedicated model". The rule gives no
# verdict here: on one CPU core the small model's own step is so cheap that the adapters' share looks large. On a GPU,
# reading a large base's weights dominates the step.

# %% [markdown] tags=["takeaway"]
# "At the cost of one" is a claim about a ratio, and a ratio needs its conditions: which device, which batch, how many
# distinct adapters in it, and what a miss costs. Ask for the outputs to be verified before the clock starts.

# %% [markdown]
# ## 7. When would you choose it?
# Choose paged adapters when tenants outnumber the slots and most of them are idle most of the time. Pin the few that
# must never wait. If every tenant is always busy, the working set is everybody: buy memory, or split the tenants over
# several servers by adapter. One or two tenants are better merged.
#
# **The failure you will meet**: a new version "does not quite arrive". The provenance names it, but for prompts that
# begin as earlier ones did, the answers are a mixture of new and old. Something is cached under the *name*. We switch
# that bug on:

# %%
from labs_lib.serving.faults import fault

engine, truth = harness()
with engine, fault("stale-prefix", engine):
    for name in ("acme", "acme-2"):
        (result,) = engine.generate([truth.request(name)])
        named = "acme-2" if result.provenance.adapter == truth.shas["acme-2"] else "acme"
        print(f"asked for {name}, provenance says {named}, tokens right: {truth.right(result)}")

# %% [markdown]
# The key of everything that is cached must hold the sha256 of the version, and the prompt's tokens: never a name, and
# never the tokens alone. (Swapping by hand has its own traps: memory that is not freed,
# [738](https://github.com/huggingface/peft/issues/738), and a name that is not found, [957](https://github.com/huggingface/peft/issues/957).)
#
# ## 8. Go further
# - **A real model.** Set `PROFILE = "gpu"` and `MODEL_ID = "HuggingFaceTB/SmolLM2-135M"` and run all.
# - **A real engine.** vLLM has the same tiers and knobs. `--max-loras` are the slots, `--max-cpu-loras` the host tier
#   and `--max-lora-rank` the pages of a slot (shown, not run here):
#
# ```bash
# python -m vllm.entrypoints.openai.api_server --model HuggingFaceTB/SmolLM2-135M --enable-lora \
#     --max-loras 32 --max-cpu-loras 256 --max-lora-rank 16 --lora-modules acme=path/to/adapter
# ```

# %% [markdown]
# - **Open exercise 1.** Replace `tiers.choose_victim` by a *random* idle slot and let the twin play: Zipf, uniform, and
#   forty tenants strictly in turns on thirty-two slots. Where does least recently used win, and where does it lose?
# - **Open exercise 2.** `patience` (seconds after which nobody overtakes the oldest request) is off in the storm above.
#   Set it to 0.05, far less than the burst lasts. What becomes of fairness, and why does an engine want patience to end?

# %% [markdown] tags=["solution-only"]
# **Answer 1.** Below. Under Zipf the recent past tells who is popular, so LRU wins; under uniform traffic it tells
# nothing, and no policy beats slots over tenants. In turns it tells exactly the wrong thing: who was used longest ago is
# who comes next. That is section 1's cliff, and chance does better.
#
# **Answer 2.** Nearly everything that the noisy tenant sends is soon overdue, and overdue requests go first: `fair`
# becomes first come, first served exactly when it is needed. Without patience a request whose adapter never finds a
# free slot could wait for ever. A patience longer than the longest storm keeps both promises.


# %% tags=["solution-only"]
import random


def any_victim(resident, pinned):
    idle = [slot for slot in resident if not slot.refs and slot.adapter not in pinned]
    return random.choice(idle) if idle else None


turns = crowd(uniform)(40)
turns = replace(turns, arrivals=tuple(replace(each, adapter=i % 40) for i, each in enumerate(turns)))
for label, trace in {"Zipf": crowd(zipf)(200), "uniform": crowd(uniform)(200), "in turns": turns}.items():
    hits = []
    for tiers.choose_victim in (any_victim, choose_victim):
        run = simulate(trace, costs, small, warm=trace, outstanding=16, vocabulary=vocabulary, **large).run
        hits.append(run.summary()["hits"] / len(trace))
    print(f"{label:9s} hits by chance {hits[0]:4.0%}, least recently used {hits[1]:4.0%}")

# %%
progress()
