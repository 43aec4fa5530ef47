"""`labs fleet`: train all tenants' adapters in batches, judge each, publish those that pass. Resumes where it stopped.

A batch of tenants is the unit of work: it is trained, read by rules and written down as a whole. Where Ray is
installed (`pip install -e '.[scale]'`) the batches are spread over it: this machine's cores, or the cluster that
RAY_ADDRESS names. What comes back are the adapters themselves, so that nodes need no common disk.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from labs_lib.errors import LabsError
from labs_lib.models.room import check_device
from labs_lib.paths import cache, data
from labs_lib.training.fleet import Recipe, Trained, save_adapter, train
from labs_lib.training.gate import Candidate, gate, read_by_rules

TOGETHER = 10  # tenants in a batch on a GPU
BUSY = 16  # rows that keep a CPU core busy: the record says that larger steps cost more per row, not less
SCORES = ("compliance", "fidelity", "leakage", "exact")
SHIPPED_FOR = "small"  # the base whose fleet is in data/fleet
ROWS = {"validation": 16, "test": 32}  # products per tenant: the gate's, and the report's


@dataclass(frozen=True)
class Work:
    """One batch of tenants to train, as it travels to a worker."""

    tenants: tuple[str, ...]
    recipe: Recipe
    size: str
    device: str = "cpu"


def run_batch(work: Work, watch: Callable | None = None) -> tuple[list[dict], Trained]:
    """Train a batch and judge it: a row for each tenant, with the gate's reasons, and the adapters."""
    from labs_lib.models.base import load_base
    from labs_lib.world.tasks import load_task

    model, tokenizer = load_base(work.size, device=work.device)
    rows = {slug: load_task("style", tenant=slug)["train"][:] for slug in work.tenants}
    trained = train(model, tokenizer, rows, work.recipe, watch=watch)
    with tempfile.TemporaryDirectory(prefix="labs-fleet-") as scratch:
        folders = {
            slug: save_adapter(Path(scratch) / slug, tensors, work.recipe, work.size)
            for slug, tensors in trained.adapters.items()
        }
        sizes = {slug: sum(f.stat().st_size for f in folder.iterdir()) for slug, folder in folders.items()}
        scores = {
            split: read_by_rules(
                model,
                tokenizer,
                {slug: Candidate.of(folder, slug, split, rows) for slug, folder in folders.items()},
            )
            for split, rows in ROWS.items()
        }
    rows = []
    for slug in work.tenants:
        row = {
            "tenant": slug,
            "loss": trained.final_loss(slug),
            "nbytes": sizes[slug],
            "together": len(work.tenants),
        }
        row |= {"seconds": trained.seconds, "cpu_seconds": trained.cpu_seconds}
        for split, found in scores.items():
            row |= {f"{split}_{name}": getattr(found[slug], name) for name in SCORES}
        rows.append(row | {"refused": gate(scores["validation"][slug])})
    return rows, trained


def spread(todo: Sequence[Work], here: bool = False) -> Iterator[tuple[list[dict], Trained]]:
    """Run the batches, and give each as it gets done: over Ray, or one after the other in this process."""
    ray = None if here else _ray()
    if ray is None:
        for work in todo:
            yield run_batch(work, _progress(work))
        return
    gpus = int(any(work.device != "cpu" for work in todo))
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(_one_core)
    try:
        waiting = [remote.remote(work) for work in todo]
        while waiting:
            (done,), waiting = ray.wait(waiting)
            yield ray.get(done)
    finally:
        ray.shutdown()  # leaves a cluster that was there before running


