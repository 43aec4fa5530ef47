"""On a CUDA device every method computes what it computes on the CPU. Needs a card: `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch

from labs_lib.models.base import load_base
from labs_lib.training.adapt import METHODS
from labs_lib.training.bakeoff import ARMS
from labs_lib.training.fit import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLAIN = [arm for arm in ARMS if not arm.quantise]


def batch():
    ids = torch.randint(3, 1000, (4, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step(arm, device):
    """Loss and gradients of one batch, with what trains made different from its start."""
    model, _ = load_base("tiny", device=device)
    model = METHODS[arm.method](model, small(arm), 0, 60).model.train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                parameter += noise.to(parameter.device)
    loss = model(**{key: value.to(device) for key, value in batch().items()}).loss
    loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, {p.device.type for p in model.parameters()}


def small(arm):
    """The arm, fitted to the narrowest base."""
    return replace(arm, options=arm.options | {"block": 16}) if arm.options.get("block") == 32 else arm


@pytest.mark.parametrize("arm", PLAIN, ids=lambda arm: arm.name)
def test_a_method_s_loss_and_gradients_are_the_cpu_s(arm):
    (loss, grads, _), (there, gradients, devices) = step(arm, "cpu"), step(arm, "cuda")
    assert devices == {"cuda"}
    assert there == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == gradients.keys() and grads
    for name, grad in grads.items():
        scale = grad.abs().max().item() or 1.0
        torch.testing.assert_close(gradients[name] / scale, grad / scale, rtol=0, atol=1e-4, msg=name)


def test_four_bits_on_the_card_are_the_four_bits_of_the_cpu():
    """The same codes and constants up to rounding at the edge of two levels, and a LoRA that trains on them."""
    pytest.importorskip("bitsandbytes")
    from labs_lib.methods.lora import inject_lora

    losses = {}
    for device in ("cpu", "cuda"):
        model, _ = load_base("small", device=device, quantise="nf4")
        assert {p.device.type for p in model.parameters()} == {device}
        inject_lora(model, "all-linear", 4, 8, generator=torch.Generator().manual_seed(0))
        loss = model(**{key: value.to(device) for key, value in batch().items()}).loss
        loss.backward()
        losses[device] = loss.item()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_on_the_card_learns_and_says_what_it_took(dtype):
    from labs_lib.methods.lora import inject_lora
    from labs_lib.world.tasks import load_task

    model, tokenizer = load_base("small", dtype=dtype, device="cuda")
    inject_lora(model, "all-linear", 8, 16, generator=torch.Generator().manual_seed(0))
    rows = load_task("knowledge", facts=32)["train"][:]
    run = fit(model, tokenizer, rows, steps=40, lr=5e-3, batch_size=32, seed=0, progress=False)
    assert run.final_loss < 0.5 * run.losses[0]
    assert run.peak_bytes > sum(p.nbytes for p in model.parameters())


def test_eight_bit_galore_moves_what_it_projects():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("galore_torch")
    from labs_lib.methods.galore import galore_groups
    from labs_lib.training.galore import FixedGaLoreAdamW8bit

    model, _ = load_base("small", device="cuda")
    rest, projected = galore_groups(model.requires_grad_(True), "all-linear", rank=16)
    optimizer = FixedGaLoreAdamW8bit([rest, projected], lr=1e-2)
    before = [p.detach().clone() for p in projected["params"]]
    model(**{key: value.cuda() for key, value in batch().items()}).loss.backward()
    optimizer.step()
    moved = [(p - was).norm() / was.norm() for p, was in zip(projected["params"], before, strict=True)]
    assert min(moved) > 1e-5


def test_the_allocator_sees_what_the_count_on_the_cpu_says():
    """CUDA's peak holds the counted tensors, and besides them scratch space and rounding only."""
    from labs_lib.methods.lora import inject_lora
    from labs_lib.training.adapt import Adapted
    from labs_lib.training.costs import training_costs

    found = {}
    for device in ("cpu", "cuda"):
        model, _ = load_base("medium", device=device)
        inject_lora(model, "all-linear", 8, 16)
        ids = torch.randint(3, 1000, (16, 64), device=device)
        found[device] = training_costs(Adapted(model), {"input_ids": ids, "labels": ids})["peak_bytes"]
    assert 0.9 < found["cuda"] / found["cpu"] < 1.6


def test_a_twin_is_born_on_the_card():
    from labs_lib.models.twins import random_like

    torch.cuda.reset_peak_memory_stats()
    twin = random_like("smollm2-135m", device="cuda")
    assert {p.device.type for p in twin.parameters()} == {"cuda"}
    assert twin(input_ids=torch.ones(1, 8, dtype=torch.long, device="cuda")).logits.isfinite().all()
