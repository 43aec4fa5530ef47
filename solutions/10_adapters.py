"""Lab 10, adapters. Its records are `labs sweep adapters` and `labs compose facts`; LoRA's come from lab 02."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, look, show

lab = setup(lab="10", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# LoRA changes a weight. An adapter ([Houlsby et al., 2019](https://arxiv.org/abs/1902.00751)) leaves every weight as it is
# and puts a small network of its own in the way of the hidden state $h$:
#
# $$h \leftarrow h + s\,\big(W_{\mathrm{up}}\, \sigma(W_{\mathrm{down}} h + b_{\mathrm{down}}) + b_{\mathrm{up}}\big)$$
#
# It squeezes $d$ numbers through a *bottleneck* of $m$ units, bends them ($\sigma$, say ReLU), stretches them to $d$ again
# and adds. That was 2019, two years before LoRA, and the word "adapter" has meant all such additions ever since.
#
# Where should it stand? Three answers:

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

grey, own_color = look("base").color, look("adapter").color


def box(ax, x, y, text, color, alpha=0.18):
    for fill, see in (("white", 1), (color, alpha)):
        shape = {"boxstyle": "round,pad=0.05", "fc": fill, "alpha": see, "lw": 0, "zorder": 2}
        ax.add_patch(FancyBboxPatch((x - 0.8, y - 0.2), 1.6, 0.4, **shape))
    ax.text(x, y, text, ha="center", va="center", size=9)


def plus(ax, x, y):
    circle = {"boxstyle": "circle,pad=0.1", "fc": "white", "ec": "#888888"}
    ax.text(x, y, "+", ha="center", va="center", size=12, bbox=circle)


def wire(ax, *points):
    ax.plot(*zip(*points[:-1], strict=True), color="#888888", lw=1, zorder=1)
    ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "color": "#888888"}, zorder=1)


# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(10, 4), width_ratios=(1, 1, 1.6))
titles = ("Houlsby: after both", "Pfeiffer: after the FFN", "Parallel: beside the FFN")
for ax, title in zip(axes, titles, strict=True):
    wire(ax, (0, -0.6), (0, 6.6))
    for bottom, name in ((0, "attention"), (3.2, "FFN")):
        wire(ax, (0, bottom - 0.3), (2, bottom - 0.3), (2, bottom + 0.3))
        box(ax, 2, bottom + 0.6, name, grey)
        wire(ax, (2, bottom + 0.9), (2, bottom + 2.3), (0.2, bottom + 2.3))
        plus(ax, 0, bottom + 2.3)
        if title.startswith("Houlsby") or (name == "FFN" and title.startswith("Pfeiffer")):
            box(ax, 2, bottom + 1.6, "adapter", own_color, 0.45)
        elif name == "FFN" and title.startswith("Parallel"):
            wire(ax, (2, bottom - 0.1), (4, bottom - 0.1), (4, bottom + 0.3))
            box(ax, 4, bottom + 0.6, "adapter", own_color, 0.45)
            wire(ax, (4, bottom + 0.9), (4, bottom + 1.6), (2.2, bottom + 1.6))
            plus(ax, 2, bottom + 1.6)
    ax.set(xlim=(-0.6, 5 if title.startswith("Parallel") else 3), ylim=(-0.7, 6.7), title=title)
    ax.axis("off")
show(
    fig,
    alt="Three sketches of a block, whose attention and FFN each add to a straight residual line. Houlsby has an adapter after attention and after the FFN, Pfeiffer after the FFN only, the parallel one stands beside the FFN, reads what the FFN reads and adds to what it makes.",
)

# %% [markdown]
# (Each adapter's own skip connection is not drawn.) Two stand *behind* a sub-layer and read what it made: one more step
# for every token. The third ([He et al., 2022](https://arxiv.org/abs/2110.04366)) stands *beside* it.
#
# **By hand**, $d = 2$, one unit: $W_{\mathrm{down}} = (1\;\;2)$, $b_{\mathrm{down}} = 1$,
# $W_{\mathrm{up}} = (3\;\;{-1})^\top$, no other bias, ReLU.
#
# | $h$ | down | ReLU | added |
# |---|---|---|---|
# | $(2, 1)$ | $2 + 2 + 1 = 5$ | $5$ | $(15, -5)$ |
# | $(-2, -1)$ | $-2 - 2 + 1 = -3$ | $0$ | $(0, 0)$ |
#
# A matrix would add $(-15, 5)$ to the second row, if it adds $(15, -5)$ to the first. **Predict**: what can you do with a
# trained LoRA that you can never do with a trained adapter?

# %% [markdown]
# ## 2. Build it
# **Exercise 1: a start that is nearly nothing.** A fresh adapter sits between layers that were trained without it, so it had
# better do little. Houlsby draws both matrices small; LoRA and He et al. set one of them to zero.
#
# *You should see* an addition of the order of `std` squared, and exactly zero.

# %% tags=["exercise"]
from labs_lib.methods.adapters import init_adapter

# %%
import torch

init_adapter = check(init_adapter)
h = torch.randn(100, 128)
for options in ({"std": 0.1}, {"std": 0.01}, {"exact": True}):
    down, up = init_adapter(128, 18, **options, generator=torch.Generator().manual_seed(0))
    added = up(down(h).relu())
    print(f"{options!s:16} adds {added.norm() / h.norm():.1e} of h")

# %% [markdown]
# **Exercise 2: the adapter.** Only what it adds; the sum comes next.
#
# *You should see* the table from above.

# %% tags=["exercise"]
from labs_lib.methods.adapters import BottleneckAdapter

# %%
BottleneckAdapter = check(BottleneckAdapter)
small = BottleneckAdapter(2, 1)
small.down.weight.data, small.down.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([1.0])
small.up.weight.data, small.up.bias.data = torch.tensor([[3.0], [-1.0]]), torch.zeros(2)
print(small(torch.tensor([[2.0, 1.0], [-2.0, -1.0]])).tolist())

# %% [markdown]
# **Exercise 3: its place.** A wrapper around a frozen attention or FFN. It can hold several adapters by name, and `active`
# says which of them act: one, or a stack, one behind the other, or all at once with a *fusion* that mixes them. You will need
# all of that in section 4.
#
# *You should see* three placements with about as many numbers as LoRA of rank 2 on all layers (18,944), and a start close
# to the base.

# %% tags=["exercise"]
from labs_lib.methods.adapters import AdaptedSublayer

# %%
from labs_lib.lab.cards import table
from labs_lib.measure import count_parameters
from labs_lib.methods.adapters import inject_adapters

AdaptedSublayer = check(AdaptedSublayer)
base, tokenizer = lab.base()
SHAPES = {  # as in `labs sweep adapters`
    "Houlsby, 9 units": {"placement": "houlsby", "bottleneck": 9},
    "Pfeiffer, 18 units": {"placement": "pfeiffer", "bottleneck": 18},
    "parallel, 18 units": {"placement": "parallel", "bottleneck": 18, "exact": True, "scale": 4},
}


def adapted(name, seed=1, **more):
    """A fresh base with the adapters called `name`."""
    own = {"kind": BottleneckAdapter, "sublayer": AdaptedSublayer}
    generator = torch.Generator().manual_seed(seed)
    return inject_adapters(lab.base()[0], generator=generator, **SHAPES[name], **own, **more)


# %% tags=["hide-input"]
from labs_lib import load_task, load_tenant
from labs_lib.measure.quality import collate, encode_rows

tenant = load_tenant("fathom-eleven")
style = load_task("style", tenant=tenant.slug)
texts = style["train"][:8]
batch = collate(encode_rows(tokenizer, texts["prompt"], texts["completion"]), tokenizer.pad_token_id)
batch = {key: value.to(lab.device) for key, value in batch.items()}

# %%
rows = []
with torch.no_grad():
    logits = base(**batch).logits
    for name in SHAPES:
        model = adapted(name)
        moved = (model(**batch).logits - logits).abs().max()
        rows.append({"": name, "trained numbers": f"{count_parameters(model).trainable:,}", "logits move by": f"{moved:.0e}"})  # fmt: skip
table(rows)

# %% [markdown]
# ## 3. Prove it
# PEFT has no bottleneck adapters. AdapterHub's library `adapters` has, but it cannot be installed beside this course:

# %%
from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from peft import PeftType

wanted = SpecifierSet("~=4.57.6")  # what adapters 1.3.0 says it requires
print(
    "PEFT's methods:",
    len(PeftType),
    "| named after a bottleneck:",
    [t.value for t in PeftType if "BOTTLENECK" in t.value],
)
print(
    f"adapters wants transformers {wanted}; here is {version('transformers')}: {version('transformers') in wanted}"
)

# %% [markdown]
# So we prove it against the formula. Hooks change what a stock model's sub-layers make, in double precision, with two
# matrix products and nothing of ours but the numbers. Outputs and gradients are compared; then `gradcheck` compares the
# gradients with finite differences, which know nothing of backpropagation.

# %%
from labs_lib.methods.adapters import adapted_sublayers, adapter_state_dict


def by_formula(tensors, shape):
    """A stock model in float64; hooks on its sub-layers add what the formula says."""
    model, scale, parallel = lab.base()[0].double(), shape.get("scale", 1.0), shape["placement"] == "parallel"

    def hook(module, args, kwargs, output, where):
        h = output[0] if isinstance(output, tuple) else output
        read = (args[0] if args else kwargs["hidden_states"]) if parallel else h
        middle = torch.clamp(read @ tensors[f"{where}.down.weight"].T + tensors[f"{where}.down.bias"], min=0)
        h = h + scale * (middle @ tensors[f"{where}.up.weight"].T + tensors[f"{where}.up.bias"])
        return (h, *output[1:]) if isinstance(output, tuple) else h

    for where in {key.rsplit(".", 2)[0] for key in tensors}:
        act = lambda *call, where=where: hook(*call, where)  # noqa: E731
        model.get_submodule(where).register_forward_hook(act, with_kwargs=True)
    return model


# %%
rows = []
for name, shape in SHAPES.items():
    ours = adapted(name).double()
    for tensor in adapter_state_dict(ours).values():
        torch.nn.init.normal_(tensor, std=0.3)  # a fresh adapter does nothing worth comparing
    leaves = {key: value.clone().requires_grad_() for key, value in adapter_state_dict(ours).items()}
    outputs = [model(**batch) for model in (ours, by_formula(leaves, shape))]
    for output in outputs:
        output.loss.backward()
    mine = {f"{where}.{key}": p.grad for where, site in adapted_sublayers(ours).items() for key, p in site.adapters["default"].named_parameters()}  # fmt: skip
    off = max((mine[key] - leaf.grad).abs().max().item() for key, leaf in leaves.items())
    apart = (outputs[0].logits - outputs[1].logits).abs().max().item()
    rows.append({"": name, "logits differ by": f"{apart:.0e}", "gradients differ by": f"{off:.0e}"})
    assert max(apart, off) < 1e-9
table(rows)

# %%
toy = AdaptedSublayer(torch.nn.Linear(6, 6).double())
toy.adapters["a"] = BottleneckAdapter(
    6, 3, "gelu", std=0.5
).double()  # finite differences dislike ReLU's kink
toy.active = ["a"]
x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
inputs = (x, *toy.adapters["a"].parameters())
print("equal to finite differences:", torch.autograd.gradcheck(lambda x, *_: toy(x), inputs))

# %% [markdown]
# **The file**: ours, since nobody else's format has them. PEFT meets it and refuses by name.

# %%
import tempfile
from pathlib import Path

from labs_lib.methods.adapters_io import load_adapter, save_adapter
from peft import PeftModel

shelf = tempfile.TemporaryDirectory()
folder = Path(shelf.name)
ours = adapted("Houlsby, 9 units")
save_adapter(ours, folder / "houlsby", base="shipped")
again = adapter_state_dict(load_adapter(lab.base()[0], folder / "houlsby"))
print("same bits back:", all(torch.equal(again[k], v) for k, v in adapter_state_dict(ours).items()))
try:
    PeftModel.from_pretrained(lab.base()[0], folder / "houlsby")
except KeyError as error:
    print("PEFT: no method is called", error)

# %% [markdown]
# ### The chapter's code is another method
# Under "insert small bottleneck modules" the chapter prints `AdaptionPromptConfig`. That is LLaMA-Adapter
# ([Zhang et al., 2023](https://arxiv.org/abs/2303.16199)): in the upper layers, each token also attends to $K$ learned
# *prompts* $P$, through the layer's own frozen projections, and a *gate* $g$ decides how much of the result is added:
#
# $$h \leftarrow h + W_o\; g\; \mathrm{softmax}\!\Big(\frac{q\,(W_k P)^\top}{\sqrt{d_h}}\Big) W_v P, \qquad g = 0 \text{ at first}$$
#
# (The paper has a gate per head, PEFT one per layer.) No down, no up, no activation: it is prefix tuning's cousin (lab 09). Two things differ from a prefix: the softmax is its
# own, so no attention is taken from the text; and there is the gate.
#
# **Exercise 4: attention through a gate.** *You should see* nothing added at zero.

# %% tags=["exercise"]
from labs_lib.methods.llama_adapter import zero_gated_attention

# %%
zero_gated_attention = check(zero_gated_attention)
q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
for gate in (0.0, 0.5, 1.0):
    print(f"gate {gate}: adds {zero_gated_attention(q, k, v, torch.tensor([gate])).norm():.3f}")

# %% [markdown]
# **Your turn.** With the gate at zero, one of the two, the `"gate"` or the `"prompts"`, gets a gradient of exactly zero in the
# first step and has to wait. Which?

# %%
### BEGIN SOLUTION
### STUB: waits = ...  # "gate" or "prompts"
waits = "prompts"
### END SOLUTION
waits = check(waits, "lab10.waits")

# %% [markdown]
# **Equal to PEFT's?** The same prompts and (open) gates in both. *You should see* zeros, and your answer.

# %%
from labs_lib import load_base
from labs_lib.methods.llama_adapter import inject_llama_adapter, llama_adapter_state_dict, prompted_layers
from peft import AdaptionPromptConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as KNOWN


def fresh_base():
    """The lab's base; for a family that PEFT's class does not know, the proof is about the shipped one."""
    return (
        lab.base(dtype=torch.float32)[0]
        if base.config.model_type in KNOWN
        else load_base("tiny", device=lab.device)[0]
    )


depth = base.config.num_hidden_layers
layers = fresh_base().config.num_hidden_layers
ids = batch["input_ids"] % 1000  # tokens that every vocabulary has
some = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": ids}
ours = inject_llama_adapter(
    fresh_base(), prompts=10, layers=layers, generator=torch.Generator().manual_seed(1)
)
ours(**some).loss.backward()
grads = {
    name.rpartition(".")[2]: p.grad.norm().item() for name, p in ours.named_parameters() if p.requires_grad
}
print("first gradients:", {key: f"{value:.1e}" for key, value in grads.items()})
for i, layer in enumerate(prompted_layers(ours).values()):
    layer.adaption_gate.data.fill_(0.8 - 0.5 * i)
config = AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM")
theirs = get_peft_model(fresh_base(), config)
loaded = set_peft_model_state_dict(theirs, llama_adapter_state_dict(ours))
print("tensors that found no place:", loaded.unexpected_keys)


# %%
def results(model):
    model.zero_grad()
    output = model(**some)
    output.loss.backward()
    named = sorted(
        (n.removeprefix("base_model.model."), p) for n, p in model.named_parameters() if p.requires_grad
    )
    return {"logits": output.logits.detach(), "gradients": torch.cat([p.grad.flatten() for _, p in named])}


pair = results(ours.train()), results(theirs.train())
for what, mine in pair[0].items():
    difference = (mine - pair[1][what]).abs().max().item()
    print(f"{what:10s} differ by at most {difference:.0e}")
    assert difference <= 1e-4, what

# %%
from labs_lib.methods.adapters_io import load_llama_adapter, save_llama_adapter

save_llama_adapter(ours, folder / "ours", base="shipped")
theirs.save_pretrained(folder / "theirs")
there = PeftModel.from_pretrained(fresh_base(), folder / "ours")
there = get_peft_model_state_dict(there, save_embedding_layers=False)
back = llama_adapter_state_dict(load_llama_adapter(fresh_base(), folder / "theirs"))
for way, tensors in (("ours in PEFT:", there), ("PEFT's in ours:", back)):
    same = all(torch.equal(tensors[key], value) for key, value in llama_adapter_state_dict(ours).items())
    print(way, f"{len(tensors)} tensors, same bits: {same}")

# %% [markdown] tags=["takeaway"]
# Two methods carry the name "adapter" here. One is a small network behind (or beside) a sub-layer; the other is a few
# extra things to attend to, behind a gate. Read the code of what you configure, not the heading above it.

# %% [markdown]
# ## 4. Train it
# One customer's style, as in lab 01: 60 steps on 128 texts. The records hold each method's own sweep of learning rates
# (`labs sweep adapters`); the live run below repeats one of their points.

# %% tags=["hide-input"]
import numpy as np

from labs_lib.measure import load_record, mean_ci, paired_difference

SOURCES = [load_record(f"sweep_{name}") for name in ("adapters", "tune_lora", "tune_lora_style", "adalora")]
for each in SOURCES:
    print(each)
FACTS, STYLE = "knowledge, 512 facts", "style"
LORA2, QV9, FULL = "LoRA r2, all linear", "LoRA r9, q and v", "full fine-tuning"


def rows_of(arm, task, stage="final"):
    """Rows of an arm on a task in the first record that has it, by rate and seed."""
    for source in SOURCES:
        rows = [r for r in source.rows if (r["arm"]["name"], r["label"], r["stage"]) == (arm, task, stage)]
        if rows:
            return sorted(rows, key=lambda row: (row["lr"], row["seed"]))
    return []


def percent(rows, key="score"):
    return mean_ci([100 * row[key] for row in rows])


def difference(first, second, task):
    """First minus second in points, over the seeds that both have."""
    ours, others = ({r["seed"]: 100 * r["score"] for r in rows_of(arm, task)} for arm in (first, second))
    both = sorted(ours.keys() & others.keys())
    return paired_difference([ours[s] for s in both], [others[s] for s in both])


# %%
from labs_lib import fit
from labs_lib.measure.quality import style_quality

PFEIFFER = "Pfeiffer, 18 units"
row = rows_of(PFEIFFER, STYLE)[0]  # seed 1 of the record
shrink = min(1, 128 / base.config.hidden_size)  # the rate was found on width 128
model = adapted(PFEIFFER, seed=row["seed"])
run = fit(model, tokenizer, style["train"][:], steps=lab.steps(60), lr=shrink * row["lr"], seed=row["seed"])
test = style["test"][: lab.rows(48)]
quality = style_quality(model, tokenizer, test, tenant)
print(f"rate {run.lr:g}, last loss {run.final_loss:.4f} (recorded {row['loss']:.4f})")
print(f"exact texts {quality.exact:.1%} (recorded {row['score']:.1%}), rules kept {quality.compliance:.1%}")

# %% [markdown]
# **No merge, in numbers.** What does a trained adapter add to the hidden states of new texts, and how much of that could the
# best matrix (with a bias) add? Fitted by least squares on half of the tokens, tested on the other half. For LoRA the answer
# is all of it, by construction.
#
# *You should see* a part that no matrix reaches, in every block.

# %%
site_inputs = {}
for where, site in adapted_sublayers(model).items():
    keep = lambda module, args, where=where: site_inputs.update({where: args[0].detach()})  # noqa: E731
    site.adapters["default"].register_forward_pre_hook(keep)
unseen = collate(encode_rows(tokenizer, test["prompt"], test["completion"]), tokenizer.pad_token_id)
unseen = {key: value.to(lab.device) for key, value in unseen.items()}
real = unseen["attention_mask"].bool()
with torch.no_grad():
    model(**unseen)

# %%
rows = []
for where, site in adapted_sublayers(model).items():
    adapter, h = site.adapters["default"], site_inputs[where][real].double()
    added = adapter.double()(h).detach()
    active = (adapter.down(h) > 0).double().mean(0)
    one = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
    best = torch.linalg.lstsq(one[::2], added[::2]).solution
    missed = (one[1::2] @ best - added[1::2]).norm() / (added[1::2] - added[::2].mean(0)).norm()
    adapter.float()
    mixed = ((active > 0.01) & (active < 0.99)).sum()
    rows.append({"": where, "adds, of h": f"{added.norm() / h.norm():.2f}", "units that switch": f"{mixed} of {len(active)}", "no matrix reaches": f"{missed**2:.0%}"})  # fmt: skip
table(rows)

# %% [markdown]
# Mind the second column: after training an adapter adds *more* than its sub-layer made. It is no gentle correction. That
# will matter when two of them meet.

# %% [markdown]
# **How near to nothing must the start be?** Houlsby et al. (section 3.6) found any `std` below 0.01 good and larger ones
# worse. Twenty steps from each start:

# %%
starts = {"exact": {"exact": True}} | {f"std {std:g}": {"std": std} for std in (0.01, 0.1, 0.5)}
rows = []
for name in lab.grid(list(starts)):
    fresh = adapted(PFEIFFER, **starts[name])
    with torch.no_grad():
        first = fresh(**batch).loss.item()
    short = fit(fresh, tokenizer, style["train"][:], steps=lab.steps(20), lr=run.lr, seed=1, progress=False)
    rows.append({"start": name, "loss before": f"{first:.2f}", "after 20 steps": f"{short.final_loss:.3f}"})
table(rows)

# %% [markdown]
# Here a tenth is as good as nothing, and only a half is worse: at this size there is more room than in the paper. That a
# disturbed base can have a *lower* loss at first is no merit: it is only less sure of a style that is not the customer's.

# %% [markdown]
# ### A gate that starts at zero
# The same customer, now by LLaMA-Adapter: standard normal prompts in every layer, 37 of them for about the same number of
# trained parameters. Once with the gate at zero, as in the paper, once open from the start.
#
# **Predict** the loss before the first step, each way.

# %%
from transformers import TrainerCallback


class Gates(TrainerCallback):
    """Keeps the gates of all layers after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append([layer.adaption_gate.item() for layer in prompted_layers(model).values()])