def _ray():
    """Ray, started or joined; None, and a word about it, where it is not installed or does not start."""
    cluster = os.environ.get("RAY_ADDRESS")
    go_on = "training in this process, batch by batch."
    try:
        import ray
    except ImportError:
        print(f"Ray is not installed (`pip install -e '.[scale]'`): {go_on}")
        return None
    try:
        # RAY_ADDRESS, if it is set, names the cluster; else Ray starts on this machine and stops at the end.
        ray.init(include_dashboard=None if cluster else False, log_to_driver=False, logging_level="error")
    except Exception as error:
        if cluster:
            raise LabsError(f"There is no Ray cluster at RAY_ADDRESS={cluster} ({error}).") from error
        print(f"Ray did not start here ({' '.join(str(error).split())[:200]}): {go_on}")
        return None
    cores = int(ray.cluster_resources().get("CPU", 1))
    print(f"Ray {ray.__version__} on {cluster or 'this machine'}: {cores} cores.")
    return ray


def _one_core(work: Work) -> tuple[list[dict], Trained]:
    """What a Ray worker runs."""
    import torch

    from labs_lib import quiet

    quiet.silence()
    torch.set_num_threads(1)
    return run_batch(work)


def _progress(work: Work) -> Callable:
    """A bar that counts this batch's steps and says which of its tenants is behind."""
    from tqdm.std import tqdm

    bar = tqdm(
        total=work.recipe.steps, unit="step", ncols=100, desc=f"{len(work.tenants)} tenants", file=sys.stdout
    )

    def watch(step: int, losses) -> None:
        worst = int(losses.argmax())
        bar.set_postfix_str(
            f"loss {losses.mean():.3f}, {work.tenants[worst]} {losses[worst]:.3f}", refresh=False
        )
        bar.update()
        if step == work.recipe.steps:
            bar.close()

    return watch


def shipped() -> Path:
    return data() / "fleet"


