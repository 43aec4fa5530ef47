"""`setup()` as a notebook calls it: profiles, seeds, the sentence for each mistake, the libraries' noise."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from labs_lib import quiet
from labs_lib.errors import LabsError
from labs_lib.lab import profiles
from labs_lib.lab.setup import Lab, available_cores, setup
from labs_lib.measure import context

REPOSITORY = Path(__file__).parents[2]
READ = (
    "PROFILE",
    "MODEL_ID",
    "LABS_STRICT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "LABS_CLOSED_HUB",
)
HAS_CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Each test starts without the variables that setup() reads, and leaves none of those it sets."""
    for name in READ:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    yield
    context.reset()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, from the checkout."""
    own = {name: value for name, value in os.environ.items() if name not in READ}
    own |= {"PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)


def lab(profile: str) -> Lab:
    chosen = profiles.PROFILES[profile]
    return Lab("01", chosen, "cpu", torch.float32, seed=7, strict=False)


def test_setup_tells_one_line_and_fills_the_context(capsys):
    prepared = setup(lab="01", profile="smoke")
    (line,) = capsys.readouterr().out.splitlines()
    assert "lab 01" in line and "profile smoke" in line and f"torch {torch.__version__.split('+')[0]}" in line
    assert (prepared.number, prepared.device, prepared.size, prepared.strict) == ("01", "cpu", "tiny", False)
    now = context.current()
    assert (now.lab, now.profile, now.device, now.seed, now.model) == (
        "01",
        "smoke",
        "cpu",
        prepared.seed,
        "tiny",
    )


def test_setup_seeds_every_generator():
    def draws():
        setup(lab="01", profile="cpu", seed=3)
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    first = draws()
    assert draws() == first
    setup(lab="01", profile="cpu", seed=4)
    assert torch.rand(1).item() != first[2]


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("PROFILE", "smoke")
    monkeypatch.setenv("LABS_STRICT", "1")
    monkeypatch.setenv("MODEL_ID", "some/model")
    prepared = setup(lab="01")
    assert (prepared.profile.name, prepared.strict, prepared.model_id) == ("smoke", True, "some/model")
    assert setup(lab="01", profile="cpu", model_id="other/model").model_id == "other/model"


@pytest.mark.parametrize("wrong", ["tiny", "CPU2"])
def test_an_unknown_profile_names_the_known_ones(wrong):
    with pytest.raises(LabsError, match="choose one of auto, smoke, cpu, t4, gpu"):
        setup(lab="01", profile=wrong)


@pytest.mark.skipif(HAS_CUDA, reason="there is a GPU")
@pytest.mark.parametrize("name", ["t4", "gpu"])
def test_a_gpu_profile_needs_a_gpu(name):
    with pytest.raises(LabsError, match="needs a CUDA device"):
        setup(lab="01", profile=name)


def test_a_lab_is_named_by_its_number():
    assert setup(lab=1, profile="cpu").number == "01"
    with pytest.raises(LabsError, match="named by its number"):
        setup(lab="lora", profile="cpu")


def test_missing_or_changed_data_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LABS_HOME", str(tmp_path))
    from labs_lib.world import build

    build._checksums.cache_clear()
    try:
        with pytest.raises(LabsError, match=r"data/.* is missing"):
            setup(lab="01", profile="cpu")
    finally:
        build._checksums.cache_clear()


@pytest.mark.parametrize(
    ("memory", "capability", "expected"),
    [(80, (9, 0), "gpu"), (24, (8, 6), "gpu"), (15, (7, 5), "t4"), (32, (7, 0), "t4"), (12, (8, 9), "t4")],
)
def test_auto_looks_at_the_gpu(monkeypatch, memory, capability, expected):
    """The rule itself, for devices that are not here."""

    class Properties:
        total_memory = memory * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert profiles.choose_profile("").name == expected
    assert profiles.choose_profile(" Auto ").name == expected


@pytest.mark.skipif(HAS_CUDA, reason="there is a GPU")
def test_auto_without_a_gpu_is_cpu():
    assert profiles.choose_profile("auto").name == "cpu"


def test_sizes_follow_the_profile():
    assert (lab("cpu").steps(150), lab("smoke").steps(150), lab("smoke").steps(1000)) == (150, 3, 20)
    assert (lab("smoke").steps(10), lab("smoke").rows(10)) == (2, 4)
    assert (lab("cpu").rows(64), lab("gpu").rows(64)) == (64, 256)
    assert (lab("cpu").seeds(3), lab("smoke").seeds(3)) == ([7, 8, 9], [7])
    assert lab("cpu").grid([1, 2, 4, 8, 16]) == [1, 2, 4, 8, 16]
    assert lab("smoke").grid([1, 2, 4, 8, 16]) == [1, 16]
    assert lab("smoke").grid([3]) == [3] and lab("smoke").grid([]) == []


def test_every_profile_s_base_is_shipped():
    from labs_lib.models.base import base_folder

    sizes = {profile.size for profile in profiles.PROFILES.values()}
    assert [size for size in sizes if not (base_folder(size) / "model.safetensors").is_file()] == []


def test_torch_gets_no_more_threads_than_cores():
    setup(lab="01", profile="cpu")
    assert 1 <= torch.get_num_threads() <= available_cores() <= (os.cpu_count() or 1)


# --- the hub


def test_the_hub_is_closed_unless_a_hub_model_is_wanted(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    setup(lab="01", profile="cpu")
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.is_offline_mode()
    setup(lab="01", profile="cpu", model_id="some/model")
    assert "HF_HUB_OFFLINE" not in os.environ and not constants.is_offline_mode()


def test_a_user_s_own_offline_setting_stands(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quiet.hub(wanted=True)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    quiet.hub(wanted=False)
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_verdicts_are_about_the_model_that_was_loaded(monkeypatch):
    """A hub model out of reach: the shipped base stands in, and no verdict may name the other."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepared = setup(lab="01", profile="cpu", model_id="nobody/no-such-model")
    assert context.current().model == "nobody/no-such-model"
    with pytest.warns(UserWarning, match="going on with the shipped base"):
        prepared.base()
    assert context.current().model == "small"


