"""Folders saved by PEFT, however unusual, become pages that mean what PEFT computes; the rest is refused, and why."""

import copy
import dataclasses
import json
import math
import os
import subprocess

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from labs_lib.methods.io import save_lora
from labs_lib.methods.lora import inject_lora, lora_state_dict
from labs_lib.serving import peft_config
from labs_lib.serving.adapter import MAX_HEADER, check_weights, digest_of, preflight, read_pages
from labs_lib.serving.layout import Layout
from labs_lib.serving.peft_config import HARMLESS, REFUSED, UNDERSTOOD, scales
from labs_lib.serving.types import Refused

CONFIGS = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn\.(q|k)_proj|mlp\.down_proj)"},
    "unsloth": {
        "target_modules": r"(?:.*?(?:language|layers).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bx\.y)"
    },
    "full names": {"target_modules": ["model.layers.1.self_attn.o_proj", "layers.0.mlp.up_proj"]},
    "some layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "full name and layers": {
        "target_modules": ["k_proj", "model.layers.0.self_attn.q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    "excluded by regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*o_proj"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 9},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {
            r"layers\.1\.mlp\.\w+": 7,
            "^model.layers.0.self_attn.q_proj": 1,
            "proj": 99,
            "o_proj": 2,
        },
        "alpha_pattern": {"q_proj": 3, r".*1.*(q|up)_proj": 11, "mlp.up_proj": 0.5},
    },
    "rslora with patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 20},
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora, all at once": {
        "target_modules": ["q_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"1.self_attn.q_proj": 31},
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "alpha 0": {"target_modules": ["q_proj"], "lora_alpha": 0},
    "rank above width": {"target_modules": ["q_proj"], "r": 64},
}


@pytest.fixture(scope="module")
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def layout(base):
    return Layout.of(base)


@pytest.fixture
def save(base, tmp_path):
    """save(**settings of LoraConfig) -> a folder that PEFT wrote, every factor random."""

    def save(folder=tmp_path / "adapter", dtype=None, **kwargs):
        config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **kwargs}
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        if dtype:
            change_tensors(folder, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
        return folder

    return save


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not DROP}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


DROP = object()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def weights_of(base):
    return lambda name: base.get_submodule(name).weight


def adapted_weight(layout, pages, dora, spec, weight):
    """The weight that the pages make of a layer: what a merge would give."""
    A, B = layout.a(pages, spec), layout.b(pages, spec)
    if not dora:
        return weight + B.T @ A
    return (1 + B[-1])[:, None] * weight + B[:-1].T @ A[:-1]


@torch.no_grad()
def assert_like_peft(base, layout, folder):
    manifest, pages = read_pages(folder, layout, weights_of(base))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert sorted(manifest.targets) == sorted(layers)
    assert manifest.rank == max(layer.r["default"] for layer in layers.values())
    assert pages.shape == (manifest.pages, layout.width) == (manifest.rank + manifest.dora, layout.width)
    for spec in layout.linears:
        weight = base.get_submodule(spec.name).weight
        ours = adapted_weight(layout, pages, manifest.dora, spec, weight)
        if spec.name not in layers:
            assert torch.equal(ours, weight)
            continue
        layer = layers[spec.name]
        if not manifest.dora:
            delta = layout.b(pages, spec).T @ layout.a(pages, spec)
            torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=0, atol=1e-6)
        layer.merge()
        torch.testing.assert_close(ours, layer.get_base_layer().weight, rtol=0, atol=1e-6)
    return manifest, pages


