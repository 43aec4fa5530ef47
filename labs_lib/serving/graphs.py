"""Recording and replaying: on CUDA a step is captured once as a graph and then replayed; elsewhere it is called.

The step must read nothing but memory that stays where it is, which `static` sees to and tests on the CPU.
"""

from collections.abc import Callable, Hashable

import torch

from labs_lib.errors import LabsError

WARM_UP = 2  # calls before the capture: kernels are compiled, libraries take their workspaces

Step = Callable[[], tuple[torch.Tensor, ...]]


class CaptureError(LabsError):
    """A step that cannot be recorded, and why."""


class Beside:
    """Work on a second stream while the first goes on; in a graph, a branch that runs at the same time.

    `with beside:` ... is what runs there; `beside.join()` makes the first stream wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()

    def __exit__(self, *error) -> None:
        self._context.__exit__(*error)

    def join(self) -> None:
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class Recorder:
    """Steps by their kind: recorded at first use, replayed from then on. Without CUDA each is simply called.

    The steps' own intermediate results share one pool of memory, so only one step's outputs are valid at a time:
    those of the last one that ran.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorded: dict[Hashable, tuple] = {}
        self._pool = None

    def run(self, kind: Hashable, step: Step) -> tuple[torch.Tensor, ...]:
        if self.device.type != "cuda":
            return step()
        if kind not in self._recorded:
            self._recorded[kind] = self._record(step)
        graph, outputs = self._recorded[kind]
        graph.replay()
        return outputs

    def clear(self) -> None:
        self._recorded.clear()
        self._pool = None

    @property
    def count(self) -> int:
        return len(self._recorded)

    def _record(self, step: Step) -> tuple:
        """Warm-up and capture. The step may run several times on the same buffers: it writes the same each time."""
        try:
            aside = torch.cuda.Stream(self.device)
            aside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream(self.device).wait_stream(aside)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # thread_local: the loader's thread may take pinned memory meanwhile, the oracle's run a model.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = step()
            return graph, outputs
        except RuntimeError as error:
            raise CaptureError(
                f"The decode step could not be recorded as a CUDA graph ({error}): use --graphs off."
            ) from error
