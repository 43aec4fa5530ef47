"""Records of measured runs: append-only JSON with provenance; and the published figures to set beside them.

`data/measured/h100.lora_rank_sweep.json` is a list of records, the newest last; a run adds one and changes
none. A course's own record is written only when LABS_RECORD=1; a learner's goes to the cache, and loading
looks there too.
"""

import contextlib
import datetime as dt
import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from labs_lib import paths
from labs_lib.errors import LabsError
from labs_lib.measure import context

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "galore-torch", "numpy")
KEEP_IN_CACHE = 50  # records per file; the course's own files keep all
_RUN = uuid.uuid4().hex[:8]  # tells the records of this process from those of an earlier one


@dataclass
class Record:
    """What was measured (`rows`, one dict each) and where it comes from (`save_record` fills that in)."""

    name: str
    rows: list[dict[str, Any]]
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Slug of the device it was measured on: "cpu", "h100", "t4"."""
        return self.provenance.get("device", "")

    @property
    def date(self) -> str:
        return self.provenance.get("date", "")

    def __str__(self) -> str:
        where = f"{self.device}, {self.date[:10]}" if self.device else "not saved"
        return f"record {self.name!r}: {len(self.rows)} rows, {where}"


_FIELDS = {each.name for each in fields(Record)}


@dataclass(frozen=True)
class NoRecord:
    """Stands for a record nobody has made yet: false in a condition, no rows, and says what is missing."""

    name: str
    device: str | None = None
    rows: tuple = ()

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        where = {None: "", "cpu": "CPU "}.get(self.device, f"{(self.device or '').upper()} ")
        return (
            f"no {where}record of {self.name!r} yet: it appears here once this has been run on such a machine"
        )

    __repr__ = __str__


def device_slug(device: str | None = None) -> str:
    """Short name of a device for file names: "cpu", "mps", or the GPU's model ("h100", "t4", "rtx4090")."""
    kind = (device or context.current().device or "cpu").split(":")[0]
    if kind != "cuda":
        return kind
    import torch

    return gpu_slug(torch.cuda.get_device_name(device or "cuda"))


def gpu_slug(name: str) -> str:
    """The part of a GPU's name that people say: "NVIDIA H100 80GB HBM3" is "h100", "Tesla T4" is "t4".

    A slice of a card (MIG) is not that card: "NVIDIA H100 80GB HBM3 MIG 1g.10gb" is "h100mig1g10gb".
    """
    name, _, part = name.lower().partition(" mig ")
    words = [w for w in re.split(r"[^a-z0-9]+", name) if w not in ("nvidia", "tesla", "geforce", "amd", "")]
    slug = ""
    for word in words:
        slug += word
        if any(c.isdigit() for c in word):
            break
    return (slug or "gpu") + (f"mig{re.sub(r'[^a-z0-9]', '', part)}" if part else "")


