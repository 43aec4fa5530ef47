"""Lab 13, the zoo and the unified view. Its records are `labs sweep mix_and_match`, those of labs 02, 08 and 09, and `labs bakeoff`."""

# %% tags=["parameters"]
PROFILE = ""  # "" chooses for this machine; or "smoke", "cpu", "t4", "gpu"
MODEL_ID = ""  # "" is the shipped base; or any causal LM on the Hugging Face hub

# %% tags=["setup"]
from labs_lib import check, claim, progress, setup
from labs_lib.lab.plots import finding, look, show

lab = setup(lab="13", profile=PROFILE, model_id=MODEL_ID)

# %% [markdown]
# ## 1. The idea
# LoRA spends its numbers on two thin matrices: the update of a weight $W$ has rank $r$ at most. There are other ways to
# spend them.
#
# | Method | Update $\Delta W$ | Trained |
# |---|---|---|
# | LoRA | $s\,BA$ | $A, B$ |
# | [VeRA](https://arxiv.org/abs/2310.11454) | $\mathrm{diag}(b)\,B\,\mathrm{diag}(d)\,A$; one random $A, B$ for all layers | $b, d$ |
# | [Tied-LoRA](https://arxiv.org/abs/2311.09578) | $s\,\mathrm{diag}(v)\,B\,\mathrm{diag}(u)\,A$; $A, B$ tied over the blocks | all |
# | [LoHa](https://arxiv.org/abs/2108.06098) | $s\,(A_1 B_1) \odot (A_2 B_2)$, number by number | all |
# | [LoKr](https://arxiv.org/abs/2309.14859) | $s\,w_1 \otimes w_2$, Kronecker | $w_1, w_2$ |
# | [OFT](https://arxiv.org/abs/2306.07280) | $W R^\top - W$; $R$ turns blocks of inputs | $R$ |
# | [BOFT](https://arxiv.org/abs/2311.06243) | the same; $R$ is rounds of turns and shuffles | $R$, a scale |
# | [MiSS](https://arxiv.org/abs/2409.15371) | $[\,D\;D\;D \cdots]$ | $D$ |

# %% [markdown]
# **By hand.** Eight numbers make sixteen:
#
# $$\begin{pmatrix} 1 & 2 \\ 0 & 1 \end{pmatrix} \otimes \begin{pmatrix} 1 & 1 \\ 1 & 1 \end{pmatrix} =
# \begin{pmatrix} 1 & 1 & 2 & 2 \\ 1 & 1 & 2 & 2 \\ 0 & 0 & 1 & 1 \\ 0 & 0 & 1 & 1 \end{pmatrix}$$
#
# Its rank is $2 \cdot 1$, the product of the ranks. And number by number, one column times one row is still that:
# $(ab^\top) \odot (cd^\top) = (a \odot c)(b \odot d)^\top$. So a sum of $r$ of them times a sum of $r$ of them is a sum of
# $r^2$.
#
# **Your turn.** LoHa of rank 4 has as many numbers as LoRA of rank 8. What is the highest rank that its update can have?

# %%
### BEGIN SOLUTION
### STUB: loha_rank = ...  # a whole number
loha_rank = 4 * 4
### END SOLUTION
loha_rank = check(loha_rank, "lab13.loha_rank")

# %% [markdown]
# **Eight ways to spend about a thousand numbers.** Each method gets random numbers, on a layer whose weight is the
# identity, $64 \times 64$, so that you see the structure and nothing else.
#
# **Predict** which of them reach the full rank of 64.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch

from labs_lib.methods.lora import inject_lora
from labs_lib.methods.updates import spectrum, update_of
from labs_lib.methods.zoo import ZOO
from labs_lib.methods.zoo.layer import inject_zoo

SIZES = {  # about 1,024 numbers on this layer; VeRA has 128
    "lora": {"rank": 8, "alpha": 8},
    "vera": {"rank": 64},
    "tied_lora": {"rank": 7, "alpha": 7},
    "loha": {"rank": 4, "alpha": 4},
    "lokr": {"rank": 32, "alpha": 32, "factor": 2},
    "oft": {"block": 32},
    "boft": {"block": 8, "factors": 2},
    "miss": {"rank": 16},
}


