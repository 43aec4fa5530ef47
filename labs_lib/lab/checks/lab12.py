"""Lab 12's checks, GaLore: the projector, the step, updates within backward, and what is kept in numbers."""

from itertools import pairwise

import torch
from torch import nn

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits
from labs_lib.methods.galore import (
    Projector,
    galore_numbers,
    galore_step,
    projection_side,
    update_in_backward,
)

KINDS = ("std", "reverse_std", "left", "right", "full")

# --- Projector


@exercise(
    "Projector",
    reference="labs_lib.methods.galore:Projector",
    hints=[
        "refresh: projection_side(gradient.shape, self.proj_type); left unless it is 'right', right unless 'left'.",
        "self.left = U[:, :rank], self.right = Vh[:rank]: Vh is V transposed already. Copies: .clone().",
        "project: without a basis, or at step % update_proj_gap == 0, refresh. Then left.T @ and/or @ right.T.",
        "project_back: left @ update and/or update @ right, times self.scale.",
    ],
)
def check_projector(candidate, ref):
    for shape in ((8, 3), (3, 8)):
        for kind in KINDS:
            gradient = torch.randn(shape)
            mine, right = candidate(2, proj_type=kind), ref(2, proj_type=kind)
            low = fits(
                lambda m=mine, g=gradient: m.project(g, 0),
                "The basis does not fit the gradient: U is (out, k), Vh (k, in).",
            )
            expect(low is not None, "project returns None: is a `return` missing?")
            _check_low(low, right.project(gradient, 0), kind, shape)
            back = fits(
                lambda m=mine, u=low: m.project_back(u),
                "project_back does not fit: left @ update, update @ right.",
            )
            expect(back is not None, "project_back returns None: is a `return` missing?")
            close(
                back,
                right.project_back(right.project(gradient, 1)),
                f"there and back with {kind!r} of {shape}",
            )
    _check_scale(candidate)
    _check_schedule(candidate)
    _check_memory(candidate)


def _check_low(low: torch.Tensor, right: torch.Tensor, kind: str, shape: tuple) -> None:
    if low.shape != right.shape:
        got, want = tuple(low.shape), tuple(right.shape)
        if kind == "std":
            raise Diagnosis(
                f"{kind!r} of {shape} came out as {got}, not {want}: the smaller side is projected"
            )
        raise Diagnosis(f"{kind!r} of {shape} came out as {got}, not {want}: what does projection_side say?")
    # the signs of singular vectors are free
    close(
        low.norm(),
        right.norm(),
        f"the norm of what {kind!r} of {shape} keeps (the FIRST singular directions?)",
    )


def _check_scale(candidate) -> None:
    plain, scaled, gradient = candidate(2), candidate(2, scale=0.25), torch.randn(6, 4)
    low = scaled.project(gradient, 0)
    ratio = (low.norm() / plain.project(gradient, 0).norm()).item()
    expect(
        abs(ratio - 1) < 1e-4, "the scale belongs to the way back: Adam would divide it out of the gradient"
    )
    ratio = (scaled.project_back(low).norm() / plain.project_back(low).norm()).item()
    expect(abs(ratio - 1) > 1e-4, "project_back forgets the scale")
    expect(abs(ratio - 0.25) < 1e-4, f"scale 0.25 makes the update {ratio:.3g} times as large")


