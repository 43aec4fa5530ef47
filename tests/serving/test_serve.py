"""`labs serve` before it serves, and how a server ends."""

import argparse
import socket
import threading

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.serving import serve

from .house import DRAFT, eventually, open_house


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_are_let_in_only_when_told(host):
    with pytest.raises(LabsError, match="--allow-remote"):
        serve.main(arguments("--host", host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_is_this_machine(host):
    assert serve.is_loopback(host)


def test_a_taken_port_is_told_with_the_way_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LabsError, match=f"Port {port} is taken: .*--port"):
            serve.main(arguments("--port", str(port)))


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none_is_told(port):
    with pytest.raises(LabsError, match="--port"):
        serve.main(arguments("--port", port))


@pytest.mark.parametrize("wrong", [("--oracle", "2"), ("--canaries", "-1"), ("--threads", "0")])
def test_numbers_that_are_none_are_told(wrong):
    with pytest.raises(LabsError, match=f"{wrong[0]} takes|{wrong[0]} 0 or|{wrong[0]} 1 or"):
        serve.main(arguments(*wrong, "--port", "0"))


def test_an_adapter_root_must_be_there(tmp_path):
    with pytest.raises(LabsError, match="make it first"):
        serve.main(arguments("--adapter-root", str(tmp_path / "none"), "--port", "0"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_and_the_pool_have_the_dtype_that_was_asked_for(dtype, tmp_path, monkeypatch):
    class ReadyError(Exception):
        pass

    def stop(engine, *args, **settings):
        assert engine.executor.dtype == engine.pool.adapters.data.dtype == getattr(torch, dtype)
        raise ReadyError

    monkeypatch.setattr("labs_lib.serving.gateway.create_app", stop)
    with pytest.raises(ReadyError):
        serve.main(arguments("--model", "tiny", "--dtype", dtype, "--registry", str(tmp_path), "--port", "0"))


def test_a_server_that_stops_lets_what_is_under_way_end(tmp_path):
    """The engine is paused, so the request is surely under way when the server is told to stop."""
    with open_house(tmp_path, started=False) as house:
        answers = []

        def ask() -> None:
            completion = house.openai().completions.create(
                model="acme", prompt=DRAFT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
            )
            answers.append(completion.choices[0].text)

        client = threading.Thread(target=ask)
        app = house.make_app()
        before = house.url
        with serve.running_server(app) as house.url:
            client.start()
            eventually(lambda: house.engine.stats()["waiting"] == 1)
            # Starts once the server has been told to stop, which is when it says so.
            threading.Thread(
                target=lambda: (eventually(lambda: app.state.gateway.closing), house.engine.start())
            ).start()
        client.join(60)
        assert answers == [house.truth("one", DRAFT)]
        with pytest.raises(OSError):  # nobody listens there any more
            socket.create_connection((house.url.split("/")[2].split(":")[0], int(house.url.split(":")[-1])))
        house.url = before
