"""The registry: keys, versions, a store that a kill at any point leaves whole; used by several at once."""

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labs_lib.errors import LabsError
from labs_lib.serving.adapter import preflight, read_pages
from labs_lib.serving.layout import Layout, LinearSpec
from labs_lib.serving.registry import Registry, Tenant
from labs_lib.serving.types import Refused

LAYOUT = Layout((LinearSpec("model.layers.0.q_proj", 32, 24, 0, 32),), 56, 8)


def make_adapter(folder: Path, seed: int, inputs: int = 32, value: float | None = None) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    A, B = torch.randn(4, inputs), torch.randn(24, 4)
    if value is not None:
        A[0, 0] = value
    name = "base_model.model.model.layers.0.q_proj"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(root / str(i), i) for i in range(6)]


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def states(registry, tenant="acme") -> list[str]:
    return [version.state for version in registry.versions(tenant)]


# --- tenants and keys


def test_keys(registry):
    acme, globex = registry.add_tenant("acme"), registry.add_tenant("globex")
    assert registry.authenticate(acme).name == "acme" and registry.authenticate(globex).name == "globex"
    assert [tenant.name for tenant in registry.tenants()] == ["acme", "globex"]
    new = registry.rotate_key("acme")
    assert registry.authenticate(acme) is None
    assert registry.authenticate(new).name == "acme" and registry.authenticate(globex).name == "globex"


def test_wrong_keys(registry):
    key = registry.add_tenant("acme")
    last = "A" if key[-1] != "A" else "B"
    wrong = [
        key[:-1],
        key + "x",
        key[:-1] + last,
        key.upper(),
        f" {key}",
        f"{key}\n",
        "",
        "labs-",
        "\ud800",
        "é" * 61,
    ]
    mixed = registry.add_tenant("globex").rsplit("-", 1)[0] + key[17:]
    for each in [*wrong, key[:17], mixed, None, 7, "' OR 1=1 --", key.encode()]:
        assert registry.authenticate(each) is None
    assert isinstance(registry.authenticate(key), Tenant)


def test_keys_are_not_stored(registry):
    keys = [registry.add_tenant("acme"), registry.rotate_key("acme")]
    registry.close()
    files = b"".join(path.read_bytes() for path in registry.root.rglob("*") if path.is_file())
    assert keys[1][5:17].encode() in files  # the public part
    for key in keys:
        assert len(key) >= 60 and key[18:].encode() not in files
    assert registry.root.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "A",
        "a b",
        "-a",
        "a-",
        "a.b",
        "é",
        "a\n",
        "a\0",
        "x" * 64,
        "\ud800",
        "a_b",
    ],
)
def test_names_that_are_no_names(registry, name, adapters):
    with pytest.raises(LabsError, match="cannot name a tenant"):
        registry.add_tenant(name)
    for call in (registry.rotate_key, registry.versions, registry.current, registry.rollback):
        with pytest.raises(LabsError, match="no tenant"):
            call(name)
    with pytest.raises(LabsError, match="no tenant"):
        registry.publish(name, adapters[0])
    assert registry.tenants() == []


def test_a_name_is_taken_once(registry):
    key = registry.add_tenant("x" * 63)
    with pytest.raises(LabsError, match="already"):
        registry.add_tenant("x" * 63)
    assert registry.authenticate(key)


# --- versions


def test_publish_roll_back_retire(registry, adapters):
    registry.add_tenant("acme")
    assert registry.current("acme") is None and registry.versions("acme") == []
    with pytest.raises(LabsError, match="no earlier version"):
        registry.rollback("acme")
    published = [registry.publish("acme", folder, f"note {i}") for i, folder in enumerate(adapters[:4])]
    assert [version.number for version in published] == [1, 2, 3, 4]
    assert registry.current("acme") == published[3]
    assert states(registry) == ["superseded"] * 3 + ["active"]
    expected = preflight(adapters[1])
    second = registry.versions("acme")[1]
    assert (second.sha256, second.rank, second.nbytes) == (expected.sha256, expected.rank, expected.nbytes)
    assert second.note == "note 1" and second.published_at <= published[2].published_at

    assert registry.rollback("acme").number == 3
    assert registry.rollback("acme").number == 2
    assert registry.rollback("acme", to=4).number == 4
    assert registry.rollback("acme", to=4) == registry.current("acme")
    assert registry.retire("acme", 3).state == "retired"
    assert registry.rollback("acme").number == 2  # over the retired one
    assert states(registry) == ["superseded", "active", "retired", "superseded"]
    with pytest.raises(LabsError, match="retired"):
        registry.rollback("acme", to=3)
    with pytest.raises(LabsError, match="no version 9"):
        registry.rollback("acme", to=9)
    with pytest.raises(LabsError, match="no version 0"):
        registry.retire("acme", 0)
    assert registry.retire("acme", 2).state == "retired"
    assert registry.current("acme") is None
    assert registry.folder(published[1].sha256).is_dir()  # running requests may still need it
    assert registry.rollback("acme").number == 4
    assert registry.publish("acme", adapters[4]).number == 5