def _check_schedule(candidate) -> None:
    projector, bases = candidate(2, update_proj_gap=3), []
    for step in range(1, 7):  # a run that goes on from step 1
        projector.project(torch.randn(6, 4), step)
        expect(
            projector.right is not None,
            "at a step that is no multiple of the gap there may be no basis yet: refresh",
        )
        bases.append(projector.right.clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    expect(any(changed), "the basis never changes: compute a new one at every multiple of update_proj_gap")
    expect(
        not all(changed),
        "there is a new basis at every step: an SVD each time is what the gap is there to save",
    )
    expect(changed == [False, True, False, False, True], "with gap 3 a new basis is due at steps 3 and 6")


def _check_memory(candidate) -> None:
    projector = candidate(2)
    projector.refresh(torch.randn(64, 32).bfloat16())
    basis = projector.right
    expect(
        basis.dtype == torch.bfloat16,
        f"of a bfloat16 gradient the basis is {basis.dtype}: give it the gradient's type",
    )
    exact = candidate(2)
    exact.refresh(torch.randn(64, 32))
    held = exact.right.untyped_storage().nbytes()
    expect(
        held == 2 * 32 * 4,
        f"a basis of {2 * 32 * 4} bytes keeps {held} alive: a slice keeps its whole matrix, clone it",
    )


@mutant("Projector", says="the smaller side")
class AlwaysLeft(Projector):
    def refresh(self, gradient):
        U, _, _ = torch.linalg.svd(gradient.float(), full_matrices=False)
        self.left = U[:, : self.rank].to(gradient.dtype).clone()


@mutant("Projector", says="FIRST singular directions")
class LastDirections(Projector):
    def refresh(self, gradient):
        U, _, Vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        side = projection_side(gradient.shape, self.proj_type)
        self.left = None if side == "right" else U[:, -self.rank :].to(gradient.dtype).clone()
        self.right = None if side == "left" else Vh[-self.rank :].to(gradient.dtype).clone()


@mutant("Projector", says="way back")
class ScaledBefore(Projector):
    def project(self, gradient, step):
        return self.scale * super().project(gradient, step)


@mutant("Projector", says="forgets the scale")
class NoScale(Projector):
    def project_back(self, update):
        return super().project_back(update) / self.scale


@mutant("Projector", says="never changes")
class NeverNew(Projector):
    def project(self, gradient, step):
        return super().project(gradient, step=1 if self.left is not None or self.right is not None else 0)


@mutant("Projector", says="at every step")
class AlwaysNew(Projector):
    def project(self, gradient, step):
        return super().project(gradient, step=0)


@mutant("Projector", says="no basis yet")
class NoFirstBasis(Projector):
    def project(self, gradient, step):
        if step % self.update_proj_gap == 0:
            self.refresh(gradient)
        gradient = gradient if self.left is None else self.left.T @ gradient
        return gradient if self.right is None else gradient @ self.right.T


@mutant("Projector", says="clone it")
class Slices(Projector):
    def refresh(self, gradient):
        U, _, Vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        side = projection_side(gradient.shape, self.proj_type)
        self.left = None if side == "right" else U[:, : self.rank].to(gradient.dtype)
        self.right = None if side == "left" else Vh[: self.rank].to(gradient.dtype)


@mutant("Projector", says="the gradient's type")
class Float32(Projector):
    def refresh(self, gradient):
        super().refresh(gradient.float())


# --- galore_step

GROUP = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
RANKED = GROUP | {"rank": 2, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std"}


def _run(step, group: dict, steps: int = 5) -> tuple[torch.Tensor, dict]:
    """The weight and its state after a few steps on gradients that are the same for everybody."""
    generator = torch.Generator().manual_seed(3)
    weight, state = torch.randn(6, 4, generator=generator), {}
    for _ in range(steps):
        step(weight, torch.randn(6, 4, generator=generator), state, group)
    return weight, state


@exercise(
    "galore_step",
    reference="labs_lib.methods.galore:galore_step",
    hints=[
        "step = state.setdefault('step', 0); the projector gets this number, before it is counted up.",
        'Projector(group["rank"], *(group[name] for name in DEFAULTS)): gap, scale and type, in this order.',
        "mean.mul_(beta1).add_(gradient, alpha=1 - beta1); square: mul_(beta2), addcmul_(..., value=1 - beta2).",
        "weight.sub_(direction, alpha=lr * sqrt(1 - beta2**step) / (1 - beta1**step)), with the step counted.",
    ],
)
def check_galore_step(candidate, ref):
    start, moved = _run(candidate, GROUP, 0)[0], _run(candidate, GROUP, 1)[0]
    expect(not torch.equal(start, moved), "the weight has not moved: change it in place (weight.sub_)")
    if torch.allclose(moved - start, start - _run(ref, GROUP, 1)[0], atol=1e-6):
        raise Diagnosis("the step goes uphill: subtract the direction")
    _check_plain(candidate, ref)
    weight, state = _run(candidate, RANKED, 1)
    expect("exp_avg" in state and "step" in state, 'the state needs "step", "exp_avg" and "exp_avg_sq"')
    shape = tuple(state["exp_avg"].shape)
    expect(
        shape != (6, 4),
        "the averages are as large as the weight: make them of the projected gradient, or nothing is saved",
    )
    expect(shape == (6, 2), f"the averages are {shape}; of a gradient (6, 4) at rank 2 they are (6, 2)")
    right = _run(ref, RANKED, 1)[0]
    half, double = (_run(ref, RANKED | {"scale": scale}, 1)[0] for scale in (0.25, 1.0))
    for wrong, says in (
        (half, "the scale is applied twice: project_back has it already"),
        (double, "the update is not scaled: use project_back"),
    ):
        if torch.allclose(weight, wrong, atol=1e-6):
            raise Diagnosis(says)
    close(weight, right, "the weight after one projected step")
    close(
        _run(candidate, RANKED)[0],
        _run(ref, RANKED)[0],
        "the weight after 5 steps with gap 2 (does the projector get the steps DONE?)",
    )
    decay = RANKED | {"weight_decay": 0.5}
    close(
        _run(candidate, decay, 1)[0],
        _run(ref, decay, 1)[0],
        "with weight decay, which comes last, the weight",
    )


def _check_plain(candidate, ref) -> None:
    """AdamW as it was: bias correction, eps, decay."""
    for steps in (1, 3):
        uncorrected = _run(ref, GROUP | {"correct_bias": False}, steps)[0]
        got, right = _run(candidate, GROUP, steps)[0], _run(ref, GROUP, steps)[0]
        if torch.allclose(got, uncorrected, atol=1e-6):
            raise Diagnosis("correct_bias is ignored: the first steps come out too small or too large")
        close(got, right, f"plain Adam's weight after {steps} step{'s' * (steps > 1)}")
    decayed = GROUP | {"weight_decay": 0.5}
    got, right = _run(candidate, decayed, 1)[0], _run(ref, decayed, 1)[0]
    if torch.allclose(got, _run(ref, GROUP, 1)[0], atol=1e-6):
        raise Diagnosis("weight_decay is ignored")
    before = _run(ref, GROUP, 0)[0]
    early = before - 0.05 * before
    if torch.allclose(got, early + _run(ref, GROUP, 1)[0] - before, atol=1e-6):
        raise Diagnosis(
            "decay first, then step? Here it is the other way round: decay the weight that has stepped"
        )
    close(got, right, "with weight decay, which is lr * weight_decay * weight, the weight")


def _variant(**changes):
    """galore_step, wrong in one respect."""

    def step(weight, gradient, state, group):
        galore_step(weight, gradient, state, group | {k: v(group) for k, v in changes.items() if k in group})

    return step


mutant("galore_step", says="correct_bias is ignored")(_variant(correct_bias=lambda group: False))
mutant("galore_step", says="weight_decay is ignored")(_variant(weight_decay=lambda group: 0.0))
mutant("galore_step", says="applied twice")(_variant(scale=lambda group: group["scale"] ** 2))
mutant("galore_step", says="not scaled")(_variant(scale=lambda group: 1.0))


@mutant("galore_step", says="has not moved")
def on_a_copy(weight, gradient, state, group):
    galore_step(weight.clone(), gradient, state, group)


@mutant("galore_step", says="uphill")
def uphill(weight, gradient, state, group):
    before = weight.clone()
    galore_step(weight, gradient, state, group)
    weight.copy_(2 * before - weight)


@mutant("galore_step", says="other way round")
def decays_first(weight, gradient, state, group):
    weight.sub_(weight, alpha=group["lr"] * group["weight_decay"])
    galore_step(weight, gradient, state, group | {"weight_decay": 0.0})


@mutant("galore_step", says="nothing is saved")
def projects_and_returns(weight, gradient, state, group):
    if "rank" in group:
        projector = Projector(group["rank"])
        gradient = projector.project_back(projector.project(gradient, 0))
    galore_step(weight, gradient, state, {k: v for k, v in group.items() if k != "rank"})


@mutant("galore_step", says="steps DONE")
def counts_first(weight, gradient, state, group):
    if (
        "rank" in group
        and state.get("projector") is not None
        and (state["step"] + 1) % group["update_proj_gap"] == 0
    ):
        state["projector"].refresh(gradient)
    galore_step(weight, gradient, state, group | {"update_proj_gap": 10**6} if "rank" in group else group)


# --- update_in_backward


class _Steps:
    """A stand-in for an optimiser: remembers its group, counts its steps and halves its weights."""

    def __init__(self, groups: list[dict]) -> None:
        self.groups, self.steps = groups, 0

    def step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            for weight in self.groups[0]["params"]:
                weight.mul_(0.5)


@exercise(
    "update_in_backward",
    reference="labs_lib.methods.galore:update_in_backward",
    hints=[
        'optimizers[parameter] = make([{**group, "params": [parameter]}]): a list with one group of one parameter.',
        "The hook takes the parameter: optimizers[parameter].step(), then parameter.grad = None.",
        "handles.append(parameter.register_post_accumulate_grad_hook(update)); remove() each of them at the end.",
    ],
)
def check_update_in_backward(candidate, ref):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    weights = [model[0].weight, model[1].weight]
    groups = [{"params": [model[0].bias, model[1].bias]}, {"params": weights, "rank": 2}]
    found = candidate(groups, _Steps)
    expect(
        isinstance(found, tuple) and len(found) == 2,
        "return two things: the optimisers, and a function that takes the hooks off",
    )
    optimizers, remove = found
    expect(isinstance(optimizers, dict), "the optimisers come as a dict: parameter -> its optimiser")
    trained = [model[0].bias, *weights]
    expect(model[1].bias not in optimizers, "a frozen parameter gets no gradient: it needs no hook")
    expect(
        set(optimizers) == set(trained),
        f"{len(optimizers)} optimisers for {len(trained)} parameters that train: one each",
    )
    for weight in weights:
        (group,) = optimizers[weight].groups
        expect(
            group.get("rank") == 2,
            "a parameter's settings got lost: its group of one keeps the rank of the old one",
        )
        expect(len(group["params"]) == 1, "each optimiser has one parameter, not its whole group")
    before = [weight.detach().clone() for weight in trained]
    model(torch.ones(1, 4)).sum().backward()
    steps = {optimizer.steps for optimizer in optimizers.values()}
    expect(steps != {0}, "nothing steps during backward(): register the hook")
    expect(steps == {1}, f"in one backward() an optimiser stepped {max(steps)} times")
    expect(
        all(weight.grad is None for weight in trained),
        "gradients are still there after backward(): set parameter.grad to None",
    )
    for weight, old in zip(trained, before, strict=True):
        close(weight.detach(), old / 2, "after one backward() each parameter")
    remove()
    model(torch.ones(1, 4)).sum().backward()
    expect(
        all(optimizer.steps == 1 for optimizer in optimizers.values()),
        "after remove() a backward() still trains: every handle has its remove()",
    )
    expect(weights[0].grad is not None, "after remove() the gradients still vanish")


def _hooked(settings=True, drop=True, off=True, frozen=False):
    """update_in_backward, wrong in one respect."""

    def update(groups, make):
        optimizers, handles = {}, []

        def hook(parameter):
            optimizers[parameter].step()
            if drop:
                parameter.grad = None

        for group in groups:
            for parameter in group["params"]:
                if parameter.requires_grad or frozen:
                    one = {"params": [parameter]}
                    optimizers[parameter] = make([{**group, **one} if settings else one])
                    if parameter.requires_grad:
                        handles.append(parameter.register_post_accumulate_grad_hook(hook))
        return optimizers, lambda: [handle.remove() for handle in handles] if off else None

    return update


mutant("update_in_backward", says="settings got lost")(_hooked(settings=False))
mutant("update_in_backward", says="still there")(_hooked(drop=False))
mutant("update_in_backward", says="still trains")(_hooked(off=False))
mutant("update_in_backward", says="frozen")(_hooked(frozen=True))


@mutant("update_in_backward", says="two things")
def no_way_back(groups, make):
    return update_in_backward(groups, make)[0]


@mutant("update_in_backward", says="whole group")
def shared_optimizer(groups, make):
    optimizers = {}
    for group in groups:
        shared = make([group])
        optimizers |= {parameter: shared for parameter in group["params"] if parameter.requires_grad}
    return optimizers, lambda: None


@mutant("update_in_backward", says="register the hook")
def no_hooks(groups, make):
    optimizers, remove = update_in_backward(groups, make)
    remove()
    return optimizers, lambda: None


# --- galore_numbers


@exercise(
    "galore_numbers",
    reference="labs_lib.methods.galore:galore_numbers",
    hints=[
        "rank = min(rank, out, in_): there are no more directions.",
        "left: the average is (rank, in), so rank * in_ numbers; the basis (out, rank), so out * rank.",
        "A dict of three pairs, looked up by projection_side(shape, proj_type).",
    ],
)
def check_galore_numbers(candidate, ref):
    got = candidate((10, 6), 2)
    expect(got is not None, "no numbers came back: return a pair")
    expect(isinstance(got, tuple) and len(got) == 2, f"return a pair, average and basis, not {got!r}")
    if tuple(got) == (12, 20):
        raise Diagnosis(
            "average and basis are swapped, or the larger side is projected: a tall weight gets 'right'"
        )
    expect(got[0] != 40, "that is both averages: count one")
    expect(got[1] != 0, "the basis takes memory, too")
    expect(
        tuple(got) == (20, 12),
        f"of (10, 6) at rank 2, one average is (10, 2) and the basis (2, 6), not {got}",
    )
    expect(
        tuple(candidate((6, 10), 2)) == (20, 12),
        "a wide weight is projected on the left: the average is (rank, in)",
    )
    full = tuple(candidate((10, 6), 2, "full"))
    expect(full == (4, 32), f"'full' has an average (2, 2) and two bases, 32 numbers; not {full}")
    high = tuple(candidate((10, 6), 100))
    expect(high != (1000, 600), "rank 100 of a (10, 6) has no more than 6 directions")
    for shape in ((10, 6), (6, 10)):
        for kind in KINDS:
            for rank in (3, 50):
                expect(
                    tuple(candidate(shape, rank, kind)) == ref(shape, rank, kind),
                    f"{kind!r} of {shape} at rank {rank}",
                )


@mutant("galore_numbers", says="swapped")
def swapped_numbers(shape, rank, proj_type="std"):
    return galore_numbers(shape, rank, proj_type)[::-1]


@mutant("galore_numbers", says="both averages")
def two_averages(shape, rank, proj_type="std"):
    average, basis = galore_numbers(shape, rank, proj_type)
    return 2 * average, basis


@mutant("galore_numbers", says="takes memory, too")
def no_basis(shape, rank, proj_type="std"):
    return galore_numbers(shape, rank, proj_type)[0], 0


@mutant("galore_numbers", says="no more than 6")
def uncapped(shape, rank, proj_type="std"):
    out, in_ = shape
    left, right = (rank * in_, out * rank), (out * rank, rank * in_)
    side = projection_side(shape, proj_type)
    return {"left": left, "right": right, "full": (rank * rank, rank * (out + in_))}[side]


@mutant("galore_numbers", says="a wide weight")
def always_right(shape, rank, proj_type="std"):
    out, in_ = shape
    rank = min(rank, out, in_)
    return (rank * rank, rank * (out + in_)) if proj_type == "full" else (out * rank, rank * in_)


@mutant("galore_numbers", says="two bases")
def one_basis(shape, rank, proj_type="std"):
    average, basis = galore_numbers(shape, rank, proj_type)
    return (average, rank * shape[1]) if proj_type == "full" else (average, basis)


# --- short answers

answer(
    "lab12.predict_energy",
    reference=90.0,
    within=(0, 100),
    unit="%",
    hints=["A share between 0 and 100; its own first directions would keep nearly all, random ones 25."],
)
answer(
    "lab12.predict_gap",
    reference=2.0,
    within=(-90, 1000),
    unit="%",
    hints=["100 * (GaLore's perplexity / Adam's - 1): the paper's own gaps on C4 are between 0.5 and 2.4."],
)
answer(
    "lab12.largest_step",
    reference=0,
    tolerance=0,
    hints=[
        "100 times the norm of what stands in the weight's place while bitsandbytes steps.",
        "A tensor of zeros has the norm 0.",
    ],
    mistakes={
        100: "that is the factor: times the norm of what?",
        1: "that would be a weight of norm 0.01; what stands there is a tensor of zeros",
    },
)
answer(
    "lab12.weights_and_gradients",
    reference=lambda: 2 * 2 * 6.738e9 / 2**30,
    unit="GiB",
    hints=[
        "bfloat16 has 2 bytes, and there is one gradient per weight.",
        "2 * 2 * 6.738e9 bytes, over 2**30.",
    ],
    mistakes={
        2 * 6.738e9 / 2**30: "that is the weights alone: every one of them has a gradient",
        2 * 4 * 6.738e9 / 2**30: "that is float32; bfloat16 has 2 bytes",
        4 * 6.738e9 / 1e9: "that is in GB of 10**9 bytes: a GiB is 2**30",
    },
)
