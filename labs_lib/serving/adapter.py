"""An adapter on disk, from an unmodified PEFT folder to checked pages of numbers; what cannot be served is refused.

A folder is a stranger's input. Nothing in it is executed, sizes are checked before anything is read, and every way of
being wrong ends in `Refused` with one sentence that says what to do.
"""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from labs_lib.serving import peft_config
from labs_lib.serving.layout import Layout
from labs_lib.serving.peft_config import Scale, part_of, show
from labs_lib.serving.types import Refused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
MAX_CONFIG = 1 << 20  # bytes
MAX_HEADER = 4 << 20  # bytes of names and shapes: an 80-layer model with every linear adapted needs 0.2 MB
MAX_BYTES = 2 << 30  # of the tensors' file
MAX_RANK = 512
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_AGAIN = "save or copy the adapter again"
_SAVE = "save it with PEFT's save_pretrained"


@dataclass(frozen=True)
class Manifest:
    """What an adapter is, known before any of its numbers is used.

    `sha256` names the content: it is what `sha256sum adapter_config.json adapter_model.safetensors | sha256sum`
    prints in the folder. `rank` is the largest of its layers; `nbytes` is the size of the two files.
    """

    sha256: str
    rank: int
    dora: bool
    targets: tuple[str, ...]
    nbytes: int
    base_name: str | None
    config: dict = field(repr=False, compare=False)

    @property
    def pages(self) -> int:
        """Pages of the pool that it takes: one per rank, and one for DoRA's gains."""
        return self.rank + self.dora


def preflight(
    folder: str | Path, layout: Layout | None = None, *, max_rank: int = MAX_RANK, max_bytes: int = MAX_BYTES
) -> Manifest:
    """Judge an adapter by its config and the header of its tensors' file; no tensor is loaded.

    With a `layout` it is also checked against the model. Raises Refused. The weights themselves (NaN, infinity) are
    looked at by `read_pages` and `check_weights`.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    raw = _read(folder, CONFIG, MAX_CONFIG)
    config = peft_config.parse(raw)
    peft_config.check(config)
    with open_inside(folder, WEIGHTS, max_bytes) as file:
        size = _header(file.read(8), file)
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            shapes = {key: (each.get_dtype(), tuple(each.get_shape())) for key, each in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{WEIGHTS} is damaged ({show(str(error))}): {_AGAIN}.") from error
    plan = _plan(config, shapes, layout, max_rank)
    return _manifest(config, plan, hashlib.sha256(raw).hexdigest(), digest.hexdigest(), len(raw) + size)


def read_pages(
    folder: str | Path,
    layout: Layout,
    weight_of: Callable[[str], torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    max_rank: int = MAX_RANK,
    max_bytes: int = MAX_BYTES,
) -> tuple[Manifest, torch.Tensor]:
    """Load an adapter as pages (manifest.pages, layout.width) on the CPU, scales folded into B.

    Row k holds, for each layer, row k of A and column k of scale * B; layers without that rank stay zero. A DoRA
    adapter has one more row, last: gain - 1 in the layers' B places, where gain = m / ||W + scale * B @ A|| for each
    output (Liu et al. 2024, arXiv:2402.09353, equation 5); its B columns carry the gain too, so that the layer is
    gain * (base - bias) + bias + update. Only for those `weight_of(layer name)` is asked for W (out, in).

    The manifest's sha256 is that of the very bytes that became pages. Needs about three times the file in memory.
    Raises Refused.
    """
    manifest, plan, tensors = _load(folder, layout, max_rank, max_bytes)
    if manifest.dora and weight_of is None:
        raise Refused("This adapter is DoRA, whose gains need the base weights: pass weight_of.")
    work = torch.promote_types(dtype, torch.float32)
    pages = torch.zeros(manifest.pages, layout.width, dtype=dtype)
    for name, layer in plan.items():
        spec = layout.by_name[name]
        A, B = tensors[name]["A"].to(work), tensors[name]["B"].to(work) * layer.scale
        if manifest.dora:
            W = weight_of(name).detach().to("cpu", work)
            if W.shape != (spec.out_features, spec.in_features):
                raise Refused(
                    f"The base weight of {name} is {tuple(W.shape)}: pass weight_of for the served model."
                )
            gain = tensors[name]["m"].to(work) / torch.linalg.norm(W + B @ A, dim=1)
            layout.b(pages, spec)[-1] = gain - 1
            B = gain[:, None] * B
        layout.a(pages, spec)[: layer.rank] = A
        layout.b(pages, spec)[: layer.rank] = B.T
    if not torch.isfinite(pages).all():
        raise Refused(f"This adapter's scaled weights do not fit in {dtype}: serve it in a wider type.")
    return manifest, pages


def check_weights(
    folder: str | Path, layout: Layout | None = None, *, max_rank: int = MAX_RANK, max_bytes: int = MAX_BYTES
) -> Manifest:
    """`preflight`, and every weight is read and is finite."""
    return _load(folder, layout, max_rank, max_bytes)[0]


def digest_of(folder: str | Path) -> str:
    """The sha256 that names a folder's content, whatever the content is; see Manifest."""
    hashes = []
    for name in FILES:
        digest = hashlib.sha256()
        with open_inside(Path(folder), name) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        hashes.append(digest.hexdigest())
    return _name(*hashes)