def shaken(method, options, size=0.3):
    """A model of one identity layer, "layer", with the method on it, its trained numbers random."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 64, bias=False)})
    torch.nn.init.eye_(model["layer"].weight)
    generator = torch.Generator().manual_seed(0)
    kind = () if method == "lora" else (ZOO[method],)
    model = (inject_zoo if kind else inject_lora)(model, *kind, ["layer"], generator=generator, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 4, figsize=(11, 5.9), layout="constrained")
ranks, numbers = {}, {}
for ax, (method, options) in zip(axes.flat, SIZES.items(), strict=True):
    model = shaken(method, options)
    update = update_of(model, "layer")
    ranks[method] = spectrum(update).rank
    numbers[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    edge = update.abs().quantile(0.99).item()
    ax.imshow(update, cmap="PuOr_r", vmin=-edge, vmax=edge, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{look(method).label}: rank {ranks[method]}", color=look(method).color)
    ax.set_xlabel(f"{numbers[method]:,} numbers", fontsize=9)
    ax.grid(visible=False)
fig.suptitle(f"About a thousand numbers reach any rank from {min(ranks.values())} to {max(ranks.values())}")
said = ", ".join(f"{look(m).label} rank {r} from {numbers[m]:,}" for m, r in ranks.items())
show(
    fig,
    alt=f"Eight heat maps of a random update of a 64 by 64 layer. LoKr repeats four tiles, OFT has two blocks and BOFT four on the diagonal, MiSS a band four times over; the others show crossing stripes. {said}.",
)

# %% [markdown]
# So rank is cheap. Whether it is worth anything is what training must tell.

# %% [markdown]
# ## 2. Build it
# Every method of the zoo is a `ZooLinear`: `learn` says what trains, `delta` is the change of the weight as a matrix, and
# the layer's output is $W x + \Delta W x$. A method that can avoid the matrix also has an `update`.
#
# **Exercise 1: LoHa.** *You should see* rank 4 at the factors, 16 at the product, and no change at the start.

# %% tags=["exercise"]
from labs_lib.methods.zoo.loha import LoHaLinear

# %%
LoHaLinear = check(LoHaLinear)
layer = LoHaLinear(torch.nn.Linear(64, 64), rank=4, alpha=4)
print("nothing at the start:", not layer.delta().any())
torch.nn.init.normal_(layer.hada_w2_b)
first = layer.hada_w1_a @ layer.hada_w1_b
print([torch.linalg.matrix_rank(each).item() for each in (first, layer.delta())])

# %% [markdown]
# **Exercise 2: OFT.** It adds nothing: it turns what the layer reads. `wide` makes half precision float32; `Held` is a module that
# only holds tensors, because PEFT keeps them so. `__init__` is given.
#
# *You should see* that turning keeps the length of every row, and that five powers of $Q$ are a rotation only while $Q$ is
# small.

# %% tags=["exercise"]
from labs_lib.methods.zoo.oft import OFTLinear

# %%
OFTLinear = check(OFTLinear)


def no_rotation(layer):
    """How far from a rotation: the largest entry of R R^T - 1."""
    R = layer.rotations().detach()
    return (R @ R.mT - torch.eye(R.shape[-1]).to(R)).abs().max().item()


for size in (0.01, 0.1, 0.3):
    layer = OFTLinear(torch.nn.Linear(64, 64), block=32)
    torch.nn.init.normal_(layer.oft_R.weight, std=size)
    W = layer.base.weight
    stretched = ((W + layer.delta()).norm(dim=1) / W.norm(dim=1)).max().item()
    print(
        f"Q of size {size}: a row's length times {stretched:.3f}, off a rotation by {no_rotation(layer):.1e}"
    )

# %% [markdown]
# **Exercise 3: count what matters.** A rank counts every direction, however faint. Two softer counts weigh them: the
# effective rank by the entropy of the singular values, the stable rank by their squares.
#
# *You should see* for a matrix of two strong and two faint directions: 4, about 2, about 2.

# %% tags=["exercise"]
from labs_lib.methods.updates import spectrum

# %%
spectrum = check(spectrum)
found = spectrum(torch.diag(torch.tensor([1.0, 0.9, 0.01, 0.01, 0.0])))
print(f"rank {found.rank}, effective {found.effective_rank:.2f}, stable {found.stable_rank:.2f}")

# %% [markdown]
# **The other five** are as short; read them in `labs_lib/methods/zoo/`. On all linear layers of this model, each with about
# as many numbers as LoRA of rank 8 (VeRA is made to have fewer):

# %%
import inspect

from labs_lib.lab.cards import table
from labs_lib.measure import count_parameters
from labs_lib.methods.zoo.layer import zoo_layers

KINDS = ZOO | {"loha": LoHaLinear, "oft": OFTLinear}  # yours among them
PLAN = {
    "vera": {"rank": 256},
    "tied_lora": {"rank": 29, "alpha": 16},
    "loha": {"rank": 4, "alpha": 8},
    "lokr": {"rank": 16, "alpha": 16, "factor": 2},
    "oft": {"block": 32},
    "boft": {"block": 8, "factors": 2},
    "miss": {"rank": 15},
}


def adapted(method):
    """A fresh base with the method on all its linear layers."""
    generator = torch.Generator().manual_seed(lab.seed)
    if method == "lora":
        return inject_lora(lab.base()[0], "all-linear", 8, 16, generator=generator)
    return inject_zoo(lab.base()[0], KINDS[method], generator=generator, **PLAN[method])


def code_lines(kind):
    """Lines of a class that are no docstring and not blank."""
    lines = [line for line in inspect.getsource(kind).splitlines() if line.strip()]
    return (
        len(lines) - 1 - sum(bool(line.strip()) for line in kind.__doc__.splitlines())
    )  # 1: the closing quotes


# %%
base, tokenizer = lab.base()
ids = torch.arange(5, 45, device=lab.device).view(2, 20)
with torch.no_grad():
    plain, rows = base(input_ids=ids).logits, []
    for method in PLAN:
        model = adapted(method)
        same = torch.equal(model(input_ids=ids).logits, plain)
        line = {"method": look(method).label, "lines of code": code_lines(ZOO[method])}
        line |= {
            "numbers": f"{count_parameters(model).trainable:,}",
            "no change at the start, bit for bit": same,
        }
        rows.append(line)
table(rows)

# %% [markdown]
# ## 3. Prove it
# Six of the seven are in PEFT (Tied-LoRA is not). Same numbers in both, none of them those of the start, then logits,
# gradients and merged weights. (PEFT's BOFT needs a CUDA extension for more than one round, so it gets one here; the tests
# compare three.)
#
# *You should see* nothing above float32's rounding.

# %% tags=["hide-input"]
import warnings

from labs_lib import load_task
from labs_lib.measure.quality import collate, encode_rows
from labs_lib.methods.zoo.layer import load_zoo_state_dict, merge_zoo, zoo_state_dict

warnings.filterwarnings("ignore", module="peft")  # VeRA's, about its random pair
facts = load_task("knowledge", facts=256)
rows = facts["train"][:8]
batch = collate(encode_rows(tokenizer, rows["prompt"], rows["completion"]), tokenizer.pad_token_id)
batch = {key: value.to(lab.device) for key, value in batch.items()}


def results(model, merge):
    """Logits, gradients by sorted name, and merged weights of a model."""
    output = model(**batch)
    output.loss.backward()
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.cat([trained[name].grad.flatten() for name in sorted(trained)])
    logits = output.logits.detach()
    merged = torch.cat([p.detach().flatten() for _, p in sorted(merge(model).named_parameters())])
    return {"logits": logits, "gradients": gradients, "merged": merged}


# %%
import peft

options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS = {
    "vera": peft.VeraConfig(r=256, save_projection=False, **options),
    "loha": peft.LoHaConfig(r=4, alpha=8, **options),
    "lokr": peft.LoKrConfig(r=16, alpha=16, decompose_factor=2, **options),
    "oft": peft.OFTConfig(oft_block_size=32, **options),
    "boft": peft.BOFTConfig(boft_block_size=8, **options),
    "miss": peft.MissConfig(r=15, **options),
}


def pair_of(method):
    """Ours and PEFT's, with the same numbers in them."""
    sizes = PLAN[method] | ({"factors": 1} if method == "boft" else {})
    ours = inject_zoo(lab.base(dtype=torch.float32)[0], KINDS[method], **sizes)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = peft.get_peft_model(lab.base(dtype=torch.float32)[0], CONFIGS[method])
    peft.set_peft_model_state_dict(theirs, zoo_state_dict(ours))
    return ours, theirs


# %%
rows = []
for method in CONFIGS:
    ours, theirs = pair_of(method)
    both = results(ours, merge_zoo), results(theirs, lambda model: model.merge_and_unload())
    line = {"method": look(method).label}
    for what, mine in both[0].items():
        off = (mine - both[1][what]).abs().max().item()
        assert off <= 500 * torch.finfo(torch.float32).eps, (method, what, off)
        line[what] = f"{off:.0e}"
    rows.append(line)
table(rows)

# %% [markdown]
# **Tied-LoRA**, which PEFT lacks, must be LoRA where it has nothing to tie: one layer, scales of one. And **the file**:
# what PEFT saves goes into ours.

# %%
import tempfile
from pathlib import Path

from safetensors.torch import load_file

