"""The watch over a running server: it finds nothing where nothing is wrong, and closes the doors at a proof."""

import pytest

from labs_lib.models.base import load_base
from labs_lib.serving.watch import Watch

from .house import ADMIN, DRAFT, eventually, open_house


@pytest.fixture
def house(tmp_path):
    with open_house(tmp_path) as house:
        yield house


def watching(house, **settings) -> Watch:
    return Watch(
        house.engine, house.registry, lambda: load_base("tiny")[0], **({"share": 1.0, "every": 0} | settings)
    )


def ask(house, tenant: str):
    return house.openai(tenant).completions.create(model=tenant, prompt=DRAFT, max_tokens=8, temperature=0)


def swap_weights(house) -> None:
    """acme's slot holds bolt's weights: the bug that no book of the engine shows."""
    pool = house.engine.pool
    acme, bolt = (pool.find(house.sha(tenant)) for tenant in ("acme", "bolt"))
    pool.adapters.data[acme.pages] = pool.adapters.data[bolt.pages]


def test_a_healthy_server_is_proved_healthy(house):
    with watching(house) as watch, house.with_app(watch=watch):
        for tenant in ("acme", "bolt"):
            ask(house, tenant)
        watch.round()
        watch.oracle.judge_waiting()
        report = house.http(ADMIN).get("/admin/isolation").json()
        metrics = house.http(ADMIN).get("/metrics").text
        assert house.http(None).get("/health").status_code == 200
    assert report["watched"] and report["isolated"] and report["canaries"] == 2
    assert report["oracle"]["tenants"]["acme"]["agree"] == 1
    assert report["oracle"]["mismatch"] == report["oracle"]["unjudged"] == 0
    assert "labs_isolated 1.0" in metrics and "labs_canaries_total 2.0" in metrics
    assert 'labs_oracle_results_total{outcome="agree",tenant="bolt"} 1.0' in metrics


@pytest.mark.parametrize("seen_by", ["oracle", "canary"])
def test_a_leak_closes_the_server(house, seen_by):
    with watching(house, share=float(seen_by == "oracle")) as watch, house.with_app(watch=watch):
        for tenant in ("acme", "bolt"):
            ask(house, tenant)
        watch.oracle.judge_waiting()
        assert watch.found is None
        swap_weights(house)
        if seen_by == "canary":
            watch.round()
        else:
            ask(house, "acme")
            watch.oracle.judge_waiting()
        assert house.sha("acme")[:12] in watch.found
        health, answer = house.http(None).get("/health"), house.http().get("/v1/models")
        metrics = house.http(ADMIN).get("/metrics").text
    assert (health.status_code, health.json()["status"]) == (503, "isolation broken")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "isolation_broken")
    assert "labs_isolated 0.0" in metrics


def test_canaries_sing_by_themselves_and_stop(house):
    with watching(house, share=0.0, every=0.01) as watch:
        eventually(lambda: watch.sung >= 4)
    assert watch.found is None and not watch._singing.is_alive()


def test_an_adapter_like_the_base_has_no_canary(house, tmp_path):
    """Nothing could tell it apart, so it is left out instead of raising an alarm."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "still"
    get_peft_model(load_base("tiny")[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    house.registry.publish("acme", folder)
    with watching(house) as watch:
        watch.round()
    assert watch.found is None and watch.sung == 1


def test_without_a_watch_the_report_says_so(house):
    assert house.http(ADMIN).get("/admin/isolation").json() == {
        "watched": False, "isolated": None, "found": None, "canaries": 0, "oracle": {}
    }  # fmt: skip