def test_a_failed_change_changes_nothing(registry, adapters):
    registry.add_tenant("acme")
    registry.publish("acme", adapters[0])
    registry.publish("acme", adapters[1])
    before = registry.versions("acme")
    (registry.folder(before[0].sha256) / "adapter_config.json").unlink()
    with pytest.raises(LabsError, match="gone from the registry"):
        registry.rollback("acme")
    assert registry.versions("acme") == before


def test_publishing_again_is_one_version(registry, adapters):
    """A client that did not hear the answer may ask again."""
    registry.add_tenant("acme")
    first = registry.publish("acme", adapters[0])
    assert registry.publish("acme", adapters[0], "again") == first
    registry.publish("acme", adapters[1])
    third = registry.publish("acme", adapters[0])
    assert third.number == 3 and third.sha256 == first.sha256


def test_tenants_share_content_and_nothing_else(registry, adapters):
    for name in ("acme", "globex"):
        registry.add_tenant(name)
        registry.publish(name, adapters[0])
    registry.retire("acme", 1)
    assert registry.current("acme") is None
    assert registry.current("globex").sha256 == preflight(adapters[0]).sha256
    assert len(list((registry.root / "adapters").iterdir())) == 1


def test_what_is_published_cannot_be_changed_from_outside(registry, adapters, tmp_path):
    folder = make_adapter(tmp_path / "mine", 77)
    registry.add_tenant("acme")
    version = registry.publish("acme", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    (folder / "notes.txt").write_text("not copied")
    manifest, _ = read_pages(registry.folder(version.sha256), LAYOUT)
    assert manifest.sha256 == version.sha256
    stored = registry.folder(version.sha256)
    assert {path.name for path in stored.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_refused_adapter_leaves_no_trace(registry, tmp_path):
    registry.add_tenant("acme")
    for i, (kwargs, words) in enumerate([({"value": float("nan")}, "NaN"), ({"inputs": 0}, "not matrices")]):
        with pytest.raises(Refused, match=words):
            registry.publish("acme", make_adapter(tmp_path / str(i), 1, **kwargs))
    with pytest.raises(Refused, match="no folder"):
        registry.publish("acme", tmp_path / "absent")
    with pytest.raises(LabsError, match="one line"):
        registry.publish("acme", make_adapter(tmp_path / "good", 1), note="two\nlines")
    assert registry.versions("acme") == [] and not list((registry.root / "adapters").iterdir())


def test_the_served_model_and_the_largest_rank_are_known(tmp_path, adapters):
    wide = make_adapter(tmp_path / "wide", 1, inputs=64)
    with Registry(tmp_path / "registry", LAYOUT, max_rank=4) as registry:
        registry.add_tenant("acme")
        registry.publish("acme", adapters[0])
        with pytest.raises(Refused, match="inputs, outputs"):
            registry.publish("acme", wide)
    with Registry(tmp_path / "registry", max_rank=3) as registry, pytest.raises(Refused, match="at most 3"):
        registry.publish("acme", adapters[1])


# --- the store


def test_damage_is_seen_and_mended(registry, adapters):
    registry.add_tenant("acme")
    sha = registry.publish("acme", adapters[0]).sha256
    assert registry.verify(sha)
    weights = registry.folder(sha) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    assert not registry.verify(sha)
    registry.publish("acme", adapters[0])
    assert registry.verify(sha)
    weights.unlink()
    assert not registry.verify(sha)
    with pytest.raises(LabsError, match=r"gone from the registry: publish it again"):
        registry.folder(sha)
    registry.publish("acme", adapters[0])
    assert registry.verify(sha)
    assert [path.name for path in (registry.root / "adapters").iterdir()] == [sha]


@pytest.mark.parametrize("sha", ["", "..", "../../etc", "A" * 64, "0" * 63, "0" * 64 + "\n", "0/" * 32])
def test_only_a_sha256_names_a_folder(registry, sha):
    with pytest.raises(LabsError, match="not the sha256"):
        registry.folder(sha)
    assert not registry.verify(sha)


def test_what_was_acknowledged_is_there_after_reopening(tmp_path, adapters):
    with Registry(tmp_path / "r") as registry:
        key = registry.add_tenant("acme")
        version = registry.publish("acme", adapters[0])
    with Registry(tmp_path / "r") as registry:
        assert registry.authenticate(key).name == "acme" and registry.current("acme") == version
        assert registry.verify(version.sha256)


def test_leftovers_are_removed_but_not_under_a_publisher(tmp_path, adapters):
    with Registry(tmp_path / "r") as registry:
        registry.add_tenant("acme")
        kept = registry.publish("acme", adapters[0]).sha256
    store = tmp_path / "r" / "adapters"
    for name in (".publishing-0123", "f" * 64):
        make_adapter(store / name, 1)
    (store / "README").write_text("not ours")
    with Registry(tmp_path / "r") as registry:
        assert {path.name for path in store.iterdir()} == {kept, "README"}
        # while somebody holds the lock of a publisher, an opening registry leaves what it finds
        with registry._locked("publish", 1):
            make_adapter(store / ".publishing-4567", 1)
            Registry(tmp_path / "r").close()
            assert (store / ".publishing-4567").is_dir()


def test_files_that_are_no_registry(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LabsError, match="cannot be opened"):
        Registry(tmp_path / "file")
    (tmp_path / "registry.sqlite").write_text("this is not a database, it is a text of some length" * 20)
    with pytest.raises(LabsError, match="not a database"):
        Registry(tmp_path)
    (tmp_path / "new").mkdir()
    sqlite3.connect(tmp_path / "new" / "registry.sqlite").execute(
        "PRAGMA user_version = 7"
    ).connection.close()
    with pytest.raises(LabsError, match="schema 7"):
        Registry(tmp_path / "new")


def test_a_closed_registry_says_so(registry):
    registry.close()
    with pytest.raises(LabsError, match="closed"):
        registry.tenants()


# --- several at once


def test_threads(registry, adapters):
    """Publishers, readers and openers, all at once: every publish counts once, and readers see whole states."""
    names = ["a", "b", "c"]
    keys = {name: registry.add_tenant(name) for name in names}
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            for name in names:
                active = [version for version in registry.versions(name) if version.state == "active"]
                seen.append(len(active) <= 1 and registry.authenticate(keys[name]).name == name)
                seen.append(all(registry.folder(version.sha256) for version in active))

    def publish(name):
        return [registry.publish(name, folder).number for folder in adapters]

    def reopen(_):
        Registry(registry.root).close()
        return list(range(1, 7))

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        done = [pool.submit(publish, name) for name in names] + [pool.submit(reopen, i) for i in range(3)]
        try:
            numbers = [each.result() for each in done]
        finally:
            stop.set()
        for each in readers:
            each.result()
    assert numbers == [[1, 2, 3, 4, 5, 6]] * 6
    assert seen and all(seen)
    assert all(registry.verify(version.sha256) for name in names for version in registry.versions(name))


def run(code: str, *arguments: str) -> list[dict]:
    """Run Python in a fresh process, which may fork; returns the JSON lines it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMON + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


COMMON = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
import labs_lib.serving.adapter  # torch: once, before the forks
from labs_lib.errors import LabsError
from labs_lib.serving.registry import Registry

root, adapters = Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]]

def child(work):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            work(lambda version: os.write(write, f"{version.number} {version.sha256}\\n".encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return pid, os.fdopen(read)

def state(root, acknowledged):
    # what a fresh registry shows after whatever happened
    with Registry(root) as registry:
        versions = registry.versions("acme")
        return {
            "acknowledged": acknowledged,
            "versions": [f"{each.number} {each.sha256}" for each in versions],
            "states": [each.state for each in versions],
            "intact": [registry.verify(each.sha256) for each in versions],
            "extra": len(list((root / "adapters").iterdir())) - len({each.sha256 for each in versions}),
            "tenant": registry.authenticate(key).name,
        }

with Registry(root / "start") as registry:
    key = registry.add_tenant("acme")
    first = registry.publish("acme", adapters[0])
"""


def assert_whole(result: dict) -> None:
    assert set(result["acknowledged"]) <= set(result["versions"])
    assert result["states"] == ["superseded"] * (len(result["states"]) - 1) + ["active"]
    assert all(result["intact"]) and result["extra"] == 0 and result["tenant"] == "acme"
    assert [int(each.split()[0]) for each in result["versions"]] == list(
        range(1, len(result["versions"]) + 1)
    )


def test_killed_at_every_line_of_publish(tmp_path, adapters):
    """kill -9 before each line of registry.py that publish runs: all or nothing, and what was acknowledged stays."""
    results = run(
        """
for line in range(1, 1000):
    place = root / str(line)
    shutil.copytree(root / "start", place)

    def work(acknowledge):
        left = line

        def trace(frame, event, argument):
            nonlocal left
            if not frame.f_code.co_filename.endswith("serving/registry.py"):
                return None
            if event == "line":
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        with Registry(place) as registry:
            sys.settrace(trace)
            version = registry.publish("acme", adapters[1])
            sys.settrace(None)
            acknowledge(version)

    pid, pipe = child(work)
    acknowledged = pipe.read().split("\\n")[:-1]
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    print(json.dumps({"killed": killed, **state(place, acknowledged)}))
    shutil.rmtree(place)
    if not killed:
        break
""",
        str(tmp_path),
        *map(str, adapters[:2]),
    )
    for result in results:
        assert_whole(result)
    assert [result["killed"] for result in results] == [True] * (len(results) - 1) + [False]
    assert len(results) > 60
    visible = [len(result["versions"]) == 2 for result in results]
    assert not visible[0] and visible == sorted(visible)  # it appears at one point, for good
    assert len(results[-1]["acknowledged"]) == 1


def test_killed_at_random_moments(tmp_path, adapters):
    """kill -9 of a process that publishes without pause, and another that goes on publishing beside it."""
    results = run(
        """
def publish_on(tenant):
    def work(acknowledge):
        with Registry(root / "start") as registry:
            while True:
                for adapter in adapters:
                    acknowledge(registry.publish(tenant, adapter))
    return work

random.seed(1)
with Registry(root / "start") as registry:
    registry.add_tenant("globex")
survivor, beside = child(publish_on("globex"))
for _ in range(8):
    pid, pipe = child(publish_on("acme"))
    time.sleep(random.uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    acknowledged = pipe.read().split("\\n")[:-1]
    result = state(root / "start", acknowledged)
    print(json.dumps(result | {"extra": 0}))  # the other one is in the midst of publishing
os.kill(survivor, signal.SIGKILL)
os.waitpid(survivor, 0)
acknowledged = beside.read().split("\\n")[:-1]
print(json.dumps(state(root / "start", [])))
with Registry(root / "start") as registry:
    assert {f"{each.number} {each.sha256}" for each in registry.versions("globex")} >= set(acknowledged)
    assert len(acknowledged) > 3
""",
        str(tmp_path),
        *map(str, adapters),
    )
    for result in results:
        assert_whole(result)
    assert sum(len(result["acknowledged"]) for result in results) > 3


def test_a_full_disk_is_told_and_survived(tmp_path, adapters):
    """The limit on file sizes stands in for the disk: first the copy fails, then the database."""
    results = run(
        """
def told(limit):
    def work(acknowledge):
        with Registry(root / "start") as registry:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                registry.publish("acme", adapters[1])
            except LabsError as error:
                print(json.dumps({"error": str(error)}), flush=True)
            assert registry.current("acme") == first  # it goes on working
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            acknowledge(registry.publish("acme", adapters[1]))
    return work

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
shutil.copytree(root / "start", root / "copy")
for limit in (600, 2000):
    pid, pipe = child(told(limit))
    acknowledged = pipe.read().split("\\n")[:-1]
    assert os.waitpid(pid, 0)[1] == 0
    print(json.dumps(state(root / "start", acknowledged)))
    shutil.rmtree(root / "start")
    shutil.copytree(root / "copy", root / "start")
""",
        str(tmp_path),
        *map(str, adapters[:2]),
    )
    copy_failed, after, database_failed, later = results
    assert "could not be published (File too large): check the disk's free space" in copy_failed["error"]
    assert "could not be changed (" in database_failed["error"] and "free space" in database_failed["error"]
    for result in (after, later):
        assert_whole(result)
        assert len(result["acknowledged"]) == 1 and len(result["versions"]) == 2