name = "model.layers.0.self_attn.q_proj" if not lab.model_id else next(iter(zoo_layers(adapted("miss"))))
tied = inject_zoo(lab.base(dtype=torch.float32)[0], KINDS["tied_lora"], [name], rank=4, alpha=8)
lora = inject_lora(lab.base(dtype=torch.float32)[0], [name], 4, 8)
shared, layer = tied.get_submodule(name).shared, lora.get_submodule(name)
torch.nn.init.normal_(layer.lora_B)
shared.A.data.copy_(layer.lora_A)
shared.B.data.copy_(layer.lora_B)
with torch.no_grad():
    off = (tied(**batch).logits - lora(**batch).logits).abs().max().item()
print(f"Tied-LoRA with nothing to tie is LoRA, to {off:.0e}")

# %%
shelf = tempfile.TemporaryDirectory()
for method in CONFIGS:
    ours, theirs = pair_of(method)
    theirs.save_pretrained(folder := Path(shelf.name) / method)
    sizes = PLAN[method] | ({"factors": 1} if method == "boft" else {})
    back = inject_zoo(lab.base(dtype=torch.float32)[0], KINDS[method], **sizes)
    load_zoo_state_dict(back, load_file(folder / "adapter_model.safetensors"))
    state = zoo_state_dict(ours)
    same = all(torch.equal(tensor, state[key]) for key, tensor in zoo_state_dict(back).items())
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"{look(method).label:5s} PEFT's file of {size:7,} bytes in ours, same bits: {same}")

# %% [markdown]
# ### A bug to find
# A colleague trains OFT with PEFT. It works. For production they want an exact rotation instead of a truncated series, change
# one field of `adapter_config.json`, and load. No warning.

# %%
ours, theirs = pair_of("oft")
merged = {}
for exact in (False, True):
    config = peft.OFTConfig(oft_block_size=32, use_cayley_neumann=not exact, **options)
    other = peft.get_peft_model(lab.base()[0], config)
    peft.set_peft_model_state_dict(other, zoo_state_dict(ours))
    weights = dict(other.merge_and_unload().named_parameters())
    merged[exact] = weights[f"{name}.weight"].detach() - base.get_submodule(name).weight.detach()
cosine = torch.nn.functional.cosine_similarity(*(m.flatten() for m in merged.values()), dim=0).item()
print(f"cosine between the update that was trained and the one that is served: {cosine:+.3f}")

# %% [markdown]
# **Your turn.** Which field did they change? Its name, as a string.

# %%
### BEGIN SOLUTION
### STUB: oft_field = ...  # for instance "oft_block_size"
oft_field = "use_cayley_neumann"
### END SOLUTION
oft_field = check(oft_field, "lab13.oft_field")

# %% [markdown]
# The series is $(I+Q)(I-Q)^{-1}$, the exact solution $(I-Q)(I+Q)^{-1}$: its inverse. The same numbers turn the other way. (Not to
# $-1$: the larger the turn, the more a turn and its inverse have in common.)

# %% [markdown] tags=["takeaway"]
# A method of the zoo is 10 to 25 lines. What costs is everything around them: which way a sign goes, what is drawn from which
# seed, what a library does without a word. Equality with the library, tested, is what makes an adapter file mean something.

# %% [markdown]
# ## 4. Train it
# 256 new facts, 100 steps, one seed. Each method at the rate that `labs bakeoff` found for it. Beside them full
# fine-tuning, which nobody tells what its update should look like.
#
# **Predict**: the update of a whole $320 \times 128$ weight can have rank 128. What is its *effective* rank after full
# fine-tuning on these facts?

# %%
### BEGIN SOLUTION
### STUB: predict_rank = ...  # from 1 to 128
predict_rank = 60
### END SOLUTION
predict_rank = check(predict_rank, "lab13.predict_rank")

# %%
from statistics import fmean

from labs_lib import fit
from labs_lib.measure.quality import recall

RATES = {
    "full": 1e-3, "lora": 5e-3, "vera": 1e-1, "tied_lora": 1e-2, "loha": 1e-2,
    "lokr": 1e-2, "oft": 3e-3, "boft": 1e-2, "miss": 3e-3,
}  # fmt: skip
shrink = min(1, 128 / base.config.hidden_size)  # the rates were found on width 128
LINEAR = list(zoo_layers(adapted("miss")))  # names of the linear layers


def updates_of(method, model):
    """The update of every linear layer, by name."""
    if method != "full":
        return {name: update_of(model, name).cpu() for name in LINEAR}
    pairs = {name: (model.get_submodule(name).weight, base.get_submodule(name).weight) for name in LINEAR}
    return {name: (after - before).detach().double().cpu() for name, (after, before) in pairs.items()}


# %%
updates, runs, models, live = {}, [], {}, {}  # live: effective rank, facts in percent
for method, rate in RATES.items():
    model = lab.base()[0].requires_grad_(True) if method == "full" else adapted(method)
    settings = {"steps": lab.steps(100), "batch_size": 32, "seed": 1, "progress": False}
    run = fit(model, tokenizer, facts["train"][:], lr=shrink * rate, **settings)
    known = fmean(recall(model, tokenizer, facts["test"][: lab.rows(256)]))
    updates[method] = updates_of(method, model)
    spectra = [spectrum(update) for update in updates[method].values()]
    size = fmean(
        (u.norm() / base.get_submodule(n).weight.norm().cpu()).item() for n, u in updates[method].items()
    )
    models[method] = model if method in ("oft", "boft") else None
    line = {"method": look(method).label, "numbers": f"{run.trainable_parameters:,}", "rate": f"{run.lr:g}"}
    line |= {
        "last loss": f"{run.final_loss:.2f}",
        "facts %": f"{100 * known:.0f}",
        "size of the update": f"{size:.2f}",
    }
    live[method] = fmean(each.effective_rank for each in spectra), 100 * known
    line |= {"rank": max(each.rank for each in spectra), "effective": f"{live[method][0]:.0f}"}
    runs.append(line | {"stable": f"{fmean(each.stable_rank for each in spectra):.1f}"})
table(runs)

# %% [markdown]
# ("Size" is Frobenius, over the weight's; ranks are the highest, the other two means over all layers.)
#
# **Look at them**: one layer's update after training, and its singular values, strongest first, each over the largest. The
# dashed line is full fine-tuning's.