def provenance(device: str | None = None, **extra: Any) -> dict[str, Any]:
    """Origin of a measurement: device, machine, versions, lab, profile, seed, command, date, commit."""
    now = context.current()
    return {
        "device": device_slug(device),
        "machine": machine() + gpu(device),
        "run": _RUN,
        "lab": now.lab,
        "profile": now.profile,
        "model": now.model,
        "seed": now.seed,
        "command": command(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        **extra,
    }


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    from importlib import metadata

    from labs_lib import __version__

    found = {"python": platform.python_version(), "peft-labs": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@lru_cache(maxsize=1)
def machine() -> str:
    """Processor and number of cores, without any name of the host or its user."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    return f"{platform.system()}, {model.strip()}, {os.cpu_count()} cores"


def gpu(device: str | None = None) -> str:
    """ ", NVIDIA H100 80GB HBM3, 79 GiB, CUDA 12.8" for what is measured on one; "" on the CPU."""
    device = device or context.current().device or "cpu"
    if not device.startswith("cuda"):
        return ""
    import torch

    card = torch.cuda.get_device_properties(device)
    return f", {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def command() -> str:
    """How this process was started, without absolute paths; "notebook" inside a kernel."""
    if "ipykernel" in sys.modules:
        return "notebook"
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return " ".join(words)


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Commit of the checkout, with "+changes" where tracked files differ from it; None outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=paths.root(), capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def recording() -> bool:
    """Whether records go into the course's own data folder (LABS_RECORD=1) instead of the cache."""
    return os.environ.get("LABS_RECORD", "") == "1"


def folder(recorded: bool | None = None) -> Path:
    """Where records are written now; `recorded` True is the course's folder, False the learner's."""
    own = recording() if recorded is None else recorded
    return (paths.data() if own else paths.cache()) / "measured"


def save_record(record: Record, *, device: str | None = None, recorded: bool | None = None) -> Path:
    """Append a record to its file and return the path. Provenance given is kept, the rest is filled in.

    The file is locked, read, and replaced as a whole by a renamed temporary file, so neither a second process
    nor an interruption can lose or tear what is there.
    """
    _check_name(record.name)
    record.provenance = {**provenance(device), **record.provenance}
    directory = folder(recorded)
    path = directory / f"{record.device}.{record.name}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            records = _read(path) if path.exists() else []
            records.append(_plain(asdict(record)))
            if directory == folder(False):
                records = records[-KEEP_IN_CACHE:]
            _replace(path, _dump(records))
    except OSError as error:
        raise LabsError(
            f"The record {path.name} could not be written to {directory} ({error.strerror}): "
            "free some space or make the folder writable, or set LABS_CACHE to another folder."
        ) from error
    return path


def load_records(name: str, device: str | None = None) -> list[Record]:
    """All records of this name, the course's before the learner's, oldest first; [] when there are none."""
    found = [*stored(name, recorded=True), *stored(name, recorded=False)]
    return [record for record in found if _is_on(record, device)]


def load_record(name: str, device: str | None = None) -> Record | NoRecord:
    """The newest of the course's records of this name, else the newest of the learner's, else a `NoRecord`.

    `device` is a slug ("cpu", "h100") or "gpu" for any that is not the CPU; None takes a GPU's record if
    there is one.
    """
    for recorded in (True, False):
        found = [record for record in stored(name, recorded) if _is_on(record, device)]
        if found:
            # reversed: of two records of one second, the one written later
            return max(reversed(found), key=lambda record: (record.device != "cpu", record.date))
    return NoRecord(name, device)


def stored(name: str, recorded: bool) -> list[Record]:
    """What is stored in one of the two folders, oldest first per file; `name` may end in `*`."""
    _check_name(name.removesuffix("*"))
    paths_ = sorted(folder(recorded).glob(f"*.{name}.json"))
    return [Record(**entry) for path in paths_ for entry in _read(path)]


def _is_on(record: Record, device: str | None) -> bool:
    return device in (None, record.device) or (device == "gpu" and record.device != "cpu")


def load_published(name: str) -> dict[str, Any]:
    """Figures of others, from `data/published/<name>.yaml`: each file has `title`, `sources` and its tables.

    Print an entry marked `as_reported` with those words: its original was not rechecked.
    """
    directory = paths.data() / "published"
    path = directory / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in directory.glob("*.yaml")))
        raise LabsError(f"There are no published figures called {name!r}; there are: {known}.")
    return read_yaml(path)


def read_yaml(path: Path) -> Any:
    """Parse a YAML file with libyaml where it is built in (ten times faster)."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"a record's name is lower-case letters, digits and underscores, got {name!r}")
    return name


def _plain(value: Any) -> Any:
    """JSON types only: numpy and torch scalars become numbers, nan and infinities become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _dump(records: list[dict]) -> str:
    """One line per field and per row, so that a new record is a small diff and a person can read it."""
    blocks = []
    for record in records:
        head = {key: value for key, value in record.items() if key != "rows"}
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()
        ]
        rows = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in record["rows"])
        blocks.append("{\n" + "\n".join(lines) + f'\n  "rows": [\n    {rows}\n  ]\n}}')
    return "[\n" + ",\n".join(blocks) + "\n]\n"


def _read(path: Path) -> list[dict]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not all(set(entry) <= _FIELDS for entry in entries):
            raise ValueError("not a list of records")
        return entries
    except (ValueError, TypeError) as error:
        raise LabsError(
            f"The record file {path} is damaged ({error}): restore it with `git checkout -- {path.name}`, "
            "or delete it if it is in the cache."
        ) from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Exclusive lock on the directory itself: leaves no lock file, and a killed process releases it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
