"""The pretended device raises where a real one does, and nowhere else."""

import copy
import threading

import numpy as np
import pytest
import torch

from . import HELD, pretend, tagged

MIXED = "Expected all tensors to be on the same device"


@pytest.fixture(autouse=True)
def device():
    with pretend("gpu"):
        yield


def there(*shape, **options):
    return torch.randn(*shape, device="cuda", **options)


# What is on the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device="cuda"),
        lambda: torch.tensor([1.0], device="cuda:0"),
        lambda: torch.arange(3, device=0),
        lambda: torch.as_tensor(torch.ones(3), device="cuda"),
        lambda: torch.as_tensor(np.ones(3), device=torch.device("cuda")),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to(torch.device("cuda", 0), torch.float64),
        lambda: torch.ones(3).to(there(1)),
        lambda: torch.ones(3).cuda(),
        lambda: there(3).cpu().cuda(),
        lambda: torch.zeros_like(there(3)),
        lambda: there(3).new_ones(2),
        lambda: torch.empty(3, device="cuda").normal_(),
        lambda: there(3, 3) @ there(3, 3),
        lambda: there(3)[1:].view(-1).detach(),
        lambda: copy.deepcopy(there(3)),
        lambda: copy.deepcopy(torch.nn.Parameter(there(3))),
        lambda: torch.ones(3, device="cpu").to("cuda", torch.bfloat16).float(),
        lambda: torch.utils._pytree.tree_map(lambda x: x.cuda(), [torch.ones(1)])[0],
        lambda: torch.nn.Linear(2, 2).to("cuda").weight,
        lambda: torch.nn.Linear(2, 2, device="cuda").bias,
        lambda: there(4).sort().indices,
        lambda: torch.cat([there(2), there(2)]),
        lambda: torch.einsum("ij,jk->ik", there(2, 3), there(3, 2)),
        lambda: torch.nn.functional.one_hot(torch.tensor([0, 2], device="cuda")),
        lambda: torch.linalg.svd(there(3, 3)).S,
    ],
)
def test_is_on_the_device(make):
    made = make()
    assert (
        made.device == torch.device("cuda", 0) and made.is_cuda and not made.is_cpu and made.get_device() == 0
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3),
        lambda: there(3).cpu(),
        lambda: there(3).to("cpu", torch.float64),
        lambda: there(3).to(torch.ones(1)),
        lambda: torch.zeros_like(there(3), device="cpu"),
        lambda: torch.from_numpy(np.ones(3)),
        lambda: torch.tensor(there(3).tolist()),
        lambda: torch.tensor([0.0, 0.0]).copy_(there(2)),
        lambda: torch.ones(3).copy_(there(3)) + torch.ones(3),
    ],
)
def test_is_on_the_cpu(make):
    made = make()
    assert made.device == torch.device("cpu") and not made.is_cuda and made.numpy() is not None


def test_a_device_context_makes_tensors_there():
    with torch.device("cuda"):
        assert torch.ones(2).is_cuda and torch.nn.Linear(2, 2).weight.is_cuda
    assert torch.ones(2).is_cpu


def test_a_move_is_a_copy_and_no_move_is_none():
    x = torch.zeros(3)
    y = x.to("cuda")
    y += 1
    assert x.sum() == 0 and y.to("cuda") is y


def test_a_module_moves_in_place_with_ties_kept():
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    assert layer.to("cuda").weight is weight and weight.is_cuda and weight.is_leaf
    assert next(layer.cpu().parameters()).is_cpu


# Where CUDA raises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda: there(3) + torch.ones(3),
        lambda: torch.ones(3) * there(3),
        lambda: torch.ones(3) + there(()),  # only a CPU number may stand beside CUDA tensors
        lambda: there(2, 2) @ torch.ones(2, 2),
        lambda: torch.nn.Linear(2, 2)(there(1, 2)),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there(3, 2)),
        lambda: torch.cat([there(2), torch.ones(2)]),
        lambda: torch.where(torch.tensor([True, False]), there(2), there(2)),
        lambda: there(2, 2).index_select(0, torch.tensor([0])),
        lambda: there(2, 2).gather(0, torch.zeros(1, 2, dtype=torch.long)),
        lambda: torch.nn.functional.cross_entropy(there(2, 3), torch.tensor([0, 1])),
        lambda: there(3).masked_fill_(torch.tensor([True, False, True]), 0),
        lambda: there(3).add_(torch.ones(3)),
        lambda: torch.einsum("i,i->", there(2), torch.ones(2)),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            there(1, 2, 2), there(1, 2, 2), torch.ones(1, 2, 2)
        ),
        lambda: there(3).index_put_((torch.tensor([0]),), torch.ones(1)),
        lambda: there(3).__setitem__(torch.tensor([0, 1]), torch.ones(2)),
    ],
)
def test_two_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError, match=MIXED):
        mix()


def test_a_cpu_tensor_is_not_indexed_by_the_devices_numbers():
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        torch.ones(3)[torch.tensor([0], device="cuda")]


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize(
    "read",
    [lambda x: x.numpy(), np.asarray, lambda x: np.array(x), lambda x: np.mean([x]), lambda x: np.stack([x])],
)
def test_nothing_leaks_to_numpy(read):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        read(there(3))


def test_bfloat16_is_no_numpy_type_on_the_cpu_either():
    with pytest.raises(TypeError, match="BFloat16"):
        there(3, dtype=torch.bfloat16).cpu().numpy()


