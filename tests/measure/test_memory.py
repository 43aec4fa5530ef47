"""The CPU's peak is exact: every test compares it with bytes added up by hand."""

import pytest
import torch
from torch import nn

from labs_lib.measure import held_bytes, peak_memory
from labs_lib.measure.memory import TensorBytes


def test_peak_of_three_steps():
    def work():
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes held
        del a
        return b * 2  # and again 8000

    peak = peak_memory(work)
    assert (peak.before, peak.peak, peak.after, peak.exact) == (0, 8000, 4000, True)


def test_views_and_in_place_work_cost_nothing():
    x = torch.zeros(1000)
    peak = peak_memory(lambda: x.add_(1).view(10, 100).t(), x)
    assert (peak.before, peak.peak, peak.after) == (4000, 4000, 4000)


def test_a_tensor_from_outside_is_not_counted_unless_held():
    x = torch.zeros(1000)
    assert peak_memory(lambda: x.view(10, 100)).peak == 0
    assert peak_memory(lambda: x + 1).peak == 4000
    assert peak_memory(lambda: x + 1, x).peak == 8000


def test_tensors_made_from_python_numbers_are_counted():
    assert peak_memory(lambda: torch.tensor([1.0, 2.0])).peak == 8


def test_saved_activations_stay_until_the_backward_pass():
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Sigmoid(), nn.Linear(64, 32, bias=False))
    x = torch.randn(8, 32)
    with_graph = peak_memory(lambda: model(x), model, x)
    with torch.no_grad():
        without = peak_memory(lambda: model(x), model, x)
    hidden, out = 8 * 64 * 4, 8 * 32 * 4
    assert with_graph.after - with_graph.before == hidden + out, "the sigmoid's output is saved"
    assert without.after - without.before == out
    assert with_graph.extra == hidden * 2, "input and output of the sigmoid at once"


def test_a_training_step_ends_at_what_is_held():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, 32)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    first = peak_memory(step, model, optimizer, x)
    second = peak_memory(step, model, optimizer, x)
    held = held_bytes(model, optimizer).total + x.nbytes
    assert first.after == second.before == second.after == held
    assert second.peak > held


def test_frozen_weights_save_their_gradients():
    def peak(frozen):
        model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
        model[0].requires_grad_(not frozen)
        x = torch.randn(1, 256)
        return peak_memory(lambda: model(x).sum().backward(), model, x).peak

    assert peak(frozen=False) - peak(frozen=True) == pytest.approx(256 * 256 * 4, abs=8 * 1024)


def test_checkpointing_lowers_the_peak():
    from torch.utils.checkpoint import checkpoint

    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(16, 512), nn.Sigmoid(), nn.Linear(512, 16)) for _ in range(4)
    )
    x = torch.randn(64, 16, requires_grad=True)

    def run(checkpointed):
        h = x
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=False) if checkpointed else layer(h)
        h.sum().backward()
        for parameter in layers.parameters():
            parameter.grad = None

    plain, saved = (peak_memory(lambda c=c: run(c), layers, x).extra for c in (False, True))
    sigmoids = 64 * 512 * 4  # the output of each is saved for the backward pass, or computed again
    assert plain - saved >= sigmoids


def test_an_error_inside_passes_through():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert peak_memory(lambda: torch.zeros(10)).peak == 40, "the next count is clean"


def test_released_tensors_are_forgotten():
    with TensorBytes() as counter:
        for _ in range(50):
            torch.zeros(1000) + 1
        assert counter.now == 0
    assert counter.peak == 8000
    assert not counter._alive


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_asks_the_allocator():
    x = torch.zeros(1 << 20, device="cuda")
    peak = peak_memory(lambda: x + 1, x)
    assert not peak.exact and peak.extra >= 4 << 20
