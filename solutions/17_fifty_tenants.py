"""Lab 17, the case study. Its adapters and its record are `labs fleet --record`; the server is labs_lib/serving."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, log_axis, look, show

lab = setup(lab="17", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# The chapter ends with a story. A company writes marketing copy for **fifty enterprise customers**, each with a voice of
# its own, on a 7B model. Fifty fine-tuned models "would require 50 GPUs". Instead, fifty LoRA adapters of "roughly 20 MB"
# share one GPU; the API key says whose adapter answers; the bill falls by 98 %.
#
# This lab runs that company:
#
# | | |
# |---|---|
# | **train** | all fifty adapters, many in one batch |
# | **judge** | no adapter is published before its texts have been read |
# | **serve** | a day's traffic; a new customer, a bad version, a way back |
# | **prove** | who was answered by whose weights |
# | **account** | what it costs, what the story leaves out |

# %% [markdown]
# First, the customers. Three of the fifty get copy for the *same* product, in one batch of one model; the adapters are
# shipped with the course (`labs fleet` trained them).
#
# *You should see* three voices that tell the same facts. What makes the difference is a few percent of the model's size.

# %%
import torch

from labs_lib import load_base, load_task
from labs_lib.training.fleet_run import fleet_folders
from labs_lib.world.tenants import load_tenants

cores = torch.get_num_threads()
torch.set_num_threads(1)  # decode steps are no faster on two, and the gateway's threads want the other
NAME = lab.model_id or "small"  # the base that the shipped adapters were trained on
base, tokenizer = load_base(NAME, device=lab.device)
everybody = {tenant.slug: tenant for tenant in load_tenants()}
first = ["fathom-eleven", "quillfeather-post", "oakum-and-tar"]
tenants = [*first, *(slug for slug in everybody if slug not in first)][: lab.rows(50)]
folders = fleet_folders(tenants, NAME, lab.device)
sizes = {slug: sum(file.stat().st_size for file in folders[slug].iterdir()) for slug in tenants}
share_of_base = max(sizes.values()) / sum(4 * p.numel() for p in base.parameters())
print(f"{len(tenants)} adapters, {max(sizes.values()) / 1e3:.0f} kB each: {share_of_base:.1%} of the model")

# %%
from labs_lib.lab.cards import side_by_side
from labs_lib.serving.adapter import digest_of
from labs_lib.serving.arms import share
from labs_lib.serving.engine import Engine
from labs_lib.serving.types import Request

sha = {slug: digest_of(folder) for slug, folder in folders.items()}
prompt = load_task("style", tenant=first[0])["test"]["prompt"][0]
ids, ends = tokenizer(prompt)["input_ids"], (tokenizer.eos_token_id,)
asked = [Request(ids, slug, sha[slug], max_tokens=80, stop_ids=ends) for slug in first]
with Engine(share(base), {sha[slug]: folders[slug] for slug in first}.__getitem__) as engine:
    answers = engine.generate(asked)
print(prompt)
side_by_side({each.request.tenant: tokenizer.decode(each.tokens) for each in answers})

# %% [markdown]
# **Fifty trainings in one batch.** Lab 15's identity has a second use. For row $i$ of tenant $t_i$
#
# $$y_i = W x_i + s\,B_{t_i} A_{t_i} x_i,$$
#
# and $W$ is frozen: nobody's step can change anybody's base. So put rows of all tenants into one batch and train all $A_t,
# B_t$ at once. Independent they stay, if three things are kept apart: each tenant's **loss**, its **gradient's norm**, and
# its optimiser state. AdamW works number by number, so the last comes free. The first two are your exercises.

# %% [markdown]
# **By hand.** Tenant 1 has tokens with losses 1 and 3, tenant 2 has 1, 1 and 4. Their own losses are 2 and 2. The mean of
# all five is 2, too; but in its gradient tenant 1 weighs 2/5 and tenant 2 weighs 3/5.

# %% [markdown]
# ## 2. Build it
# **Exercise 1: everybody's own loss.** *You should see* 2 and 2, and gradients of 1/2 and 1/3 per token: what each would
# have had alone.

# %% tags=["exercise"]
from labs_lib.training.fleet import tenant_losses

# %%
tenant_losses = check(tenant_losses)
tokens, owners = torch.tensor([1.0, 1.0, 3.0, 1.0, 4.0], requires_grad=True), torch.tensor([0, 1, 0, 1, 1])
losses = tenant_losses(tokens, owners, 2)
losses.sum().backward()
print(losses.tolist(), [round(each, 3) for each in tokens.grad.tolist()])

# %% [markdown]
# **Exercise 2: everybody's own norm.** Training clips a gradient whose norm is above 1. Over which numbers? If over the
# whole fleet, one customer whose loss explodes slows down forty-nine others.
#
# *You should see* the first tenant's gradient cut to a norm of 1, and the second's left alone.

# %% tags=["exercise"]
from labs_lib.training.fleet import clip_each

# %%
clip_each = check(clip_each)
gradients = [
    torch.tensor([[30.0, 0.0], [0.3, 0.0]]),
    torch.tensor([[40.0], [0.4]]),
]  # two layers, two tenants
print("norms before:", clip_each(gradients).tolist())
print("after:", [[round(n, 2) for n in each.flatten().tolist()] for each in gradients])

# %% [markdown]
# **Exercise 3: the gate.** A server gives out whatever was published. So somebody must read first; here rules read
# (lab 01), since every guide is made of rules. What passes?
#
# *You should see* one adapter pass, and two reasons against the other.

# %% tags=["exercise"]
from labs_lib.training.gate import gate

# %%
from types import SimpleNamespace

gate = check(gate)
print(gate(SimpleNamespace(compliance=0.99, fidelity=0.97, leakage=0.0)))
print(gate(SimpleNamespace(compliance=0.62, fidelity=0.97, leakage=0.25)))

# %% [markdown]
# ## 3. Prove it
# Three tenants train together, through the serving engine's own op, now with gradients. And each trains alone, by `fit`:
# transformers' Trainer on lab 01's LoRA, with its own clipping, schedule and AdamW.
#
# *You should see* the same losses and the same weights, to five digits.

# %%
from labs_lib import fit
from labs_lib.methods.lora import inject_lora, lora_state_dict
from labs_lib.training import fleet
from labs_lib.training.fleet import Recipe, train

fleet.tenant_losses, fleet.clip_each = tenant_losses, clip_each  # yours, from here on
short = Recipe(rank=4, alpha=8, steps=5, batch=4, seed=lab.seed)
rows = {slug: load_task("style", tenant=slug)["train"][:16] for slug in tenants[:3]}
together = train(base, tokenizer, rows, short)

# %%
from labs_lib.lab.cards import table

results = []
for slug, mine in rows.items():
    model = load_base(NAME, device=lab.device)[0]
    seeded = torch.Generator().manual_seed(short.seed)
    inject_lora(model, "all-linear", short.rank, short.alpha, generator=seeded)
    settings = {"steps": short.steps, "batch_size": short.batch, "lr": short.lr, "seed": short.seed}
    alone = fit(model, tokenizer, mine, progress=False, **settings)
    own = lora_state_dict(model)
    apart = max((together.adapters[slug][key] - own[key]).abs().max().item() for key in own)
    lost = max(abs(a - b) for a, b in zip(together.losses[slug], alone.losses, strict=True))
    assert apart < 1e-4, slug
    results.append({"tenant": slug, "loss of the last step": f"{alone.losses[-1]:.4f}"})
    results[-1] |= {"losses differ by": f"{lost:.0e}", "weights differ by": f"{apart:.0e}"}
table(results)

# %% [markdown]
# What is left is rounding: in double precision the course's tests find nine equal digits. The layout is the pool's of lab
# 15. Tenant $k$'s factors are the pages of slot $k$; slot 0 is the base, no row reads it, so its gradient stays zero.
#
# ## 4. Train it
# **The customer of this morning.** A fifty-first company has sent its style guide and 128 texts that it approved. And, to
# have something to fear, a mix-up: somebody trains "fathom-eleven, new version" on *another* customer's texts.

# %%
import random

from labs_lib.world.tasks import random_style, style_rows
from labs_lib.world.tenants import Tenant

draw = random.Random(lab.seed)
marks = {tenant.mark for tenant in everybody.values()}
while (
    newcomer := Tenant("mossgate-lamps", "Mossgate Lamps", "lighting", "", random_style(draw))
).mark in marks:
    pass
print("Guide:", newcomer.guide)

# %%
parts = {"train": [], "validation": [], "test": []}
for row in style_rows(newcomer):
    parts[row["split"]].append(row)
new_rows = {split: {key: [row[key] for row in part] for key in part[0]} for split, part in parts.items()}
print(new_rows["train"]["completion"][0])

# %% [markdown]
# These two train now, in one batch, and with them whomever the fleet's own run left unsatisfied: the record says who failed
# at the gate below. They get a second try with another seed.
#
# *You should see* losses fall together, and one stay behind. The mix-up's is as good as anybody's: a loss cannot tell whose
# texts it learned.

# %%
import time
from dataclasses import replace

from labs_lib.measure import load_record

record = load_record("fleet", device="cpu")
print(record)
of = {name: [row for row in record.rows if row["section"] == name] for name in ("tenant", "step")}
failed = [row["tenant"] for row in of["tenant"] if row["refused"]]
print("refused at first:", ", ".join(failed))

# %%
recipe = replace(Recipe(), steps=lab.steps(40), seed=1)  # two thirds of the fleet's steps
data = {slug: load_task("style", tenant=slug)["train"][:] for slug in failed[:2]}
data |= {
    "mossgate-lamps": new_rows["train"],
    "mix-up": load_task("style", tenant="quillfeather-post")["train"][:],
}
torch.set_num_threads(cores)
started = time.perf_counter()
live = train(base, tokenizer, data, recipe)
torch.set_num_threads(1)
print(f"{len(data)} adapters in {time.perf_counter() - started:.0f} s: {', '.join(data)}")

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7.2, 3.2))
paint = {
    "mossgate-lamps": look("ia3").color,
    "mix-up": look("dora").color,
}
for (name, losses), line in zip(live.losses.items(), ("-", "--", ":", "-.", (0, (1, 3))), strict=False):
    color = paint.get(name, look("base").color)
    ax.plot(range(1, len(losses) + 1), losses, linestyle=line, color=color, label=name)
ax.set_yscale("log")
ax.legend()
*rest, worst = sorted(data, key=live.final_loss)
high, next_one = live.final_loss(worst), live.final_loss(rest[-1])
title = f"{worst} stays at {high:.2g}, the others reach {next_one:.2g}"
if high < 5 * next_one:
    title = f"{len(data)} adapters, one batch: all end at a loss of {high:.2g} or less"
finding(ax, title, "step", "loss (nats per token)")
listed = ", ".join(f"{name} {live.final_loss(name):.2g}" for name in data)
show(fig, alt=f"Training loss of adapters that share a batch, falling side by side. At the end: {listed}.")

# %% [markdown]
# **Does it pay?** A GPU is idle in small steps, and filling them is why one would train many adapters at once. Is a CPU?
#
# **Predict** how many times cheaper a training step becomes per tenant when ten tenants share it, each with a single row.

# %%
### BEGIN SOLUTION
### STUB: predict_fleet = ...  # times cheaper
predict_fleet = 5
### END SOLUTION
predict_fleet = check(predict_fleet, "lab17.predict_fleet")

# %%
per_row = {(row["rows"], row["arm"]): row["cpu_ms_per_tenant"] / row["rows"] for row in of["step"]}
rows_of, arms_of = sorted({rows for rows, _ in per_row}), list(dict.fromkeys(arm for _, arm in per_row))
few_rows, many_rows, (trainer, single, shared) = rows_of[0], rows_of[-1], arms_of
gains = {rows: per_row[rows, single] / per_row[rows, shared] for rows in rows_of}
print(f"you predicted {predict_fleet} times cheaper; recorded, by rows of each tenant:")
print("  " + ", ".join(f"{rows}: {gain:.1f} times" for rows, gain in gains.items()), "(below 1: dearer)")
for arm in arms_of:
    minutes = 50 * Recipe().steps * many_rows * per_row[many_rows, arm] / 6e4
    print(
        f"{arm:12s} {minutes:4.1f} CPU minutes for fifty tenants, {Recipe().steps} steps of {many_rows} rows"
    )

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 3.3))
shades = (look("full").color, look("base").color, look("lora").color)
for place, (arm, color) in enumerate(zip(arms_of, shades, strict=True)):
    at = [i + 0.27 * (place - 1) for i in range(len(rows_of))]
    tall = [per_row[rows, arm] for rows in rows_of]
    ax.bar(at, tall, 0.25, color=color, label=arm)
    for x, y in zip(at, tall, strict=True):
        ax.annotate(f"{y:.1f}", (x, y), ha="center", va="bottom", size=8)
ax.set_xticks(range(len(rows_of)), rows_of)
ax.legend()
share_1, share_16 = (f"{1 / gains[rows]:.1f}" for rows in (few_rows, many_rows))
title = f"Ten share a step: {share_1} times the cost at 1 row, {share_16} times at {many_rows}"
finding(ax, title, "rows of each tenant in a step", "CPU ms per row")
listed = "; ".join(f"{arm}, {rows} rows: {ms:.1f}" for (rows, arm), ms in per_row.items())
show(fig, alt=f"{title}. CPU milliseconds per row: {listed}.")

# %% [markdown]
# On one CPU core a shared batch pays only where a step is too small to keep the core busy. Sixteen rows of this base do that
# already; ten tenants with sixteen each make a step dearer per row, probably since what it keeps for the backward pass no
# longer fits into the caches. So `labs fleet` fills its batches up to sixteen rows on a CPU, and further on a GPU, which
# stays idle up to far more rows than that.
#
# The work also spreads: `labs fleet` gives its batches to **Ray** where that is installed, on this machine or on the
# cluster that `RAY_ADDRESS` names, and goes on where it stopped.

# %% [markdown]
# ### The gate
# Now the texts are read, as the server would write them: for held-out products, with all candidates mixed in the engine's
# batches, judged by each tenant's own rules. The record has the fleet's sixteen products per tenant; live we read the new
# candidates, and again whoever failed. The mix-up stands as a candidate for `fathom-eleven`.
#
# *You should see* who is refused, and why.

# %%
import tempfile
from pathlib import Path

from labs_lib.training.fleet import save_adapter
from labs_lib.training.gate import Candidate, read_by_rules

shelf = tempfile.TemporaryDirectory()
root = Path(shelf.name)
made = {name: save_adapter(root / name, live.adapters[name], recipe, NAME) for name in data}
few = lab.rows(16)
held = {key: values[:few] for key, values in new_rows["validation"].items()}
candidates = {
    "mossgate-lamps": Candidate(made["mossgate-lamps"], newcomer, held),
    "mix-up": Candidate.of(made["mix-up"], "fathom-eleven", rows=few),
}
for slug in failed:
    if slug in made:
        candidates[f"{slug}, second try"] = Candidate.of(made[slug], slug, rows=few)
    if slug in folders:
        candidates[f"{slug}, first"] = Candidate.of(folders[slug], slug, rows=few)

# %%
scores = read_by_rules(base, tokenizer, candidates)
refused = {name: reasons for name, score in scores.items() if (reasons := gate(score))}
for name in candidates:
    print(f"{name:34s} {'; '.join(refused[name]) if name in refused else 'passes'}")

# %% tags=["hide-input"]
points = [(row["tenant"], row["validation_compliance"], row["validation_fidelity"]) for row in of["tenant"]]
points += [(name, score.compliance, score.fidelity) for name, score in scores.items() if "first" not in name]
fig, ax = plt.subplots(figsize=(7.6, 3.2))
for number, (name, *both) in enumerate(points):
    bad = name in refused or name in failed
    how = {
        "color": look("dora" if bad else "lora").color,
        "marker": "X" if bad else "o",
        "ms": 8 if bad else 5,
    }
    for place, value in enumerate(both):
        ax.plot(100 * value, place + (number % 17 - 8) / 32, alpha=0.75, **how)
bad_ones = [
    (number, *point) for number, point in enumerate(points) if point[0] in refused or point[0] in failed
]
for line, (number, name, compliance, _) in enumerate(sorted(bad_ones, key=lambda each: each[0] % 17)):
    at, text = (100 * compliance, (number % 17 - 8) / 32), (58, -0.36 + 0.22 * line)
    arrow = {"arrowstyle": "-", "color": look("base").color, "linewidth": 0.7}
    ax.annotate(name, at, text, ha="center", va="center", size=8.5, arrowprops=arrow)
ax.axvline(95, color=look("base").color, linestyle=":", linewidth=1)
ax.set_yticks([0, 1], ["compliance\n(rules obeyed)", "fidelity\n(facts told)"])
ax.set_ylim(1.5, -0.5)
bad_names = [name for _, name, *_ in bad_ones]
title = f"{len(points) - len(bad_names)} of {len(points)} adapters pass the gate"
finding(ax, title, "score on held-out products (%)")
show(
    fig,
    alt=f"Compliance and fidelity of the fleet and the new candidates, bar at 95 percent. {title}. Not: {', '.join(bad_names)}.",
)

# %%
count = len(of["tenant"])
print(f"recorded: {count - len(failed)} of {count} passed; all of them, on products of the test split:")
for name in ("compliance", "fidelity", "leakage", "exact"):
    print(f"  {name:10s} {sum(row[f'test_{name}'] for row in of['tenant']) / max(1, count):6.1%}")
for row in of["tenant"]:
    if row["refused"] and f"{row['tenant']}, first" in scores:
        rules = scores[f"{row['tenant']}, first"].per_rule
        weak = sorted(rules, key=rules.get)[:3]
        gate_, other = row["validation_compliance"], row["test_compliance"]
        print(
            f"{row['tenant']}: loss {row['loss']:.4f}; compliance {gate_:.3f} at the gate, {other:.3f} in the test"
        )
        print("  broken: " + ", ".join(f"{rule} in {1 - rules[rule]:.0%} of its texts" for rule in weak))

# %% [markdown]
# Two ways to fail. One customer's loss never came down, and a second seed did not help: there the recipe is wrong, and a
# higher rank or more steps are the next thing to try. The other's loss is as low as anybody's; its few bad texts stood
# among the gate's sixteen, and on thirty-two other products it is fine. A small gate refuses some that deserve better. The
# price of that is a second try, which costs seconds; the price of no gate is a customer.

# %% [markdown] tags=["takeaway"]
# Fifty adapters are one training job: one frozen base, rows of everybody, and three things kept apart. Nothing of it
# reads the texts, though. The mix-up trained as well as the rest; only a gate that knows the customer's rules can see it.

# %% [markdown]
# ## 5. Serve it
# The registry takes what passed, each version under the sha256 of its files. Then the server of lab 15, with sixteen
# slots for everybody, and an oracle that will judge a share of all answers on weights that PEFT has merged.

# %%
from labs_lib.serving.registry import Registry

registry, keys = Registry(root / "registry"), {}
for slug in tenants:
    second = f"{slug}, second try" in candidates and f"{slug}, second try" not in refused
    if slug not in failed or second:
        keys[slug] = registry.add_tenant(slug)  # shown once: the registry keeps a hash
        registry.publish(slug, made[slug] if slug in failed else folders[slug], note="fleet")
served = list(keys)
print(f"{len(served)} tenants published, for instance {served[0]} with key {keys[served[0]][:12]}...")

# %% [markdown]
# **A day, squeezed**: quiet at night, busy in the afternoon, some customers far busier than others. While it runs, an
# operator has three things to do:
#
# 1. onboard the fifty-first customer: key, version, first requests;
# 2. in a hurry, past the gate, publish the mix-up as `fathom-eleven`'s new version;
# 3. see other people's words in its texts, and roll back, over HTTP.
#
# **Predict**: how many requests fail?

# %%
### BEGIN SOLUTION
### STUB: predict_failed = ...  # a number of requests
predict_failed = 3
### END SOLUTION
predict_failed = check(predict_failed, "lab17.predict_failed")

# %%
import httpx

ADMIN = "labs-admin-of-this-notebook"
seen = {}


def onboard():
    if "mossgate-lamps" not in refused:
        keys["mossgate-lamps"] = registry.add_tenant("mossgate-lamps")
        registry.publish("mossgate-lamps", made["mossgate-lamps"], note="this morning's")
    return "mossgate-lamps is on board"


def hurry():
    registry.publish("fathom-eleven", made["mix-up"], note="new version, not judged")
    return "the mix-up is published"


def roll_back():
    head = {"Authorization": f"Bearer {ADMIN}"}
    now = httpx.post(f"{seen['url']}/admin/tenants/fathom-eleven/rollback", headers=head).json()["current"]
    return f"fathom-eleven is back on version {now}"


# %%
from labs_lib.serving import live as watching
from labs_lib.serving.gateway import create_app
from labs_lib.serving.oracle import ShadowOracle, Witness
from labs_lib.serving.serve import running_server
from labs_lib.serving.traffic import Call, plan, play
from labs_lib.serving.workload import day, zipf

prompts = {slug: load_task("style", tenant=slug)["test"]["prompt"] for slug in served}
witness = Witness(load_base(NAME, device=lab.device)[0], registry.folder, copies=len(served) + 2)
oracle = ShadowOracle(witness, share=0.3, seed=lab.seed, waiting=10_000)
sizes_of = {"slots": 16, "max_rank": 8, "max_batch": 16, "kv_tokens": 4096, "host_bytes": 64 << 20}

# %%
with Engine(share(base), registry.folder, **sizes_of) as engine:
    app = create_app(engine, registry, tokenizer, admin_key=ADMIN, model_name="base")
    engine.start()
    with running_server(app) as url:
        seen["url"] = url
        rush = [Call(0, slug, prompts[slug][0]) for slug in served[:16]]
        pace = len(rush) / max(each.seconds for each in play(url, rush, keys).replies)
        whole = lab.rows(120) / (0.4 * pace)
        trace = day(0.4 * pace, whole, zipf(len(served)), seed=lab.seed)
        calls = plan(trace, served, prompts)
        arrive = [at * whole for at in (0.3, 0.45, 0.6, 0.75, 0.9)] if "mossgate-lamps" not in refused else []
        calls += [Call(at, "mossgate-lamps", new_rows["test"]["prompt"][0]) for at in arrive]
        engine.observers.append(oracle)
        work = [(0.25 * whole, onboard), (0.5 * whole, hurry), (0.75 * whole, roll_back)]
        played = play(url, calls, keys, during=work)
        picture = watching.picture(engine, registry)
print(f"{len(calls)} requests in {whole:.0f} s; {len(played.failed)} failed, you predicted {predict_failed}")

# %% tags=["hide-input"]
colors = {"fathom-eleven": {2: look("dora").color}, "mossgate-lamps": {1: look("ia3").color}}
fig, ax = plt.subplots(figsize=(9, 4.6))
hour = 24 / whole  # of the day in a second of ours
lanes = {slug: lane for lane, slug in enumerate(served)} | {"mossgate-lamps": -4}
for reply in played.replies:
    who, lane = reply.call.tenant, lanes[reply.call.tenant]
    color = colors.get(who, {}).get(reply.version, look("lora").color)
    arrived, answered = reply.call.at * hour, (reply.call.at + reply.seconds) * hour
    ax.plot([arrived, answered], [lane, lane], color=color, linewidth=3.2)
    ax.plot(arrived, lane, ".", color=color, markersize=4)
for height, (at, what) in enumerate(played.happened):
    ax.axvline(at * hour, color="#333333", linestyle=":", linewidth=1)
    side = {"ha": "right", "xytext": (-3, 2)} if at > 0.6 * whole else {"ha": "left", "xytext": (3, 2)}
    ax.annotate(
        what, (at * hour, len(lanes) + 3 * height), textcoords="offset points", size=8, va="bottom", **side
    )
ax.plot([], [], color=look("dora").color, linewidth=3, label="the mix-up's answers")
ax.plot([], [], color=look("ia3").color, linewidth=3, label="the new customer's")
ax.legend(loc="upper left")
ax.set_yticks([-4, 0, len(served) - 1], ["mossgate-lamps (new)", served[0], "the quietest"])
ax.set_ylim(-6, len(lanes) * 1.2)
ax.grid(visible=False, axis="y")
title = f"{len(calls)} requests of {len({r.call.tenant for r in played.replies})} tenants, {len(played.failed)} failed"
finding(ax, title, f"hour of the day (squeezed into {whole:.0f} s)", "tenants, the busiest below")
said = "; ".join(f"{what} at {at * hour:.0f} h" for at, what in played.happened)
show(
    fig,
    alt=f"Each request of the day as a bar from its arrival to its answer, a lane for each tenant. {title}. {said}.",
)

# %% [markdown]
# No request waits for a publish, and none is lost to one: a request keeps the version that was current when it came, and
# the adapter is named by its content, so an old one and a new one can be in the same batch.
#
# **Who noticed?** Below, `fathom-eleven`'s answers by version. The customer's mark (house word and sign-off) is a pair that
# nobody else has, so that a text in another's voice can be told by a rule.

# %%
from labs_lib.world.scorers import leaks

rows_by = {}
for reply in played.replies:
    whose = everybody.get(reply.call.tenant, newcomer)
    leaked = leaks(reply.text, whose)
    row = rows_by.setdefault((reply.call.tenant, reply.version), [0, 0, ""])
    row[0], row[1], row[2] = row[0] + 1, row[1] + bool(leaked), row[2] or ", ".join(leaked)
shown = []
for (slug, version), (answers_, leaked, whom) in sorted(rows_by.items()):
    if slug in ("fathom-eleven", "mossgate-lamps"):
        shown.append({"tenant": slug, "version": version, "answers": answers_})
        shown[-1] |= {"with another's mark": leaked, "whose": whom}
others = [row for (slug, _), row in rows_by.items() if slug not in ("fathom-eleven", "mossgate-lamps")]
shown.append({"tenant": f"the other {len(others)}", "version": 1, "answers": sum(row[0] for row in others)})
shown[-1] |= {"with another's mark": sum(row[1] for row in others), "whose": ""}
table(shown)

# %% [markdown]
# **The isolation report.** The oracle has kept three in ten answers. It replays each on a model of its own, into which PEFT
# merges the very files that the answer's provenance names.
#
# *You should see* no mismatch. The mix-up's answers agree, too!

# %%
oracle.judge_waiting()
report = oracle.report()
print({key: report[key] for key in ("seen", "agree", "tie", "mismatch", "unjudged")})
print(f"judged answers came from {len(report['tenants'])} tenants")
moved = {what: engine.ledger.counts[what] for what in ("load", "device", "evict")}
print("what the tiers did meanwhile:", moved)
tiers = [row["tier"] for row in picture["tenants"]]
print("where they are at the end:", {tier: tiers.count(tier) for tier in sorted(set(tiers))})

# %% [markdown] tags=["takeaway"]
# Two different leaks. If the *server* mixes adapters, the oracle sees it: the answer is not what the named weights say. If
# the *weights* are somebody else's, the server is right and the text is wrong: only the gate, or a rule on the texts, sees
# it. A service needs both.

# %% [markdown]
# **Look at it.** The server has a page at `/`: who is in which tier, who waits, each tenant's latency, swaps as they
# happen. `labs serve` prints its address and the admin's key, without which it shows nothing. To see it move:
#
# ```bash
# labs fleet --publish --keys keys.txt      # train what is missing, judge, publish
# labs serve                                # then open http://127.0.0.1:8000/
# ```

# %% [markdown]
# ## 6. The chapter on trial
# **Claim 34**: median latency "increased by only 8 ms compared to a dedicated model". The same requests of one tenant, three
# times each, interleaved: on a dedicated merged model; on the shared engine, unmerged; and there with seven neighbours in
# every batch.
#
# **Predict**: with the engine to itself, how much longer does a request take unmerged, in percent?

# %%
### BEGIN SOLUTION
### STUB: predict_overhead = ...  # percent
predict_overhead = 20
### END SOLUTION
predict_overhead = check(predict_overhead, "lab17.predict_overhead")

# %%
from statistics import median

from labs_lib.serving import arms
from labs_lib.serving.replay import replay

one = "fathom-eleven"
dedicated = arms.merged(base, folders[one])
TOKENS = 24
mine = [tokenizer(text)["input_ids"] for text in prompts[one][: lab.rows(6)]]
crowd_of = {sha[slug]: folders[slug] for slug in served}


def latency(arm, model, neighbours=()):
    """Median seconds (per token after the first, per request) of this tenant's requests."""
    setup_ = arms.Setup(model, crowd_of, batch=8, slots=16)
    requests = []
    for number, prompt_ids in enumerate(mine):
        adapter = None if arm == "base" else sha[one]
        requests.append(Request(prompt_ids, one, adapter, TOKENS, ignore_eos=True))
        for slug in neighbours:
            theirs = tokenizer(prompts[slug][number])["input_ids"]
            requests.append(Request(theirs, slug, sha[slug], TOKENS, ignore_eos=True))
    with arms.build(arm, setup_) as engine:
        engine.generate(requests[: 1 + len(neighbours)])  # adapters are in their slots, code is warm
        run = replay(engine, requests, outstanding=1 + len(neighbours))
    own = [each for each in run.answers if each.result.request.tenant == one]
    return median(each.tpot for each in own), median(each.stamps[-1] - each.at for each in own)


