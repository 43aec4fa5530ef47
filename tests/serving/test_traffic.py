"""Customers over HTTP: every call is answered with its own tenant's adapter, whatever the operator does meanwhile."""

import pytest

from labs_lib.serving.traffic import Call, plan, play
from labs_lib.serving.workload import closed, uniform

from .house import ADMIN, PROMPT, open_house


def test_a_publish_and_a_rollback_under_load_fail_nobody(tmp_path):
    with open_house(tmp_path) as house:
        calls = [Call(0.02 * i, ("acme", "bolt")[i % 2], PROMPT, 8) for i in range(40)]

        def publish():
            return house.registry.publish("acme", house.folders["two"]).number

        def roll_back():
            return house.http(ADMIN).post("/admin/tenants/acme/rollback").json()["current"]

        played = play(house.url, calls, house.keys, during=[(0.5, roll_back), (0.25, publish)])
        assert played.failed == [] and [what for _, what in played.happened] == [2, 1]
        assert {reply.version for reply in played.replies if reply.call.tenant == "bolt"} == {1}
        for reply in played.replies:
            names = {("acme", 1): "one", ("acme", 2): "two", ("bolt", 1): "bolt"}
            assert reply.text == house.truth(names[reply.call.tenant, reply.version])
            assert reply.tokens <= 8 and reply.seconds > 0 and len(reply.adapter) == 64


def test_what_fails_is_told(tmp_path):
    with open_house(tmp_path) as house:
        calls = [Call(0, "acme", PROMPT, 2), Call(0, "nobody", PROMPT, 2), Call(0, "acme", "long", 10**6)]
        replies = {(r.call.tenant, r.call.prompt): r for r in play(house.url, calls, house.keys).replies}
        assert replies["acme", PROMPT].status == 200
        assert replies["nobody", PROMPT].status == 401 and "API key" in replies["nobody", PROMPT].error
        assert replies["acme", "long"].status == 400
    (gone,) = play("http://127.0.0.1:9", calls[:1], house.keys).failed
    assert gone.status == 0 and gone.error


def test_an_operators_mistake_is_raised_after_the_calls(tmp_path):
    with open_house(tmp_path) as house:
        with pytest.raises(ZeroDivisionError):
            play(house.url, [Call(0, "acme", PROMPT, 2)], house.keys, during=[(0, lambda: 1 / 0)])
        assert house.engine.ledger.counts["end"] == 1


def test_a_plan_gives_each_tenant_its_own_prompts_in_turn():
    calls = plan(closed(6, uniform(2), seed=1), ["a", "b"], {"a": ["a0", "a1"], "b": ["b0"]}, max_tokens=5)
    assert len(calls) == 6 and all(call.prompt.startswith(call.tenant) for call in calls)
    mine = [call.prompt for call in calls if call.tenant == "a"]
    assert mine == [f"a{i % 2}" for i in range(len(mine))] and {call.max_tokens for call in calls} == {5}
