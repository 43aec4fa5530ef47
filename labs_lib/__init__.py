"""PEFT Labs: parameter-efficient fine-tuning from scratch, proved equal to PEFT, and put on trial.

This file owns the short names a notebook imports. They resolve on first use (PEP 562), so that `import labs_lib`
costs milliseconds and a cell that needs no model does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "setup": "labs_lib.lab.setup",
    "check": "labs_lib.lab.check",
    "progress": "labs_lib.lab.progress",
    "claim": "labs_lib.measure.claims",
    "load_base": "labs_lib.models.base",
    "random_like": "labs_lib.models.twins",
    "load_tenants": "labs_lib.world.tenants",
    "load_tenant": "labs_lib.world.tenants",
    "load_task": "labs_lib.world.tasks",
    "fit": "labs_lib.training.fit",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'labs_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