# %%
neighbours = served[1:8]
ways = {
    "dedicated, merged": ("base", dedicated, ()),
    "shared, alone": ("engine", base, ()),
    f"shared, {len(neighbours)} neighbours": ("engine", base, neighbours),
}
times = {name: [] for name in ways}
for turn in range(3):
    for name in list(ways) if turn % 2 == 0 else reversed(ways):
        times[name].append(latency(*ways[name]))
rows_, added = [], {}
for name, measured in times.items():
    token, whole_ = (1e3 * median(each[i] for each in measured) for i in (0, 1))
    rows_.append(
        {
            "served": name,
            "ms per token": f"{token:.2f}",
            f"ms per request of {TOKENS} tokens": f"{whole_:.0f}",
        }
    )
    for i, unit in enumerate(("per token", f"per request of {TOKENS} tokens")):
        pairs = zip(measured, times["dedicated, merged"], strict=True)
        added[f"{unit}, {name.removeprefix('shared, ')}"] = [1e3 * (a[i] - b[i]) for a, b in pairs]
table(rows_)

# %%
longer = 100 * (
    median(t[1] for t in times["shared, alone"]) / median(t[1] for t in times["dedicated, merged"]) - 1
)
print(f"you predicted {predict_overhead} % longer; measured {longer:.0f} %")
claim(34).observe(conditions={name: values for name, values in added.items() if "dedicated" not in name})

