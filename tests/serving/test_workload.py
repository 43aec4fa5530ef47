"""Traces: what the exponents mean, what two traces of one seed share, and adapters that PEFT itself takes."""

import numpy as np
import pytest
import torch
from peft import PeftModel

from labs_lib.errors import LabsError
from labs_lib.serving import workload
from labs_lib.serving.adapter import preflight
from labs_lib.serving.layout import Layout
from labs_lib.serving.workload import Arrival, Trace

from .conftest import VOCABULARY, small_model


def test_zipf_is_a_power_of_the_rank_over_n_adapters():
    shares = workload.zipf(50, 1.0)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10)
    assert shares[0] == pytest.approx(0.2223, abs=1e-4)
    assert workload.zipf(1000, 1.0)[0] == pytest.approx(0.1336, abs=1e-4)
    assert np.allclose(workload.zipf(50, 0.0), workload.uniform(50))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_power_is_what_numpy_draws(alpha):
    drawn = np.random.default_rng(0).power(alpha, 200_000)
    counts = np.bincount((drawn * 10).astype(int), minlength=10) / len(drawn)
    assert np.allclose(workload.power(10, alpha), counts, atol=0.01)


def test_power_with_alpha_one_is_uniform():
    assert np.allclose(workload.power(20, 1.0), workload.uniform(20))


def test_one_seed_has_the_same_arrivals_and_lengths_for_any_number_of_adapters():
    few = workload.poisson(5, 200, workload.zipf(50), seed=3)
    many = workload.poisson(5, 200, workload.zipf(1000), seed=3)
    assert [(a.at, a.prompt, a.output) for a in few] == [(a.at, a.prompt, a.output) for a in many]
    assert [a.adapter for a in few] != [a.adapter for a in many]
    assert few != workload.poisson(5, 200, workload.zipf(50), seed=4)
    assert few == workload.poisson(5, 200, workload.zipf(50), seed=3)


def test_adapters_are_drawn_as_often_as_their_shares_say():
    trace = workload.closed(20_000, workload.zipf(20, 1.5), base_share=0.25, seed=1)
    named = [a.adapter for a in trace if a.adapter is not None]
    assert len(named) == pytest.approx(15_000, rel=0.03)
    counts = np.bincount(named, minlength=20) / len(named)
    assert np.allclose(counts, workload.zipf(20, 1.5), atol=0.01)
    assert all((a.tenant == "base") == (a.adapter is None) for a in trace)


def test_arrivals_of_each_kind():
    steady = workload.poisson(10, 2000, workload.uniform(3))
    assert steady.summary()["rate"] == pytest.approx(10, rel=0.1)
    assert all(a.at == 0 for a in workload.closed(5, workload.uniform(3)))

    day = workload.day(40, 24, workload.uniform(3), depth=0.8)  # an "hour" is a second
    assert len(day) == pytest.approx(40 * 24, rel=0.1)
    hours = np.bincount([int(a.at) for a in day], minlength=24)
    assert hours[14:18].sum() > 4 * hours[2:6].sum()

    loud = workload.noisy(10, 30, workload.uniform(5), burst=50, start=10, length=5, tenant=2)
    inside = [a for a in loud if 10 <= a.at < 15]
    assert sum(a.adapter == 2 for a in inside) > 0.7 * len(inside)
    outside = [a for a in loud if not 10 <= a.at < 15]
    assert sum(a.adapter == 2 for a in outside) < 0.4 * len(outside)
    assert [a.at for a in loud] == sorted(a.at for a in loud)


def test_a_trace_survives_its_file(tmp_path):
    trace = workload.poisson(5, 20, workload.zipf(4), base_share=0.3)
    mixed = Trace("mixed", 1, 4, (*trace.arrivals, Arrival(9.0, "t", 1, (5, 6, 7), 3)))
    for each in (trace, mixed):
        assert Trace.load(each.save(tmp_path / "trace.jsonl")).arrivals == each.arrivals
    assert mixed.arrivals[-1].prompt_tokens == 3
    broken = tmp_path / "broken.jsonl"
    for text in ("", "{}\n", '{"kind": "x", "seed": 0, "adapters": 1}\n{"at": 1}\n', "not json"):
        broken.write_text(text)
        with pytest.raises(LabsError, match="not a trace"):
            Trace.load(broken)


def test_requests_are_the_same_each_time_and_of_the_asked_lengths():
    trace = workload.closed(30, workload.uniform(4), prompt=(3, 9), output=(2, 5), base_share=0.3)
    first = trace.requests(list("abcd"), VOCABULARY)
    assert first == trace.requests(list("abcd"), VOCABULARY)
    for arrival, request in zip(trace, first, strict=True):
        assert len(request.prompt) == arrival.prompt and request.max_tokens == arrival.output
        assert request.adapter == (None if arrival.adapter is None else "abcd"[arrival.adapter])
        assert 3 <= min(request.prompt) <= max(request.prompt) < VOCABULARY
        assert request.ignore_eos and request.temperature == 0
    assert {r.adapter for r in trace.base_only().requests([], VOCABULARY)} == {None}
    with pytest.raises(LabsError, match="names"):
        trace.requests(["a"], VOCABULARY)


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"output": (5, 4)}])
def test_impossible_lengths_are_refused(wrong):
    with pytest.raises(LabsError, match="makes no sense"):
        workload.closed(3, workload.uniform(2), **wrong)


def test_real_prompts_are_of_the_tenant(tmp_path):
    from transformers import AutoTokenizer

    from labs_lib.models.base import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder("tiny"))
    trace = workload.world_prompts(workload.closed(6, workload.uniform(2)), tokenizer)
    texts = [tokenizer.decode(a.prompt, skip_special_tokens=True) for a in trace]
    assert all("Facts:" in text and "Copy:" in text for text in texts)
    assert Trace.load(trace.save(tmp_path / "t")).arrivals == trace.arrivals


def test_random_adapters_are_valid_differ_and_are_repeatable(tmp_path):
    model = small_model()
    folders = workload.random_adapters(model, 3, tmp_path / "a", rank=4)
    assert len(folders) == 3
    layout = Layout.of(model)
    for sha, folder in folders.items():
        manifest = preflight(folder, layout)
        assert manifest.sha256 == sha and manifest.rank == 4 and len(manifest.targets) == len(layout.linears)
    again = workload.random_adapters(small_model(), 3, tmp_path / "b", rank=4)
    assert list(again) == list(folders)
    some = workload.random_adapters(model, 1, tmp_path / "c", rank=2, targets=["q_proj", "v_proj"])
    assert {name.rpartition(".")[2] for name in preflight(*some.values()).targets} == {"q_proj", "v_proj"}
    with pytest.raises(LabsError, match="no linear layer"):
        workload.random_adapters(model, 1, tmp_path / "d", targets=["nothing"])


def test_peft_reads_random_adapters_and_answers_with_each_differ(tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    base = small_model()
    logits = [base(ids).logits]
    for folder in workload.random_adapters(base, 2, tmp_path, rank=4).values():
        logits.append(PeftModel.from_pretrained(small_model(), folder)(ids).logits)
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.1 for other in logits[:i])
