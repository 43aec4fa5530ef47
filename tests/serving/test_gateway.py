"""The server as its clients see it: the real `openai` client, a real port, the real engine, adapters saved by PEFT."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from .house import ADMIN, DRAFT, PROMPT, eventually, make_adapter, open_house


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with open_house(tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture
def paused(tmp_path):
    """A server whose engine does nothing until the test starts it."""
    with open_house(tmp_path, started=False, engine={"queue_limit": 3}, max_inflight=2) as house:
        yield house


def complete(house, tenant="acme", model=None, **more):
    settings = {"model": model or tenant, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | more
    return house.openai(tenant).completions.create(**settings)


# --- the right adapter


def test_everybody_at_once_gets_the_tokens_of_their_own_adapter(house):
    """Tenants and base mixed, streams and not: each text is what PEFT says with that adapter alone."""

    def ask(i: int) -> tuple[str, str]:
        tenant, model, name = [("acme", "acme", "one"), ("bolt", "bolt", "bolt"), ("acme", "tiny", None)][
            i % 3
        ]
        answer = complete(house, tenant, model, stream=i % 2 == 0)
        text = "".join(c.choices[0].text for c in answer) if i % 2 == 0 else answer.choices[0].text
        return text, house.truth(name)

    truths = {house.truth(name) for name in ("one", "two", "bolt", None)}
    assert len(truths) == 4, "else this test could not tell them apart"
    with ThreadPoolExecutor(9) as threads:
        for text, truth in threads.map(ask, range(18)):
            assert text == truth


def test_every_answer_says_which_weights_made_it(house):
    raw = house.openai().completions.with_raw_response.create(
        model="acme", prompt=PROMPT, max_tokens=3, temperature=0
    )
    origin = raw.parse().provenance
    assert origin["adapter"] == house.sha("acme") == raw.headers["x-adapter-sha256"]
    assert origin["version"] == 1 and raw.headers["x-adapter-version"] == "1"
    assert origin["slot"] == int(raw.headers["x-adapter-slot"]) > 0
    assert origin["generation"] == int(raw.headers["x-adapter-generation"]) > 0
    assert raw.headers["x-request-id"]
    base = complete(house, model="tiny").provenance
    assert base == {"adapter": None, "version": None, "slot": 0, "generation": 0}


def test_a_stream_has_its_provenance_in_the_last_chunk(house):
    *chunks, last = list(complete(house, stream=True))
    assert last.provenance["adapter"] == house.sha("acme")
    assert last.choices[0].finish_reason == "length"
    assert not any(getattr(chunk, "provenance", None) for chunk in chunks)
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)


def test_a_publish_by_another_process_counts_from_the_next_request_on(paused):
    """Hot swap: what was asked before stays on its version, also if it had not begun; roll back is one call."""
    before = ThreadPoolExecutor(1).submit(complete, paused)
    eventually(lambda: paused.engine.stats()["waiting"] == 1)
    command = [sys.executable, "-m", "labs_lib", "tenants", "--registry", str(paused.root / "registry")]
    subprocess.run([*command, "publish", "acme", str(paused.folders["two"])], check=True)
    paused.engine.start()
    old, new = before.result(), complete(paused)
    assert (old.provenance["version"], old.choices[0].text) == (1, paused.truth("one"))
    assert (new.provenance["version"], new.choices[0].text) == (2, paused.truth("two"))
    assert complete(paused, model="acme:1").choices[0].text == paused.truth("one")
    rolled = paused.http(ADMIN).post("/admin/tenants/acme/rollback")
    assert rolled.json()["current"] == 1
    assert complete(paused).choices[0].text == paused.truth("one")
    assert complete(paused, model="acme:2").choices[0].text == paused.truth("two")


# --- OpenAI's API


def test_the_models_of_a_tenant_are_its_own_and_the_base(house):
    assert [model.id for model in house.openai("acme").models.list()] == ["tiny", "acme", "acme:1"]
    assert [model.id for model in house.openai("bolt").models.list()] == ["tiny", "bolt", "bolt:1"]
    card = house.openai("acme").models.retrieve("acme:1")
    assert (card.parent, card.version, card.adapter) == ("tiny", 1, house.sha("acme"))
    with pytest.raises(openai.NotFoundError):
        house.openai("acme").models.retrieve("bolt")


def test_a_chat_is_the_completion_of_its_plain_template(house):
    """The shipped base has no template of its own."""
    guide, rest = "Guide: short", "Facts: a teapot\nCopy:\n"
    messages = [{"role": "system", "content": guide}, {"role": "user", "content": rest}]
    client = house.openai()
    said = client.chat.completions.create(
        model="acme", messages=messages, max_completion_tokens=9, temperature=0
    )
    text = complete(house, prompt=f"{guide}\n{rest}", max_tokens=9)
    assert said.choices[0].message.content == text.choices[0].text != ""
    assert said.usage == text.usage
    assert said.provenance["adapter"] == house.sha("acme")
    chunks = list(
        client.chat.completions.create(
            model="acme", messages=messages, max_tokens=9, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == said.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_openai_clients_own_stream_helper_takes_our_stream(house):
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    with house.openai().chat.completions.stream(model="tiny", messages=messages, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == " good"
    assert final.choices[0].finish_reason == "stop"


def test_usage_of_a_stream_comes_when_it_is_asked_for(house):
    *chunks, last = list(complete(house, stream=True, stream_options={"include_usage": True}))
    assert last.choices == [] and last.usage == complete(house).usage
    assert last.usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks)


def test_the_models_end_token_ends_a_text_and_is_not_part_of_it(house):
    answer = complete(house, model="tiny")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" good", "stop")
    on = complete(house, model="tiny", extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == 8 and on.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_and_nothing_of_it_was_sent(house, stream):
    whole = house.truth("one", DRAFT, 40)
    stop = whole[10:14]
    aborted = house.engine.ledger.accounts["acme"].requests["abort"]
    answer = complete(house, prompt=DRAFT, max_tokens=400, stop=[stop, "never-there"], stream=stream)
    if stream:
        chunks = list(answer)
        text, finish = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert finish == "stop"
    assert house.engine.ledger.accounts["acme"].requests["abort"] == aborted + 1, "no more tokens were made"


def test_a_seed_makes_sampling_repeatable(house):
    texts = [complete(house, temperature=1.2, top_p=0.9, seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    first, again, other = (text.choices[0].text for text in texts)
    assert first == again != other


def test_the_tiniest_temperature_is_greedy(house):
    assert complete(house, temperature=5e-324).choices[0].text == house.truth("one")


def test_token_ids_are_a_prompt_too(house):
    ids = house.tokenizer(PROMPT).input_ids
    assert complete(house, prompt=ids).choices[0].text == house.truth("one")
    assert complete(house, prompt=[PROMPT]).choices[0].text == house.truth("one")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 2),
        ("echo", True),
        ("logprobs", 1),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("suffix", "x"),
        ("top_k", 5),
        ("max_tokens", 0),
        ("temperature", 3),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("seed", 2**63),
        ("prompt", ["one", "two"]),
        ("prompt", []),
        ("prompt", [-1]),
        ("prompt", [2048]),
        ("prompt", "half a pair: \ud800"),
        ("stream_options", {"include_usage": True}),
        ("unheard_of", 1),
    ],
)
def test_what_is_not_supported_is_said_and_not_ignored(house, field, value):
    body = {"model": "acme", "prompt": "a", "max_tokens": 2} | {field: value}
    answer = house.http().post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] in (field, None)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": []},
    ],
)
def test_what_a_chat_does_not_support_is_said(house, more):
    settings = {"model": "acme", "messages": [{"role": "user", "content": "a"}]} | more
    with pytest.raises(openai.BadRequestError):
        house.openai().chat.completions.create(**settings)


def test_values_that_change_nothing_are_taken(house):
    more = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "echo": False,
    }
    assert complete(house, **more).choices[0].text == house.truth("one")


def test_too_long_a_prompt_is_told_as_openai_tells_it(house):
    for prompt in ("word " * 600, "word " * 100_000, list(range(3, 600))):
        with pytest.raises(openai.BadRequestError) as error:
            complete(house, prompt=prompt)
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        complete(house, max_tokens=512)
    assert error.value.code == "context_length_exceeded"


# --- who may what


def test_without_a_good_key_there_is_nothing(house):
    for key in (None, "labs-0123456789ab-" + "x" * 43, "käse", ADMIN):
        client = house.http(key)
        for path, body in (
            ("/v1/completions", {"model": "acme", "prompt": "a"}),
            ("/generate", {"inputs": "a"}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{house.url}/v1", api_key="no", max_retries=0).models.list()


def test_anothers_adapter_and_none_at_all_look_the_same(house):
    """Status, body and headers: nothing tells a stranger that the name exists."""

    def probe(name: str) -> tuple:
        answer = house.http("acme").post("/v1/completions", json={"model": name, "prompt": "a"})
        headers = {
            k: v for k, v in answer.headers.items() if k not in ("date", "x-request-id", "content-length")
        }
        return answer.status_code, answer.text.replace(name, "NAME"), headers

    there, nowhere = probe("bolt"), probe("nobody")
    assert there == nowhere and there[0] == 404
    assert probe("bolt:1") == probe("nobody:1")
    assert "model_not_found" in there[1]
    with pytest.raises(openai.NotFoundError):
        complete(house, "acme", "bolt")


def test_unknown_versions_of_ones_own_are_not_found(house):
    for name in ("acme:2", "acme:0", "acme:x", "acme:1:1", "acme:01", "acme:" + "9" * 50):
        with pytest.raises(openai.NotFoundError):
            complete(house, model=name)


def test_the_base_can_be_withheld(house):
    with house.with_app(allow_base=False):
        assert [model.id for model in house.openai().models.list()] == ["acme", "acme:1"]
        with pytest.raises(openai.NotFoundError):
            complete(house, model="tiny")
        assert house.http().post("/generate", json={"inputs": "a"}).status_code == 404
        assert complete(house).choices[0].text == house.truth("one")


def test_a_tenant_named_like_the_base_never_gets_the_base_by_accident(house):
    new = house.registry.add_tenant("base-model")
    with house.with_app(model_name="base-model"):
        assert complete(house, model="base-model").choices[0].text == house.truth(None)  # for everybody else
        answer = house.http(new).post("/v1/completions", json={"model": "base-model", "prompt": "a"})
        assert answer.status_code == 404, "it has published nothing"


def test_the_admins_paths_are_for_the_admin(house):
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/admin/tenants"),
        ("POST", "/admin/tenants/bolt/rollback"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ):
        body = {"json": {"lora_name": "bolt", "lora_path": "bolt"}} if "lora" in path else {}
        assert house.http("acme").request(method, path, **body).status_code == 403
        assert house.http(None).request(method, path, **body).status_code == 401
    listed = house.http(ADMIN).get("/admin/tenants").json()["tenants"]
    assert {tenant["name"]: tenant["current"] for tenant in listed}.items() >= {"acme": 1, "bolt": 1}.items()
    assert house.http(ADMIN).post("/admin/tenants/nobody/rollback").status_code == 404
    assert (
        house.http(ADMIN).post("/admin/tenants/bolt/rollback").status_code == 400
    )  # there is nothing before 1


def test_without_an_admin_key_nobody_is_admin(house):
    for nothing in (None, ""):
        with house.with_app(admin_key=nothing):
            for key in ("None", "acme", ADMIN):
                assert house.http(key).get("/metrics").status_code == 403
            empty = house.http(None).get("/metrics", headers={"authorization": "Bearer"})
            assert empty.status_code == 401


# --- too much at once


def test_a_tenants_requests_under_way_are_bounded(paused):
    """Two of acme wait; its third is refused, bolt's is not."""
    threads = ThreadPoolExecutor(3)
    waiting = [threads.submit(complete, paused) for _ in range(2)]
    eventually(lambda: paused.engine.stats()["waiting"] == 2)
    with pytest.raises(openai.RateLimitError) as error:
        complete(paused)
    assert int(error.value.response.headers["retry-after"]) >= 1
    waiting.append(threads.submit(complete, paused, "bolt"))
    eventually(lambda: paused.engine.stats()["waiting"] == 3)
    with pytest.raises(openai.RateLimitError) as error:  # now the engine's own queue is full
        complete(paused, "bolt")
    assert int(error.value.response.headers["retry-after"]) >= 1
    paused.engine.start()
    texts = [each.result().choices[0].text for each in waiting]
    assert texts == [paused.truth("one")] * 2 + [paused.truth("bolt")]
    assert complete(paused).choices[0].text == paused.truth("one"), "the places were given back"