# %% tags=["hide-input"]
SHOWN = LINEAR[len(LINEAR) // 2]  # a layer in the middle of the model
for name in LINEAR[len(LINEAR) // 2 :]:
    if "gate_proj" in name:
        SHOWN = name
        break
values = {method: spectrum(each[SHOWN]).values for method, each in updates.items()}
effective = {method: spectrum(each[SHOWN]).effective_rank for method, each in updates.items()}
METHODS = [method for method in updates if method != "full"]
fig = plt.figure(figsize=(12, 9.4), layout="constrained")
grid = fig.subplots(4, 4, height_ratios=(1.25, 1, 1.25, 1))
maps, lines = grid[[0, 2]].reshape(-1), grid[[1, 3]].reshape(-1)
for ax, under, method in zip(maps, lines, METHODS, strict=True):
    drawn, update = look(method), updates[method][SHOWN].T
    edge = update.abs().quantile(0.99).item() or 1.0
    ax.imshow(update, cmap="PuOr_r", vmin=-edge, vmax=edge, aspect="auto", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{drawn.label}: effective rank {effective[method]:.0f}", color=drawn.color, fontsize=11)
    ax.grid(visible=False)
    for which, style in (
        ("full", {"color": "#777777", "ls": "--", "lw": 1}),
        (method, {"color": drawn.color, "lw": 2}),
    ):
        curve = values[which] / values[which][0].clamp(min=1e-30)
        alive = int((curve > 1e-6).sum())
        under.plot(range(1, alive + 1), curve[:alive], **style)
        if alive < len(curve):
            under.plot([alive, alive], [curve[alive - 1], 1e-4], color=style["color"], lw=1, ls=":")
    under.set(yscale="log", ylim=(1e-3, 1.4), xlim=(0, len(values["full"]) + 2))
    under.set_xlabel("singular value, by order", fontsize=9)
for row in (1, 3):
    grid[row, 0].set_ylabel("over the largest", fontsize=9)
    grid[row - 1, 0].set_ylabel("inputs", fontsize=9)
few, many = min(METHODS, key=effective.get), max(METHODS, key=effective.get)
fig.suptitle(
    f"Effective ranks from {effective[few]:.0f} ({look(few).label}) to {effective[many]:.0f} ({look(many).label}); "
    f"full fine-tuning's is {effective['full']:.0f} of {len(values['full'])}"
)
said = ", ".join(f"{look(m).label} {effective[m]:.0f}" for m in METHODS)
show(
    fig,
    alt=f"For eight methods, a heat map of the trained update of {SHOWN}, inputs by outputs, and below it the singular values on a log axis with full fine-tuning's dashed. Effective ranks: {said}; full fine-tuning {effective['full']:.0f}.",
)
print(f"{SHOWN}; you predicted {predict_rank:g} for full fine-tuning")

# %% [markdown]
# Read a picture and you read the method: MiSS repeats its band, VeRA weighs outputs, LoRA's curve ends where its rank does. OFT and
# BOFT come nearest to full fine-tuning's curve. MiSS stops after fifteen values. All three learn these facts.
#
# And OFT? Five powers of $Q$ are a rotation while $Q$ is small. Did training keep it small?

# %%
from labs_lib.measure import load_record, mean_ci, paired_difference

for method in ("oft", "boft"):
    errors, stretch = [], []
    for layer in zoo_layers(models[method]).values():
        eye = torch.eye(layer.base.in_features, device=lab.device)
        with torch.no_grad():
            R = layer.rotate(eye) if method == "boft" else torch.block_diag(*layer.rotations())
            errors.append((R @ R.T - eye).abs().max().item())
            stretch.append(torch.linalg.svdvals(R.float()).max().item())
    print(
        f"{look(method).label}: off a rotation by up to {max(errors):.1e}; stretches a direction up to {max(stretch):.2f} times"
    )

bakeoff, FACTS = load_record("sweep_bakeoff", device="cpu"), "knowledge, 512 facts"
print(bakeoff)
for row in sorted(bakeoff.rows if bakeoff else (), key=lambda row: row["lr"]):
    if row["arm"]["name"] in ("OFT 32", "BOFT 8, 2 rounds") and (row["label"], row["stage"]) == (
        FACTS,
        "sweep",
    ):
        facts_ = f"{100 * row['score']:.0f} % of 512 facts"
        print(
            f"{row['arm']['name']:16s} rate {row['lr']:<7g} size of the change {row['change']:5.2f} of W, {facts_}"
        )

# %% [markdown]
# At a moderate rate, nearly. But a rotation cannot change $W$ by more than twice its size, and in the record, at the largest rate, the
# series did, many times over: there it is a block-diagonal matrix and no turn. BOFT solves for its rotation, and has one at every rate.
# "The angles between neurons are kept" is a promise of `use_cayley_neumann=False`, or of small rates.

# %% [markdown]
# ### What the numbers bought
# Your own run is one seed. `labs bakeoff` gives each method its own sweep of rates and five fresh seeds, on 512 facts; where
# its record is at hand, the table and the figure are of that. **Predict**: does recall go with the update's rank?

# %% tags=["hide-input"]
ARMS = {
    "LoRA r8": "lora", "rsLoRA r8": "rslora", "VeRA r256": "vera", "Tied-LoRA r29": "tied_lora", "LoHa r4": "loha",
    "LoKr r16": "lokr", "OFT 32": "oft", "BOFT 8, 2 rounds": "boft", "MiSS r15": "miss", "full fine-tuning": "full",
}  # fmt: skip


def baked(arm, stage):
    """An arm's rows on 512 facts."""
    rows = [row for row in (bakeoff.rows if bakeoff else ()) if row["label"] == FACTS]
    return [row for row in rows if row["arm"]["name"] == arm and row["stage"] == stage]


points, lines = {}, []  # method -> (effective rank, recall in percent)
for arm, method in ARMS.items():
    if not (rows := baked(arm, "final")):
        continue
    rates, score = [row["lr"] for row in baked(arm, "sweep")], mean_ci([100 * row["score"] for row in rows])
    points[method] = fmean(row.get("effective_rank", live.get(method, (0,))[0]) for row in rows), score
    line = {"method": look(method).label, "numbers": f"{rows[0]['params']:,}"}
    line["rate"] = f"{rows[0]['lr']:g}{' (edge)' if rows[0]['lr'] in (min(rates), max(rates)) else ''}"
    bits = score.value / 100 * 512 * 6 / rows[0]["params"]  # a fact is 6 bits
    line |= {"facts %": str(score), "bits per number": f"{bits:.2f}"}
    line["old facts kept %"] = f"{100 * fmean(row['kept'] for row in rows):.0f}"
    lines.append(line | {"seconds": f"{fmean(row['seconds'] for row in rows):.0f}"})
table(lines or [{"from your own run": "no record of the bake-off yet"}])

# %% tags=["hide-input"]
shown = {m: point for m, point in (points or live).items() if m in RATES and m != "full"}
fig, ax = plt.subplots(figsize=(7.4, 4))
found = {}
for method, (x, score) in shown.items():
    drawn, found[method] = look(method), getattr(score, "value", score)
    if hasattr(score, "ci"):
        ends = [max(0, score.ci[0]), min(100, score.ci[1])]
        ax.plot([x, x], ends, color=drawn.color, lw=1.5)
    ax.plot(x, found[method], drawn.marker, ms=10, color=drawn.color, mec="white")
    below = method in ("loha", "boft", "lora")
    near = {"xytext": (-8 if below else 8, -13 if below else 5), "textcoords": "offset points", "size": 9}
    near["ha"] = "right" if below else "left"
    ax.annotate(drawn.label, (x, found[method]), color=drawn.color, **near)
order = torch.tensor([[x, found[m]] for m, (x, _) in shown.items()]).argsort(0).argsort(0).double()
spearman = torch.corrcoef(order.T)[0, 1].item()
ax.set(ylim=(0, 107), xlim=(0, 1.15 * max(x for x, _ in shown.values())))
what = "512 facts recalled (%)" if points else "256 facts recalled (%), one seed"
title = f"Recall and effective rank: rank correlation {spearman:+.2f}"
finding(ax, title, "effective rank of the update", what)
told = {look(m).label: round(v) for m, v in found.items()}
show(fig, alt=f"Recall against the effective rank of the update, one point per method. In percent: {told}.")
top, widest = max(found, key=found.get), max(shown, key=lambda method: shown[method][0])
for which, method in (("best recall", top), ("highest rank", widest)):
    print(f"{which}: {look(method).label}, effective rank {shown[method][0]:.0f}, {found[method]:.0f} %")

# %% [markdown]
# From eight points no such correlation can be told from none. The exceptions say more: a band of rank 15, repeated along the inputs,
# beats updates of five times its effective rank, and VeRA draws the widest update of all from a sixth of the numbers.
#
# **Before you credit the form**, look at the scale. LoRA has a knob that stood at 16 all the time: $\alpha$, how far a step of
# $B$ carries, at the same rate. The control is LoRA with a larger one, alias rsLoRA: lab 06's record has these 256 facts and 100
# steps.

# %%
for method, rank in (("lora", 4), ("lora", 16), ("rslora", 4), ("rslora", 16)):
    rows = [r for r in load_record("sweep_rslora", device="cpu").rows if r["arm"]["method"] == method]
    rates = {}
    for row in (row for row in rows if row["arm"]["rank"] == rank):
        rates.setdefault(row["lr"], []).append(100 * row["score"])
    best = max(rates, key=lambda lr: fmean(rates[lr]))
    print(f"{look(method).label} r{rank}: {mean_ci(rates[best])} % at rate {best:g}")

# %% [markdown] tags=["takeaway"]
# The same count of numbers can be a matrix of any rank, and the rank does not say what it learns. Much of what separates
# methods at one setting is the scale of their steps, which LoRA gets by $\alpha$. Compare at equal numbers, each tuned, scale included.

# %% [markdown]
# ### The unified view
# [He et al. (2022)](https://arxiv.org/abs/2110.04366) ask of every method: *which hidden state* $h$ does it change, does it
# read the module's input $x$ (**parallel**) or its output $h$ (**sequential**), *what function* is the change $D$, how does $D$ meet $h$,
# and with which *scale*? They filled a table by hand.
#
# `describe` fills it by experiment. It knows no method's name: it pushes the adapted model at one place and looks what moves.
# Double the input: is $D$ linear? Push $h$: does $D$ notice? Double a trained vector: is it a scale?
#
# **Predict**: the methods of labs 01 to 13, how many kinds are they?

# %% tags=["hide-input"]
from labs_lib.methods.adalora import inject_adalora
from labs_lib.methods.adapters import inject_adapters
from labs_lib.methods.dora import inject_dora
from labs_lib.methods.ia3 import inject_ia3
from labs_lib.methods.llama_adapter import inject_llama_adapter
from labs_lib.methods.prefix_tuning import add_prefix
from labs_lib.methods.prompt_tuning import add_prompt
from labs_lib.methods.rslora import inject_rslora
from labs_lib.methods.unified import describe, mix_and_match
from transformers import DynamicCache

ALL, EVERY = "all-linear", "attention (q, k, v, o), ffn (gate, up, down)"
MAKERS = {
    "LoRA": lambda m: inject_lora(m, ALL, 4, 8),
    "rsLoRA": lambda m: inject_rslora(m, ALL, 4, 8),
    "AdaLoRA": lambda m: inject_adalora(m, ALL, 4, 8),
    "DoRA": lambda m: inject_dora(m, ALL, 4, 8),
    "VeRA": lambda m: inject_zoo(m, KINDS["vera"], rank=16),
    "Tied-LoRA": lambda m: inject_zoo(m, KINDS["tied_lora"], rank=4),
    "LoHa": lambda m: inject_zoo(m, KINDS["loha"], rank=3),
    "LoKr": lambda m: inject_zoo(m, KINDS["lokr"], rank=2, factor=2),
    "MiSS": lambda m: inject_zoo(m, KINDS["miss"], rank=4),
    "OFT": lambda m: inject_zoo(m, KINDS["oft"], block=32),
    "BOFT": lambda m: inject_zoo(m, KINDS["boft"], block=8, factors=2),
    "IA3": inject_ia3,
    "Houlsby": lambda m: inject_adapters(m, 4, "houlsby"),
    "Pfeiffer": lambda m: inject_adapters(m, 4, "pfeiffer"),
    "parallel adapter": lambda m: inject_adapters(m, 4, "parallel", exact=True, scale=4.0),
    "LLaMA-Adapter": lambda m: inject_llama_adapter(m, 4, 2),
    "prefix": lambda m: add_prefix(m, 4, DynamicCache),
    "prompt": lambda m: add_prompt(m, 4),
}

# %%
designs = {
    name: describe(make(lab.base()[0].float()), batch["input_ids"][:4]) for name, make in MAKERS.items()
}
rows = []
for name, found in designs.items():
    for each in found:
        low, high = each.kept
        where = each.where.replace("_proj", "").replace(EVERY, "every linear layer")
        line = {"method": name, "where": where, "insertion": each.insertion}
        line |= {"form of D": each.form, "composition": each.composition, "scale": each.scale}
        rows.append(
            line | {"width": each.width, "h kept": f"{low:g}" if low == high else f"{low:.2f} to {high:.2f}"}
        )
table(rows)

# %% [markdown]
# Three methods have no row: LoRA+ and GaLore are optimisers, QLoRA is LoRA on another base. ("Width" is the rank of $D$ over many
# tokens; a bias makes it one more. Small sizes were used, the answers do not depend on them.)
#
# **A map**: each method in the cell of its form and its way to meet $h$.

# %% tags=["hide-input"]
from collections import defaultdict

cells = defaultdict(list)
for name, found in designs.items():
    for each in found:
        way = f"{each.insertion.replace('sequential, on x', 'on the input x')}\n{each.composition}"
        cells[each.form.partition(" ")[0], way].append((name, each))
forms = ["linear", "nonlinear", "softmax"]
ways = sorted(
    {way for _, way in cells}, key=lambda way: (not way.startswith("par"), way.startswith("on"), way)
)
PLACES = {"attention": look("prefix").color, "ffn": look("ia3").color, "both": look("lora").color}


def place(design):
    """Which sub-layers a row changes."""
    inside = [where for where in ("attention", "ffn") if where in design.where]
    return inside[0] if len(inside) == 1 else "both"


# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(12.4, 5.2), layout="constrained")
for x, way in enumerate(ways):
    for y, form in enumerate(forms):
        here = cells.get((form, way), [])
        drawn = {"fc": "#F4F4F4", "ls": "-"} if here else {"fc": "white", "ls": ":"}
        ax.add_patch(plt.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, ec="#CCCCCC", **drawn))
        for i, (name, design) in enumerate(here):
            top = y - 0.11 * (len(here) - 1) / 2 + 0.11 * i
            ax.text(x, top, name, ha="center", va="center", size=9.5, color=PLACES[place(design)])
        if not here:
            ax.text(x, y, "?", ha="center", va="center", size=15, color="#BBBBBB")
ax.set(xlim=(-0.55, len(ways) - 0.45), ylim=(len(forms) - 0.45, -0.55))
ax.set_xticks(range(len(ways)), ways)
ax.set_yticks(range(len(forms)), forms)
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.grid(visible=False)
for spine in ax.spines.values():
    spine.set_visible(False)
for i, (where, color) in enumerate(PLACES.items()):
    ax.text(0.01 + 0.16 * i, -0.05, f"changes {where}", color=color, transform=ax.transAxes, size=10)
fig.suptitle(f"{len(designs)} methods live in {len(cells)} of {len(forms) * len(ways)} cells")
crowd = max(cells, key=lambda key: len(cells[key]))
said = "; ".join(
    f"{form}, {way.replace(chr(10), ', ')}: {', '.join(n for n, _ in here)}"
    for (form, way), here in cells.items()
)
show(
    fig,
    alt=f"A grid of forms by ways to meet the hidden state, with the methods' names in their cells, coloured by sub-layer; empty cells have a question mark. {said}.",
)
print(f"{', '.join(name for name, _ in cells[crowd])}: one cell")

# %% [markdown]
# The crowd in the first cell differs in how its matrix is made, not in what it does. That is He et al.'s point: once the parts
# are named, they can be recombined. Every empty cell is a method that nobody of these has tried.
#
# **Exercise 4: a hybrid.** Their own, mix-and-match: few virtual tokens for the attention, a scaled parallel adapter for the FFN.
#
# *You should see* both parts in the table.

# %% tags=["exercise"]
from labs_lib.methods.unified import mix_and_match

# %%
mix_and_match = check(mix_and_match)
hybrid = mix_and_match(lab.base()[0], 3, 15, DynamicCache)
for each in describe(hybrid, batch["input_ids"][:4]):
    print(f"{each.where}: {each.insertion}, {each.form}, {each.composition}")
print(f"{count_parameters(hybrid).trainable:,} numbers")

# %% [markdown]
# **Against its parts**, all with about 19,000 numbers (LoRA of rank 2 on all linear layers, for scale); each with its own rates,
# then fresh seeds (`labs sweep mix_and_match`, `adapters`, and lab 08's prefixes).
#
# The two parts want rates a factor of ten apart: prefix numbers are of size 1, an adapter's start near 0. So there is one arm
# with one rate for both (from `labs bakeoff`, facts only), and two whose prefix gets ten times the adapters' rate.

# %% tags=["hide-input"]
SOURCES = [
    load_record(f"sweep_{n}", device="cpu")
    for n in ("mix_and_match", "adapters", "prefix", "tune_lora", "tune_lora_style")
]
stable = load_record("sweep_prefix_stability", device="cpu")
for each in (*SOURCES, stable):
    print(each)
LORA2, PARALLEL, PREFIX = "LoRA r2, all linear", "parallel, 18 units", "prefix 18"
ONE, SMALL, EVEN = "9 tokens, 9 units, one rate", "3 tokens, 15 units", "9 tokens, 9 units"  # the mixtures
LOOKS = {LORA2: "o", PREFIX: "s", PARALLEL: "H", ONE: "v", SMALL: "X", EVEN: "P"}
COLORS = {arm: look(kind).color for arm, kind in ((LORA2, "lora"), (PREFIX, "prefix"), (PARALLEL, "oft"))}
COLORS |= {ONE: "#999999", SMALL: "#D55E00", EVEN: "#111111"}


def rows_of(arm, task, stage="final"):
    """Rows of an arm on a task in the first record that has it; a prefix on the style by its best rate there."""
    for source in filter(None, SOURCES):
        rows = [r for r in source.rows if (r["arm"]["name"], r["label"], r["stage"]) == (arm, task, stage)]
        if rows:
            return sorted(rows, key=lambda row: row["seed"])
    if arm == ONE and task == FACTS and bakeoff:  # the same task there; its style has smaller batches
        return [
            r
            for r in bakeoff.rows
            if (r["arm"]["name"], r["label"], r["stage"]) == ("mix-and-match", task, stage)
        ]
    if arm == PREFIX and task == "style" and stable:
        first = [r for r in stable.rows if r["stage"] == "sweep" and r["arm"]["name"].startswith("direct")]
        best = max(first, key=lambda row: row["score"])["lr"]
        direct = [r for r in stable.rows if r["stage"] == stage and r["arm"]["name"].startswith("direct")]
        return [r for r in direct if stage == "sweep" or r["lr"] == best]
    return []


# %% tags=["hide-input"]
TASKS, results, means = (FACTS, "style"), [], {}
for task in TASKS:
    for arm in LOOKS:
        if not (rows := rows_of(arm, task)):
            continue
        rates = [row["lr"] for row in rows_of(arm, task, "sweep")]
        score, kept = (mean_ci([100 * row[key] for row in rows]) for key in ("score", "kept"))
        means[task, arm] = score, kept
        line = {
            "task": task.split(",")[0],
            "arm": arm,
            "numbers": f"{rows[0]['params']:,}",
            "seeds": len(rows),
        }
        line["rate"] = f"{rows[0]['lr']:g}{' (edge)' if rows[0]['lr'] in (min(rates), max(rates)) else ''}"
        results.append(line | {"score %": str(score), "old facts kept %": f"{kept.value:.0f}"})
table(results)

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(11.4, 3.9), layout="constrained")
arms = [arm for arm in LOOKS if (FACTS, arm) in means]
for y, arm in enumerate(reversed(arms)):
    score = means[FACTS, arm][0]
    left.barh(y, score.value, color=COLORS[arm], height=0.62, alpha=0.75)
    left.plot([max(0, score.ci[0]), min(100, score.ci[1])], [y, y], color="#333333", lw=2)
left.set_yticks(range(len(arms)), list(reversed(arms)))
best = max(arms, key=lambda arm: means[FACTS, arm][0].value)
finding(left, f"Facts: {best} is ahead", "512 facts recalled (%)")
for arm in LOOKS:
    path = sorted(rows_of(arm, "style", "sweep"), key=lambda row: row["lr"])
    xy = [(100 * row["kept"], 100 * row["score"]) for row in path]
    if not path:
        continue
    right.plot(*zip(*xy, strict=True), "-", color=COLORS[arm], lw=1, alpha=0.6)
    right.scatter(*zip(*xy, strict=True), s=14, color=COLORS[arm], alpha=0.6)
    score, kept = means["style", arm]  # a path's points below the frame are rates too small or too large
    right.plot(kept.value, score.value, LOOKS[arm], color=COLORS[arm], ms=10, mec="white", label=arm)
right.set_ylim(78, 101.5)
right.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.14, 0))
halves, whole = (f"{means['style', arm][1].value:.0f} %" for arm in (EVEN, PARALLEL))
title = f"Style: {EVEN} keep {halves}, 18 units {whole}"
finding(right, title, "old facts kept (%)", "exact texts (%), from 78")
said = "; ".join(
    f"{a}, {t}: {score.value:.0f}, kept {kept.value:.0f}" for (t, a), (score, kept) in means.items()
)
show(
    fig,
    alt=f"Left, bars of 512 facts recalled with intervals. Right, exact texts against old facts kept, a thin path over the rates of one seed and a marker for the mean at the chosen rate. In percent: {said}.",
)

