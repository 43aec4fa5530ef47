"""Tuning LoRA: what its knobs are worth in parameters and in learning rate, and how to read a sweep fairly.

Pure arithmetic; the runs themselves are `labs sweep`'s business.
"""

from collections.abc import Mapping, Sequence


def rank_for_budget(shapes: Sequence[tuple[int, int]], budget: int) -> int:
    """The largest LoRA rank on the given layers that trains at most `budget` parameters.

    `shapes` holds (out, in) of every layer that gets an adapter. Comparing target modules is fair only at equal
    parameters: the more layers, the lower the rank.

    Steps:
    1. One unit of rank costs a row of A (in) and a column of B (out): sum in + out over all layers.
    2. Divide the budget by it, rounding down.
    3. If not even rank 1 fits, raise ValueError that names the smallest budget that does.
    """
    per_rank = sum(out + in_ for out, in_ in shapes)
    rank = budget // per_rank
    if rank < 1:
        raise ValueError(f"{budget} parameters are too few: rank 1 on these layers takes {per_rank}")
    return rank


def equivalent_rate(lr: float, alpha: float, new_alpha: float, optimizer: str) -> float:
    """The learning rate at which `new_alpha` takes the same first step of the weights as `lr` does with `alpha`.

    At the start B is zero and only B moves, so the first change of the weight is s * (step of B) @ A, with
    s = alpha / rank (Hu et al. 2021, section 4.1). B's gradient is proportional to s as well.

    Steps:
    1. SGD steps by lr * gradient, and the gradient carries an s of its own: the weight moves by lr * s**2.
    2. Adam divides the gradient by its own size, so that s cancels there: the weight moves by lr * s.
    3. Keep that product equal. Anything but "sgd" or "adam" is a ValueError.
    """
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
    ratio = alpha / new_alpha
    return lr * (ratio**2 if optimizer == "sgd" else ratio)


def pick_rate(scores: Mapping[float, float]) -> tuple[float, bool]:
    """The best learning rate of a sweep, and whether it lies at the grid's edge.

    `scores` maps learning rate to score (higher is better). A best value at the edge is no best value yet: the
    grid must be widened, or the comparison says so.

    Steps:
    1. Find the rate with the highest score; of equal ones take the lowest rate.
    2. Compare it with the smallest and the largest rate tried.
    """
    best = min(scores, key=lambda lr: (-scores[lr], lr))
    return best, best in (min(scores), max(scores))
