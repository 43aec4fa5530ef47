"""LoRAX's own Python client against this server: optional, since the client cannot share the course's environment.

lorax-client 0.6.3 pins huggingface-hub below 1.0. To run this, make it an environment and name its Python:
`python3 -m venv lorax && lorax/bin/pip install lorax-client==0.6.3`, then `LORAX_PYTHON=lorax/bin/python pytest ...`.
The requests that it sends are tested without it in test_gateway.
"""

import json
import os
import subprocess

import pytest

from .house import PROMPT, open_house

CLIENT = """
import asyncio, json, sys
from lorax import AsyncClient, Client
from lorax.errors import NotFoundError

asked = json.loads(sys.argv[1])
headers = {"authorization": f"Bearer {asked['key']}"}
settings = {"adapter_id": asked["tenant"], "max_new_tokens": 8}


def text(answers):
    return "".join(answer.token.text for answer in answers if not answer.token.special)


async def both():
    client = AsyncClient(asked["url"], headers=headers)
    whole = await client.generate(asked["prompt"], **settings)
    streamed = [answer async for answer in client.generate_stream(asked["prompt"], **settings)]
    return [whole.generated_text, text(streamed)]


client = Client(asked["url"], headers=headers)
said = [client.generate(asked["prompt"], **settings).generated_text]
said += [text(client.generate_stream(asked["prompt"], **settings)), *asyncio.run(both())]
try:
    client.generate(asked["prompt"], adapter_id=asked["another"])
except NotFoundError:
    said.append("not found")
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.skipif("LORAX_PYTHON" not in os.environ, reason="LORAX_PYTHON names no Python with lorax-client")
def test_its_client_gets_the_tenants_own_adapter(tmp_path):
    with open_house(tmp_path / "root") as house:
        for tenant, folder, another in (("acme", "one", "bolt"), ("bolt", "bolt", "acme")):
            asked = {"url": house.url, "key": house.keys[tenant], "tenant": tenant, "another": another}
            command = [os.environ["LORAX_PYTHON"], "-c", CLIENT, json.dumps(asked | {"prompt": PROMPT})]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == [house.truth(folder)] * 4 + ["not found"]