# %%
for task in TASKS:
    for arm in (PARALLEL, PREFIX, LORA2):
        for key, what in (("score", "score"), ("kept", "old facts kept")):
            mine, others = ({r["seed"]: 100 * r[key] for r in rows_of(each, task)} for each in (EVEN, arm))
            if both := sorted(mine.keys() & others.keys()):
                gain = paired_difference([mine[s] for s in both], [others[s] for s in both])
                print(f"{task:21s} {EVEN} minus {arm:19s} {what:14s} {gain} points, {len(both)} seeds")

# %% [markdown]
# On the facts no mixture beats the better of its parts, a rate for each part changes nothing, and plain LoRA is far ahead of all of
# them. On the style everybody is at the ceiling, and there the even mixture shows what it is good for: half a change in each of two places does the job
# of a whole one in one place, and less of what the base knew is lost, as little as with LoRA.
#
# Mind how the rates were chosen: by the score alone, as in all our sweeps. The thin paths show what that hides; here they are in numbers
# (one seed): exact texts and, in brackets, old facts kept.

# %%
for arm in (LORA2, PARALLEL, SMALL, EVEN):
    path = sorted(rows_of(arm, "style", "sweep"), key=lambda row: row["lr"])
    print(
        f"{arm:20s}",
        ", ".join(f"{r['lr']:g}: {100 * r['score']:.0f} % ({100 * r['kept']:.0f} %)" for r in path),
    )

