"""What /metrics tells after a known day's work."""

import threading

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .house import ADMIN, PROMPT, eventually, open_house


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with open_house(tmp_path_factory.mktemp("house"), engine={"slots": 1}) as house:
        yield house


def scrape(house) -> dict[tuple, float]:
    answer = house.http(ADMIN).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_a_days_work_is_in_the_metrics(house):
    """Two tenants in turn through one slot: each change of tenant is an eviction."""
    prompt = len(house.tokenizer(PROMPT).input_ids)
    for tenant in ("acme", "bolt", "acme"):
        house.openai(tenant).completions.create(
            model=tenant, prompt=PROMPT, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
        )
    list(
        house.openai("acme").completions.create(
            model="acme",
            prompt=PROMPT,
            max_tokens=5,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    with pytest.raises(openai.NotFoundError):
        house.openai("acme").completions.create(model="bolt", prompt="a")
    with pytest.raises(openai.BadRequestError):
        house.openai("bolt").completions.create(model="bolt", prompt="a", n=2)
    house.http(None).get("/v1/models")
    seen = scrape(house)
    assert seen["labs_requests_total", "acme", "ok"] == 3
    assert seen["labs_requests_total", "bolt", "ok"] == 1
    assert seen["labs_requests_total", "404", "acme"] == 1
    assert seen["labs_requests_total", "400", "bolt"] == 1
    assert seen["labs_requests_total", "-", "401"] == 1
    assert seen["labs_prompt_tokens_total", "acme"] == 3 * prompt
    assert seen["labs_output_tokens_total", "acme"] == 15
    assert seen["labs_output_tokens_total", "bolt"] == 5
    assert seen["labs_time_to_first_token_seconds_count", "acme"] == 3
    assert seen["labs_time_per_output_token_seconds_count", "bolt"] == 1
    assert seen["labs_time_to_first_token_seconds_sum", "acme"] > 0
    assert seen["labs_inflight_requests", "acme"] == 0
    assert seen["labs_adapter_evictions_total", "acme", "bolt"] >= 1
    assert seen["labs_engine_events_total", "evict"] == 2
    assert seen["labs_engine_events_total", "load"] == 2, "the second time it came from host memory"
    assert seen["labs_engine_events_total", "device"] == 3
    assert seen["labs_engine_slots",] == seen["labs_engine_resident_adapters",] == 1
    assert seen["labs_engine_waiting",] == seen["labs_engine_running",] == 0


def test_a_client_that_went_away_is_counted(house, monkeypatch):
    """The engine waits after the first token, so that it cannot be done before the client has gone."""
    gone, executor = threading.Event(), house.engine.executor
    decode = executor.decode
    monkeypatch.setattr(executor, "decode", lambda rows: gone.wait(30) and decode(rows))
    before = scrape(house).get(("labs_requests_total", "aborted", "acme"), 0)
    stream = house.openai("acme").completions.create(
        model="acme", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    eventually(lambda: scrape(house).get(("labs_requests_total", "aborted", "acme"), 0) == before + 1)
    gone.set()
    assert scrape(house)["labs_inflight_requests", "acme"] == 0


def test_two_servers_do_not_add_up(house):
    with house.with_app():
        assert ("labs_requests_total", "acme", "ok") not in scrape(house)