@pytest.mark.parametrize("name", CONFIGS)
def test_pages_mean_what_peft_computes(base, layout, save, name):
    folder = save(**CONFIGS[name])
    manifest, pages = assert_like_peft(base, layout, folder)
    assert pages.abs().max() > 0
    assert manifest == preflight(folder, layout) == preflight(folder) == check_weights(folder, layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors(base, layout, save, dtype):
    folder = save(dtype=dtype, target_modules="all-linear", use_dora=True)
    assert_like_peft(base, layout, folder)


def test_all_linear_on_disk(base, layout, save):
    """PEFT writes the names that all-linear stands for; a config written by hand may say the word."""
    folder = save(target_modules="all-linear")
    change_config(folder, target_modules="ALL-LINEAR")
    assert_like_peft(base, layout, folder)


def test_an_adapter_from_the_labs(base, layout, tmp_path):
    model = inject_lora(copy.deepcopy(base), ["q_proj", "mlp.down_proj"], 3, 8)
    for tensor in lora_state_dict(model).values():
        torch.nn.init.normal_(tensor, std=0.3)
    assert_like_peft(base, layout, save_lora(model, tmp_path))


def test_unknown_settings_that_are_off_do_no_harm(base, layout, save):
    """A config of another PEFT version: its new settings are there, at their defaults."""
    folder = save()
    new = {
        "use_new_thing": False,
        "new_config": None,
        "new_list": [],
        "new_text": "",
        "new_dict": {},
        "mode": "none",
    }
    change_config(folder, **new, rank_pattern=None, exclude_modules=None, use_rslora=None, lora_bias=None)
    pages = read_pages(folder, layout)[1]
    change_config(folder, **dict.fromkeys(new, DROP), rank_pattern={})
    assert torch.equal(pages, assert_like_peft(base, layout, folder)[1])


NAMES = [f"layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"]
PATTERNS = st.sampled_from(
    [
        "q_proj",
        "v_proj",
        "self_attn.q_proj",
        r".*\.0\..*",
        "^model.layers.1.self_attn.v_proj",
        "proj",
        r"\w+_proj",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
    alphas=st.dictionaries(PATTERNS, st.integers(1, 40) | st.floats(0.1, 9), max_size=3),
    rslora=st.booleans(),
    layers=st.none() | st.lists(st.integers(0, 2)),
    targets=st.lists(
        st.sampled_from(["q_proj", "v_proj", "self_attn.q_proj", "model.layers.1.self_attn.v_proj"])
    )
    | st.sampled_from([r".*_proj", r"model\.layers\.1\..*proj", "all-linear", ".*v_proj|.*0.*up_proj"]),
    excluded=st.none()
    | st.lists(st.sampled_from(["v_proj", "layers.0.self_attn.q_proj"]))
    | st.just(".*o_proj"),
)
def test_scales_are_pefts(base, layout, ranks, alphas, rslora, layers, targets, excluded):
    """For random configs, which layers are adapted, with which rank and scale, is what PEFT makes of the config."""
    config = {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
        "layers_to_transform": layers if isinstance(targets, list) else None,
        "target_modules": targets,
        "exclude_modules": excluded,
    }
    peft_config.check({"peft_type": "LORA", **config})
    ours = scales(config, [spec.name for spec in layout.linears])
    try:
        with torch.device("meta"):
            theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**config), low_cpu_mem_usage=True)
    except ValueError as error:  # PEFT's answer to a config that adapts nothing
        assert "target" in str(error).lower()
        assert not ours
        return
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {name: (layer.rank, layer.scale) for name, layer in ours.items()} == expected


