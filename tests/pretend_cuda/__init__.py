"""A pretended CUDA device: proves, where there is none, that code keeps its tensors on the right device.

Tensors of `cuda:0` are CPU tensors whose memory is marked (`tags`). One mode sees what Python calls and answers for the
device (`modes.Calls`); another sees every operator, also in backward, and raises what CUDA raises where devices mix
(`modes.Operators`). `torch.cuda` tells of one card (`cuda`). The modes hold in every thread that is started inside.

    with pretend("gpu"):
        model.to("cuda")(ids.to("cuda"))

    PROFILE=gpu python -m tests.pretend_cuda --small solutions/01_lora.py     (or t4, a smaller card)
    python -m tests.pretend_cuda -m labs_lib doctor

With `noise` sums are off by a last digit, each time by another: what holds then needs no certain order of summation.

What it proves: tensors, generators and gradients that meet lie on one device; nothing of the device reaches NumPy
without `.cpu()`; code takes the ways that it takes for a CUDA device (Trainer, optimisers' `foreach` and `fused`,
bitsandbytes' checks), in the card's dtypes, bfloat16 included.
What it cannot prove: kernels of the device (Triton, cuBLAS, bitsandbytes' own: the CPU's compute instead), speed,
asynchrony (a missing `synchronize`), memory beyond the bytes of tensors, autocast (it does nothing here), and other
processes, which start without it.
"""

from .cuda import Pretend as pretend  # noqa: N813  used as a function: `with pretend("gpu")`
from .tags import HELD, tagged

__all__ = ["HELD", "pretend", "tagged"]