@pytest.mark.parametrize(
    "draw",
    [
        lambda cpu, cuda: torch.randn(3, device="cuda", generator=cpu),
        lambda cpu, cuda: torch.randn(3, generator=cuda),
        lambda cpu, cuda: there(3).uniform_(generator=cpu),
        lambda cpu, cuda: torch.multinomial(there(3).abs(), 1, generator=cpu),
        lambda cpu, cuda: torch.randperm(3, generator=cuda),
    ],
)
def test_a_generator_belongs_to_one_device(draw):
    with pytest.raises(RuntimeError, match="device type for generator"):
        draw(torch.Generator(), torch.Generator(device="cuda"))


def test_a_gradient_lies_where_its_tensor_does():
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="different device"):
        x.grad = there(2)


def test_a_mix_in_the_backward_pass_is_seen():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(3)

    with pytest.raises(RuntimeError, match=MIXED):
        Bad.apply(there(3, requires_grad=True)).sum().backward()


def test_a_second_device_does_not_exist():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:1")


# Where it does not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda: there(3) + torch.tensor(1.0),
        lambda: torch.tensor(2.0) * there(3),
        lambda: there(3).fill_(torch.tensor(1.0)),
        lambda: there(3).masked_fill(there(3) > 0, torch.tensor(0.0)),
        lambda: torch.where(there(3) > 0, there(3), torch.tensor(0.0)),
        lambda: there(3)[torch.tensor([0, 1])],
        lambda: there(3, 3)[torch.tensor([True, False, True])],
        lambda: there(3).index_put_((torch.tensor([0]),), torch.tensor(1.0)),
        lambda: there(3).copy_(torch.ones(3)),
        lambda: there(3).__setitem__(slice(0, 2), torch.ones(2)),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1)),
        lambda: there(3).mean() + 1,
    ],
)
def test_what_cuda_allows_is_allowed(mix):
    mix()


def test_a_gradient_comes_back_to_the_cpu():
    weight = torch.nn.Parameter(torch.ones(3))
    (weight.to("cuda") * there(3)).sum().backward()
    assert weight.grad.is_cpu and weight.grad.shape == (3,)


def test_functions_hooks_and_checkpoints_stay_on_the_device_in_backward():
    from torch.utils.checkpoint import checkpoint

    class Good(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.full((3,), 2.0, device=gradient.device)

    x, seen = there(3, requires_grad=True), []
    x.register_hook(lambda gradient: seen.append(gradient.device.type))
    checkpoint(lambda x: Good.apply(x).exp(), x, use_reentrant=False).sum().backward()
    assert x.grad.is_cuda and seen == ["cuda"]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
def test_an_optimizer_steps_on_the_device(options):
    layer = torch.nn.Linear(3, 2).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), **options)
    for _ in range(2):
        layer(there(4, 3)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[layer.weight]
    assert state["exp_avg"].is_cuda and state["exp_avg_sq"].is_cuda


def test_a_flop_counter_sees_the_same_on_the_device():
    from labs_lib.measure import count_flops

    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    here = count_flops(lambda: layer(x).sum().backward())
    layer, x = layer.to("cuda", torch.bfloat16), x.to("cuda")
    assert count_flops(lambda: layer(x.bfloat16()).float().sum().backward()) == here


def test_threads_have_the_device_too():
    found = []

    def work():
        found.append(torch.ones(2, device="cuda").is_cuda)
        try:
            torch.ones(2) + there(2)
        except RuntimeError as error:
            found.append(MIXED in str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True]


# The card ----------------------------------------------------------------------------------------------------------


def test_memory_is_the_bytes_of_what_is_alive():
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    view = x[10:]
    assert torch.cuda.memory_allocated() - before == 4000
    torch.cuda.reset_peak_memory_stats()
    y = x * 2
    del y
    assert torch.cuda.memory_allocated() - before == 4000
    assert torch.cuda.max_memory_allocated() - before == 8000
    free, total = torch.cuda.mem_get_info()
    assert total - free == torch.cuda.memory_allocated() == HELD.now
    del x
    assert torch.cuda.memory_allocated() - before == 4000  # the view holds it
    del view
    assert torch.cuda.memory_allocated() == before


def test_the_card_decides_the_profile():
    from labs_lib.lab.profiles import auto_profile

    assert auto_profile().name == "gpu"
    assert torch.cuda.is_bf16_supported(including_emulation=False)


def test_everything_is_taken_back():
    x = there(2)
    with pretend("t4"):
        from labs_lib.lab.profiles import auto_profile

        assert auto_profile().name == "t4"
    assert not tagged(x)


def test_noise_moves_sums_by_a_last_digit():
    with pretend("gpu", noise=True):
        a = there(16, 16)
        apart = (a @ a - a @ a).abs().max()
        assert 0 < apart < 1e-5
        x = torch.ones(4, 4)
        assert torch.equal(x @ x, x @ x)  # the CPU's own sums are left alone


# Graphs --------------------------------------------------------------------------------------------------------------


def test_a_graph_replays_on_the_same_memory():
    x, weight = torch.zeros(3, device="cuda"), there(3, 3)
    total = torch.zeros(3, device="cuda")

    def step():
        total.add_(1)
        return (x @ weight).relu().view(1, 3) + 1

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    x.copy_(torch.randn(3))
    graph.replay()
    assert torch.equal(out, (x @ weight).relu().view(1, 3) + 1)
    assert total.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x[x > 0],
        lambda x: torch.cuda.synchronize(),
        lambda x: bool((x > 0).all()),
    ],
)
def test_what_cannot_stand_in_a_graph_is_refused(wrong):
    x = there(3)
    refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        wrong(x)