LLAMA = "LLaMA-Adapter, 37 prompts"
rate, traces = shrink * rows_of(LLAMA, STYLE)[0]["lr"], {}
for start in (0.0, 1.0):
    prompted = inject_llama_adapter(lab.base()[0], 37, depth, torch.Generator().manual_seed(1))
    for layer in prompted_layers(prompted).values():
        layer.adaption_gate.data.fill_(start)
    settings = {"steps": lab.steps(40), "lr": rate, "seed": 1, "progress": False, "callbacks": [Gates()]}
    gated = fit(prompted, tokenizer, style["train"][:], **settings)
    traces[start] = gated.losses, settings["callbacks"][0].seen
    print(
        f"gate {start:g} at first: loss {gated.losses[0]:.2f}, after {gated.steps} steps {gated.final_loss:.3f}"
    )

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.3))
drawn = look("llama_adapter")
for start, line in ((0.0, "-"), (1.0, ":")):
    left.plot(
        range(1, 1 + len(traces[start][0])),
        traces[start][0],
        line,
        color=drawn.color,
        label=f"gate {start:g} at first",
    )
left.set_yscale("log")
left.legend()
gates = np.array(traces[0.0][1])
for i, path in enumerate(gates.T):
    right.plot(range(1, len(path) + 1), path, color=drawn.color, alpha=0.4 + 0.6 * i / len(gates.T))
    right.annotate(f"block {i}", (len(path), path[-1]), size=8, xytext=(3, 0), textcoords="offset points")
