"""A whole server for a test: the shipped `tiny` base, two tenants with adapters saved by PEFT, the truth of each."""

import atexit
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import httpx
import openai
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from labs_lib.models.base import load_base
from labs_lib.serving.engine import Engine
from labs_lib.serving.gateway import create_app
from labs_lib.serving.registry import Registry
from labs_lib.serving.serve import running_server

ADMIN = "labs-admin-of-the-tests"
PROMPT = "Review: navy teapot, the cover is lovely\nVerdict:"
DRAFT = "Facts: "  # after this the base and the adapters go on for as long as they may


def make_adapter(folder: Path, seed: int, base: str = "tiny", rank: int = 4) -> Path:
    """A PEFT adapter with random weights, large enough to change every answer."""
    model, _ = load_base(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@cache
def adapters() -> Path:
    """Made once for all tests of a process; each house gets a copy."""
    folder = Path(tempfile.mkdtemp(prefix="labs-adapters-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for seed, name in enumerate(("one", "two", "bolt")):
        make_adapter(folder / name, seed)
    return folder


class House:
    """What a test may touch. `keys`: API key by tenant; `folders`: adapter by name."""

    def __init__(self, root: Path, engine: dict, **app) -> None:
        self.root = root
        shutil.copytree(adapters(), root, dirs_exist_ok=True)
        self.folders = {name: root / name for name in ("one", "two", "bolt")}
        self.registry = Registry(root / "registry")
        self.keys = {name: self.registry.add_tenant(name) for name in ("acme", "bolt")}
        self.registry.publish("acme", self.folders["one"])
        self.registry.publish("bolt", self.folders["bolt"])
        self.model, self.tokenizer = load_base("tiny")
        sizes = {"slots": 4, "max_rank": 8, "max_batch": 8, "kv_tokens": 4096}
        self.engine = Engine(self.model, self.registry.folder, **(sizes | engine))
        self.app = self.make_app(**app)
        self.url = ""
        self._openai: dict[str, openai.OpenAI] = {}

    def make_app(self, **settings):
        """An app over this house's engine and registry; a test may serve a second one with other settings."""
        settings = {"admin_key": ADMIN, "model_name": "tiny", "adapter_root": self.root} | settings
        return create_app(self.engine, self.registry, self.tokenizer, **settings)

    @contextlib.contextmanager
    def with_app(self, **settings) -> Iterator["House"]:
        """The same house, for a while behind a second server with other settings."""
        before, self._openai = (self.url, self._openai), {}
        with running_server(self.make_app(**settings)) as self.url:
            yield self
        self.url, self._openai = before

    def openai(self, tenant: str = "acme") -> openai.OpenAI:
        if tenant not in self._openai:  # making one takes longer than a request
            self._openai[tenant] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0, timeout=60
            )
        return self._openai[tenant]

    def http(self, key: str | None = "acme") -> httpx.Client:
        """A plain client with a tenant's key, another key as it is, or none."""
        headers = (
            {} if key is None else {"authorization": f"Bearer {self.keys.get(key, key)}".encode("latin-1")}
        )
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=False)

    def truth(self, name: str | None, prompt: str = PROMPT, count: int = 8) -> str:
        """What PEFT itself says with this adapter (None: the base), greedily and alone."""
        return truth(name, prompt, count)

    def sha(self, tenant: str) -> str:
        return self.registry.current(tenant).sha256


@cache
@torch.inference_mode()
def truth(name: str | None, prompt: str, count: int) -> str:
    model, tokenizer = load_base("tiny")
    if name is not None:
        model = PeftModel.from_pretrained(model, adapters() / name).merge_and_unload().eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@contextlib.contextmanager
def open_house(root: Path, started: bool = True, engine: dict | None = None, **app) -> Iterator[House]:
    """A running server. With `started=False` requests wait until `house.engine.start()`."""
    house = House(root, engine or {}, **app)
    try:
        if started:
            house.engine.start()
        with running_server(house.app) as house.url:
            yield house
    finally:
        house.engine.close()
        house.registry.close()


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for what must come true soon; its time is not what is tested."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