def test_while_it_shuts_down_it_says_so(house):
    house.app.state.gateway.closing = True
    with pytest.raises(openai.InternalServerError) as error:
        complete(house)
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
    assert house.http().get("/health").status_code == 503
    house.app.state.gateway.closing = False
    assert house.http().get("/health").json() == {"status": "ok", "model": "tiny"}


# --- LoRAX's API


def test_lorax_generate(house):
    parameters = {"adapter_id": "acme", "max_new_tokens": 8, "details": True, "adapter_source": "local"}
    answer = house.http().post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    body = answer.json()
    assert body["generated_text"] == house.truth("one")
    assert "".join(token["text"] for token in body["details"]["tokens"]) == body["generated_text"]
    assert body["details"]["finish_reason"] == "length" and body["details"]["generated_tokens"] == 8
    assert answer.headers["x-adapter-sha256"] == body["provenance"]["adapter"] == house.sha("acme")
    base = house.http().post("/generate", json={"inputs": PROMPT, "parameters": {"details": True}}).json()
    assert (base["generated_text"], base["details"]["finish_reason"]) == (" good", "eos_token")


def test_lorax_stream(house):
    parameters = {"adapter_id": "bolt", "max_new_tokens": 8}
    with house.http("bolt").stream(
        "POST", "/generate_stream", json={"inputs": PROMPT, "parameters": parameters}
    ) as answer:
        events = [json.loads(line.removeprefix("data:")) for line in answer.iter_lines() if line]
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == house.truth("bolt")
    assert events[-1]["generated_text"] == house.truth("bolt")
    assert events[-1]["provenance"]["adapter"] == house.sha("bolt")
    assert len(events) == events[-1]["details"]["generated_tokens"] == 8
    assert all(event["generated_text"] is None for event in events[:-1])


