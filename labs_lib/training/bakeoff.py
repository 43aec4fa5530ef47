"""`labs bakeoff`: all methods of the course by one protocol, and what each costs besides quality.

One protocol for everybody: four learning rates half a decade apart, around the one that the method's own lab (or paper)
found; where the best is at the edge of the grid, the grid grows, by three rates at most; then fresh seeds at the best.
"""

from typing import TYPE_CHECKING

from labs_lib.training.sweeps import TENANT, Arm, Task

if TYPE_CHECKING:
    pass

#: knowledge at three sizes (0.4, 1.5 and 6.1 kbit); retention is what is left of old facts after each of these tasks
TASKS = (
    Task("style", "style", steps=60, batch=16, tenant=TENANT),
    Task("classification", "classification", steps=60, batch=16),
    Task("knowledge, 64 facts", "knowledge", steps=100, batch=32, facts=64),
    Task("knowledge, 256 facts", "knowledge", steps=150, batch=32, facts=256),
    Task("knowledge, 1,024 facts", "knowledge", steps=300, batch=64, facts=1024),
)


def _rates(middle: float) -> tuple[float, ...]:
    """Two half-decades below the guess, the guess, one above: too large a rate fails at once, too small one slowly."""
    return tuple(float(f"{middle * 10 ** (k / 2):.2g}") for k in (-2, -1, 0, 1))


def _arm(name: str, method: str, rate: float, **more) -> Arm:
    return Arm(name, method=method, rates=_rates(rate), **more)
