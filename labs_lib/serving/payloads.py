"""Random adapters in host memory, for measurements at a size where folders would not do.

A rank-8 adapter of a 7B model is 40 MB, a thousand of them 40 GB. Here each adapter has a name of its own, shaped like
a sha256, a slot and device memory of its own; but only as many sets of weights are drawn as a budget of bytes allows,
and adapters k, k + n, k + 2 n, ... of n sets share one. What the device reads is what it would read of as many
different ones; that each row got *its* adapter is proved among n. Measurements say n as `payloads`.
"""

import copy
import hashlib

import torch
from torch import Tensor, nn

from labs_lib.errors import LabsError
from labs_lib.serving.layout import Layout
from labs_lib.serving.tiers import HostAdapter


class Payloads:
    """`count` adapters of a rank on all linear layers, B not zero, within `budget` bytes of host memory.

    `strength` is the size of B A against the base weight's, as in `workload.random_adapters`.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        rank: int,
        budget: float = 4e9,
        strength: float = 0.5,
        seed: int = 0,
    ) -> None:
        weight = model.get_input_embeddings().weight
        self.layout, self.rank, self.device, self.dtype = Layout.of(model), rank, weight.device, weight.dtype
        self.names = [hashlib.sha256(f"{seed}/{rank}/{k}".encode()).hexdigest() for k in range(count)]
        self.number = {name: k for k, name in enumerate(self.names)}
        self.nbytes = rank * self.layout.width * weight.element_size()
        self.distinct = max(1, min(count, int(budget // self.nbytes)))
        scale = torch.zeros(self.layout.width, device=self.device)
        for spec in self.layout.linears:
            size = model.get_submodule(spec.name).weight.detach().float().std() if weight.numel() else 0
            self.layout.a(scale[None], spec)[:] = spec.in_features**-0.5
            self.layout.b(scale[None], spec)[:] = strength * size * (spec.in_features / rank) ** 0.5
        generator = torch.Generator(self.device).manual_seed(seed)
        self._sets = []
        for _ in range(self.distinct):
            pages = torch.randn(rank, self.layout.width, generator=generator, device=self.device)
            pages = (pages * scale).to(self.dtype).cpu()
            self._sets.append(pages.pin_memory() if self.device.type == "cuda" else pages)

    def set_of(self, name: str) -> int:
        return self.number[name] % self.distinct

    def another(self, name: str) -> str:
        """An adapter with other weights."""
        if self.distinct < 2:
            raise LabsError("One set of weights cannot be told from another: allow more with --payload-gb.")
        return self.names[(self.set_of(name) + 1) % self.distinct]

    def pages(self, name: str) -> Tensor:
        """(rank, width), as an arena holds them."""
        return self._sets[self.set_of(name)]

    def matrices(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A (rank, in) and B (out, rank), scale included, of each layer, on the model's device."""
        pages = self.pages(name).to(self.device)
        return {
            spec.name: (self.layout.a(pages, spec), self.layout.b(pages, spec).T)
            for spec in self.layout.linears
        }

    def peft(self, model: nn.Module, names: list[str]):
        """A PeftModel of `model` with these adapters, in the model's own number format."""
        from peft import LoraConfig, get_peft_model

        targets = sorted({spec.name.rpartition(".")[2] for spec in self.layout.linears})
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=targets,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        with torch.device(self.device):  # else every adapter is drawn on the host first
            peft = get_peft_model(model, config, adapter_name=names[0])
            for name in names[1:]:
                peft.add_adapter(name, config)
        layers = peft.base_model.model
        for name in names:
            for path, (A, B) in self.matrices(name).items():
                layer = layers.get_submodule(path)
                layer.lora_A[name].weight = nn.Parameter(A.contiguous(), requires_grad=False)
                layer.lora_B[name].weight = nn.Parameter(B.contiguous(), requires_grad=False)
        return peft.eval()

    def merge(self, into: nn.Module, model: nn.Module, name: str) -> None:
        """Make the weights of `into`, a copy of `model`, those of the model with the adapter merged."""
        with torch.no_grad():
            for path, (A, B) in self.matrices(name).items():
                weight = into.get_submodule(path).weight
                weight.copy_(model.get_submodule(path).weight)
                weight.addmm_(B, A)


class Given:
    """A loader that has every adapter in host memory already."""

    def __init__(self, payloads: Payloads) -> None:
        self.payloads, self._asked = payloads, []

    def start(self, adapter: str) -> None:
        self._asked.append(adapter)

    def finished(self) -> list[tuple[str, HostAdapter]]:
        asked, self._asked = self._asked, []
        return [
            (
                name,
                HostAdapter(name, self.payloads.rank, self.payloads.nbytes, values=self.payloads.pages(name)),
            )
            for name in asked
        ]

    def close(self) -> None:
        pass


class Merging:
    """The truth about an adapter's answers: one copy of the base, into which it is merged when it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.known = model, []  # of which the adapters are
        self._copy, self._now = copy.deepcopy(model), None

    def merged(self, name: str | None) -> nn.Module:
        if name is None:
            return self.model
        payloads = next(each for each in self.known if name in each.number)
        wanted = payloads.rank, payloads.set_of(name)
        if self._now != wanted:
            payloads.merge(self._copy, self.model, name)
            self._now = wanted
        return self._copy