right.margins(x=0.12)
ends = {start: np.mean(losses[-4:]) for start, (losses, _) in traces.items()}
finding(
    left,
    f"Closed at first, it ends at {ends[0.0]:.2g}; open, at {ends[1.0]:.2g}",
    "step",
    "loss (nats per token)",
)
finding(right, f"Gates open both ways, up to {np.abs(gates).max():.2f}", "step", "gate")
show(
    fig,
    alt=f"Left: loss over the steps from a gate of 0 (solid) and of 1 (dotted), log axis; last values {ends[0.0]:.3g} and {ends[1.0]:.3g}. Right: the gate of each block over the steps, from 0 to {[round(float(g), 2) for g in gates[-1]]}.",
)

# %% [markdown]
# An open gate lets random prompts talk into every layer: a lower loss at first, for the reason just given, then a detour, and
# a worse end (one seed; the paper compares the two in its ablations). From zero, the gate opens as far as the prompts are
# worth hearing, and in either direction: nothing keeps it positive.

# %% [markdown]
# ### At equal parameters, against LoRA
# Every arm has about LoRA r2's 18,944 numbers, five rates (more where the best lay at the edge) and five fresh seeds.
#
# **Predict**: LoRA r2 recalls about 40 % of 512 new facts after 150 steps. And adapters?

