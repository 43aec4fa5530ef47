"""The live page at the server's `/`: who is in which tier, who waits, each tenant's latency, swaps as they happen.

The page itself is a static file that knows nothing; it asks for the admin's key and polls `/admin/live` with it.
"""

import base64
import hashlib
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import median

MOVES = ("load", "host", "device", "evict", "drop", "failed")  # events of the ledger that the page shows
RECENT = 50  # requests of a tenant that its latency is taken from
SHOWN = 200  # moves in one answer


@cache
def page() -> tuple[str, dict[str, str]]:
    """The HTML, and headers that let it load nothing from anywhere and talk to this server only."""
    html = Path(__file__).with_name("live.html").read_text(encoding="utf-8")
    script = html.partition("<script>")[2].partition("</script>")[0]
    style = html.partition("<style>")[2].partition("</style>")[0]
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in allowed.items()),
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return html, headers


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def picture(engine, registry, watch=None, since: int = 0) -> dict:
    """What the page shows; JSON-ready.

    Args:
        since: the `seen` of an earlier answer; moves after it are given, at most the newest `SHOWN`.

    `tier` of a tenant's current version is the highest that it is in: `device`, `host`, `loading`, `disk`; or `none`
    if nothing is published. Latencies are medians of its last `RECENT` requests, in milliseconds.
    """
    now = engine.look()
    slot_of = {slot["adapter"]: slot for slot in now["slots"]}
    tenants = []
    for tenant in registry.tenants():
        version, account = registry.current(tenant.name), engine.ledger.accounts.get(tenant.name)
        sha = version and version.sha256
        tier = (
            "none"
            if sha is None
            else "device"
            if sha in slot_of
            else "host"
            if sha in now["host"]
            else "loading"
            if sha in now["loading"]
            else "disk"
        )
        row = {"name": tenant.name, "version": version and version.number, "adapter": sha, "tier": tier}
        row["slot"] = slot_of[sha]["slot"] if sha in slot_of else None
        row |= {"running": now["running"].get(tenant.name, 0), "waiting": now["waiting"].get(tenant.name, 0)}
        timings = list(islice(reversed(account.timings), RECENT)) if account else []
        row["requests"] = sum(account.requests.values()) if account else 0
        row["failed"] = account.requests["error"] if account else 0
        row["ttft_ms"] = 1e3 * median(each.ttft for each in timings) if timings else None
        row["total_ms"] = 1e3 * median(each.ttft + each.decode for each in timings) if timings else None
        row["loads"] = account.loads if account else 0
        tenants.append(row)
    first = now["events_seen"] - len(now["events"])
    moves = [
        {
            "number": number,
            "at": event.at,
            "what": event.what,
            "adapter": event.adapter,
            "tenant": event.tenant,
        }
        | {"of": event.more.get("of"), "slot": event.more.get("slot")}
        for number, event in enumerate(now["events"], start=first)
        if number >= since and event.what in MOVES
    ]
    return {
        "now": engine.clock(),
        "seen": now["events_seen"],
        "slots": now["slots"],
        "running": sum(now["running"].values()),
        "rows": engine.max_batch,
        "waiting": sum(now["waiting"].values()),
        "isolated": None if watch is None else watch.found is None,
        "tenants": tenants,
        "moves": moves[-SHOWN:],
    }
