"""Who may use which adapter version: API keys, tenants, versions. SQLite, and a store of adapters named by content.

    root/registry.sqlite                 tenants, hashed keys, versions
    root/adapters/<sha256>/              adapter_config.json and adapter_model.safetensors; never changed

A version is visible only once its files are on the disk for good: they are copied under a temporary name, flushed,
renamed, and then the version is committed. So a kill or a power cut at any point loses nothing that was acknowledged
and shows nothing half done; what it leaves lying about is removed the next time a registry opens.
"""

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError

if TYPE_CHECKING:
    from labs_lib.serving.layout import Layout

SCHEMA = 1
TABLES = """
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    key_id TEXT NOT NULL UNIQUE,   -- the public part of the API key, by which it is found
    key_hash BLOB NOT NULL,        -- sha256 of the whole key
    created_at REAL NOT NULL
);
CREATE TABLE versions (
    tenant TEXT NOT NULL REFERENCES tenants (name),
    number INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    rank INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    note TEXT NOT NULL,
    published_at REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('active', 'superseded', 'retired')),
    PRIMARY KEY (tenant, number)
);
CREATE UNIQUE INDEX one_active_version ON versions (tenant) WHERE state = 'active';
"""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SHA = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"labs-([0-9a-f]{12})-[\w-]{43}", re.ASCII)
_TEMPORARY = ".publishing-"


@dataclass(frozen=True)
class Tenant:
    """A customer. `key_id`: the public part of the API key, which is not kept. `created_at`: Unix seconds."""

    name: str
    key_id: str
    created_at: float


@dataclass(frozen=True)
class Version:
    """An adapter that a tenant published; `number` counts from 1 in each tenant, and `sha256` names the content.

    Of a tenant's versions at most one is `active`: new requests get it. `superseded` ones can be rolled back to,
    `retired` ones cannot. `nbytes`: size of the files. `published_at`: Unix seconds.
    """

    tenant: str
    number: int
    sha256: str
    rank: int
    nbytes: int
    note: str
    published_at: float
    state: str