def test_every_setting_of_peft_is_judged():
    """A setting that a new PEFT adds has to be put into one of the three lists."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = HARMLESS | UNDERSTOOD.keys() | REFUSED.keys()
    assert not fields - known
    assert not HARMLESS & UNDERSTOOD.keys() and not (HARMLESS | UNDERSTOOD.keys()) & REFUSED.keys()


def test_the_name_is_of_the_content(save, tmp_path):
    folder = save()
    command = "sha256sum adapter_config.json adapter_model.safetensors | sha256sum"
    out = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout
    name = preflight(folder).sha256
    assert name == out.split()[0] == digest_of(folder)
    (folder / "README.md").write_text("not part of the adapter")
    assert preflight(folder).sha256 == name
    change_config(folder, peft_version="0.0.0")
    assert preflight(folder).sha256 != name


def test_manifest(save):
    folder = save(r=3, use_dora=True, rank_pattern={"layers.0.self_attn.q_proj": 5})
    change_config(folder, base_model_name_or_path="some/base")
    manifest = preflight(folder)
    size = sum(
        (folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert (manifest.rank, manifest.dora, manifest.pages, manifest.nbytes) == (5, True, 6, size)
    assert manifest.base_name == "some/base" and manifest.config["r"] == 3
    assert manifest.targets == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


# --- refusals: a change to a good folder, and words of the reason

BAD_CONFIGS = {
    "ia3": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "no type": ({"peft_type": DROP}, "peft_type is None"),
    "type is a list": ({"peft_type": ["LORA"]}, "peft_type is"),
    "task": ({"task_type": "SEQ_CLS"}, "task 'SEQ_CLS'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "lora_bias": ({"lora_bias": True}, "bias to B"),
    "token indices": ({"trainable_token_indices": [1]}, "changes embeddings"),
    "target_parameters": ({"target_parameters": ["x"]}, "bare parameters"),
    "replication": ({"layer_replication": [[0, 2]]}, "stack of layers"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    "kasa": ({"kasa_config": {"beta": 1}}, "KaSA"),
    "monteclora": ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
    "velora": ({"velora_config": {"scale": 1}}, "VeLoRA"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "Arrow"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "transposed"),
    "megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, "may change the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "may change the base"),
    "unknown": ({"use_magic": True}, "does not know"),
    "no r": ({"r": DROP}, "gives no r"),
    "no alpha": ({"lora_alpha": None}, "gives no lora_alpha"),
    "r is text": ({"r": "8"}, "r is '8'"),
    "r is true": ({"r": True}, "r is True"),
    "r is 0": ({"r": 0}, "at least 1"),
    "r is negative": ({"rank_pattern": {"q_proj": -1}}, "at least 1"),
    "r is half": ({"rank_pattern": {"q_proj": 1.5}}, "at least 1"),
    "alpha is text": ({"alpha_pattern": {"q_proj": "8"}}, "finite number"),
    "alpha is huge": ({"lora_alpha": 1e300}, "finite number"),
    "rslora is text": ({"use_rslora": "false"}, "use_rslora is 'false'"),
    "dora is a number": ({"use_dora": 1}, "use_dora is 1"),
    "no targets": ({"target_modules": None}, "no target_modules"),
    "targets are numbers": ({"target_modules": [1]}, "list of str"),
    "targets are a dict": ({"target_modules": {"q_proj": 1}}, "of a type"),
    "patterns are a list": ({"rank_pattern": ["q_proj"]}, "of a type"),
    "layers are text": ({"layers_to_transform": ["0"]}, "list of int"),
    "layers of a regex": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "list of names"),
    "layers_pattern": ({"layers_to_transform": [0], "layers_pattern": "(a|aa)+"}, "not a regular expression"),
    "broken regex": ({"target_modules": "(q_proj"}, "cannot be used"),
    "broken pattern": ({"rank_pattern": {"*": 4}}, "cannot be used"),
    "slow regex": ({"target_modules": r"(\w|.|[a-z])+x"}, "more than 1 s"),
    "slow pattern": ({"alpha_pattern": {r"(\w|.|[a-z])+x": 4}}, "more than 1 s"),
    "rank differs": ({"r": 5}, "of rank 4 and 4, the config says 5"),
    "targets less": ({"layers_to_transform": [0]}, "does not target"),
    "not dora": ({"use_dora": True}, "no lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_are_refused(save, name, monkeypatch):
    monkeypatch.setattr(peft_config, "REGEX_SECONDS", 1)
    folder = save()
    preflight(folder)
    changes, words = BAD_CONFIGS[name]
    change_config(folder, **changes)
    with pytest.raises(Refused) as refused:
        preflight(folder)
    assert words in str(refused.value)


def test_an_adapter_of_more_layers_is_refused(save, layout):
    folder = save()
    change_config(folder, target_modules=["q_proj", "v_proj"], base_model_name_or_path="some/other")
    preflight(folder)  # without a model nobody can say
    with pytest.raises(Refused, match=r"targets 'model.layers.0.self_attn.v_proj'.*'some/other'"):
        preflight(folder, layout)


def renamed(tensors, old, new):
    return {key.replace(old, new): value for key, value in tensors.items()}


def replaced(tensors, key, change):
    return tensors | {key: change(tensors[key])}


A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
BAD_TENSORS = {
    "no B": (lambda t: {k: v for k, v in t.items() if k != B0}, "no lora_B"),
    "no A": (lambda t: {k: v for k, v in t.items() if k != A0}, "no lora_A"),
    "none": (lambda t: {}, "no tensors"),
    "head": (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, "output head"),
    "embedding": (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 61)},
        "no LoRA factor",
    ),
    "whole module": (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(61, 32)}, "no LoRA factor"),
    "no prefix": (lambda t: renamed(t, "base_model.model.", ""), "no LoRA factor"),
    "another module": (
        lambda t: renamed(t, "layers.1.self_attn.q", "layers.7.self_attn.q"),
        "layers.7.self_attn",
    ),
    "wrong base": (lambda t: replaced(t, A0, lambda v: v.repeat(1, 2)), "(inputs, outputs)"),
    "rank of A": (lambda t: replaced(t, A0, lambda v: v[:3]), "of rank 3 and 4"),
    "flat": (lambda t: replaced(t, A0, torch.flatten), "not matrices"),
    "empty": (lambda t: replaced(t, B0, lambda v: v[:0]), "not matrices"),
    "integers": (lambda t: replaced(t, A0, lambda v: v.to(torch.int8)), "stored as I8"),
    "double": (lambda t: replaced(t, A0, lambda v: v.double()), "stored as F64"),
    "magnitude": (lambda t: t | {f"{Q0}.lora_magnitude_vector": torch.ones(32)}, "does not say use_dora"),
    "line break": (lambda t: t | {"a\nb": torch.ones(1)}, r"'a\nb'"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_are_refused(save, layout, name):
    folder = save()
    change, words = BAD_TENSORS[name]
    change_tensors(folder, change)
    for judge in (preflight, check_weights, read_pages):
        with pytest.raises(Refused) as refused:
            judge(folder, layout)
        assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(save, layout, value):
    folder = save()
    change_tensors(folder, lambda t: replaced(t, B0, lambda v: v.index_fill(0, torch.tensor([3]), value)))
    preflight(folder, layout)  # looks at no weights
    for judge in (check_weights, read_pages):
        with pytest.raises(Refused, match="NaN or infinity"):
            judge(folder, layout)


def test_scaled_weights_must_fit_the_type(save, layout):
    folder = save(lora_alpha=4_000_000)
    assert torch.isfinite(read_pages(folder, layout)[1]).all()
    with pytest.raises(Refused, match=r"do not fit in torch\.float16"):
        read_pages(folder, layout, dtype=torch.float16)


def test_dora_needs_the_base(save, layout, base):
    folder = save(use_dora=True)
    with pytest.raises(Refused, match="pass weight_of"):
        read_pages(folder, layout)
    with pytest.raises(Refused, match="for the served model"):
        read_pages(folder, layout, lambda name: base.get_submodule(name).weight[:3])
    change_tensors(folder, lambda t: replaced(t, f"{Q0}.lora_magnitude_vector", lambda v: v[:-1]))
    with pytest.raises(Refused, match=r"magnitude vector of shape \(31,\)"):
        preflight(folder)


def test_limits(save):
    folder = save(rank_pattern={"layers.0.self_attn.q_proj": 40})
    with pytest.raises(Refused, match="rank 40; at most 39"):
        preflight(folder, max_rank=39)
    with pytest.raises(Refused, match="over the limit of 1,000"):
        preflight(folder, max_bytes=1000)
    (folder / "adapter_config.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(Refused, match="over the limit"):
        preflight(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": NaN}', "not a JSON number"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"peft_type": "LORA", "r": 1, "r": 2}', "twice"),
        (b"[]", "one JSON object"),
        (b'"LORA"', "one JSON object"),
        (b"{}", "peft_type is None"),
    ],
)
def test_config_files_that_are_refused(save, text, words):
    folder = save()
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(Refused, match=words):
        preflight(folder)


def header(length: int, body: bytes = b"{}") -> bytes:
    return length.to_bytes(8, "little") + body


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends within"),
        (b"\x02", "ends within"),
        (header(2**63), "ends within"),
        (header(3), "ends within"),
        (header(MAX_HEADER + 1, b" " * (MAX_HEADER + 1)), "over the limit"),
        (header(2, b"[]"), "damaged"),
        (header(2, b"\xff\xff"), "damaged"),
        (header(2), "no tensors"),
        (header(59, b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}x'), "damaged"),
        (
            header(71, b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}'),
            "damaged",
        ),
    ],
)
def test_tensor_files_that_are_refused(save, layout, data, words):
    folder = save()
    (folder / "adapter_model.safetensors").write_bytes(data)
    for judge in (preflight, read_pages):
        with pytest.raises(Refused, match=words):
            judge(folder, layout)


def test_a_truncated_file_is_refused(save, layout):
    folder = save()
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        for judge in (preflight, read_pages):
            with pytest.raises(Refused, match="damaged"):
                judge(folder, layout)


def test_folders_that_are_refused(save, tmp_path):
    with pytest.raises(Refused, match="no folder"):
        preflight(tmp_path / "absent")
    with pytest.raises(Refused, match="cannot be read"):
        preflight("nul\0byte")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"adapter_config\.json is missing"):
        preflight(tmp_path / "empty")
    folder = save()
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(Refused, match=r"pickle.*safe_serialization"):
        preflight(folder)
    weights.mkdir()
    with pytest.raises(Refused, match="not a regular file"):
        preflight(folder)
    weights.rmdir()
    os.mkfifo(weights)  # opening it would wait for a writer for ever
    with pytest.raises(Refused, match="not a regular file"):
        preflight(folder)


def test_links_stay_inside_the_folder(save, tmp_path):
    folder = save()
    config = folder / "adapter_config.json"
    inside = config.rename(folder / "real.json")
    config.symlink_to(inside.name)
    preflight(folder)
    (tmp_path / "alias").symlink_to(folder)  # the folder itself may be reached through a link
    preflight(tmp_path / "alias")
    outside = inside.rename(tmp_path / "secret.json")
    config.unlink()
    config.symlink_to(outside)
    with pytest.raises(Refused, match="link out of the adapter's folder"):
        preflight(folder)
    config.unlink()
    config.symlink_to(config.name)
    with pytest.raises(Refused, match="cannot be read"):
        preflight(folder)
