"""Measuring: counts, bytes, FLOPs, time, statistics, records of runs, the register of the chapter's claims.

This file owns the room's short names; each resolves on first use, so that importing the room loads no torch.
"""

from importlib import import_module

_EXPORTS = {
    "count": ("count_flops", "count_parameters", "held_bytes", "optimizer_state_bytes", "tensor_bytes"),
    "memory": ("peak_memory",),
    "timing": ("time_ratio", "time_ratios"),
    "stats": (
        "Estimate",
        "bootstrap_ci",
        "mean_ci",
        "paired_difference",
        "paired_tost",
        "spearman",
        "steps_to_threshold",
        "wilson_ci",
    ),
    "records": ("Record", "load_published", "load_record", "load_records", "save_record"),
    "claims": ("claim", "observed"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'labs_lib.measure' has no attribute {name!r}")
    return getattr(import_module(f"labs_lib.measure.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