# %% [markdown]
# At its lowest rate each mixture still writes nearly every text, and keeps three quarters of what the base knew or more.

# %% [markdown]
# **One point live**: yours, on the style, seed 1 of the record.

# %%
from labs_lib import load_tenant
from labs_lib.measure.quality import style_quality
from labs_lib.methods.lora import trainable_parameters

rows, tenant = rows_of(EVEN, "style"), load_tenant("fathom-eleven")
style = load_task("style", tenant=tenant.slug)
recorded = next((row for row in rows if row["seed"] == 1), None)
rate = shrink * (recorded["lr"] if recorded else 1e-2)
hybrid = mix_and_match(lab.base()[0], 9, 9, DynamicCache, generator=torch.Generator().manual_seed(1))
groups = [
    {"params": trainable_parameters(part), "lr": times * rate}
    for part, times in ((hybrid.base, 1), (hybrid.prefix, 10))
]
optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
run = fit(
    hybrid,
    tokenizer,
    style["train"][:],
    steps=lab.steps(60),
    lr=rate,
    optimizer=optimizer,
    seed=1,
    progress=False,
)
quality = style_quality(hybrid, tokenizer, style["test"][: lab.rows(48)], tenant)
print(f"exact texts {quality.exact:.1%}, last loss {run.final_loss:.4f}")
if recorded:
    print(f"recorded:   {recorded['score']:.1%}, last loss {recorded['loss']:.4f}")