# %% tags=["hide-input"]
HOULSBY, PARALLEL, MLP = "Houlsby, 9 units", "parallel, 18 units", "LoRA r3, MLP"
ARMS = {HOULSBY: "adapter", PFEIFFER: "adapter", PARALLEL: "parallel_adapter", LLAMA: "llama_adapter"}
ARMS |= {QV9: "lora", "LoRA r4, attention": "lora", MLP: "lora", LORA2: "lora", FULL: "full"}
results, scores = [], {}
for task in (FACTS, STYLE):
    for arm in ARMS:
        rows = rows_of(arm, task)
        if not rows:
            continue
        grid, scores[task, arm] = [row["lr"] for row in rows_of(arm, task, "sweep")], percent(rows)
        line = {"task": task.split(",")[0], "arm": arm, "numbers": f"{rows[0]['params']:,}"}
        line["rate"] = f"{rows[0]['lr']:g}{' (edge)' if rows[0]['lr'] in (min(grid), max(grid)) else ''}"
        line |= {"score %": str(scores[task, arm]), "old facts kept %": f"{percent(rows, 'kept').value:.0f}"}
        results.append(line)
table(results)

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
order = list(reversed(ARMS))
for ax, task in zip(axes, (FACTS, STYLE), strict=True):
    for height, arm in enumerate(order):
        if (task, arm) in scores:
            score, drawn = scores[task, arm], look(ARMS[arm])
            ax.plot(np.clip(score.ci, 0, 100), [height] * 2, color=drawn.color, lw=2)
            ax.plot(score.value, height, drawn.marker, color=drawn.color, ms=7)
    ax.set_yticks(range(len(order)), order)
    ax.set_xlim(-3, 103)
