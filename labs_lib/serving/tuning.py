"""How large the pieces are that SGMV's two kernels cut their work into: measured for a card where it was, else a guess.

A piece's size changes nothing but the time, so this is a table: `labs bench kernels --tune` tries `candidates` at the
shapes that matter, records the fastest as `sgmv_pieces` of the device, and `pieces` finds the nearest shape in it.
"""

import math
from functools import cache
from itertools import product
from typing import NamedTuple

RECORD = "sgmv_pieces"


class Shrink(NamedTuple):
    """Of the kernel with the long sums: numbers of a row at a time, programs to split for, warps, stages."""

    block: int
    programs: int
    warps: int
    stages: int


class Expand(NamedTuple):
    """Of the kernel with many columns: columns of a program, warps."""

    block: int
    warps: int


HALVES = {"shrink": Shrink, "expand": Expand}


class Shape(NamedTuple):
    """What the best pieces depend on. `size` is the layer's `in` for the shrink, its `out` for the expand."""

    half: str
    rows: int  # of a tile: 16 or 64
    ranks: int  # rounded up to a power of two, 16 at least
    itemsize: int  # bytes of a number
    tiles: int
    size: int


def default(shape: Shape) -> Shrink | Expand:
    """Sizes that no card refuses: three stages of the shrink hold 48 KB at most, which a T4 (64 KB) has.

    The shrink is split until 256 programs run, two for each of an A100's or H100's processors, so that enough bytes
    are under way: one program alone waits for memory most of the time.
    """
    block = _power(16384 // (shape.itemsize * (shape.rows + shape.ranks)))
    if shape.half == "shrink":
        return Shrink(max(32, min(256, block)), programs=256, warps=4, stages=3)
    return Expand(max(32, min(256, block)), warps=4)


def candidates(shape: Shape) -> list[Shrink | Expand]:
    """What the tuning tries: the default first."""
    first = default(shape)
    blocks = sorted({max(32, first.block // 2), first.block, min(512, 2 * first.block)})
    if shape.half == "shrink":
        tried = [Shrink(*each) for each in product(blocks, (128, 256, 512), (2, 4), (2, 4))]
    else:
        tried = [Expand(*each) for each in product(sorted({*blocks, 64}), (1, 2, 4, 8))]
    return [first, *(each for each in tried if each != first)]


def pieces(shape: Shape, device: str) -> Shrink | Expand:
    """For a shape on a device (as torch names it): those of the nearest shape that was tuned, or `default`."""
    return _nearest(shape, _slug(device))


def nearest(shape: Shape, rows: list[dict]) -> Shrink | Expand | None:
    """Of tuned rows those of the nearest shape; only tiles and size may differ, and are compared by their ratio."""
    same = [row for row in rows if all(row[key] == getattr(shape, key) for key in Shape._fields[:4])]
    if not same:
        return None

    def far(row: dict) -> float:
        return sum(abs(math.log(row[key] / max(1, getattr(shape, key)))) for key in ("tiles", "size"))

    row, kind = min(same, key=far), HALVES[shape.half]
    return kind(*(row[key] for key in kind._fields))


def forget() -> None:
    """Read the records anew: they have changed."""
    _nearest.cache_clear()
    _tuned.cache_clear()


@cache
def _nearest(shape: Shape, slug: str) -> Shrink | Expand:
    return nearest(shape, _tuned(slug)) or default(shape)


@cache
def _tuned(slug: str) -> list[dict]:
    from labs_lib.measure.records import load_record

    return list(load_record(RECORD, slug).rows)


@cache
def _slug(device: str) -> str:
    from labs_lib.measure.records import device_slug

    return device_slug(device)


def _power(number: int) -> int:
    """The largest power of two that is not larger."""
    return 1 << max(0, number.bit_length() - 1)