def test_what_the_lorax_client_posts_to_the_root(house):
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "acme", "max_new_tokens": 8, "stop": []}}
    (answer,) = house.http().post("/", json=body | {"stream": False}).json()
    assert answer["generated_text"] == house.truth("one")
    streamed = house.http().post("/", json=body | {"stream": True}).text
    assert json.loads(streamed.split("data:")[-1])["generated_text"] == house.truth("one")


def test_lorax_errors_are_in_its_own_shape(house):
    anothers = house.http().post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "bolt"}})
    assert anothers.status_code == 404 and isinstance(anothers.json()["error"], str)
    wrong = house.http().post(
        "/generate", json={"inputs": "a", "parameters": {"merged_adapters": {"ids": ["a"]}}}
    )
    assert wrong.status_code == 400 and wrong.json()["error_type"] == "validation"


# --- vLLM's paths


def test_an_admin_loads_and_unloads_over_http(tmp_path):
    with open_house(tmp_path / "root") as house:
        admin = house.http(ADMIN)
        outside = make_adapter(tmp_path / "outside", 9)
        (house.root / "link").symlink_to(outside)
        (house.root / "files").mkdir()
        for file in outside.iterdir():
            (house.root / "files" / file.name).symlink_to(file)
        for path in (
            str(outside),
            "../outside",
            "link",
            "files",
            "/etc",
            "none",
            "two/../../outside",
            "a\x00b",
            "",
        ):
            body = {"lora_name": "acme", "lora_path": path, "load_inplace": True}
            refused = admin.post("/v1/load_lora_adapter", json=body)
            assert refused.status_code == 400, path
            assert str(tmp_path) not in refused.text
        body = {"lora_name": "acme", "lora_path": "two"}
        assert "already been loaded" in admin.post("/v1/load_lora_adapter", json=body).text
        done = admin.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
        assert done.text == "Success: LoRA adapter 'acme' added successfully."
        assert complete(house).choices[0].text == house.truth("two")
        assert admin.post("/v1/load_lora_adapter", json=body | {"lora_name": "new"}).status_code == 404
        gone = admin.post("/v1/unload_lora_adapter", json={"lora_name": "acme"})
        assert gone.text == "Success: LoRA adapter 'acme' removed successfully."
        for name in ("acme", "acme:1", "acme:2"):
            with pytest.raises(openai.NotFoundError):
                complete(house, model=name)
        assert [model.id for model in house.openai().models.list()] == ["tiny"]
        assert complete(house, "bolt").choices[0].text == house.truth("bolt")
        assert admin.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert complete(house).choices[0].text == house.truth("two")


def test_without_an_adapter_root_no_path_is_taken(house):
    with house.with_app(adapter_root=None):
        body = {"lora_name": "acme", "lora_path": str(house.folders["two"]), "load_inplace": True}
        assert house.http(ADMIN).post("/v1/load_lora_adapter", json=body).status_code == 403