def together_on(device: str, recipe: Recipe) -> int:
    """How many tenants should share a batch."""
    return max(1, BUSY // recipe.batch) if device == "cpu" else TOGETHER


def default_folder(recipe: Recipe, size: str) -> Path:
    """Where a fleet lies: another recipe or another base is another folder."""
    from labs_lib.models.base import base_folder

    file = base_folder(size) / "model.safetensors"
    base = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else size
    name = hashlib.sha256(json.dumps([recipe.to_dict(), base]).encode()).hexdigest()[:12]
    return cache() / "fleet" / f"{Path(size).name}-{name}"


def fleet_folders(tenants: Sequence[str], size: str = "small", device: str = "cpu") -> dict[str, Path]:
    """Each tenant's trained adapter: as shipped for the base `small`, else from the cache, else trained now."""
    recipe = Recipe()
    if size == SHIPPED_FOR and all((shipped() / slug).is_dir() for slug in tenants):
        return {slug: shipped() / slug for slug in tenants}
    folder = default_folder(recipe, size)
    run_fleet(tenants, recipe, size, folder, device=device, here=True)
    return {slug: folder / slug for slug in tenants}


def run_fleet(
    tenants: Sequence[str],
    recipe: Recipe,
    size: str = "small",
    folder: Path | None = None,
    *,
    together: int | None = None,
    here: bool = False,
    limit: int | None = None,
    device: str = "cpu",
) -> list[dict]:
    """Train what is missing of a fleet into `folder`, one PEFT directory per tenant; returns a row for each.

    `fleet.jsonl` in the folder has a row per tenant: what is in it is not trained again. `limit`: stop after so many
    batches.
    """
    together = together_on(device, recipe) if together is None else together
    if together < 1:
        raise LabsError(f"{together} tenants cannot share a batch: at least 1.")
    folder = folder or default_folder(recipe, size)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "fleet.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rows = {row["tenant"]: row for row in done if (folder / row["tenant"]).is_dir()}
    missing = [slug for slug in tenants if slug not in rows]
    if len(missing) < len(tenants):
        print(f"{len(tenants) - len(missing)} of {len(tenants)} tenants are trained already, in {folder}")
    todo = [
        Work(tuple(missing[i : i + together]), recipe, size, device) for i in range(0, len(missing), together)
    ]
    for found, trained in spread(todo[:limit], here) if missing else ():
        for row in found:
            save_adapter(folder / row["tenant"], trained.adapters[row["tenant"]], recipe, size)
            rows[row["tenant"]] = row
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            count = sum(slug in rows for slug in tenants)
            print(f"[{count:2d}/{len(tenants)}] {told(row)}", flush=True)
    return [rows[slug] for slug in tenants if slug in rows]


def told(row: dict) -> str:
    """A tenant's row in one line."""
    verdict = "passes" if not row["refused"] else "REFUSED: " + "; ".join(row["refused"])
    return (
        f"{row['tenant']:28s} loss {row['loss']:.4f}, compliance {row['validation_compliance']:.3f}, "
        f"fidelity {row['validation_fidelity']:.3f}, leakage {row['validation_leakage']:.2f}: {verdict}"
    )


def publish(rows: Sequence[dict], folder: Path, registry, note: str) -> dict[str, str]:
    """Publish the adapters that passed; returns the API keys of tenants that are new to the registry."""
    known, keys = {each.name for each in registry.tenants()}, {}
    for row in rows:
        if row["refused"]:
            continue
        if row["tenant"] not in known:
            keys[row["tenant"]] = registry.add_tenant(row["tenant"])
        registry.publish(row["tenant"], folder / row["tenant"], note)
    return keys


# -- the measurement -------------------------------------------------------------------------------------------------


def step_costs(
    size: str,
    recipe: Recipe,
    batches: Sequence[int] = (1, 4, 16),
    together: int = TOGETHER,
    rounds: int = 3,
    device: str = "cpu",
) -> list[dict]:
    """Milliseconds of a training step per tenant, by rows per tenant: `fit`, a fleet of one, a fleet of many.

    They are this process' CPU time (`cpu_ms_per_tenant`); on a GPU, which works by itself, they are the clock's
    (`ms_per_tenant`). The arms take turns, so that a busy machine slows all of them alike; a run's first step does not
    count.
    """
    from statistics import median

    from labs_lib.models.base import load_base
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenants

    slugs = [tenant.slug for tenant in load_tenants()][:together]
    own = {slug: load_task("style", tenant=slug)["train"][:] for slug in slugs}
    model, tokenizer = load_base(size, device=device)
    on_cpu = device == "cpu"
    now, unit = (time.process_time, "cpu_ms_per_tenant") if on_cpu else (time.perf_counter, "ms_per_tenant")
    found: dict[tuple[int, str], list[float]] = {}
    for _ in range(rounds):
        for rows in batches:
            short = replace(recipe, steps=3, batch=rows)
            stamps = [now()]
            _fit_alone(size, own[slugs[0]], short, lambda s=stamps: s.append(now()), device)
            found.setdefault((rows, "fit"), []).append((stamps[-1] - stamps[1]) / (len(stamps) - 2))
            for count in (1, together):
                stamps = []
                data = {slug: own[slug] for slug in slugs[:count]}
                train(model, tokenizer, data, short, watch=lambda *_, s=stamps: s.append(now()))
                seconds = (stamps[-1] - stamps[0]) / (len(stamps) - 1) / count
                found.setdefault((rows, f"fleet of {count}"), []).append(seconds)
    return [
        {"rows": rows, "arm": arm, unit: 1e3 * median(times), "rounds": rounds}
        for (rows, arm), times in found.items()
    ]


def _fit_alone(size: str, data: dict, recipe: Recipe, stamp: Callable[[], None], device: str) -> None:
    """One tenant by `fit`; `stamp` is called after each step."""
    from transformers import TrainerCallback

    from labs_lib.methods.lora import inject_lora
    from labs_lib.models.base import load_base
    from labs_lib.training.fit import fit

    class Stamp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            stamp()

    model, tokenizer = load_base(size, device=device)
    inject_lora(model, "all-linear", recipe.rank, recipe.alpha)
    settings = {"steps": recipe.steps, "batch_size": recipe.batch, "lr": recipe.lr, "seed": recipe.seed}
    fit(model, tokenizer, data, progress=False, callbacks=[Stamp()], **settings)


# -- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = Recipe()
    parser.add_argument("tenants", nargs="*", metavar="TENANT", help="slugs (default: all fifty)")
    parser.add_argument("--base", default="small", help="a base of the course's family (default: small)")
    parser.add_argument("--rank", type=int, default=recipe.rank, help="(default: %(default)s)")
    parser.add_argument(
        "--lr", type=float, default=recipe.lr, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=recipe.steps, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=recipe.seed, help="another one for a second try (default: 0)"
    )
    parser.add_argument(
        "--together", type=int, help="tenants in a batch (default: as many as keep a core busy)"
    )
    parser.add_argument("--device", default="cpu", help="where each batch is trained (default: cpu)")
    parser.add_argument("--here", action="store_true", help="in this process, even if Ray is installed")
    parser.add_argument("--limit", type=int, help="stop after so many batches; the next call goes on")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the adapters go (default: in the cache)"
    )
    parser.add_argument("--publish", action="store_true", help="publish those that pass the gate")
    parser.add_argument("--registry", type=Path, metavar="PATH", help="of --publish (default: in the cache)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="where the new tenants' API keys go (--publish)"
    )
    parser.add_argument("--record", action="store_true", help="measure the batching, too, and keep a record")


