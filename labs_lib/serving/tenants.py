"""`labs tenants`: who may use the server, and which adapter version each tenant's requests get."""

import argparse
import time
from pathlib import Path

from labs_lib.paths import cache
from labs_lib.serving.registry import Registry, Version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--registry", type=Path, metavar="PATH", help="the registry's folder (default: in the cache)"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, *arguments: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        for argument in arguments:
            parser.add_argument(argument.lower(), metavar=argument)
        return parser

    action("add", "add a tenant and show its API key, this once", "NAME")
    publish = action(
        "publish", "check a PEFT adapter and make it the tenant's active version", "NAME", "FOLDER"
    )
    publish.add_argument("--note", default="", metavar="TEXT", help="one line to remember the version by")
    rollback = action("rollback", "go back to an earlier version", "NAME")
    rollback.add_argument(
        "--to", type=int, metavar="N", help="its number (default: the one before the active)"
    )
    retire = action("retire", "take a version out of use for good", "NAME")
    retire.add_argument("number", type=int, metavar="N")
    listing = action("list", "list the tenants, or the versions of one")
    listing.add_argument("name", nargs="?", metavar="NAME")
    action("rotate-key", "give a tenant a new API key, shown this once; the old one is void at once", "NAME")
    action("verify", "read every stored adapter again and compare it with its sha256")


def main(args: argparse.Namespace) -> int:
    with Registry(args.registry or cache() / "registry") as registry:
        return globals()[f"_{args.action.replace('-', '_')}"](registry, args)


def _add(registry: Registry, args: argparse.Namespace) -> int:
    _show_key(args.name, registry.add_tenant(args.name))
    return 0


def _rotate_key(registry: Registry, args: argparse.Namespace) -> int:
    _show_key(args.name, registry.rotate_key(args.name))
    return 0


def _publish(registry: Registry, args: argparse.Namespace) -> int:
    _show_active(registry.publish(args.name, args.folder, args.note))
    return 0


def _rollback(registry: Registry, args: argparse.Namespace) -> int:
    _show_active(registry.rollback(args.name, args.to))
    return 0


def _retire(registry: Registry, args: argparse.Namespace) -> int:
    registry.retire(args.name, args.number)
    left = registry.current(args.name)
    print(f"Version {args.number} of {args.name} is retired.")
    print(f"Active: version {left.number}." if left else "No version is active: publish one, or roll back.")
    return 0


def _list(registry: Registry, args: argparse.Namespace) -> int:
    if args.name:
        header = ("version", "state", "sha256", "rank", "MB", "published (UTC)", "note")
        rows = [
            (
                str(v.number),
                v.state,
                v.sha256[:12],
                str(v.rank),
                f"{v.nbytes / 1e6:.2f}",
                _time(v.published_at),
                v.note,
            )
            for v in registry.versions(args.name)
        ]
    else:
        header = ("tenant", "active", "sha256", "versions", "key", "added (UTC)")
        rows = []
        for tenant in registry.tenants():
            versions = registry.versions(tenant.name)
            active = next((each for each in versions if each.state == "active"), None)
            shown = (str(active.number), active.sha256[:12]) if active else ("-", "-")
            key = f"labs-{tenant.key_id}-..."
            rows.append((tenant.name, *shown, str(len(versions)), key, _time(tenant.created_at)))
    if not rows:
        print(
            f"{args.name} has no versions yet." if args.name else "No tenants yet: `labs tenants add NAME`."
        )
        return 0
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _verify(registry: Registry, args: argparse.Namespace) -> int:
    users: dict[str, list[str]] = {}
    for tenant in registry.tenants():
        for version in registry.versions(tenant.name):
            users.setdefault(version.sha256, []).append(f"{tenant.name} {version.number}")
    broken = {sha256: names for sha256, names in users.items() if not registry.verify(sha256)}
    for sha256, names in broken.items():
        print(f"Damaged or gone: {sha256[:12]} ({', '.join(names)}). Publish it again.")
    print(f"{len(users) - len(broken)} of {len(users)} stored adapters are intact.")
    return 1 if broken else 0


def _show_key(name: str, key: str) -> None:
    print(f"API key of {name}, shown only this once:\n{key}")


def _show_active(version: Version) -> None:
    print(
        f"Active for {version.tenant}: version {version.number}, {version.sha256[:12]}, rank {version.rank}."
    )


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
