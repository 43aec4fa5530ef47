"""GaLore: galore_torch's steps; at full rank Adam in rotated coordinates, and with SGD no change; its bytes."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn

from labs_lib.measure.count import optimizer_state_bytes, tensor_bytes
from labs_lib.methods.galore import (
    DEFAULTS,
    PROJ_TYPES,
    GaLoreAdamW,
    Projector,
    adam_bytes,
    energy_curve,
    energy_kept,
    galore_bytes,
    galore_groups,
    galore_numbers,
    galore_step,
    gradient_energy,
    projection_side,
    update_in_backward,
)
from labs_lib.models.twins import random_like


def theirs(groups, **settings):
    from galore_torch import GaLoreAdamW as Reference

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # galore_torch's own deprecation notice
        return Reference(groups, **settings)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# --- the projector


@pytest.mark.parametrize(
    "shape, sides",
    [
        ((8, 3), {"std": "right", "reverse_std": "left", "left": "left", "right": "right", "full": "full"}),
        ((3, 8), {"std": "left", "reverse_std": "right", "left": "left", "right": "right", "full": "full"}),
        ((5, 5), {"std": "right", "reverse_std": "left", "left": "left", "right": "right", "full": "full"}),
    ],
)
def test_std_projects_the_smaller_side(shape, sides):
    assert {kind: projection_side(shape, kind) for kind in PROJ_TYPES} == sides


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
@pytest.mark.parametrize("kind", PROJ_TYPES)
def test_shapes_and_an_orthogonal_projection(shape, kind):
    gradient, projector = torch.randn(shape), Projector(2, proj_type=kind, scale=0.5)
    low = projector.project(gradient, 0)
    want = {"left": (2, shape[1]), "right": (shape[0], 2), "full": (2, 2)}[projection_side(shape, kind)]
    assert tuple(low.shape) == want
    back = projector.project_back(low)
    assert back.shape == gradient.shape
    twice = projector.project_back(projector.project(back / 0.5, 1))
    torch.testing.assert_close(twice, back)  # a second projection changes nothing
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(back, 0.5 * U[:, :2] * S[:2] @ Vh[:2])  # the best approximation of rank 2


def test_the_basis_is_of_its_own_memory_and_the_gradients_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        projector = Projector(2)
        projector.project(torch.randn(64, 32).to(dtype), 0)
        assert projector.right.dtype == dtype and projector.left is None
        assert tensor_bytes(projector) == 2 * 32 * projector.right.element_size()  # not the whole of Vh


def test_a_new_basis_every_gap_and_at_the_first_step_of_any_number():
    projector, bases = Projector(2, update_proj_gap=3), []
    for step_ in range(4, 11):  # a run that goes on from step 4 has no basis yet
        projector.project(torch.randn(6, 4), step_)
        bases.append(projector.right.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, True, False, False, True, False]  # before steps 6 and 9


@pytest.mark.parametrize("bad", [{"rank": 0}, {"update_proj_gap": 0}, {"proj_type": "both"}])
def test_settings_that_make_no_projection_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(3, 2))], "rank": 2} | bad])


# --- equal to galore_torch


@pytest.mark.parametrize("kind", PROJ_TYPES)
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95)}, {"correct_bias": False}]
)
def test_ten_steps_equal_galore_torchs(tiny_llama, batch, kind, settings):
    ours, reference = tiny_llama(), tiny_llama()
    projection = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": kind}
    optimizers = [
        GaLoreAdamW(galore_groups(ours, "all-linear", **projection), lr=1e-2, **settings),
        theirs(galore_groups(reference, "all-linear", **projection), lr=1e-2, **settings),
    ]
    losses = []
    for _ in range(10):
        losses.append([step(ours, optimizers[0], batch), step(reference, optimizers[1], batch)])
        assert distance(ours, reference) <= 1e-6
    assert losses[-1][0] < losses[0][0] and losses[-1][0] == pytest.approx(losses[-1][1], rel=1e-5)
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        states = optimizers[0].state[mine], optimizers[1].state[other]
        assert states[0]["step"] == states[1]["step"] == 10
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)


def test_without_a_rank_it_is_transformers_adamw(tiny_llama, batch):
    models = [tiny_llama() for _ in range(3)]
    settings = {"lr": 1e-3, "eps": 1e-12}  # eps stands elsewhere in torch's: let it not matter
    optimizers = [
        GaLoreAdamW(models[0].parameters(), **settings),
        theirs(models[1].parameters(), **settings),
        torch.optim.AdamW(models[2].parameters(), weight_decay=0.0, **settings),
    ]
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch)
    assert distance(models[0], models[1]) == 0
    assert distance(models[0], models[2]) < 1e-5


def test_bfloat16_weights_equal_galore_torchs(tiny_llama, batch):
    ours, reference = (tiny_llama(dtype=torch.bfloat16) for _ in range(2))
    optimizers = [
        GaLoreAdamW(galore_groups(ours, "all-linear", 4), lr=1e-2),
        theirs(galore_groups(reference, "all-linear", 4), lr=1e-2),
    ]
    for _ in range(3):
        step(ours, optimizers[0], batch), step(reference, optimizers[1], batch)
    assert distance(ours, reference) <= 1e-2  # one unit of bfloat16 at 1
    state = optimizers[0].state[ours.model.layers[0].self_attn.q_proj.weight]
    assert state["exp_avg"].dtype == state["projector"].right.dtype == torch.bfloat16


def test_a_closure_and_a_parameter_without_a_gradient():
    weight, idle = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(2))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 1}, {"params": [idle]}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and torch.equal(idle, torch.ones(2))
    assert weight.square().sum() < 3


def test_a_saved_optimizer_goes_on_where_it_was(tiny_llama, batch):
    straight, stopped = tiny_llama(), tiny_llama()

    def optimizer_of(model):
        return GaLoreAdamW(galore_groups(model, "all-linear", 4, update_proj_gap=4), lr=1e-2)

    optimizer = optimizer_of(straight)
    for _ in range(6):
        step(straight, optimizer, batch)
    first = optimizer_of(stopped)
    for _ in range(3):
        step(stopped, first, batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(stopped)
    second.load_state_dict(torch.load(file))  # weights_only, torch's default
    for _ in range(3):
        step(stopped, second, batch)
    assert distance(straight, stopped) == 0


# --- what it is, and what it is not


def loss_of(weight, targets):
    return (weight - targets).square().sum() / 2 + (weight**4).sum() / 40


def test_full_rank_without_reprojection_is_adam_in_rotated_coordinates_not_adam():
    torch.manual_seed(0)
    start, targets = torch.randn(2, 6, 4, dtype=torch.float64)

    def adam(parameters):
        return GaLoreAdamW(parameters, lr=0.05)

    weight = nn.Parameter(start.clone())
    group = {"params": [weight], "rank": 4, "update_proj_gap": 10**9, "scale": 1.0}
    optimizer = GaLoreAdamW([group], lr=0.05)
    gradient = torch.autograd.grad(loss_of(weight, targets), weight)[0]
    rotation = torch.linalg.svd(gradient, full_matrices=False)[2]
    turned, plain = nn.Parameter(start @ rotation.T), nn.Parameter(start.clone())
    others = adam([turned]), adam([plain])
    for _ in range(20):
        for each in (optimizer, *others):
            each.zero_grad()
        loss_of(weight, targets).backward()
        loss_of(turned @ rotation, targets).backward()
        loss_of(plain, targets).backward()
        for each in (optimizer, *others):
            each.step()
    assert (weight - turned @ rotation).abs().max() < 1e-12
    assert (weight - plain).abs().max() > 0.05


def test_with_sgd_full_rank_changes_nothing_and_low_rank_only_projects():
    """SGD has no coordinates of its own: its step is the projected gradient, turned back."""
    gradient = torch.randn(6, 4, dtype=torch.float64)
    for kind in PROJ_TYPES:
        if projection_side((6, 4), kind) == "left":
            continue  # four of the six directions of the outputs: the gradient has no more, so see below
        full = Projector(4, proj_type=kind)
        assert (full.project_back(full.project(gradient, 0)) - gradient).abs().max() < 1e-13
    left = Projector(4, proj_type="left")
    assert (left.project_back(left.project(gradient, 0)) - gradient).abs().max() < 1e-13
    other = torch.randn(6, 4, dtype=torch.float64)  # a later gradient leaves the four directions
    assert (left.project_back(left.project(other, 1)) - other).abs().max() > 0.1
    low = Projector(2)
    got, basis = low.project_back(low.project(gradient, 0)), low.right
    torch.testing.assert_close(got, gradient @ basis.T @ basis)


def test_a_new_basis_leaves_the_averages_as_they_were():
    """A known weakness, kept because galore_torch has it: their coordinates no longer mean the same."""
    group = {"betas": (0.9, 0.999), "lr": 0.0, "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
    group |= DEFAULTS | {"rank": 2, "update_proj_gap": 1}
    weight, state = torch.zeros(6, 4), {}
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    galore_step(weight, first, state, group)
    before, basis = state["exp_avg"].clone(), state["projector"].right.clone()
    galore_step(weight, second, state, group)
    now = state["projector"].right
    assert not torch.allclose(basis, now)
    torch.testing.assert_close(state["exp_avg"], 0.9 * before + 0.1 * second @ now.T)


# --- groups, hooks


def test_every_parameter_is_in_one_group_and_the_matrices_are_projected(tiny_llama):
    model = tiny_llama()
    rest, projected = galore_groups(model, "all-linear", 4, scale=2.0)
    held = [id(each) for each in [*rest["params"], *projected["params"]]]
    assert sorted(held) == sorted(id(each) for each in model.parameters())
    assert "rank" not in rest and len(projected["params"]) == 2 * 7
    assert {k: v for k, v in projected.items() if k != "params"} == {"rank": 4, **DEFAULTS, "scale": 2.0}
    assert any(each is model.lm_head.weight for each in rest["params"])
    (only,) = galore_groups(
        model.requires_grad_(False).model.layers.requires_grad_(True)[0].mlp, "up_proj", 4
    )[1:]
    assert len(only["params"]) == 1


def test_frozen_weights_and_empty_groups_are_left_out(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    (group,) = galore_groups(model, "all-linear", 4)
    assert group["rank"] == 4 and len(group["params"]) == 1


def test_what_cannot_be_projected_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="not gap"):
        galore_groups(tiny_llama(), "all-linear", 4, gap=50)
    with pytest.raises(ValueError, match="Only a matrix"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(3))], "rank": 1}])


def test_updates_within_backward_are_the_same_steps_with_one_gradient_at_a_time(tiny_llama, batch):
    usual, hooked = tiny_llama(), tiny_llama()

    def groups_of(model):
        return galore_groups(model, "all-linear", 4, update_proj_gap=2)

    def make(groups):
        return GaLoreAdamW(groups, lr=1e-2)

    optimizer = make(groups_of(usual))
    optimizers, remove = update_in_backward(groups_of(hooked), make)
    assert set(optimizers) == set(hooked.parameters())
    most = 0

    def count(_):
        nonlocal most
        most = max(most, sum(each.grad is not None for each in hooked.parameters()))

    for parameter in hooked.parameters():  # after the update's own hook: what it left behind
        parameter.register_post_accumulate_grad_hook(count)
    for _ in range(4):
        step(usual, optimizer, batch)
        hooked(**batch).loss.backward()
    assert distance(usual, hooked) == 0 and most == 0
    remove()
    before = copy.deepcopy(hooked)
    hooked(**batch).loss.backward()
    assert distance(before, hooked) == 0 and all(each.grad is not None for each in hooked.parameters())


# --- energy


def test_the_energy_curve_of_a_known_spectrum():
    U, V = (torch.linalg.qr(torch.randn(n, 3)).Q for n in (9, 5))
    matrix = U * torch.tensor([3.0, 2.0, 1.0]) @ V.T
    torch.testing.assert_close(energy_curve(matrix), torch.tensor([9.0, 13, 14, 14, 14]) / 14)
    assert energy_curve(torch.zeros(4, 2)).tolist() == [0, 0]
    assert energy_curve(matrix.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", PROJ_TYPES)
def test_a_basis_keeps_the_most_of_its_own_gradient(kind):
    gradient, later = torch.randn(2, 9, 5)
    projector = Projector(2, proj_type=kind)
    projector.refresh(gradient)
    best = energy_curve(gradient)[1].item()
    assert energy_kept(gradient, projector) == pytest.approx(best, abs=1e-6)
    assert energy_kept(later, projector) < energy_curve(later)[1].item()


def test_gradient_energy_by_layer(tiny_llama, batch):
    model = tiny_llama()
    model(**batch).loss.backward()
    curves = gradient_energy(model)
    assert len(curves) == 14 and all(curve[-1] == pytest.approx(1) for curve in curves.values())
    assert curves["model.layers.0.mlp.down_proj"].shape == (32,)
    model.zero_grad()
    assert gradient_energy(model) == {}


# --- bytes


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("kind", PROJ_TYPES)
@pytest.mark.parametrize("rank", [2, 7])
def test_numbers_are_those_of_a_real_projection(shape, kind, rank):
    projector = Projector(rank, proj_type=kind)
    low = projector.project(torch.randn(shape), 0)
    basis = sum(each.numel() for each in (projector.left, projector.right) if each is not None)
    assert galore_numbers(shape, rank, kind) == (low.numel(), basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4, 100])
def test_the_arithmetic_is_a_real_optimizers(tiny_llama, batch, dtype, rank):
    model = tiny_llama(dtype=dtype)
    groups = (
        [{"params": list(model.parameters())}] if rank is None else galore_groups(model, "all-linear", rank)
    )
    optimizer = GaLoreAdamW(groups, lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
    size = dtype.itemsize
    counted = galore_bytes(model, rank, weight=size, state=size)
    assert counted.optimizer == optimizer_state_bytes(optimizer)
    assert counted.weights == counted.gradients == tensor_bytes(list(model.parameters()))
    hooked = galore_bytes(model, rank, weight=size, state=size, per_layer=True)
    assert hooked.gradients == max(each.numel() for each in model.parameters()) * size
    assert hooked.total - hooked.gradients == counted.total - counted.gradients


def test_adam_in_bytes():
    assert adam_bytes(1000, 4) == 8000 and adam_bytes(1000, 2) == 4000
    assert adam_bytes(4095, 1) == 2 * 4 * 4095  # too small for 8 bits
    assert adam_bytes(4096, 1) == 2 * (4096 + 4 * 16) and adam_bytes(4097, 1) == 2 * (4097 + 4 * 17)


def test_seven_billion_parameters():
    """The chapter's 2 to 4 GB are right, and its one line is not enough for 24 GB."""
    llama = random_like("llama-2-7b")
    states = [galore_bytes(llama, 128, state=size, projector=size).optimizer / 1e9 for size in (2, 4)]
    assert states == pytest.approx([2.09, 4.19], abs=0.01)
    adam = galore_bytes(llama, None, state=4)
    assert adam.optimizer / 1e9 == pytest.approx(53.9, abs=0.05) and adam.projectors == adam.projected == 0
    gib = {hooks: galore_bytes(llama, 128, state=1, per_layer=hooks).total / 2**30 for hooks in (False, True)}
    assert gib[False] > 24 > gib[True]