# --- noise: in a fresh interpreter, as the libraries speak while they load

WORK = """
import sys, torch
{setup}
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(**sizes))
import tempfile
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
import bitsandbytes.backends.cpu.ops, logging, warnings
kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: no such module")
kernels.warning("something else to say")
for _ in range(3):
    logging.getLogger("bitsandbytes.autograd._functions").warning("MatMul8bitLt: inputs will be cast from a to b")
warnings.warn("another FutureWarning", FutureWarning)
"""
NOISE = ("is_gradient_checkpointing", "gemm_4bit_forward", "Loading weights")


@pytest.mark.parametrize(
    "call", ["", "import labs_lib; labs_lib.setup(lab='01', profile='cpu')"], ids=["without", "with"]
)
def test_known_noise_is_silenced_and_the_rest_is_not(call):
    said = python(WORK.format(setup=call)).stderr
    assert "something else to say" in said and "another FutureWarning" in said
    if call:
        assert not [noise for noise in NOISE if noise in said]
        assert said.count("MatMul8bitLt") == 1
    else:  # the libraries still make it: an entry of quiet.py whose noise is gone can go, too
        from transformers import PreTrainedModel

        # Python 3.10 gets a release of transformers that has not renamed it yet.
        renamed = hasattr(PreTrainedModel, "is_activation_checkpointing")
        assert [noise for noise in (NOISE if renamed else NOISE[1:]) if noise not in said] == []


def test_a_notebook_s_first_import_is_cheap():
    heavy = ("torch", "numpy", "matplotlib", "transformers")
    code = f"import sys, labs_lib; print([name for name in {heavy} if name in sys.modules])"
    assert python(code).stdout.strip() == "[]"
    code = "from labs_lib import check, claim, progress, setup; import sys; print('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


def test_setup_loads_neither_transformers_nor_peft():
    loaded = "[name for name in ('transformers', 'peft') if name in sys.modules]"
    code = f"import labs_lib, sys; labs_lib.setup(lab='01', profile='cpu'); print({loaded})"
    assert python(code).stdout.splitlines()[-1] == "[]"