near = [scores[STYLE, arm].value for arm in ARMS if (STYLE, arm) in scores]
best = max(scores[FACTS, arm].value for arm in (HOULSBY, PFEIFFER, PARALLEL))
finding(
    axes[0], f"Facts: adapters {best:.0f} %, LoRA r2 {scores[FACTS, LORA2].value:.0f} %", "facts recalled (%)"
)
finding(axes[1], f"Style: {min(near):.0f} to {max(near):.0f} %, whoever", "exact texts (%)")
told = {f"{task.split(',')[0]}, {arm}": round(score.value) for (task, arm), score in scores.items()}
show(
    fig,
    alt=f"Dots with 95 % intervals, one row per method, for facts recalled and for exact texts of the style, in percent: {told}.",
)

# %%
for task in (FACTS, STYLE):
    for arm in (HOULSBY, PARALLEL):
        print(f"{task:21s} {arm:18s} minus LoRA r2: {difference(arm, LORA2, task)} points, paired seeds")
print(f"{FACTS:21s} {PARALLEL:18s} minus {QV9}: {difference(PARALLEL, QV9, FACTS)} points")
print(f"units: {depth * 18} in Pfeiffer's adapters, {depth * base.config.intermediate_size:,} in the FFNs")

# %% [markdown]
# On the style nothing but LoRA on q and v falls behind, a little. On the facts the adapters are where that LoRA is, and far
# below LoRA with as many numbers *inside* the FFN. So it is not the bend that decides; it is the place. One reading: a unit
# is one key and one value of a memory ([Geva et al., 2021](https://arxiv.org/abs/2012.14913)). An adapter brings a few new
# ones, LoRA turns all those that the FFN has. More units on the same facts, or more steps, would tell.
#
# Look at the old facts, too: the parallel adapter pays most for its style.

# %% [markdown]
# ### What stands in the way, delays
# LoRA, merged, is the base. An adapter cannot be merged, so every token walks through it. The work is tiny; but it is a step
# of its own, which starts only when the one before has ended. One token at a time, for one customer, is where that hurts.
#
# **Your turn.** How many percent longer does a token take with Houlsby's two adapters per block?

# %%
### BEGIN SOLUTION
### STUB: predict_latency = ...  # in percent
predict_latency = 20
### END SOLUTION
predict_latency = check(predict_latency, "lab10.predict_latency")

# %%
from labs_lib.measure import count_flops, time_ratios
from labs_lib.methods.lora import inject_lora, merge_lora

ways = {"base": lambda: lab.base()[0], "LoRA r2, merged": lambda: merge_lora(inject_lora(lab.base()[0], "all-linear", 2, 4))}  # fmt: skip
ways["LoRA r2, not merged"] = lambda: inject_lora(lab.base()[0], "all-linear", 2, 4)
ways |= {name: lambda name=name: adapted(name) for name in SHAPES}
ways[LLAMA] = lambda: inject_llama_adapter(lab.base()[0], 37, depth)


