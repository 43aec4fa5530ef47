"""What a result proves: nothing on a healthy engine, and each of four things that can be wrong."""

from dataclasses import replace

import pytest

from labs_lib.serving.fault_lab import harness, traffic
from labs_lib.serving.verdict import misserved


@pytest.fixture(scope="module")
def served():
    engine, truth = harness()
    with engine:
        return traffic(engine, truth), truth


def of(served, name, failed=False):
    results, truth = served
    return next(r for r in results if r.request.adapter == truth.shas[name] and bool(r.error) == failed)


def test_nothing_is_wrong_with_a_healthy_engine(served):
    results, truth = served
    assert {misserved(result, truth) for result in results} == {""}
    assert any(result.error for result in results)  # the deleted adapter was asked for


def test_the_tokens_count_whatever_the_provenance_says(served):
    acme, bolt = of(served, "acme"), of(served, "bolt")
    assert "tokens" in misserved(replace(acme, tokens=bolt.tokens), served[1])


def test_the_last_token_counts(served):
    acme = of(served, "acme")
    wrong = [*acme.tokens[:-1], (acme.tokens[-1] + 1) % 97]
    assert "tokens" in misserved(replace(acme, tokens=wrong), served[1])


def test_right_tokens_under_another_name_are_luck(served):
    acme, bolt = of(served, "acme"), of(served, "bolt")
    assert "names" in misserved(replace(acme, provenance=bolt.provenance), served[1])


def test_only_the_deleted_adapter_may_fail(served):
    _, truth = served
    gone, base = of(served, "gone", failed=True), of(served, "base")
    assert misserved(gone, truth) == ""
    assert "fails" in misserved(replace(base, error=gone.error, provenance=None, tokens=[]), truth)
    assert "deleted" in misserved(replace(gone, error=None, provenance=base.provenance), truth)
