"""The Triton kernels compile for the cards that the course names, which needs Triton but no GPU; and they load wide.

What the interpreter cannot see is seen here: that a card's shared memory suffices, that products are matrix
instructions, that an adapter's pages are read 16 bytes at a time.
"""

import importlib.util
import os
import re

import pytest

from labs_lib.serving.tuning import Shape, default

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SHARED = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}  # bytes of a program at most: T4, A100, H100
NAMES = {"fp16": 2, "bf16": 2, "fp32": 4}


def compiled(kernel, number: str, constants: dict, capability: int, **options):
    """The kernel for a card; sizes and steps are multiples of 16, as a model's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        "x": number,
        "a": number,
        "b": number,
        "out": number,
        "h": "fp32",
        "cells": "i64",
        "pages": "i64",
    }
    signature = {
        name: "constexpr" if name in constants else f"*{types[name]}" if name in types else "i32"
        for name in kernel.arg_names
    }
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={
            places[name]: [["tt.divisibility", 16]] for name in signature if name not in ("R", *constants)
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("number", NAMES)
@pytest.mark.parametrize(("rows", "ranks"), [(16, 16), (16, 64), (64, 64)])
def test_both_kernels(monkeypatch, tmp_path, capability, number, rows, ranks):
    if number == "bf16" and capability < 80:
        pytest.skip("a T4 has no bfloat16")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from labs_lib.serving import sgmv

    shape = Shape("shrink", rows, ranks, NAMES[number], 32, 4096)
    how, then = default(shape), default(shape._replace(half="expand"))
    sizes = {"ROWS": rows, "RANKS": ranks, "BLOCK": how.block}
    first = compiled(
        sgmv._shrink, number, sizes | {"STEPS": 4}, capability, num_warps=how.warps, num_stages=how.stages
    )
    precision = "ieee" if number == "fp32" else "tf32"
    sizes |= {"BLOCK": then.block, "SPLITS": 4, "PRECISION": precision}
    second = compiled(sgmv._expand, number, sizes, capability, num_warps=then.warps)
    for kernel in (first, second):
        assert kernel.metadata.shared <= SHARED[capability]
        assert not re.search(r"(ld|st)\.local", kernel.asm["ptx"]), "registers are spilled"
        if capability >= 80 and number != "fp32":
            assert re.search(r"mma", kernel.asm["ptx"]), "products are not matrix instructions"
    wide = r"cp\.async\.c[ag]\S* [^;]*, (0x10|16)\b|ld\.global\.v4"
    assert re.search(wide, first.asm["ptx"]) and re.search(r"ld\.global\.v4", second.asm["ptx"])