def next_token(model, rows, past=64):
    """One step of writing for `rows` texts, after `past` tokens that lie in the cache."""
    ids = torch.randint(3, base.config.vocab_size, (rows, past + 1), device=lab.device)
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:, :past], use_cache=True).past_key_values

    @torch.no_grad()
    def step():
        model(input_ids=ids[:, past:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


# %%
models = {name: make() for name, make in ways.items()}
alone = time_ratios({n: next_token(m, 1) for n, m in models.items()}, "base", rounds=lab.rows(61))
crowd = time_ratios({n: next_token(m, 64) for n, m in models.items()}, "base", rounds=lab.rows(21))
work = {name: count_flops(next_token(model, 1)) for name, model in models.items()}
rows = []
for name in models:
    line = {"": name, "FLOPs": f"{work[name] / work['base'] - 1:+.1%}"}
    for title, times in (("one text", alone), ("64 texts", crowd)):
        ratio = times[name].ratio
        line[f"{title}, time"] = (
            f"{100 * (ratio.value - 1):+.0f} % [{100 * (ratio.lo - 1):+.0f}, {100 * (ratio.hi - 1):+.0f}]"
        )
    rows.append(line)
print(
    f"You predicted {predict_latency:+g} % for Houlsby. Time of one token, base: {1e3 * alone['base'].seconds:.1f} ms"
)
table(rows)

# %% [markdown]
# Far more time than work: the extra steps wait in line, whatever they compute. With many texts at once the line is better
# used. LoRA *not* merged delays even more, since it stands beside every layer; but it need not stay so. And LLaMA-Adapter,
# as in PEFT, makes the keys and values of its prompts anew for every token: that is real work. (Measured in turns, base and
# others within each round; medians with 95 % intervals.) Published, on GPUs and larger models:

# %%
from labs_lib.measure import load_published

published = load_published("papers")["tables"]
for name in ("adapter_latency", "adapter_drop"):
    figures = published[name]
    print(f"{figures['unit']} ({figures['source']['cite']}, as reported)")
    for row in figures["rows"]:
        print(f"  {row['label']}: {row['ms'] if 'ms' in row else str(row['lo']) + ' to ' + str(row['hi'])}")

# %% [markdown]
# ### Two skills, one model
# The chapter's table recommends adapters for "Compositional multi-task". Here is what it may mean: somebody has trained an
# adapter for a customer's style, somebody else one for 160 facts. Nobody has both data sets. Can the two be put together?
#
# Adapters are modules, so there are ways that LoRA does not have: one *behind* the other, in either order, or both side by
# side with a small attention that decides, token by token, whom to ask (AdapterFusion,
# [Pfeiffer et al., 2021](https://arxiv.org/abs/2005.00247)).

# %% tags=["hide-input"]
from labs_lib.training import composition

record = load_record("compose_facts")
print(record)


def composed(kind, way, stage="final"):
    """Rows of one way to put two adapters of a kind together, by seed."""
    return [r for r in record.rows if (r["kind"], r["way"], r["stage"]) == (kind, way, stage)]


facts = load_task("knowledge", facts=composition.FACTS)["train"][:]
practised, others = composition.part(facts, 0, 64), composition.part(facts, 96, composition.FACTS)

# %%
from labs_lib.measure.quality import recall
from labs_lib.methods.adapters import use_adapters

LESSONS = {"style": (style["train"][:], 60, 16), "facts": (facts, composition.FACT_STEPS, 32)}
both = lab.base()[0]
for (name, (data, steps, size)), label in zip(LESSONS.items(), (STYLE, FACTS), strict=True):
    own = {
        "kind": BottleneckAdapter,
        "sublayer": AdaptedSublayer,
        "generator": torch.Generator().manual_seed(1),
    }
    inject_adapters(both, name=name, **SHAPES[PFEIFFER], **own)  # freezes all that was there
    lr = shrink * rows_of(PFEIFFER, label)[0]["lr"]
    fit(both, tokenizer, data, steps=lab.steps(steps), lr=lr, batch_size=size, seed=1, progress=False)


def skills(model):
    """Exact texts of the style, and recall of 64 facts, in percent."""
    known = recall(model, tokenizer, {key: values[: lab.rows(64)] for key, values in others.items()})
    return 100 * style_quality(model, tokenizer, test, tenant).exact, 100 * float(np.mean(known))


# %% [markdown]
# **Predict**: each adapter alone is nearly perfect at its own. With the style's adapter first and the facts' behind it, how
# many of the facts are left?

# %%
### BEGIN SOLUTION
### STUB: predict_stack = ...  # in percent
predict_stack = 50
### END SOLUTION
predict_stack = check(predict_stack, "lab10.predict_stack")

# %%
rows = []
for names in (["style"], ["facts"], ["style", "facts"], ["facts", "style"]):
    exact, known = skills(use_adapters(both, names))
    rows.append(
        {"acting": " then ".join(names), "style: exact %": f"{exact:.0f}", "facts recalled %": f"{known:.0f}"}
    )
print(f"You predicted {predict_stack:g} % of the facts.")
table(rows)

# %% [markdown]
# **Exercise 5: fusion.** For every token the hidden state asks a question, each adapter's addition answers, and a softmax
# over the *adapters* says how much of each is taken. Both adapters stay frozen; only the three matrices train.
#
# *You should see* a fresh fusion that takes about half of each.

# %% tags=["exercise"]
from labs_lib.methods.adapters import AdapterFusion

# %%
from labs_lib.methods.adapters import fuse_adapters

AdapterFusion = check(AdapterFusion)
fuse_adapters(both, ["style", "facts"], torch.Generator().manual_seed(1), kind=AdapterFusion)
print(f"a fusion trains {count_parameters(both).trainable:,} numbers; the adapters have", end=" ")
print(f"{sum(t.numel() for n in LESSONS for t in adapter_state_dict(both, n).values()):,} together")
exact, known = skills(both)
print(f"fresh: exact {exact:.0f} %, facts {known:.0f} %")

# %% [markdown]
# Its practice: the customer's texts, and 64 of the facts, in 60 steps. Scored are 64 *other* facts, which the fusion never
# sees: only the facts' adapter has them. (So has the style's, on other products.)

# %%
streams = (composition.Stream(style["train"][:], 16), composition.Stream(practised, 32))
rate = shrink * composed("adapter", "fusion")[0]["lr"]
composition.train(both, tokenizer, streams, lab.steps(60), rate, seed=1)
exact, known = skills(both)
print(f"trained: exact {exact:.0f} %, facts {known:.0f} %")


def asked(rows):
    """For each block: how much of the facts' adapter the fusion takes, mean over the tokens of these rows."""
    shares, hooks = {}, []
    for where, site in adapted_sublayers(both).items():
        keep = lambda module, args, _, where=where: shares.update({where: module.weights(*args)[..., 1]})  # noqa: E731
        hooks.append(site.fusion.register_forward_hook(keep))
    tokens = collate(encode_rows(tokenizer, rows["prompt"], rows["completion"]), tokenizer.pad_token_id)
    with torch.no_grad():
        both(**{key: value.to(lab.device) for key, value in tokens.items()})
    for hook in hooks:
        hook.remove()
    real = tokens["attention_mask"].bool().to(lab.device)
    return [share[real].mean().item() for share in shares.values()]


# %% tags=["hide-input"]
shares = {"copy": asked(composition.part(test, 0, 16)), "questions": asked(composition.part(others, 0, 32))}
fig, ax = plt.subplots(figsize=(6.5, 2.9))
blocks = np.arange(len(shares["copy"]))
for offset, (kind, alpha) in zip((-0.18, 0.18), (("copy", 0.35), ("questions", 0.9)), strict=True):
    ax.bar(
        blocks + offset,
        [100 * s for s in shares[kind]],
        0.34,
        color=own_color,
        alpha=alpha,
        label=f"tokens of {kind}",
    )
ax.axhline(50, color="#7A7A7A", ls="--", lw=1)
ax.set_xticks(blocks, [f"block {i}" for i in blocks])
ax.set_ylim(0, 118)
ax.legend(loc="upper left", fontsize=8, ncols=2)
means = {kind: 100 * float(np.mean(each)) for kind, each in shares.items()}
finding(
    ax,
    f"Asked of the facts' adapter: {means['questions']:.0f} % in questions, {means['copy']:.0f} % in copy",
    "",
    "share of the facts' adapter (%)",
)
show(
    fig,
    alt=f"Bars per block: how much of the facts' adapter the fusion takes, for tokens of copy {[round(100 * s) for s in shares['copy']]} and of questions {[round(100 * s) for s in shares['questions']]} percent.",
)

# %% [markdown]
# It has learned whom to ask: more of the facts' adapter where a question stands, more of the style's where copy is written.

# %% [markdown]
# **All ways, with seeds.** `labs compose facts` has each of them, fresh seeds, and two controls: a *new* adapter that practises
# what the fusion practises (can the facts come from there?), and *one* adapter of twice the size that gets all data at once
# (what is there to gain?). LoRA of as many numbers can be added up too.

# %% tags=["hide-input"]
NAMES = composition.MEANS | {"first": "the style's alone", "second": "the facts' alone"}
NAMES |= {"first, second": "stack: style's, then facts'", "second, first": "stack: facts', then style's"}
rows = []
for kind, ways_ in composition.WAYS.items():
    for way in ways_:
        done = composed(kind, way)
        if done:
            line = {
                "": f"{'LoRA r2' if kind == 'lora' else 'adapters'}: {NAMES[way]}",
                "trained": f"{done[0]['trained']:,}",
            }
            for title, key in (("style: exact %", "first"), ("facts recalled %", "second")):
                line[title] = str(percent(done, key))
            for title, key in (
                ("rules kept %", "compliance"),
                ("practised facts %", "practised"),
                ("old facts %", "kept"),
            ):
                line[title] = f"{percent(done, key).value:.0f}"
            rows.append(line)
table(rows)

# %% tags=["hide-input"]
SHORT = {"first": "style's alone", "second": "facts' alone"}
SHORT |= {"first, second": "style's, then facts'", "second, first": "facts', then style's"}
SHORT |= {"fresh": "new adapter", "one": "one for both"}
told = {}
for kind, ways_ in composition.WAYS.items():
    for way in ways_:
        if done := composed(kind, way):
            told[kind, way] = percent(done, "first").value, percent(done, "second").value
added = {"adapter": 0.0, "lora": 0.0}  # the lesser of the two skills, in the best way that needs no training
for (kind, way), both_scores in told.items():
    if way not in (*composition.SKILLS, *composition.RATES):
        added[kind] = max(added[kind], min(both_scores))
fused = min(told.get(("adapter", "fusion"), (0, 0)))

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 5))
placed = []
for (kind, way), (x, y) in sorted(told.items(), key=lambda each: each[1][1]):
    drawn, control = look(kind), way in ("fresh", "one")
    ax.plot(x, y, drawn.marker, color=drawn.color, ms=8, mfc="white" if control else drawn.color)
    height = y
    while any(abs(x - px) < 30 and abs(height - py) < 4.5 for px, py in placed):
        height += 0.5  # labels of neighbours, one above the other
    placed.append((x, height))
    line = {"arrowstyle": "-", "lw": 0.6, "color": drawn.color}
    name = SHORT.get(way, way) + (" (LoRA)" if kind == "lora" else "")
    ax.annotate(
        name, (x, y), xytext=(x + 2.5, height), size=8, va="center", color=drawn.color, arrowprops=line
    )