# %% [markdown] tags=["takeaway"]
# A method is a place, an input, a form and a scale. Say those four, and most of the zoo is one animal. What a method forgets is set
# by its rate at least as much as by its name: choose the rate by both.

# %% [markdown]
# ## 5. The chapter on trial
# **Claim 51**: "the literature contained over 40 distinct PEFT variants ... about 90% of practitioners use plain LoRA or QLoRA."
# **Predict** how many the installed PEFT knows.

# %%
### BEGIN SOLUTION
### STUB: predict_types = ...  # a whole number
predict_types = 30
### END SOLUTION
predict_types = check(predict_types, "lab13.predict_types")

# %%
import textwrap

types = [kind.name for kind in peft.PeftType]
print(textwrap.fill(", ".join(types), 110))
print(f"You predicted {predict_types:g}.")
claim(51).observe(parts={"variants": len(types)})
NAMED = ("LoRA", "DoRA", "QLoRA", "rsLoRA", "LoRA+", "AdaLoRA", "LoHa", "LoKr", "OFT", "BOFT", "VeRA", "IA3")
print("Named by the chapter, but no type of its own:", [n for n in NAMED if n.upper() not in types])

# %% [markdown]
# A `PeftType` is a file format, not an idea. Some variants are a flag of another type or an optimiser, and the map above has
# one cell for nearly half of what we built. So "over 40" holds by count, and says little. For the 90 % nothing here can
# tell: it would take the adapter types of a hub's public adapters, or a survey.
#
# **Claim 52**: He et al. show that adapters, prefix tuning and LoRA "can all be understood as modifications to attention".
# Their own words, and our table:

# %%
words = claim(52).reported[0]["text"]
print(words)
quoted = words.split("'")[1]
places = {name: sorted({place(each) for each in designs[name]}) for name in ("Houlsby", "prefix", "LoRA")}
print(places)
verdict = claim(52).observe("attention" in quoted)
assert any(where != ["attention"] for where in places.values())

# %% [markdown]
# Hidden states. Of the three only prefix tuning is bound to attention. (Its change to the *heads* is what they derive in detail, which
# may be what the chapter remembers.) And the distinction matters: their best design puts most numbers into the FFN.
#
# **Claim 26**: prompt tuning is "the most parameter-efficient method". Count on Llama-2-7B: a prompt of ten tokens, and others
# set as small as they go.

# %%
from labs_lib import random_like
from labs_lib.models.twins import peft_parameter_count

