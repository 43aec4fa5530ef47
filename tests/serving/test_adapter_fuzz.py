"""Random damage to an adapter's two files: it is refused or served right, with no other error and no hang."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from labs_lib.serving import peft_config
from labs_lib.serving.adapter import check_weights, preflight, read_pages
from labs_lib.serving.layout import Layout, LinearSpec
from labs_lib.serving.types import Refused

NAMES = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qk"]
LAYOUT = Layout(tuple(LinearSpec(name, 8, 6, 14 * i, 14 * i + 8) for i, name in enumerate(NAMES)), 64, 16)
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "k_proj"],
    "rank_pattern": {"k_proj": 3},
    "alpha_pattern": {r"layers\.1\.\w+": 5},
    "use_dora": True,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": None,
    "exclude_modules": ["v_proj"],
    "init_lora_weights": True,
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parts = {}
    for name in NAMES:
        rank = 3 if "k_proj" in name else 2
        parts[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 8)
        parts[f"base_model.model.{name}.lora_B.weight"] = torch.randn(6, rank)
        parts[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(6) + 1
    return parts


BYTES = save(tensors())
KEYS = sorted(tensors())
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """judge(config, weights) -> True if served; both are bytes. Only Refused may be raised, and in one line."""
    monkeypatch.setattr(peft_config, "REGEX_SECONDS", 1)
    base = torch.ones(6, 8)

    def judge(config: bytes = json.dumps(CONFIG).encode(), weights: bytes = BYTES) -> bool:
        (tmp_path / "adapter_config.json").write_bytes(config)
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        served = []
        for read in (preflight, check_weights, lambda *args: read_pages(*args, lambda name: base)[0]):
            for layout in (None, LAYOUT):
                if layout is None and read not in (preflight, check_weights):
                    continue
                try:
                    served.append(read(tmp_path, layout))
                except Refused as refused:
                    assert len(str(refused)) < 600 and "\n" not in str(refused)
        assert len(set(map(repr, served))) <= 1  # whoever accepts it sees the same adapter
        if len(served) == 5:
            pages = read_pages(tmp_path, LAYOUT, lambda name: base)[1]
            assert torch.isfinite(pages).all()
        return len(served) == 5

    return judge


def test_the_undamaged_one_is_served(judge):
    assert judge()


@FUZZ
@given(st.data())
def test_bytes_of_the_tensors(judge, data):
    """Bytes overwritten, inserted or taken out, most of them in the header."""
    weights = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, 200, len(BYTES)]))
        at = data.draw(st.integers(0, end - 1))
        new = data.draw(st.binary(max_size=8))
        weights[at : at + data.draw(st.integers(0, 8))] = new
    judge(weights=bytes(weights))


@FUZZ
@given(st.integers(0, len(BYTES)), st.binary(max_size=64))
def test_a_cut_file(judge, size, more):
    served = judge(weights=BYTES[:size] + more)
    assert not served or size + len(more) == len(BYTES)  # other numbers, but a whole file


@FUZZ
@given(st.data())
def test_bytes_of_the_config(judge, data):
    config = bytearray(json.dumps(CONFIG).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(config)))
        new = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"null", b"{", b"[", b'"', b"1e999", b"-", b"\\u0000"])
        )
        config[at : at + data.draw(st.integers(0, 6))] = new
    judge(config=bytes(config))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, -1, 1.5]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.just("q_proj"), inner, max_size=3)
    ),
    max_leaves=8,
)
REGEX = st.text(alphabet="qk_proj.*+?()[]|\\dw^${}0123,:layers", max_size=24)


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)) | st.text(max_size=12), JSON, min_size=1, max_size=3))
def test_values_of_wrong_types(judge, changes):
    judge(config=json.dumps(CONFIG | changes).encode())


@settings(FUZZ, max_examples=25)
@given(st.sampled_from(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]), REGEX)
@example("target_modules", r"(\w|.|[a-z])+x")
@example("alpha_pattern", "(" * 200 + "a*" + ")*" * 200)
@example("rank_pattern", "(?i)q_proj")
@example("target_modules", r"((a{1000}){1000}){1000}")
@example("target_modules", "all-linear")
@example("exclude_modules", "all-linear")
@example("exclude_modules", r"(?P<a>.)(?P=a)\Z")
def test_any_regular_expression(judge, key, pattern):
    judge(config=json.dumps(CONFIG | {key: {pattern: 3} if key.endswith("pattern") else pattern}).encode())


@FUZZ
@given(JSON)
def test_any_json(judge, value):
    judge(config=json.dumps(value).encode())


@FUZZ
@given(
    st.sampled_from(KEYS),
    st.text(max_size=20) | st.sampled_from([*KEYS, "base_model.model..lora_A.weight", "lm_head.weight"]),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2]
    ),
    st.sampled_from([0.0, 1.0, math.nan, math.inf, 3e38, 1e-40]),
)
def test_a_tensor_of_another_name_shape_type_or_value(judge, tmp_path, old, new, shape, dtype, value):
    parts = tensors()
    del parts[old]
    parts[new] = torch.full(shape, value).to(dtype)
    save_file(parts, tmp_path / "other.safetensors")
    with safe_open(tmp_path / "other.safetensors", "pt") as file:
        assert set(file.keys()) == parts.keys()
    judge(weights=(tmp_path / "other.safetensors").read_bytes())