ax.set(xlim=(-4, 128), ylim=(-6, 112))
title = f"Both skills at once: adapters {added['adapter']:.0f} %, LoRAs {added['lora']:.0f} %, a fusion {fused:.0f} %"
finding(ax, title, "style: exact texts (%)", "facts recalled (%)")
points = {f"{kind}, {SHORT.get(way, way)}": (round(x), round(y)) for (kind, way), (x, y) in told.items()}
show(
    fig,
    alt=f"Facts recalled against exact texts of the style, in percent, one point per way to put two adapters together, means of the seeds: {points}.",
)

# %% [markdown]
# As they are, two adapters ruin each other. In neither order, nor side by side, is an exact text left (hardly one), and most
# facts are gone: each learned to read and write the states of a base without the other. Two LoRAs added up lose less,
# half of each least.
#
# A trained fusion brings most of the style back and about half of the facts that it has *not* practised. The new adapter,
# after the same practice, knows none of those: they come from the facts' adapter. The practised ones it has nearly all:
# its value matrices, larger than both adapters, learned them by heart.
#
# One adapter for both, on all the data, beats all of this.

# %% [markdown] tags=["takeaway"]
# Adapters can be put together in more ways than LoRA. They do not compose by themselves: a fusion must practise on both
# skills, and keeps a part of either. It is for somebody else's skill whose data you do not have. If you have the data, train
# one adapter on all of it.

# %% [markdown]
# ## 5. The chapter on trial
# **Claim 15**: the code under "insert small bottleneck modules between transformer layers" does that, and the table gives such
# adapters 0.5 to 3 % of the parameters. The chapter's very lines, on Llama-2-7B without its weights: which modules appear, and
# how many numbers train?

# %%
from labs_lib import random_like
from labs_lib.models.twins import peft_parameter_count

chapters = AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM")
llama = random_like("llama-2-7b")  # shapes without numbers
count = peft_parameter_count(llama, chapters)
share = 100 * count / count_parameters(llama).total
print(f"{count:,} trained numbers = 30 x (10 x 4,096 + 1), {share:.3f} %")


def linears(model):
    return sum(isinstance(module, torch.nn.Linear) for module in model.modules())


new = linears(theirs) - linears(fresh_base())
houlsbys = linears(adapted("Houlsby, 9 units")) - linears(base)
print(f"new linear layers: PEFT's AdaptionPrompt {new}, Houlsby's {houlsbys}")
claim(15).observe(parts={"bottleneck": new > 0, "share": share})

# %% [markdown]
# And on models with fewer than 30 layers the chapter's lines do not run:

# %%
rows = []
for name in ("llama-2-7b", "smollm2-135m", "llama-3.2-3b", "llama-3.2-1b"):
    twin = random_like(name)
    try:
        said = f"{peft_parameter_count(twin, chapters):,} trained"
    except ValueError as error:
        said = f"ValueError: {error}"
    rows.append({"model": name, "layers": twin.config.num_hidden_layers, "adapter_layers=30": said})
table(rows)

# %% [markdown]
# **Your turn.** What the heading promised: Houlsby's adapters with 64 units on Llama-2-7B (32 blocks, width 4,096). How many
# numbers train?

# %%
### BEGIN SOLUTION
### STUB: houlsby_7b = ...  # a whole number
houlsby_7b = 32 * 2 * (2 * 4096 * 64 + 64 + 4096)
### END SOLUTION
houlsby_7b = check(houlsby_7b, "lab10.houlsby_7b")

# %%
from labs_lib.methods.adapters import count_adapters

total = count_parameters(llama).total
for placement in ("houlsby", "pfeiffer"):
    units = {m: 100 * count_adapters(4096, m, 32, placement) / total for m in (8, 64, 128, 256, 512)}
    print(f"{placement:9s}", ", ".join(f"{m} units {share:.2f} %" for m, share in units.items()))

