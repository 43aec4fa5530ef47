"""Lab 16, paging and scheduling. The engine is labs_lib.serving; `labs bench serving` makes the record it shows."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, log_axis, look, reference, show

lab = setup(lab="16", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# Lab 15 put many adapters into one batch. But a device has room for few of a thousand, so an engine decides, for every
# request: *who is in*, *who goes next*? And somebody must be able to tell *whose tokens these are*.
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
books, kinds = Books(240), {}
for number in range(14):  # adapters come and go, conversations grow between them
    kinds[number] = books.take(int(rng.choice([4, 8, 16])), number), ADAPTER
    kinds[100 + number] = books.take(int(rng.integers(2, 12)), 100 + number), CELLS
    if number > 4 and number % 2:
        books.give_back(kinds.pop(number - 5)[0])
fig, axes = plt.subplots(1, 3, figsize=(9, 3), width_ratios=(1.25, 1, 1.25))
for ax, count, wide, filled, title in (
    (axes[0], 1000, 40, 1000, "Disk: all 1,000"),
    (axes[1], 400, 20, 240, "Host memory: 240 of them"),
    (axes[2], 240, 20, 0, f"Device: {sum(color == ADAPTER for _, color in kinds.values())} now, in pages"),
):
    colors = np.array([ADAPTER if i < filled else FREE for i in range(count)], dtype=object)
    for pages, color in kinds.values() if not filled else ():
        colors[np.array(pages) - 1] = color
    ax.scatter(np.arange(count) % wide, -(np.arange(count) // wide), c=list(colors), s=26 if not filled else 9, marker="s")
    ax.set_title(title)
    ax.axis("off")
for color, label in ((ADAPTER, "adapter"), (CELLS, "keys and values"), (FREE, "free")):
    axes[2].scatter([], [], c=color, marker="s", label=label)
axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, columnspacing=0.8, handletextpad=0.1)
show(
    fig,
    alt="Three tiers: a thousand adapters on disk, 240 in host memory, and on the device a grid of pages that adapters and keys and values share in no particular order.",
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
from collections import OrderedDict


def lru_hits(requests, slots):
    inside, hits = OrderedDict(), 0
    for tenant in requests:
        hits += tenant in inside
        inside[tenant] = True
        inside.move_to_end(tenant)
        if len(inside) > slots:
            inside.popitem(last=False)
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
# **Exercise 1: the books of a memory.** Which pages are free, and whose are the others? Sixteen lines, and everything
# that follows trusts them.
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
slots = [Slot(1, adapter="A", used=3.0), Slot(2, adapter="B", used=1.0, refs=1), Slot(3, adapter="C", used=2.0)]
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
print(f"beside the model on 80 GB: {room / (16 * page):.0f} adapters of rank 16 and not one token, or")
print(f"{32 * 16 * page / 1e9:.1f} GB for 32 adapters and room for {(room - 32 * 16 * page) / cell:,.0f} tokens")

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
# give different answers. Then a stress test: **two slots for twelve tenants**, pages for only a few conversations, and
# visitors of the base model in between.

# %%
import tempfile
from pathlib import Path

from labs_lib.serving.workload import random_adapters

model, tokenizer = lab.base()
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
print({what: count for what, count in engine.ledger.counts.items() if what in ("load", "device", "evict", "end")})

# %% [markdown]
# Each answer is now compared, token by token, with a model into which PEFT has merged that tenant's adapter. A proof
# that cannot fail proves nothing, so we also ask the *neighbour's* merged model.
#
# *You should see* no wrong token, although every adapter was evicted and came back, and most wrong by the neighbour.

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
        print(f"{each.request.tenant}: adapter {lease.adapter[:12]}, slot {lease.slot}, generation {lease.generation}")

# %% [markdown]
# **Nothing stays behind.** A page is zeroed before somebody else gets it. *You should see* zero at the end: neither
# weights nor keys and values of any tenant.

# %%
memory = engine.pool.adapters.data  # unified: adapters, keys and values
print("numbers in memory that are not zero:", int(memory.count_nonzero()))
for slot in engine.pool.resident:
    engine.unload(slot.adapter)
print("without adapters:", int(memory.count_nonzero()), "(prompts kept for the next request of the same adapter)")
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
# Eight slots on the device, room for sixteen adapters in host memory, and more and more tenants who are equally busy.
# Prompts of 24 tokens, answers of 8: short, as when labelling or routing, so that moving adapters weighs as much as it
# ever does.
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


def play(trace, watch=replay, **changes):
    """Sixteen requests at any time, eight of them running; the first third fills the tiers and does not count."""
    with Engine(share(model), folders.__getitem__, **setting | changes) as engine:
        requests = trace.requests(names, vocabulary)
        replay(engine, requests[: len(requests) // 3], outstanding=16)
        return watch(engine, requests, outstanding=16)


def busy(tenants, count=lab.rows(96)):
    return closed(count, uniform(tenants), prompt=24, output=8, seed=lab.seed)


# %%
tenants = lab.grid([4, 8, 12, 16, 24, 32, 48])
measured = {count: play(busy(count)).summary() for count in tenants}
for count, row in measured.items():
    print(
        f"{count:3d} tenants: {row['hits'] / row['requests']:4.0%} hits, {row['loads']:3d} read from disk, "
        f"{row['tokens_per_s']:5.0f} tokens/s, first token after {row['ttft_p50']:4.0f} ms"
    )

# %% [markdown]
# **A digital twin.** Measuring forty-eight tenants takes seconds; a thousand tenants, a slower disk, another pool size
# would take hours or another machine. The twin runs *the same* scheduler, tiers and books, your four pieces included,
# under a virtual clock. Only what takes time is replaced: each pass and each load costs what a formula says, fitted to
# one measured run.
#
# *You should see* errors of some percent on runs that it was not fitted to; counts, such as loads, come out best, since
# they follow from decisions.

# %%
from labs_lib.serving.twin import calibrate, simulate

costs = play(busy(24), watch=calibrate)
print("fitted:", {name: f"R2 {fit['r2']}, n {fit['n']}" for name, fit in costs.fit.items()})
virtual = setting | {"pages": 8}
predicted = {}
for count in tenants:
    trace = busy(count)
    warm = replace(trace, arrivals=trace.arrivals[: len(trace) // 3])
    predicted[count] = simulate(trace, costs, small, warm=warm, outstanding=16, vocabulary=vocabulary, **virtual).run.summary()
errors = [100 * (predicted[n]["tokens_per_s"] / measured[n]["tokens_per_s"] - 1) for n in tenants if n != 24]
print(f"throughput of the other runs, predicted: {min(errors):+.0f} to {max(errors):+.0f} % off")

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
for rows, options in ((measured, {"marker": "o"}), (predicted, {"linestyle": "--", "color": "#333333"})):
    label = "measured" if rows is measured else "twin"
    left.plot(tenants, [100 * r["hits"] / r["requests"] for r in rows.values()], label=label, **options)
    right.plot(tenants, [r["tokens_per_s"] for r in rows.values()], label=label, **options)
for ax in (left, right):
    log_axis(ax, tenants)
    ax.axvline(8, color=look("base").color, linewidth=1, linestyle=":")
    ax.annotate("slots", (8, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", size=8.5)
    ax.set_ylim(bottom=0)
    ax.axvline(16, color=look("base").color, linewidth=1, linestyle=":")
    ax.annotate("host", (16, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", size=8.5)
left.legend()
last, best = tenants[-1], max(row["tokens_per_s"] for row in measured.values())
share_left = measured[last]["tokens_per_s"] / measured[tenants[0]]["tokens_per_s"]
hit_share = {n: measured[n]["hits"] / measured[n]["requests"] for n in tenants}
finding(left, f"Hits: {hit_share[tenants[0]]:.0%} to {hit_share[last]:.0%}, slots over tenants", "busy tenants", "found on the device (%)")
finding(right, f"Throughput: {share_left:.0%} is left", "busy tenants", "tokens per second")
show(
    fig,
    alt=f"Hits and throughput against the number of busy tenants, measured and predicted by the twin. Past 8 slots hits fall from {hit_share[tenants[0]]:.0%} to {hit_share[last]:.0%}; throughput keeps {share_left:.0%}.",
)

# %%
at_16 = hit_share.get(16)
print(f"You predicted {predict_hits} % hits; measured {'nothing' if at_16 is None else f'{at_16:.0%}'}.")
print(f"You predicted {predict_cliff} % of the throughput; it is {share_left:.0%}.")

# %% [markdown]
# **Thousands.** Now the twin answers what we cannot measure here: thirty-two slots, 256 adapters in host memory, up to
# 2,000 tenants, busy to very different degrees (Zipf: the $k$-th gets a share in proportion to $1/k$), and three disks.
#
# *You should see* that it is not the number of adapters that hurts, but what a miss costs.

# %%
from labs_lib.serving.twin import working_set
from labs_lib.serving.workload import zipf

sizes = lab.grid([8, 32, 100, 256, 500, 1000, 2000])
large = virtual | {"slots": 32, "host_bytes": 256 * held}
disk = costs.load["call"] + costs.load["byte"] * held
loads = {"this disk": disk, "10 times slower": 10 * disk, "50 times slower": 50 * disk}
curves = {}
for label, seconds in loads.items():
    slower = replace(costs, load={"call": seconds, "byte": 0.0})
    for kind, popularity in (("Zipf", zipf), ("uniform", uniform)):
        make = lambda n, popularity=popularity: closed(lab.rows(1000), popularity(n), prompt=24, output=8, seed=lab.seed)
        curves[kind, label] = working_set(make, sizes, slower, small, outstanding=16, **large)
print(f"an adapter comes from this disk in {1e3 * disk:.1f} ms, a request takes {1e3 * 16 / measured[tenants[0]]['requests_per_s']:.0f} ms")

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
kept = {}
for ax, kind in zip(axes, ("Zipf", "uniform"), strict=True):
    for (which, label), line in zip(curves, ("-", "-", "--", "--", ":", ":"), strict=True):
        if which == kind:
            rows = curves[which, label]
            speed = [row["tokens_per_s"] for row in rows]
            kept[which, label] = speed[-1] / speed[0]
            ax.plot(sizes, speed, line, marker="o", markersize=4, color=look("lora").color, label=label)
    log_axis(ax, sizes)
    for at, what in ((32, "slots"), (256, "host")):
        ax.axvline(at, color=look("base").color, linewidth=1, linestyle=":")
        ax.annotate(what, (at, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", size=8.5)
    ax.set_ylim(bottom=0)
    lines = {name: kept[kind, name] for name in loads}
    finding(ax, f"{kind}: {lines['this disk']:.0%} left, {lines['50 times slower']:.0%} from a slow disk", "registered adapters")
axes[0].set_ylabel("tokens per second (twin)")
axes[1].legend()
listed = "; ".join(f"{kind}, {label}: {share:.0%}" for (kind, label), share in kept.items())
show(fig, alt=f"The twin's throughput from {sizes[0]} to {sizes[-1]} registered adapters with 32 slots. Left of it at the end: {listed}.")

# %% [markdown]
# S-LoRA reports the same shape on an A100: 8.05 requests a second with 5 adapters, 7.61 with 2,000. The miss there is a
# copy from host memory, hidden behind the work of others.
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

QUEUE, LOAD, PREFILL, DECODE = "#B3B3B3", "#E69F00", "#56B4E9", "#0072B2"
fig, ax = plt.subplots(figsize=(7.2, 2.3))
total = {}
for row, (where, timings) in enumerate(first.items()):
    parts = [1e3 * median(getattr(each, part) for each in timings) for part in ("load", "prefill")]
    ax.barh(row, parts[0], color=LOAD, height=0.6, label="waiting for the load" if not row else None)
    ax.barh(row, parts[1], left=parts[0], color=PREFILL, height=0.6, label="copy and prefill" if not row else None)
    total[where] = sum(parts)
ax.set_yticks(range(3), list(first))
ax.invert_yaxis()
ax.grid(axis="x")
ax.grid(visible=False, axis="y")
ax.legend()
extra = {where: total[where] - total["on the device"] for where in first}
finding(ax, f"A miss adds {extra['in host memory']:.1f} ms from host memory, {extra['on disk']:.1f} ms from disk", "time to the first token (ms, median)")
listed = ", ".join(f"{where} {ms:.1f} ms" for where, ms in total.items())
show(fig, alt=f"Time to the first token by where the adapter was: {listed}.")

# %% [markdown]
# **Prefetch.** The engine starts a load when the request *arrives*, not when its turn comes: what waits in the queue
# anyway does not wait for the disk. In the run with the most tenants, how many loads cost nothing?

# %%
crowded = play(busy(tenants[-1]))
read = [each.timing for each in crowded.results if each.timing.load > 0]
hidden = sum(timing.queue > 0.001 for timing in read)
print(f"{len(read)} requests had to wait for a load; {hidden} of them had to wait for a free row after it anyway")

# %% [markdown]
# ### One memory or two
# Two tenants' needs, one after the other: first many tenants with short conversations and small adapters, then one
# tenant with long conversations. The memory has the same number of bytes both times: split in two ("separate": four
# slots for the largest rank, and the rest for keys and values), or one pool of pages ("unified").
#
# *You should see* the unified pool turn the memory over from one need to the other, and be done in fewer steps.

# %%
few = list(folders)[:12]  # ranks 2, 4 and 8
short = closed(lab.rows(64), uniform(12), prompt=24, output=8, seed=lab.seed).requests(few, vocabulary)
long = closed(lab.rows(32), uniform(1), prompt=(80, 120), output=16, seed=lab.seed).requests(few, vocabulary)


def watch_memory(policy):
    """(numbers in adapters, in keys and values, running sequences) at each step, and seconds and bytes."""
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
                steps.append((used, cells * small.cell, len(engine.running)))
            return len(done) == len(short) + len(long)

        started = engine.clock()
        engine.drive(looked)
        return np.array(steps), engine.clock() - started, engine.pool.nbytes, engine.ledger.counts["evict"]


pools = {policy: watch_memory(policy) for policy in ("separate", "unified")}

# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, sharey=True)
for ax, (policy, (steps, seconds, nbytes, evicted)) in zip(axes, pools.items(), strict=True):
    whole = nbytes / model.get_input_embeddings().weight.element_size()
    used, cells, rows = 100 * steps[:, 0] / whole, 100 * steps[:, 1] / whole, steps[:, 2]
    x = np.arange(len(steps))
    ax.stackplot(x, used, cells, colors=[ADAPTER, CELLS], labels=["adapters", "keys and values"], alpha=0.9, step="post")
    ax.set_ylim(0, 100)
    said = f"{rows.mean():.1f} requests run together, {evicted} evictions, {seconds:.1f} s"
    finding(ax, f"{policy.capitalize()}: {len(steps)} steps ({said})", y="memory in use (%)")
axes[1].set_xlabel("steps of the engine")
axes[1].legend(loc="upper right")
together = {policy: rows[0][:, 2].mean() for policy, rows in pools.items()}
show(
    fig,
    alt=f"Memory in use by adapters and by keys and values at each step, for separate and unified pools of the same size. Unified is done in {len(pools['unified'][0])} steps with {together['unified']:.1f} requests together, separate in {len(pools['separate'][0])} with {together['separate']:.1f}.",
)

# %% [markdown] tags=["takeaway"]
# The cliff is not where the adapters stop fitting on the device, but where misses cost more than the work that hides
# them. Size the host tier for the working set; share one pool of pages if ranks and conversations vary; read ahead.

# %% [markdown]
# ### One noisy tenant
# Six tenants share a server at half its capacity. Then one of them sends a burst of twice the capacity for a while.
# Under *first come, first served*, who pays? And with your counters?

# %%
from labs_lib.serving.workload import noisy

capacity = measured[tenants[0]]["requests_per_s"]
whole = lab.rows(150) / capacity  # seconds
burst = {"burst": 2 * capacity, "start": 0.15 * whole, "length": 0.25 * whole}
storm = noisy(0.5 * capacity, whole, uniform(6), **burst, prompt=24, output=8, seed=lab.seed)
requests, at = storm.requests(names, vocabulary), [each.at for each in storm]
days = {}
for fairness in ("fcfs", "fair"):
    with Engine(share(model), folders.__getitem__, **setting, fairness=fairness, patience=1e9) as engine:
        replay(engine, requests[:12], outstanding=12)
        days[fairness] = replay(engine, requests, at)

# %% tags=["hide-input"]
loud, PARTS = "tenant-0", (("queue", QUEUE), ("load", LOAD), ("prefill", PREFILL), ("decode", DECODE))
whos = sorted({request.tenant for request in requests})
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, sharey=True)
waits = {}
for ax, (fairness, day) in zip(axes, days.items(), strict=True):
    for row, who in enumerate(whos):
        mine = [each.timing for each in day.results if each.request.tenant == who]
        left = 0.0
        for part, color in PARTS:
            value = 1e3 * float(np.mean([getattr(timing, part) for timing in mine]))
            ax.barh(row, value, left=left, color=color, height=0.7, label=part if not row else None)
            left += value
        waits[fairness, who] = left
    ax.set_yticks(range(len(whos)), [f"{who} (noisy)" if who == loud else who for who in whos])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
axes[0].invert_yaxis()
quiet = {f: float(np.mean([waits[f, who] for who in whos if who != loud] or [0])) for f in days}
finding(axes[0], f"First come, first served: the others wait {quiet['fcfs']:.0f} ms", "mean time to the last token (ms)")
finding(axes[1], f"Fair: {quiet['fair']:.0f} ms; the noisy one {waits.get(('fair', loud), 0):.0f}", "mean time to the last token (ms)")
axes[1].legend()
listed = "; ".join(f"{who} {waits['fcfs', who]:.0f} and {waits['fair', who]:.0f} ms" for who in whos)
show(fig, alt=f"Mean latency of each tenant, split into queue, load, prefill and decode, under first come first served and under fair scheduling: {listed}.")

# %% [markdown]
# One number for the day? Over the whole run both orders give everybody all that was asked for, so an index of totals
# cannot tell them apart. *When* is what fairness is about: we take the share of each tenant's wishes that was met by the
# end of the burst.

# %%
end = burst["start"] + burst["length"]
for fairness, day in days.items():
    met = {}
    for answer in day.answers:
        got, asked = met.get(answer.result.request.tenant, (0, 0))
        if answer.at < end:
            met[answer.result.request.tenant] = got + sum(t < end for t in answer.stamps), asked + 8
    shares = [got / asked for got, asked in met.values()]
    totals = [sum(len(r.tokens) for r in day.results if r.request.tenant == who) for who in whos]
    print(f"{fairness}: Jain's index {jain_index(shares):.3f} at the end of the burst, {jain_index(totals):.3f} of the whole day")

# %% [markdown] tags=["takeaway"]
# First come, first served lets one tenant spend everybody's latency. Counters send the bill to whoever makes the
# noise, at no cost in throughput, as long as there is somebody else to serve.

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
    row = {"request": each.id, "version": notes[lease.adapter], "sha256": lease.adapter[:12], "slot": lease.slot}
    rows.append(row | {"tokens": len(each.tokens), "wrong tokens": verdict.wrong})
registry.close()
table(rows)

# %% [markdown]
# ## 5. Who can tell?
# Everything so far came out right. In engines that thousands use it did not: answers from another tenant's adapter were
# shipped by each of the well-known ones, without an error message. The **isolation fault lab** has their bugs to switch
# on, one at a time.
#
# **Exercise 5: the accuser.** Given one result and the truth, what does it prove to be wrong? Two traps: an accuser who
# believes the provenance, and one who accuses an engine that is healthy.
#
# *You should see* nothing wrong with a healthy engine.

# %% tags=["exercise"]
from labs_lib.serving.verdict import misserved

# %%
from labs_lib.serving.fault_lab import harness, score, traffic

misserved = check(misserved)


def detects(engine, truth):
    """Send requests of every kind in waves: does one of them prove that something is wrong?"""
    return any(misserved(result, truth) for result in traffic(engine, truth))


engine, truth = harness()  # a tiny model, two slots, four adapters and a deleted one
with engine:
    print("a healthy engine is accused:", detects(engine, truth))

# %% [markdown]
# Before you look at your score: here are some of the bugs. **Predict** which one nobody notices who only looks at
# answers.

# %%
from labs_lib.serving.faults import FAULTS

outcomes = {each.fault: each for each in score(detects)}
rows = []
for name, fault in FAULTS.items():
    row = {"fault": name, "who had it": fault.engine, "what a tenant sees": fault.seen}
    rows.append(row | {"caught": "yes" if outcomes[name].caught else "no"})
print(f"your check catches {sum(each.caught for each in outcomes.values())} of {len(FAULTS)}")
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
seen = {name: ["yours"] * outcomes[name].caught + list(fault.caught_by) for name, fault in FAULTS.items()}

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 4.6))
for row, (name, by) in enumerate(seen.items()):
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
ax.set_title("Books look clean in most of these bugs: only answers tell", pad=12)
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
from labs_lib.measure import load_published

published = load_published("serving")["tables"]
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
