"""`labs tenants`, as a person calls it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labs_lib import cli
from labs_lib.serving.registry import Registry


def make_adapter(folder: Path, seed: int) -> str:
    folder.mkdir()
    torch.manual_seed(seed)
    name = "base_model.model.model.layers.0.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 32), f"{name}.lora_B.weight": torch.randn(24, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def labs(tmp_path, capsys):
    """labs(words...) -> (exit status, what was printed); the registry is in a folder of its own."""

    def labs(*words: str) -> tuple[int, str]:
        status = cli.main(["tenants", "--registry", str(tmp_path / "registry"), *words])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return labs


def test_a_tenants_life(labs, tmp_path):
    assert labs("list") == (0, "No tenants yet: `labs tenants add NAME`.\n")
    status, out = labs("add", "acme")
    key = out.splitlines()[-1]
    assert status == 0 and re.fullmatch(r"labs-[0-9a-f]{12}-[\w-]{43}", key)
    assert labs("list", "acme") == (0, "acme has no versions yet.\n")
    one, two = make_adapter(tmp_path / "one", 1), make_adapter(tmp_path / "two", 2)
    assert "Active for acme: version 1, " in labs("publish", "acme", one, "--note", "the first")[1]
    assert "version 2, " in labs("publish", "acme", two)[1]
    out = labs("list", "acme")[1].splitlines()
    assert [line.split()[:2] for line in out] == [["version", "state"], ["1", "superseded"], ["2", "active"]]
    assert out[1].endswith("the first")
    assert "version 1, " in labs("rollback", "acme")[1]
    assert "version 2, " in labs("rollback", "acme", "--to", "2")[1]
    assert labs("retire", "acme", "2") == (
        0,
        "Version 2 of acme is retired.\nNo version is active: publish one, or roll back.\n",
    )
    assert "version 1, " in labs("rollback", "acme")[1]
    new = labs("rotate-key", "acme")[1].splitlines()[-1]
    with Registry(tmp_path / "registry") as registry:
        assert registry.authenticate(key) is None
        assert registry.authenticate(new).name == "acme"
    out = labs("list")[1]
    assert out.splitlines()[1].split()[:2] == ["acme", "1"] and f"labs-{new[5:17]}-..." in out
    assert key not in out and new not in out


def test_verify(labs, tmp_path):
    labs("add", "acme")
    labs("add", "globex")
    folder = make_adapter(tmp_path / "one", 1)
    labs("publish", "acme", folder)
    labs("publish", "globex", folder)
    assert labs("verify") == (0, "1 of 1 stored adapters are intact.\n")
    (stored,) = (tmp_path / "registry" / "adapters").iterdir()
    (stored / "adapter_config.json").unlink()
    status, out = labs("verify")
    assert status == 1 and f"Damaged or gone: {stored.name[:12]} (acme 1, globex 1)" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add", "Acme Inc"], "lowercase letters"),
        (["publish", "nobody", "."], "no tenant 'nobody'"),
        (["rollback", "nobody"], "no tenant 'nobody'"),
        (["retire", "nobody", "1"], "no tenant 'nobody'"),
        (["rotate-key", "nobody"], "no tenant 'nobody'"),
        (["list", "nobody"], "no tenant 'nobody'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(labs, words, told):
    status, out = labs(*words)
    assert status == 2 and told in out and out.startswith("labs: ") and out.count("\n") == 1


def test_a_refused_adapter_is_told(labs, tmp_path):
    labs("add", "acme")
    folder = make_adapter(tmp_path / "one", 1)
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(path.read_text().replace("LORA", "IA3"))
    status, out = labs("publish", "acme", folder)
    assert status == 2 and "peft_type is 'IA3'" in out


def test_the_registry_is_in_the_cache_unless_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    assert cli.main(["tenants", "add", "acme"]) == 0
    with Registry(tmp_path / "registry") as registry:
        assert [tenant.name for tenant in registry.tenants()] == ["acme"]


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["retire", "acme", "x"], ["add"]])
def test_usage(labs, words):
    with pytest.raises(SystemExit) as exit_:
        labs(*words)
    assert exit_.value.code == 2