# %% [markdown]
# So the table's "0.5-3 %" is Houlsby's kind with some 64 to 380 units, thirty times the code's 0.018 %: the row and the code
# describe two methods. The rest of that row, measured at equal parameters on our base: **memory** "Medium" (LoRA's is "Low"),
# all tensors at the peak of a training step:

# %%
from labs_lib.training.adapt import Adapted
from labs_lib.training.costs import training_costs

sixteen = style["train"][:16]
full_batch = collate(encode_rows(tokenizer, sixteen["prompt"], sixteen["completion"]), tokenizer.pad_token_id)
full_batch = {key: value.to(lab.device) for key, value in full_batch.items()}
ways["LoRA r9, q and v"] = lambda: inject_lora(lab.base()[0], ["q_proj", "v_proj"], 9, 18)
names = ("LoRA r2, not merged", "LoRA r9, q and v", *SHAPES, LLAMA)
spent = {name: training_costs(Adapted(ways[name]()), full_batch) for name in names}
rows = []
for name, cost in spent.items():
    line = {
        "": name.removesuffix(", not merged"),
        "numbers": f"{cost['params']:,}",
        "peak, MB": f"{cost['peak_bytes'] / 1e6:.1f}",
    }
    rows.append(
        line | {"FLOPs of a step, of LoRA's": f"{cost['train_flops'] / spent[names[0]]['train_flops']:.2f}"}
    )
table(rows)

# %% [markdown]
# For the gradient of a matrix, its input must be kept. LoRA on all linear layers keeps the inputs of every one, adapters
# those of one or two places per block. So at equal numbers the adapters need *less* than that LoRA: "Medium" against "Low"
# is the wrong way round.
#
# **Inference overhead** "Small (sequential)": of the work, yes; of the time, see above. **Best for** "Compositional
# multi-task": what you measured in section 4 does not support it. Two trained adapters put together lost both skills, LoRAs
# lost less, and a fusion has to practise.

# %% [markdown]
# ## 6. When would you choose it?
# For one task LoRA: as good at the style, better at facts, and merged it delays nothing. Adapters when skills from several
# people are to be mixed by a trained fusion and the delay does not matter, or where only a sub-layer's output is within
# reach. LLaMA-Adapter when the base must be untouched at the first step, to the last bit, and the text is short.
#
# **The failure you will meet**: LLaMA-Adapter's files name layers, and PEFT puts the prompts into the *top* ones. Load an
# adapter into a model of another depth, and nothing of it is used. Nobody says so.

# %%
from transformers import AutoModelForCausalLM
from labs_lib.errors import LabsError
from labs_lib.models.base import base_config
from labs_lib.errors import LabsError


def of_depth(layers):
    """A small random Llama of so many layers, the same numbers every time."""
    torch.manual_seed(lab.seed)
    shape = base_config("tiny")
    shape.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(shape).eval()


shallow = inject_llama_adapter(of_depth(2), prompts=5, layers=2)
for layer in prompted_layers(shallow).values():
    layer.adaption_gate.data.fill_(1.0)
save_llama_adapter(shallow, folder / "shallow")
ids = some["input_ids"][:2].cpu()
with torch.no_grad():
    deep = of_depth(4)(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(of_depth(4), folder / "shallow").eval()(input_ids=ids).logits
print("PEFT loads it into 4 layers; the model is as without it:", torch.equal(loaded, deep))
try:
    load_llama_adapter(of_depth(4), folder / "shallow")
except LabsError as error:
    print("ours refuses:", str(error).partition(": ")[2].partition(", which")[0])

# %% [markdown]
# More to know:
#
# - **A mixed batch.** PEFT's AdaptionPrompt takes `adapter_names` and ignores it, as IA3 does (lab 11).
# - **A bias in attention's output projection**: PEFT adds it twice, so that even a closed gate changes the model.
# - **Order.** A stack is not a sum: `["style", "facts"]` and `["facts", "style"]` are two models.
# - **Dead units.** A ReLU unit that never fires gets no gradient and stays dead.

# %% [markdown]
# **Rows for the map** of [He et al., 2022](https://arxiv.org/abs/2110.04366), every method as a change to a hidden state
# (lab 11 began it). Not written by hand: `describe` pushes at each module and looks what moves.

# %%
from labs_lib.methods.unified import describe

probe = torch.randint(3, base.config.vocab_size, (2, 48))
rows = []
for name in (*SHAPES, LLAMA):
    for design in describe(ways[name]().cpu().float(), probe):
        line = {"method": name.split(",")[0], "where": design.where, "reads": design.insertion}
        rows.append(line | {"change": design.form, "put together": design.composition, "scale": design.scale})
table(rows)

# %% [markdown]
# An adapter reads what the sub-layer *made* and adds to it; the parallel one reads what the sub-layer *reads*, as LoRA does.
# LoRA is the parallel adapter without the bend: that is why it can be folded away, and why it stays a matrix.

# %% [markdown]
# ## 7. Go further
# - **A real model.** `PROFILE = "gpu"` and a `MODEL_ID`: the same cells. How much slower is a token with adapters there?
# - **Open exercise 1.** AdapterDrop ([Rückle et al., 2021](https://arxiv.org/abs/2010.11918)) leaves adapters out of the lower
#   blocks to save time. Switch those of your style's adapter off, one block after another from below. What is left?
# - **Open exercise 2.** How much longer does a token take with a fusion of two adapters than with one adapter?

# %% tags=["solution-only"]
rows = []
for dropped in range(depth + 1):
    for i, site in enumerate(adapted_sublayers(model).values()):
        site.active = ["default"] if i >= dropped else []
    score = style_quality(model, tokenizer, test, tenant)
    rows.append(
        {
            "blocks without": dropped,
            "exact %": f"{100 * score.exact:.0f}",
            "rules kept %": f"{100 * score.compliance:.0f}",
        }
    )
table(rows)

# %% tags=["solution-only"]
single, fused = (
    next_token(adapted(PFEIFFER), 1),
    next_token(use_adapters(both, ["style", "facts"], fused=True), 1),
)
print(
    "fusion over one adapter:",
    time_ratios({"fused": fused, "one": single}, "one", rounds=lab.rows(61))["fused"],
)

# %% [markdown] tags=["solution-only"]
# **Answer 1.** Without the lowest block's adapter no text is right any more: the adapters above it learned to read what it
# wrote. AdapterDrop prepares for it: a random number of the lower ones is left out while training.
#
# **Answer 2.** A fusion runs every adapter and three matrices of full width besides. The time above says what that costs
# here; the matrices cost the more, the wider the model.

# %%
progress()