llama, task = random_like("llama-2-7b"), {"task_type": "CAUSAL_LM"}
whole = sum(parameter.numel() for parameter in llama.parameters())
small = {
    "a prompt of ten tokens": peft.PromptTuningConfig(num_virtual_tokens=10, **task),
    "LoRA r1, one layer's q": peft.LoraConfig(
        r=1, target_modules=["q_proj"], layers_to_transform=[0], **task
    ),
    "FourierFT, 10 in q and v": peft.FourierFTConfig(
        n_frequency=10, target_modules=["q_proj", "v_proj"], **task
    ),
    "TinyLoRA, 64 tied": peft.TinyLoraConfig(
        u=64, weight_tying=1.0, target_modules=["q_proj", "v_proj"], **task
    ),
    "TinyLoRA, 1 tied": peft.TinyLoraConfig(
        u=1, weight_tying=1.0, target_modules=["q_proj", "v_proj"], **task
    ),
}
counts = {name: peft_parameter_count(llama, config) for name, config in small.items()}
for name, count in counts.items():
    print(f"{name:25s} {count:7,} = {100 * count / whole:.7f} %")
prompt = counts.pop("a prompt of ten tokens")
claim(26).observe(conditions={name: count / prompt for name, count in counts.items()})

# %% [markdown]
# The figure "< 0.01 %" is right and the superlative is not: even LoRA on a single layer has fewer. How *useful* one number is, is
# another question, and the honest one: efficiency is quality per number, and a count has no quality.
#
# **The zoo at 7B**, on q and v, sizes as in the papers' and PEFT's defaults, and PEFT's published benchmark beside it (one seed, rates not
# swept for all: differences of two points are noise):

# %%
from labs_lib.measure import load_published
from labs_lib.methods.zoo.layer import count_zoo

USUAL = {
    "lora": {"rank": 8}, "vera": {"rank": 256}, "tied_lora": {"rank": 8}, "loha": {"rank": 8}, "lokr": {"rank": 8},
    "oft": {"block": 32}, "boft": {"block": 4, "factors": 2}, "miss": {"rank": 64},
}  # fmt: skip
published = {
    row["method"]: row
    for row in load_published("method_comparison")["rows"]
    if row["method"] in ZOO or row["label"] == "LoRA r32"
}
rows = []
for method, sizes in USUAL.items():
    row = published.get(method)
    if method == "lora":
        count = peft_parameter_count(llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=8, **task))
    else:
        count = count_zoo(llama, ZOO[method], ["q_proj", "v_proj"], **sizes)
    line = {
        "method": look(method).label,
        "sizes": str(sizes)[1:-1].replace("'", ""),
        "on Llama-2-7B": f"{count:,}",
    }
    line |= {
        "MetaMathQA %": f"{row['accuracy']}" if row else "",
        "its numbers": f"{row['parameters']:,.0f}" if row else "",
    }
    rows.append(line | {"training, s": f"{row['train_s']:,}" if row else ""})
table(rows)

# %% [markdown]
# There, too, OFT and MiSS stand a little above a LoRA of about as many numbers, but by no more than that benchmark's noise.

# %% [markdown]
# ## 6. When would you choose it?
# VeRA when the file must be small (save it without its random pair: `save_projection=False`). MiSS when LoRA falls short and you can do
# without engines that know it: as many numbers, the least time, one knob less. OFT and BOFT are said to keep what the base knows; at the
# rates that learned our facts they did not. Otherwise LoRA, $\alpha$ tuned: it is what engines serve in mixed batches.
#
# **The failure you will meet**: PEFT's LoRA takes `adapter_names`, one adapter per row of a batch. Most of the zoo takes it too,
# and does not look at it.

# %%
rows, exact = batch["input_ids"], lab.base(dtype=torch.float32)[0]
for method in ("vera", "loha", "oft", "miss"):
    ours, theirs = pair_of(method)
    theirs.eval()
    with torch.no_grad():
        asked = theirs(input_ids=rows, adapter_names=["__base__"] * len(rows)).logits
        adapted_, plain = theirs(input_ids=rows).logits, exact(input_ids=rows).logits
    print(
        f"{look(method).label:5s} rows that asked for the base model got it: {torch.equal(asked, plain)}, "
        f"got the adapter: {torch.equal(asked, adapted_)}"
    )

# %% [markdown]
# ## 7. Go further
# - Set `PROFILE = "gpu"` and a `MODEL_ID`: the table, the training and the gallery then run on that model.
# - **Open exercise 1.** Invent an animal: a `ZooLinear` of your own that starts as nothing. Two lines of `delta` will do. `inject_zoo`,
#   `spectrum` and `describe` take it like any other.
# - **Open exercise 2.** Take an empty cell of the map and say how a method there would look. Is it worth building?
# - **Open exercise 3.** LoHa with all four factors zero, and LoHa with $B_1$ and $B_2$ zero: which of them can train?

# %% [markdown] tags=["solution-only"]
# **Answer 1.** For instance MiSS squared by a Hadamard product with a random, frozen matrix: still as many numbers as MiSS, and full rank.

# %% tags=["solution-only"]
from labs_lib.methods.zoo.layer import ZooLinear


class MiHa(ZooLinear):
    """[D D D ...] times a frozen random matrix, number by number."""

    def __init__(self, base, rank=15, generator=None):
        super().__init__(base)
        self.register_buffer(
            "noise", torch.randn(base.weight.shape, generator=generator).to(base.weight.device)
        )
        self.learn(D=torch.zeros(base.out_features, rank))

    def delta(self):
        width = self.base.in_features
        return self.D.repeat(1, -(-width // self.D.shape[1]))[:, :width] * self.noise


own = inject_zoo(lab.base()[0], MiHa, generator=torch.Generator().manual_seed(0))
run = fit(
    own,
    tokenizer,
    facts["train"][:],
    steps=lab.steps(100),
    lr=shrink * 3e-3,
    batch_size=32,
    seed=1,
    progress=False,
)
known = fmean(recall(own, tokenizer, facts["test"][: lab.rows(256)]))
print(
    f"{run.trainable_parameters:,} numbers, rank {spectrum(update_of(own, SHOWN)).rank}, {known:.0%} of the facts"
)
print(*[(each.insertion, each.form, each.composition) for each in describe(own, batch["input_ids"][:4])])

# %% [markdown] tags=["solution-only"]
# **Answer 2.** Linear and sequential, $h + D(h)$, is a LoRA that reads the *output* of a layer: it can be merged too, $(1 + BA)W$. PEFT
# has relatives of it (HRA and OFT turn the input side). A softmax with a learned gate that reads $h$ is an attention over virtual tokens
# placed after the block: expensive, and it cannot be merged.
#
# **Answer 3.** Neither. Each factor's gradient is a product of the other three. With both second factors zero, every gradient holds a
# zero, and nothing ever moves. One factor at zero makes an exact start; two make a dead one.

# %%
progress()