# %% [markdown]
# Only a GPU can tell about the chapter's 8 ms. But two things hold on any device. The overhead is *per token*: 8 ms per
# token would be seconds in an answer of 400 tokens, 8 ms per request a fiftieth of a millisecond in each of them. And "shared" has two
# prices: being unmerged, and having neighbours. A dedicated model pays neither, and stands idle for it.
#
# [Punica](https://arxiv.org/abs/2310.18547) reports 2 ms per token on an A100: that is 0.8 s in 400 tokens.

# %% [markdown]
# **Claim 35**: an adapter of "roughly 20 MB", "10 to 50 MB", "1/300th". Ours first: does a saved file hold anything but its
# numbers? Then the 7B model's, counted on its shapes.

# %%
from peft import LoraConfig

from labs_lib import random_like
from labs_lib.measure import count_parameters
from labs_lib.models.twins import peft_parameter_count

numbers = sum(tensor.numel() for tensor in live.adapters["mix-up"].values())
extra = max(sizes.values()) - 4 * numbers
print(f"ours: {numbers:,} numbers, {max(sizes.values()):,} bytes: {extra:,} of them are names and settings")
llama = random_like("llama-2-7b")
whole_7b = count_parameters(llama).total
megabytes = {}
for label, targets in (("q and v", ["q_proj", "v_proj"]), ("all linear", "all-linear")):
    adapter = peft_parameter_count(llama, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    megabytes |= {
        f"{label}, half precision": 2 * adapter / 1e6,
        f"{label}, as PEFT saves it": 4 * adapter / 1e6,
    }
for label, size in megabytes.items():
    print(f"rank 16, {label:28s} {size:6.1f} MB, fifty take {50 * size / 1e3:4.1f} GB")

# %%
ratios = {label: 2 * whole_7b / 1e6 / size for label, size in megabytes.items()}
parts_35 = {"twenty_mb": megabytes, "ten_to_fifty_mb": megabytes, "ratio": ratios}
claim(35).observe(parts=parts_35 | {"copies": 50 * 2 * whole_7b / 1e9})

# %% [markdown]
# ### The bill
# **Claim 33**: fifty models "would require 50 GPUs", more than $150,000 a month; sharing one saves 98 %.
#
# **Exercise 4: how many cards?** A card of 80 GB is bought for its memory; so ask what fits.
#
# *You should see* ten cards for fifty copies of 13.5 GB, and more once each copy needs room to work.

# %% tags=["exercise"]
from labs_lib.serving.cost import cards_needed

# %%
from labs_lib.serving import cost

cost.cards_needed = cards_needed = check(cards_needed)
for room in (0, 4, 13, 26):
    fit_ = cards_needed(50, 2 * whole_7b / 1e9, 80, room)
    print(f"{room:2d} GB of room for each copy's keys and values: {fit_} cards of 80 GB")

# %% [markdown]
# **Your turn.** The honest comparison is not against fifty cards but against fifty copies *packed* onto cards, without
# extra room. What percentage does one shared card save then?

# %%
### BEGIN SOLUTION
### STUB: shared_saving = ...  # percent
shared_saving = 100 * (1 - 1 / cards_needed(50, 2 * whole_7b / 1e9, 80))
### END SOLUTION
shared_saving = check(shared_saving, "lab17.shared_saving")

# %% [markdown]
# **The calculator.** These are all its inputs. Change them: another price, another model, more traffic. `card_rate`,
# `kept` and `load` are assumptions here; put in what you measured.

# %%
from labs_lib.serving.cost import DESIGNS, Inputs, cards, saving

inputs = Inputs(
    tenants=50,
    copy_gb=2 * whole_7b / 1e9,  # Llama-2-7B, two bytes a number
    adapter_gb=0.02,  # the chapter's
    card_gb=80,
    card_dollars=3000,  # a month: the chapter's 150,000 over 50
    room_gb=0,  # for each copy's keys and values
    load=1.0,  # requests per second, of all tenants
    card_rate=10.0,  # that one card answers with a merged model
    kept=0.7,  # share of it that is left with adapters in the batch
)
needed = cards(inputs)
for design in DESIGNS:
    bill = needed[design] * inputs.card_dollars
    saved = saving(needed[DESIGNS[0]], needed[design])
    print(
        f"{design:34s} {needed[design]:3d} cards, ${bill:9,.0f} a month, {saved:3.0f} % less than a card per copy"
    )

# %% tags=["hide-input"]
loads = [1, 2, 5, 10, 20, 50, 100, 200, 500]
curves = {design: [cards(replace(inputs, load=load))[design] for load in loads] for design in DESIGNS}
fig, ax = plt.subplots(figsize=(7.6, 3.6))
looks = ((look("full").color, ":"), (look("dora").color, "--"), (look("lora").color, "-"))
for (design, values), (color, line) in zip(curves.items(), looks, strict=True):
    ax.plot(loads, values, line, color=color, marker="o", markersize=4, label=design)
ax.set_yscale("log")
log_axis(ax, loads)
log_axis(ax, [1, 10, 50], axis="y")
ax.legend()
packed, shared = curves[DESIGNS[1]], curves[DESIGNS[2]]
turn = next((load for load, a, b in zip(loads, packed, shared, strict=True) if b >= a), None)
saves = [100 * (1 - b / a) for a, b in zip(packed, shared, strict=True)]
where = (
    f"{saves[0]:.0f} % at little traffic, nothing from {turn} requests/s on"
    if turn
    else f"{saves[0]:.0f} % at least"
)
finding(ax, f"Sharing saves {where}", "requests per second, of all tenants", "cards")
show(
    fig, alt=f"Cards needed against traffic for three designs. Against packed copies, sharing saves {where}."
)

# %%
conditions = {f"{room} GB of room per copy": cards_needed(50, inputs.copy_gb, 80, room) for room in (0, 13)}
savings = {
    "against a card per copy": saving(needed[DESIGNS[0]], needed[DESIGNS[2]]),
    "against packed copies": saving(needed[DESIGNS[1]], needed[DESIGNS[2]]),
}
dollars = inputs.tenants * inputs.card_dollars
claim(33).observe(parts={"gpus": conditions, "saving": savings, "dollars": dollars})

# %% [markdown]
# The 98 % are right for the question that the story asks, and the question is loaded: nobody needs a card for an idle copy.
# Against packed copies it is less; and once traffic fills cards, what is saved is memory, while the unmerged share of speed
# is *paid*.
#
# The calculator is even kind to packed copies: it lets a card with five of them be as fast as a card with one. But copies
# cannot share a batch. The twin of lab 16 has costs fitted to a measured engine; for 32 rows that wait: *one* step with all
# their adapters, or a step for each merged copy on its own rows.

# %% tags=["hide-input"]
found = next(
    row for row in load_record("bench_serving", device="cpu").rows if row.get("what") == "merge or multiplex"
)
distinct = [int(d) for d in found["merged_ms"]]
fig, ax = plt.subplots(figsize=(7.2, 3.2))
shared_ms, apart_ms = ([found[key][str(d)] for d in distinct] for key in ("multiplexed_ms", "merged_ms"))
ax.plot(distinct, shared_ms, "-o", color=look("lora").color, label="one step, adapters in the batch")
ax.plot(distinct, apart_ms, "--o", color=look("dora").color, label="a step for each merged copy")
ax.set_yscale("log")
log_axis(ax, distinct)
log_axis(ax, [5, 10, 20, 50], axis="y")
ax.legend()
when = f"From {found['multiplex_from']} tenants in a batch on, sharing is faster"
finding(ax, when, "different tenants among 32 rows", "time for all 32 rows (ms)")
alone_ms, many_ms = (f"{apart_ms[i]:.1f} against {shared_ms[i]:.1f} ms" for i in (0, -1))
show(
    fig,
    alt=f"{when} (the twin, from the recorded bench). Merged against shared with 1 tenant {alone_ms}, with 32 {many_ms}.",
)

# %% [markdown] tags=["takeaway"]
# Multiplex the many that ask seldom; give a merged copy to the one that fills batches of its own. The saving is real, but
# its size is a property of your traffic, not of LoRA.

# %% [markdown]
# ## 7. When would you choose it?
# Choose one base with adapters when customers are many, each asks seldom, and all can live on one base model. Choose merged
# copies when few customers make most of the traffic, or when their bases differ. And ask first whether a prompt would do
# (lab 00): a guide in the prompt needs no training, no gate and no registry.
#
# **The failure you will meet** is none of the engine's. It is a version that loads, serves and is *wrong*: trained on other
# data, for another base, or before the guide changed. Keep the gate in the pipeline, versions immutable, and the way back
# one call long.

# %% [markdown]
# ### When one machine is not enough
# **More training**: start Ray on your machines; the same command uses all of them.
#
# ```bash
# ray start --head                                       # on one, and `ray start --address=...` on the others
# RAY_ADDRESS=auto labs fleet --publish --keys keys.txt
# ```
#
# **More traffic**: several servers behind a proxy that sends a tenant always to the same one, so that its adapter stays in
# its slots. They may share one registry: publishing and rolling back reach all of them with the next request.
#
# ```bash
# labs serve --registry /srv/registry --port 8001 & labs serve --registry /srv/registry --port 8002 &
# ```

# %% [markdown]
# **A larger model**: [vLLM](https://docs.vllm.ai/en/latest/features/lora.html) takes the same folders and speaks the same API
# (shown, not run here). Keys per tenant, the gate and the ledger you keep in front of it.
#
# ```bash
# VLLM_ALLOW_RUNTIME_LORA_UPDATING=true vllm serve meta-llama/Llama-2-7b-hf --enable-lora \
#     --max-loras 32 --max-lora-rank 16 --max-cpu-loras 64 --lora-modules fathom-eleven=fleet/fathom-eleven
# ```
#
# **Where LoRAX and S-LoRA stand**, corrected. What labs 15 and 16 found about claims 30 to 32:

# %%
from labs_lib.measure.standings import standings

stand = standings()
for number in (30, 31, 32):
    print(f"claim {number}: {claim(number).says}")
    for each in stand.get(number, ()):
        print(f"    {each}; labs {', '.join(each.labs)}")
    for reported in claim(number).reported:
        print(f"    reported: {reported['text']}")

# %% [markdown]
# [LoRAX](https://github.com/predibase/lorax) is "LoRA eXchange" and was never called anything else; its README speaks of
# thousands of adapters on one GPU. [S-LoRA](https://arxiv.org/abs/2311.03285) is a paper's research code; its tiers are GPU
# and main memory, without a disk. What both showed is now built into vLLM and SGLang, which is where you would look first.

# %% [markdown]
# ## 8. Go further
# - **A real model.** Set `PROFILE = "gpu"` and `MODEL_ID = "HuggingFaceTB/SmolLM2-135M"` and run all: the fleet is trained on
#   it, and kept.
# - **Open exercise 1.** Half of the newcomers bring 16 approved texts, not 128. What does the gate say at 16, and would a
#   higher bar have caught anything that this one did not?
# - **Open exercise 2.** The oracle judged three in ten answers. If one answer in a thousand were wrong, how many requests
#   pass before it is seen with a probability of 95 %? And at the server's default of one in a hundred?

# %% [markdown] tags=["solution-only"]
# **Answer 1.** The records `sweep_few_shot` (80 steps) and `sweep_few_shot_long` (160) have one tenant with 4 to 64 texts and
# four seeds each. Below: with few texts it is luck which seed passes, and longer training helps; so the gate, and a second
# try, are worth more than a rule about how many texts are enough. A higher bar would add little: on sixteen products one
# broken rule is 0.4 points of compliance. Read more texts before you raise the bar.
#
# **Answer 2.** An answer is wrong *and* judged with probability $p = 0.001 q$. Unseen after $n$ requests: $(1 - p)^n$.

# %% tags=["solution-only"]
for name in ("few_shot", "few_shot_long"):
    passes = {}
    for row in load_record(f"sweep_{name}", device="cpu").rows:
        if row["stage"] == "final" and row["arm"]["method"] == "lora":
            score = SimpleNamespace(compliance=row["compliance"], fidelity=row["fidelity"], leakage=0.0)
            passes.setdefault(row["arm"]["options"]["examples"], []).append(not gate(score))
    print(name, ", ".join(f"{n} texts: {sum(found)} of {len(found)} pass" for n, found in passes.items()))

# %% tags=["solution-only"]
import math

for q in (0.3, 0.01):
    print(f"judging {q:.0%}: {math.ceil(math.log(0.05) / math.log(1 - 0.001 * q)):,} requests")

# %%
registry.close()
progress()
