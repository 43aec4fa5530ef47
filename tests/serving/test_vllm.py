"""The fleet's folders and the same requests on vLLM: optional, since vLLM does not share the course's environment.

Make it an environment of its own and name its Python: `VLLM_PYTHON=vllm/bin/python pytest tests/serving/test_vllm.py`.
Only rows with an adapter are asked for: vLLM 0.32 on a CPU answers base rows of a mixed batch wrong.
"""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request

import openai
import pytest
import torch
from peft import PeftModel

from labs_lib.measure.quality import generate
from labs_lib.models.base import base_folder, load_base
from labs_lib.training.fleet_run import fleet_folders
from labs_lib.world.tasks import load_task

VLLM = os.environ.get("VLLM_PYTHON", "")
TENANTS = ("fathom-eleven", "quillfeather-post", "oakum-and-tar")
TOKENS = 48


@contextlib.contextmanager
def vllm_server(folders, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base_folder("small"))]
    command += ["--dtype", "float32", "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-lora", "--max-loras", str(len(folders)), "--max-lora-rank", "8", "--lora-modules"]
    command += [f"{slug}={folder}" for slug, folder in folders.items()]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | settings) as server,
    ):
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="VLLM_PYTHON names no Python with vLLM")
@torch.inference_mode()
def test_the_same_folders_give_the_same_words(tmp_path):
    folders = fleet_folders(TENANTS)
    with vllm_server(folders, tmp_path / "vllm.log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
        for slug, folder in folders.items():
            model, tokenizer = load_base("small")
            alone = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
            prompt = load_task("style", tenant=slug)["test"]["prompt"][0]
            said = client.completions.create(model=slug, prompt=prompt, max_tokens=TOKENS, temperature=0)
            assert [said.choices[0].text] == generate(alone, tokenizer, [prompt], TOKENS), slug
