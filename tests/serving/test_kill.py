"""`kill -9` of a real `labs serve` while it publishes and serves: what was acknowledged is there after a restart."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from labs_lib.serving.registry import Registry

from .house import ADMIN, DRAFT, PROMPT, adapters, truth

NAMES = ("one", "two")
ROUNDS = 2


class Server:
    """A `labs serve` process of its own."""

    def __init__(self, registry, adapter_root) -> None:
        command = [sys.executable, "-m", "labs_lib", "serve", "--model", "tiny", "--port", "0"]
        command += ["--registry", str(registry), "--adapter-root", str(adapter_root), "--slots", "2"]
        environment = os.environ | {"LABS_ADMIN_KEY": ADMIN}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = self.process.stdout.readline() + self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        if not found:
            pytest.fail(said + self.process.stderr.read())
        self.url = found[0]

    def http(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=False)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    """Each round: one thread publishes without pause, one streams, the process is killed at a random moment."""
    root, draw = tmp_path / "registry", random.Random(0)
    with Registry(root) as registry:
        key = registry.add_tenant("acme")
    acknowledged: list[int] = []  # numbers of versions that the server said are published
    for _ in range(ROUNDS):
        server = Server(root, adapters())
        going = threading.Event()

        def publish(server=server, going=going) -> None:
            with contextlib.suppress(httpx.HTTPError), server.http(ADMIN) as client:
                for i in range(10**6):
                    body = {"lora_name": "acme", "lora_path": NAMES[i % 2], "load_inplace": True}
                    client.post("/v1/load_lora_adapter", json=body).raise_for_status()
                    (tenant,) = client.get("/admin/tenants").json()["tenants"]
                    acknowledged.append(tenant["current"])
                    if i >= 3:
                        going.set()

        def chat(server=server) -> None:
            body = {"model": "acme", "prompt": DRAFT, "max_tokens": 100, "stream": True, "ignore_eos": True}
            with contextlib.suppress(httpx.HTTPError), server.http(key) as client:
                while client.post("/v1/completions", json=body).status_code in (200, 404):
                    pass

        threads = [threading.Thread(target=each) for each in (publish, chat, chat)]
        for thread in threads:
            thread.start()
        assert going.wait(60)
        time.sleep(draw.random() / 2)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        for thread in threads:
            thread.join(60)
        with Registry(root) as registry:
            versions = {version.number: version for version in registry.versions("acme")}
            assert set(acknowledged) <= set(versions)
            assert all(registry.verify(version.sha256) for version in versions.values())
            assert registry.current("acme").number >= acknowledged[-1]

    server = Server(root, adapters())
    with server.http(key) as client:
        for model in ("acme", f"acme:{acknowledged[0]}", f"acme:{acknowledged[-1]}"):
            body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] in {truth(name, PROMPT, 8) for name in NAMES}
        body |= {"max_tokens": 480, "stream": True, "ignore_eos": True}
        with contextlib.ExitStack() as streams:  # several, so that they take a while
            answers = [
                streams.enter_context(client.stream("POST", "/v1/completions", json=body)) for _ in range(8)
            ]
            ending = threading.Thread(target=server.end, args=[signal.SIGTERM])
            ending.start()
            for answer in answers:
                answer.read()
                assert answer.text.endswith("data: [DONE]\n\n"), (
                    "asked to stop, it lets what is under way end"
                )
    ending.join(60)
    assert server.process.returncode == 0