class Registry:
    """The registry in the folder `root`, made if it is not there. Several threads and processes may use it at once.

    With a `layout`, an adapter that does not fit the served model is refused when it is published; without one, when
    it is first loaded. `max_rank`: the largest rank taken. After a fork, open it again.
    """

    def __init__(self, root: str | Path, layout: "Layout | None" = None, max_rank: int | None = None) -> None:
        self.root = Path(root)
        self._store = self.root / "adapters"
        self._layout, self._limits = layout, {} if max_rank is None else {"max_rank": max_rank}
        self._lock = threading.RLock()  # of the connection
        with _told(f"The registry at {self.root} cannot be opened"):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._store.mkdir(exist_ok=True)
            with self._locked("open", fcntl.LOCK_EX):
                self._db = self._connect()
            self._clean()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Tenants and keys

    def add_tenant(self, name: str) -> str:
        """Add a tenant; returns the API key, which is shown only now."""
        if not _NAME.fullmatch(name):
            raise LabsError(
                f"{name[:80]!r} cannot name a tenant: use 1 to 63 lowercase letters, digits and inner dashes."
            )
        key_id, key, hashed = _new_key()
        with self._write() as db:
            if db.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone():
                raise LabsError(
                    f"There is a tenant {name!r} already: choose another name, or rotate its key."
                )
            db.execute("INSERT INTO tenants VALUES (?, ?, ?, ?)", (name, key_id, hashed, time.time()))
        return key

    def rotate_key(self, name: str) -> str:
        """Give the tenant a new API key, returned and shown only now; the old one is void at once."""
        key_id, key, hashed = _new_key()
        with self._write() as db:
            self._check_tenant(name)
            db.execute("UPDATE tenants SET key_id = ?, key_hash = ? WHERE name = ?", (key_id, hashed, name))
        return key

    def tenants(self) -> list[Tenant]:
        return [
            Tenant(*row) for row in self._read("SELECT name, key_id, created_at FROM tenants ORDER BY name")
        ]

    def authenticate(self, key: str) -> Tenant | None:
        """Whose key this is, or None. How long it takes says nothing about the secret part of the key."""
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        query = "SELECT name, key_id, created_at, key_hash FROM tenants WHERE key_id = ?"
        rows = self._read(query, (match[1] if match else "",))
        *tenant, hashed = rows[0] if rows else ("", "", 0.0, bytes(32))
        right = hmac.compare_digest(hashlib.sha256(str(key).encode("utf-8", "replace")).digest(), hashed)
        return Tenant(*tenant) if right and rows else None

    # Versions

    def publish(self, tenant: str, folder: str | Path, note: str = "") -> Version:
        """Check the PEFT adapter in `folder`, store it and make it the tenant's active version.

        What comes back is on the disk for good. Publishing what is active already changes nothing. Raises Refused for
        an adapter that cannot be served right, LabsError for an unknown tenant or a full disk.
        """
        from labs_lib.serving.adapter import check_weights, preflight

        if len(note) > 200 or not (note.isprintable()):
            raise LabsError("A note is one line of at most 200 characters.")
        with _told("The adapter could not be published"):
            self._check_tenant(tenant)
            checked = preflight(folder, self._layout, **self._limits)
            # Holding the lock says that temporary folders are in use: see _clean.
            with self._locked("publish", fcntl.LOCK_SH), self._temporary() as temporary:
                _copy(Path(folder), temporary)
                manifest = check_weights(temporary, self._layout, **self._limits)
                if manifest.sha256 != checked.sha256:
                    raise LabsError("The adapter changed while it was published: publish it again.")
                self._keep(temporary, manifest.sha256)
                return self._activate_new(tenant, manifest.sha256, manifest.rank, manifest.nbytes, note)

    def rollback(self, tenant: str, to: int | None = None) -> Version:
        """Make version `to` the active one, or else the newest before the active one that is not retired."""
        with self._write():
            versions = self.versions(tenant)
            active = next((each.number for each in versions if each.state == "active"), None)
            if to is None:
                choice = [
                    v for v in versions if v.state == "superseded" and (active is None or v.number < active)
                ]
                if not choice:
                    raise LabsError(f"{tenant} has no earlier version to roll back to: publish one.")
                to = choice[-1].number
            if self._version(tenant, to).state == "retired":
                raise LabsError(f"Version {to} of {tenant} is retired: publish its adapter again.")
            self.folder(self._version(tenant, to).sha256)
            if to != active:
                self._set_state(tenant, active, "superseded")
                self._set_state(tenant, to, "active")
            return self._version(tenant, to)

    def retire(self, tenant: str, version: int) -> Version:
        """Take a version out of use for good; if it is active, the tenant has no version until the next publish.

        Running requests finish on it: they hold its sha256, and its files stay.
        """
        with self._write():
            self._version(tenant, version)
            self._set_state(tenant, version, "retired")
            return self._version(tenant, version)

    def current(self, tenant: str) -> Version | None:
        """The version that new requests of the tenant get."""
        return next((version for version in self.versions(tenant) if version.state == "active"), None)

    def versions(self, tenant: str) -> list[Version]:
        """All versions of a tenant, oldest first."""
        self._check_tenant(tenant)
        rows = self._read("SELECT * FROM versions WHERE tenant = ? ORDER BY number", (tenant,))
        return [Version(*row) for row in rows]

    # The store

    def folder(self, sha256: str) -> Path:
        """Where the files of an adapter lie; LabsError if they have been deleted."""
        if not _SHA.fullmatch(sha256):
            raise LabsError(f"{sha256[:80]!r} is not the sha256 of an adapter: it has 64 hexadecimal digits.")
        folder = self._store / sha256
        if not all(
            (folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")
        ):
            raise LabsError(
                f"The files of adapter {sha256[:12]} are gone from the registry: publish it again."
            )
        return folder

    def verify(self, sha256: str) -> bool:
        """Read a stored adapter again: True if its content still is what its name says."""
        from labs_lib.serving.adapter import digest_of

        try:
            return digest_of(self.folder(sha256)) == sha256
        except LabsError:
            return False

    def _keep(self, temporary: Path, sha256: str) -> None:
        """Move a complete, flushed folder to its place; one that is there stays if it is intact."""
        target = self._store / sha256
        if not self.verify(sha256):
            with self._temporary() as aside:  # a damaged one makes room
                with contextlib.suppress(FileNotFoundError):
                    target.rename(aside)
                try:
                    temporary.rename(target)
                except OSError as error:  # another publisher of the same content may have been faster
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
        _flush(self._store)

    def _activate_new(self, tenant: str, sha256: str, rank: int, nbytes: int, note: str) -> Version:
        with self._write() as db:
            versions = self.versions(tenant)
            active = next((each for each in versions if each.state == "active"), None)
            if active and active.sha256 == sha256:
                return active
            self._set_state(tenant, active and active.number, "superseded")
            number = versions[-1].number + 1 if versions else 1
            new = Version(tenant, number, sha256, rank, nbytes, note, time.time(), "active")
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", tuple(vars(new).values()))
            return new

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self._temporary_name()
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _temporary_name(self) -> Path:
        return self._store / f"{_TEMPORARY}{secrets.token_hex(8)}"

    def _clean(self) -> None:
        """Remove what interrupted publishes left, unless somebody publishes right now.

        A publisher holds a shared lock, which the system takes back when the process dies, however it dies.
        """
        with contextlib.suppress(BlockingIOError), self._locked("publish", fcntl.LOCK_EX | fcntl.LOCK_NB):
            known = {sha256 for (sha256,) in self._read("SELECT DISTINCT sha256 FROM versions")}
            for path in self._store.iterdir():
                if path.name.startswith(_TEMPORARY) or _SHA.fullmatch(path.name) and path.name not in known:
                    shutil.rmtree(path, ignore_errors=True)

    # The database

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.root / "registry.sqlite", timeout=30, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            db.execute("PRAGMA foreign_keys = ON")
            schema = db.execute("PRAGMA user_version").fetchone()[0]
            if schema == 0:
                db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
            elif schema != SCHEMA:
                raise LabsError(
                    f"The registry at {self.root} is of schema {schema}, this course knows {SCHEMA}: update the course."
                )
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer can come between; all or nothing."""
        with self._lock, _told("The registry could not be changed"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _read(self, query: str, values: tuple = ()) -> list[tuple]:
        with self._lock, _told("The registry could not be read"):
            return self._db.execute(query, values).fetchall()

    def _check_tenant(self, name: str) -> None:
        if not _NAME.fullmatch(name) or not self._read("SELECT 1 FROM tenants WHERE name = ?", (name,)):
            raise LabsError(f"There is no tenant {name[:80]!r}: add it with `labs tenants add`.")

    def _version(self, tenant: str, number: int) -> Version:
        version = next((each for each in self.versions(tenant) if each.number == number), None)
        if version is None:
            raise LabsError(
                f"{tenant} has no version {number}: `labs tenants list {tenant}` shows what there is."
            )
        return version

    def _set_state(self, tenant: str, number: int | None, state: str) -> None:
        self._db.execute(
            "UPDATE versions SET state = ? WHERE tenant = ? AND number = ?", (state, tenant, number)
        )

    @contextlib.contextmanager
    def _locked(self, what: str, how: int) -> Iterator[None]:
        with (self.root / f"{what}.lock").open("a") as file:
            fcntl.flock(file, how)
            yield


def _new_key() -> tuple[str, str, bytes]:
    """A key's public part, the key, and what is stored of it.

    256 random bits need no slow hash: nobody can try them all.
    """
    key_id = secrets.token_hex(6)
    key = f"labs-{key_id}-{secrets.token_urlsafe(32)}"
    return key_id, key, hashlib.sha256(key.encode()).digest()


def _copy(source: Path, target: Path) -> None:
    """Copy the two files of an adapter and flush them to the disk."""
    from labs_lib.serving.adapter import FILES, MAX_BYTES, open_inside

    for name in FILES:
        with open_inside(source, name, MAX_BYTES) as read, (target / name).open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
            write.flush()
            os.fsync(write.fileno())
            os.fchmod(write.fileno(), 0o444)
    _flush(target)


def _flush(folder: Path) -> None:
    """Flush a folder's own entries: what was made or renamed in it stays after a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell a fault of the disk or the database in one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise LabsError(
            f"{what} ({error}): check the disk's free space and the folder's permissions."
        ) from error
    except OSError as error:
        raise LabsError(
            f"{what} ({error.strerror or error}): check the disk's free space and the folder's permissions."
        ) from error