def _load(
    folder: str | Path, layout: Layout | None, max_rank: int, max_bytes: int
) -> tuple[Manifest, dict[str, Scale], dict[str, dict[str, torch.Tensor]]]:
    """The manifest, rank and scale of each layer, and its finite tensors A, B and, for DoRA, m.

    The file is read, not mapped: a map of a file that is cut short while in use kills the process.
    """
    from safetensors import SafetensorError, deserialize

    folder = Path(folder)
    raw = _read(folder, CONFIG, MAX_CONFIG)
    config = peft_config.parse(raw)
    peft_config.check(config)
    data = _read(folder, WEIGHTS, max_bytes, _header)
    try:
        stored = dict(deserialize(data))
    except (SafetensorError, ValueError) as error:
        raise Refused(f"{WEIGHTS} is damaged ({show(str(error))}): {_AGAIN}.") from error
    shapes = {key: (each["dtype"], tuple(each["shape"])) for key, each in stored.items()}
    plan = _plan(config, shapes, layout, max_rank)
    tensors = {}
    for key, each in stored.items():
        name, part = part_of(key)
        tensor = torch.frombuffer(bytearray(each["data"]), dtype=DTYPES[each["dtype"]]).reshape(each["shape"])
        if not torch.isfinite(tensor).all():
            raise Refused(
                f"{show(key)} holds NaN or infinity: the training diverged, so publish an earlier checkpoint."
            )
        tensors.setdefault(name, {})[part] = tensor
    hashes = (hashlib.sha256(each).hexdigest() for each in (raw, data))
    return _manifest(config, plan, *hashes, len(raw) + len(data)), plan, tensors


