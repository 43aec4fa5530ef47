"""What clients, files and tenants do wrong: that request fails clearly, the engine and everybody else go on."""

import logging
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from labs_lib.serving.serve import listen, make_server

from .house import ADMIN, DRAFT, PROMPT, eventually, make_adapter, open_house

LONG = {"prompt": DRAFT, "max_tokens": 480, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with open_house(tmp_path_factory.mktemp("house")) as house:
        yield house


def ended(house, tenant: str, how: str) -> int:
    return house.engine.ledger.accounts[tenant].requests[how]


def fine(house, tenant: str = "bolt") -> None:
    """Another tenant is served, and right."""
    answer = house.openai(tenant).completions.create(model=tenant, prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == house.truth({"acme": "one"}.get(tenant, tenant))


def raw(
    house, head: str, body: bytes, length: int | None = None, connection: socket.socket | None = None
) -> socket.socket:
    """A connection of one's own, to break."""
    connection = connection or socket.socket()
    connection.connect(address_of(house))
    lines = [head, "host: x", f"authorization: Bearer {house.keys['acme']}", "content-type: application/json"]
    lines.append(f"content-length: {len(body) if length is None else length}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def address_of(house) -> tuple[str, int]:
    host, port = house.url.removeprefix("http://").split(":")
    return host, int(port)


# --- clients that go


def test_a_client_that_leaves_its_stream_ends_its_request(house):
    before = ended(house, "acme", "abort")
    stream = house.openai().completions.create(model="acme", stream=True, **LONG)
    next(iter(stream))
    stream.close()
    eventually(lambda: ended(house, "acme", "abort") == before + 1)
    eventually(lambda: house.engine.stats()["running"] == 0)
    eventually(lambda: not house.app.state.gateway.calls.inflight)
    fine(house)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_leaves_while_it_waits_ends_its_request(tmp_path, caplog, stream):
    """Nothing has been sent yet: only the connection tells. It is no error of ours, so no error is logged."""
    with open_house(tmp_path, started=False) as house:
        body = b'{"model": "acme", "prompt": "a", "max_tokens": 400, "stream": %s}' % stream.encode()
        connection = raw(house, "POST /v1/completions HTTP/1.1", body)
        eventually(lambda: house.engine.stats()["waiting"] == 1)
        connection.close()
        eventually(lambda: not house.app.state.gateway.calls.inflight)
        eventually(lambda: all(each.aborted for each in house.engine.queue.waiting.values()))
        house.engine.start()
        eventually(lambda: ended(house, "acme", "abort") == 1)
        assert house.engine.ledger.accounts["acme"].output_tokens == 0
        fine(house)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(house):
    raw(house, "POST /v1/completions HTTP/1.1", b'{"model": "ac', length=500).close()
    fine(house)


# --- clients that do not read, or send too much


def test_slow_readers_hold_up_nobody_and_are_dropped(house):
    """Streams that nobody reads fill their buffers: others are served meanwhile, and in the end they are closed."""
    app = house.make_app(write_seconds=2.0)
    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # by default a whole stream would fit
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    before, house.url = house.url, f"http://127.0.0.1:{listener.getsockname()[1]}"
    body = b'{"model": "acme", "prompt": "a", "max_tokens": 500, "stream": true, "ignore_eos": true}'
    silent = []
    try:
        for _ in range(4):
            silent.append(socket.socket())
            silent[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw(house, "POST /v1/completions HTTP/1.1", body, connection=silent[-1])
        with house.http("bolt") as client:
            for _ in range(3):
                asked = {"model": "bolt", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
                answer = client.post("/v1/completions", json=asked)
                assert answer.json()["choices"][0]["text"] == house.truth("bolt")
        eventually(lambda: not app.state.gateway.calls.inflight, 60)
        eventually(lambda: not server.server_state.tasks)
        eventually(lambda: house.engine.stats()["running"] == 0)
    finally:
        house.url = before
        for connection in silent:
            connection.close()
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def test_a_huge_body_is_refused_and_not_kept(house):
    client = house.http()
    for content in (b"x" * (1 << 21), b"x" * (1 << 24), (b"x" * (1 << 16) for _ in range(256))):
        answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    fine(house)


def test_a_body_that_never_comes_is_not_waited_for(house):
    with house.with_app(body_seconds=0.2):
        connection = raw(house, "POST /v1/completions HTTP/1.1", b'{"model"', length=100)
        connection.settimeout(60)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        connection.close()
        fine(house)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nul",
        b"[" * 100_000,
        b'{"model": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
        b'{"\\ud800": 1}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "acme", "prompt": "\\udfff"}',
        b'{"model": "acme", "prompt": "a", "temperature": NaN}',
        b'{"model": "acme", "prompt": "a", "temperature": 1e999}',
        b'{"model": "acme\\u0000", "prompt": "a"}',
    ],
)
def test_bodies_that_are_none(house, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/"):
        answer = house.http().post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]


def test_bytes_that_are_not_http(house):
    for garbage in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 1000, b"A" * 100_000):
        with socket.create_connection(address_of(house), timeout=60) as connection:
            connection.sendall(garbage)
    fine(house)


# --- adapters that cannot be served


def refusal(house, tenant: str = "acme", stream: bool = False) -> openai.APIStatusError:
    """The error that a tenant gets, which must be clear, ours, and not worth a retry."""
    with pytest.raises(openai.APIStatusError) as error:
        house.openai(tenant).completions.create(model=tenant, prompt=PROMPT, max_tokens=4, stream=stream)
    assert error.value.status_code == 500 and error.value.code == "engine_error"
    assert error.value.response.headers["x-should-retry"] == "false"
    return error.value


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_whose_files_were_deleted(tmp_path, stream):
    with open_house(tmp_path) as house:
        shutil.rmtree(house.registry.folder(house.sha("acme")))
        assert "publish it again" in str(refusal(house, stream=stream))
        fine(house)
        house.registry.publish("acme", house.folders["two"])
        answer = house.openai().completions.create(model="acme", prompt=PROMPT, max_tokens=8, temperature=0)
        assert answer.choices[0].text == house.truth("two")


def test_an_adapter_whose_files_were_changed(tmp_path):
    with open_house(tmp_path) as house:
        file = house.registry.folder(house.sha("acme")) / "adapter_model.safetensors"
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "changed" in str(refusal(house))
        file.write_bytes(content[: len(content) // 2])
        refusal(house)
        fine(house)


def test_an_adapter_of_another_base(tmp_path):
    """Published without a look at the model, as another process may do it; refused when it is to be loaded."""
    with open_house(tmp_path) as house:
        house.registry.publish("acme", make_adapter(tmp_path / "wrong", 5, base="small"))
        assert str(refusal(house))
        fine(house)
        house.registry.rollback("acme")
        fine(house, "acme")


def test_an_adapter_of_too_large_a_rank(tmp_path):
    with open_house(tmp_path) as house:
        house.registry.publish("acme", make_adapter(tmp_path / "large", 5, rank=16))
        assert "max-rank" in str(refusal(house))
        fine(house)


def test_a_wrong_adapter_is_refused_over_http_with_the_reason(house):
    torch_file = house.root / "pickled"
    torch_file.mkdir()
    shutil.copy(house.folders["two"] / "adapter_config.json", torch_file)
    torch.save(
        load_file(house.folders["two"] / "adapter_model.safetensors"), torch_file / "adapter_model.bin"
    )
    body = {"lora_name": "acme", "lora_path": "pickled", "load_inplace": True}
    answer = house.http(ADMIN).post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 400 and "pickle" in answer.json()["error"]["message"]
    fine(house, "acme")


def test_an_adapter_that_overflows_spoils_nobody_elses_sampling(tmp_path):
    """Finite weights whose products are not: NaN logits in one row, while the others of the batch draw their tokens."""
    with open_house(tmp_path, started=False) as house:
        wild = shutil.copytree(house.folders["two"], tmp_path / "wild")
        weights = load_file(wild / "adapter_model.safetensors")
        save_file({name: value * 1e25 for name, value in weights.items()}, wild / "adapter_model.safetensors")
        house.registry.publish("acme", wild)
        threads = ThreadPoolExecutor(6)
        sampled = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.0, "seed": 1}

        def ask(tenant: str):
            with house.http(tenant) as client:
                return client.post("/v1/completions", json=sampled | {"model": tenant})

        asked = [(tenant, threads.submit(ask, tenant)) for tenant in ("bolt", "acme", "bolt", "acme", "bolt")]
        eventually(lambda: house.engine.stats()["waiting"] == 5)
        house.engine.start()
        answers = [(tenant, each.result()) for tenant, each in asked]
        alone = ask("bolt").json()["choices"][0]["text"]
        for tenant, answer in answers:
            if tenant == "bolt":
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == alone
            else:
                assert answer.status_code in (200, 500)
        fine(house)


# --- ourselves


def test_what_nobody_expected_is_a_500_with_an_id_that_is_in_the_log(tmp_path, caplog):
    """The database goes away under the server: no traceback for the client, and the server answers again after."""
    with open_house(tmp_path) as house:
        house.registry._db.close()
        with caplog.at_level(logging.ERROR, "labs_lib.serving"):
            answer = house.http().get("/v1/models")
        error = answer.json()["error"]
        assert answer.status_code == 500 and error["code"] == "internal_error"
        assert answer.headers["x-request-id"] in error["message"]
        assert answer.headers["x-request-id"] in caplog.text
        assert "registry" not in error["message"].lower()
        house.registry._db = house.registry._connect()
        fine(house)


def test_a_stream_that_fails_half_way_says_so(house):
    """The slot is taken away from a running request: its client hears of it in the stream, others notice nothing."""
    stream = iter(house.openai().completions.create(model="acme", stream=True, **LONG))
    next(stream)
    with house.engine._lock:
        house.engine.running[0].slot.generation += 1
    with pytest.raises(openai.APIError, match="another adapter"):
        list(stream)
    fine(house)
    assert house.http("acme").get("/health").json()["status"] == "ok"