def main(args: argparse.Namespace) -> int:
    import torch

    from labs_lib import quiet
    from labs_lib.world.tenants import load_tenant, load_tenants

    quiet.silence()
    check_device(args.device)
    torch.set_num_threads(1)
    if args.publish and args.keys is None:
        raise LabsError(
            "--publish makes API keys that are shown only once: say where they go with --keys FILE."
        )
    tenants = [load_tenant(slug).slug for slug in args.tenants] or [each.slug for each in load_tenants()]
    recipe = Recipe(rank=args.rank, alpha=2 * args.rank, lr=args.lr, steps=args.steps, seed=args.seed)
    folder = args.out or default_folder(recipe, args.base)
    settings = {"together": args.together, "here": args.here, "limit": args.limit, "device": args.device}
    rows = run_fleet(tenants, recipe, args.base, folder, **settings)
    passed = [row for row in rows if not row["refused"]]
    print(f"{len(rows)} of {len(tenants)} trained, {len(passed)} passed the gate: {folder}")
    if len(rows) < len(tenants):
        print("stopped early; run the same command to go on")
        return 0
    if args.record:
        print(f"recorded in {_record(rows, recipe, args.base, args.device)}")
    if args.publish:
        _publish(rows, folder, args)
    return 0 if len(passed) == len(rows) else 1


def _record(rows: list[dict], recipe: Recipe, size: str, device: str) -> Path:
    from labs_lib.measure.records import Record, save_record

    found = [{"section": "tenant", **row} for row in rows]
    found += [{"section": "step", **row} for row in step_costs(size, recipe, device=device)]
    note = "All tenants' adapters, many in a batch; CPU seconds on one thread. Gate on validation, report on test."
    record = Record("fleet", found, note, {"recipe": recipe.to_dict(), "model": size})
    return save_record(record, device=device)


def _publish(rows: list[dict], folder: Path, args: argparse.Namespace) -> None:
    from labs_lib.serving.registry import Registry

    with Registry(args.registry or cache() / "registry") as registry:
        keys = publish(rows, folder, registry, "labs fleet")
    if keys:
        handle = os.open(args.keys, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # for nobody else's eyes
        with os.fdopen(handle, "a") as file:
            file.writelines(f"{slug} {key}\n" for slug, key in keys.items())
    published = sum(not row["refused"] for row in rows)
    print(
        f"published {published} adapters; keys of {len(keys)} new tenants"
        + (f" in {args.keys}" if keys else "")
    )