def _plan(
    config: dict, shapes: dict[str, tuple[str, tuple[int, ...]]], layout: Layout | None, max_rank: int
) -> dict[str, Scale]:
    """Rank and scale of each adapted layer, after every check that needs no weights. `shapes`: key: (dtype, shape)."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (dtype, shape) in shapes.items():
        name, part = part_of(key)
        if dtype not in DTYPES:
            raise Refused(
                f"{show(key)} is stored as {dtype}: save the adapter in float32, float16 or bfloat16."
            )
        if part in found.setdefault(name, {}):
            raise Refused(f"{show(key)} is there twice under two names: {_SAVE}.")
        found[name][part] = shape
    if not found:
        raise Refused(f"{WEIGHTS} holds no tensors: {_SAVE}, outside of any sharded training state.")
    known = list(found) if layout is None else list(layout.by_name)
    if unknown := found.keys() - set(known):
        raise Refused(
            f"This adapter changes {show(min(unknown))}, which is no adapted layer of this model: {_fit(config)}."
        )
    plan = peft_config.scales(config, known)
    if unmeant := found.keys() - plan.keys():
        raise Refused(
            f"The config does not target {show(min(unmeant))}, for which there are tensors: {_SAVE}."
        )
    if absent := [name for name in plan if name not in found]:
        raise Refused(
            f"The config targets {show(absent[0])}, for which there are no tensors: {_fit(config)}."
        )
    for name, part in found.items():
        _check_shapes(name, part, plan[name].rank, bool(config.get("use_dora")))
        expected = layout and (layout.by_name[name].in_features, layout.by_name[name].out_features)
        if expected and (actual := (part["A"][1], part["B"][0])) != expected:
            raise Refused(
                f"{show(name)} has (inputs, outputs) {expected}, this adapter's {actual}: {_fit(config)}."
            )
    if (rank := max(each.rank for each in plan.values())) > max_rank:
        raise Refused(
            f"This adapter has rank {rank}; at most {max_rank} is served: train it with a smaller r."
        )
    return plan


def _check_shapes(name: str, part: dict[str, tuple[int, ...]], rank: int, dora: bool) -> None:
    needed = {"A", "B"} | ({"m"} if dora else set())
    if missing := needed - part.keys():
        label = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}[min(missing)]
        raise Refused(f"{show(name)} has no {label}: {_AGAIN}.")
    if "m" in part and not dora:
        raise Refused(f"{show(name)} has a magnitude vector, but the config does not say use_dora: {_SAVE}.")
    A, B = part["A"], part["B"]
    if len(A) != 2 or len(B) != 2 or 0 in (*A, *B):
        raise Refused(
            f"{show(name)} has factors of shape {A} and {B}, not matrices: gather the shards, then {_SAVE}."
        )
    if not A[0] == B[1] == rank:
        raise Refused(f"{show(name)} has factors of rank {A[0]} and {B[1]}, the config says {rank}: {_SAVE}.")
    if dora and part["m"] != (B[0],):
        raise Refused(f"{show(name)} has a magnitude vector of shape {part['m']}, not {(B[0],)}: {_SAVE}.")


def _manifest(
    config: dict, plan: dict[str, Scale], config_sha: str, weights_sha: str, nbytes: int
) -> Manifest:
    base = config.get("base_model_name_or_path")
    return Manifest(
        sha256=_name(config_sha, weights_sha),
        rank=max(each.rank for each in plan.values()),
        dora=bool(config.get("use_dora")),
        targets=tuple(sorted(plan)),
        nbytes=nbytes,
        base_name=base if isinstance(base, str) and base else None,
        config=config,
    )


def _name(config_sha: str, weights_sha: str) -> str:
    return hashlib.sha256(f"{config_sha}  {CONFIG}\n{weights_sha}  {WEIGHTS}\n".encode()).hexdigest()


def _fit(config: dict) -> str:
    base = config.get("base_model_name_or_path")
    return (
        f"it has to be trained on the served base (it says {show(base)})"
        if base
        else "train it on the served base"
    )


def _header(first: bytes, file: BinaryIO) -> int:
    """Check the length that a safetensors file gives its header against the file; returns the file's size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(first, "little")
    if len(first) < 8 or 8 + length > size:
        raise Refused(f"{WEIGHTS} is damaged (it ends within its header): {_AGAIN}.")
    if length > MAX_HEADER:
        raise Refused(
            f"{WEIGHTS} has a header of {length:,} bytes, over the limit of {MAX_HEADER:,}: {_SAVE}."
        )
    return size


def _read(
    folder: Path, name: str, limit: int, check: Callable[[bytes, BinaryIO], int] | None = None
) -> bytes:
    with open_inside(folder, name, limit) as file:
        if check:
            check(file.read(8), file)
            file.seek(0)
        data = file.read(limit + 1)
    if len(data) > limit:  # it grew since it was opened
        raise Refused(f"{name} is larger than the limit of {limit:,} bytes: {_SAVE}.")
    return data


def open_inside(folder: Path, name: str, limit: int | None = None) -> BinaryIO:
    """Open a regular file inside the folder, of at most `limit` bytes. Raises Refused."""
    path = folder / name
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise Refused(f"{name} is a link out of the adapter's folder: copy the adapter with `cp -rL`.")
        # Not blocking: the open of a named pipe would wait for a writer for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Refused(_missing(folder, name)) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(f"{name} cannot be read ({show(str(error))}): check the adapter's folder.") from error
    facts, wrong = os.fstat(handle), None
    if not stat.S_ISREG(facts.st_mode):
        wrong = f"{name} is not a regular file: {_AGAIN}."
    elif limit is not None and facts.st_size > limit:
        wrong = f"{name} has {facts.st_size:,} bytes, over the limit of {limit:,}: {_SAVE}."
    if wrong:
        os.close(handle)
        raise Refused(wrong)
    return os.fdopen(handle, "rb")


def _missing(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"There is no folder {str(folder)!r}: give the folder that save_pretrained wrote."
    if name == WEIGHTS and any(
        (folder / f"adapter_model.{end}").exists() for end in ("bin", "pt", "pth", "ckpt")
    ):
        return "This adapter is a pickle file, which can run code when loaded: save it with safe_serialization=True."
    return f"{str(folder)!r} is not a saved adapter, {name} is missing: give the folder that save_pretrained wrote."
