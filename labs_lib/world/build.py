"""Builds and verifies the shipped data: `labs data build`, `labs data check`, the checksums that loading consults."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache

from labs_lib.errors import LabsError
from labs_lib.paths import data
from labs_lib.world import tasks
from labs_lib.world.tenants import load_tenants

CHECKSUMS = "checksums.json"


def _jsonl(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def generated_files() -> dict[str, Callable[[], bytes]]:
    """Path under data/ -> a function that makes its bytes."""
    files = {f"tenants/{t.slug}.jsonl": lambda t=t: _jsonl(tasks.style_rows(t)) for t in load_tenants()}
    return files | {
        "tasks/knowledge.jsonl": lambda: _jsonl(tasks.new_facts()),
        "tasks/classification.jsonl": lambda: _jsonl(tasks.classification_rows()),
        "tasks/domain.jsonl": lambda: _jsonl(tasks.domain_rows()),
        "tasks/retention.jsonl": lambda: _jsonl(tasks.retention_rows()),
    }


def shipped_files() -> list[str]:
    """Every file that a checksum covers: generated splits, style guides, the base family and the fleet."""
    patterns = (
        "tenants/*.yaml",
        "tenants/*.jsonl",
        "tasks/*.jsonl",
        "base/**/*.safetensors",
        "base/**/*.json",
        "fleet/**/*.safetensors",
        "fleet/**/*.json",
    )
    return sorted(
        str(p.relative_to(data())) for pattern in patterns for p in data().glob(pattern) if p.is_file()
    )


def sha256(relative: str) -> str:
    return hashlib.sha256((data() / relative).read_bytes()).hexdigest()


def write_checksums() -> None:
    sums = {relative: sha256(relative) for relative in shipped_files()}
    (data() / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


@cache
def _checksums() -> dict[str, str]:
    path = data() / CHECKSUMS
    if not path.is_file():
        raise LabsError("data/checksums.json is missing: restore it with `git checkout data/checksums.json`.")
    return json.loads(path.read_text(encoding="utf-8"))


def verify(*relative: str) -> None:
    """Raise LabsError unless the shipped files (all of them, if none is named) are there and unchanged."""
    for name in relative or _checksums():
        path = data() / name
        if not path.is_file():
            raise LabsError(f"data/{name} is missing: restore it with `git checkout data/{name}`.")
        if sha256(name) != _checksums().get(name):
            raise LabsError(
                f"data/{name} is not the file that was shipped (checksum differs): restore it with "
                f"`git checkout data/{name}`, or run `labs data build` if you changed it on purpose."
            )


def build() -> list[str]:
    """Write every generated file and the checksums; returns the paths whose content changed."""
    changed = []
    for relative, make in generated_files().items():
        path, content = data() / relative, make()
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            changed.append(relative)
    write_checksums()
    _checksums.cache_clear()
    return changed


def check() -> list[str]:
    """Paths whose shipped content is not what the generators make today, or not what the checksums say."""
    stale = [
        relative
        for relative, make in generated_files().items()
        if not (data() / relative).is_file() or (data() / relative).read_bytes() != make()
    ]
    for name in sorted({*shipped_files(), *_checksums()} - set(stale)):
        if not (data() / name).is_file() or sha256(name) != _checksums().get(name):
            stale.append(name)
    return stale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=["build", "check"], help="rebuild the shipped data, or prove that it is current"
    )


def main(args: argparse.Namespace) -> int:
    if args.action == "build":
        changed = build()
        print(f"{len(generated_files())} files generated, {len(changed)} changed.")
        return 0
    stale = check()
    for name in stale:
        print(f"data/{name}: differs from what `labs data build` makes")
    print("data is current" if not stale else f"{len(stale)} files differ")
    return 1 if stale else 0
