"""The 50 customers ("tenants"): their style guides, from `data/tenants/*.yaml`, validated against the grammar."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from labs_lib.errors import LabsError
from labs_lib.paths import data
from labs_lib.world.grammar import DIMENSIONS, guide_line, validate_style


@dataclass(frozen=True)
class Tenant:
    """One fictional customer. `style` maps every dimension of the grammar to a value."""

    slug: str
    name: str
    sector: str
    voice: str
    style: dict[str, str]

    @property
    def guide(self) -> str:
        """The style as a prompt's guide line."""
        return guide_line(self.style)

    @property
    def mark(self) -> tuple[str, str]:
        """(house word, sign-off phrase): a pair that no other tenant has, by which a leak is recognised."""
        return self.style["houseword"], DIMENSIONS["signoff"][self.style["signoff"]]


def read_tenant(path: Path) -> Tenant:
    """One YAML style guide. Raises LabsError naming the file and what is wrong with it."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        tenant = Tenant(
            path.stem, fields["name"], fields["sector"], fields["voice"].strip(), dict(fields["style"])
        )
        validate_style(tenant.style)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise LabsError(
            f"Style guide {path.name} cannot be used: {reason}. Fix it or restore it with git."
        ) from error
    return tenant


@cache
def load_tenants() -> tuple[Tenant, ...]:
    """All tenants, by slug."""
    folder = data() / "tenants"
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise LabsError(f"No style guides in {folder}: restore them with `git checkout data/tenants`.")
    return tuple(read_tenant(path) for path in paths)


def load_tenant(slug: str) -> Tenant:
    """One tenant by its slug, or a LabsError that names those that exist."""
    for tenant in load_tenants():
        if tenant.slug == slug:
            return tenant
    raise LabsError(f"No tenant {slug!r}: one of {', '.join(t.slug for t in load_tenants())}.")
