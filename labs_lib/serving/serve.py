"""`labs serve`: the engine behind HTTP, on this machine only unless told otherwise; and the same for a notebook.

Nothing is written but the registry, by its own rules: kill the server at any moment and start it again.
"""

import argparse
import contextlib
import errno
import ipaddress
import os
import secrets
import shlex
import socket
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib import quiet
from labs_lib.errors import LabsError
from labs_lib.paths import cache

if TYPE_CHECKING:
    from fastapi import FastAPI

DRAIN_SECONDS = 30
STALL_SECONDS = 60
SMALL = 100e6  # parameters
MAX_CONNECTIONS = 1024  # one more gets 503; each may hold a body of MAX_BODY bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="small", help="a base, a folder, or a hub id (default: small)")
    parser.add_argument(
        "--registry", type=Path, metavar="PATH", help="the registry's folder (default: in the cache)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")
    parser.add_argument(
        "--allow-remote", action="store_true", help="listen to other machines, without encryption"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the model and the adapters on the device; half of it for a large model on a GPU (default: float32)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="of the model on a CPU (default: 1 up to 100 million parameters, whose steps more threads slow down)",
    )
    parser.add_argument("--slots", type=int, default=32, help="adapters on the device (default: 32)")
    parser.add_argument("--max-rank", type=int, default=16, help="of an adapter (default: 16)")
    parser.add_argument("--max-batch", type=int, default=32, help="requests that run together (default: 32)")
    parser.add_argument("--kv-tokens", type=int, default=8192, help="tokens in KV memory (default: 8192)")
    parser.add_argument("--host-mb", type=int, default=256, help="adapters in host memory (default: 256)")
    parser.add_argument(
        "--policy", choices=["separate", "unified"], default="separate", help="memory of adapters and KV"
    )
    parser.add_argument(
        "--graphs",
        choices=["auto", "on", "off"],
        default="auto",
        help="record decode steps and replay them (default: auto, on a GPU)",
    )
    parser.add_argument("--fairness", choices=["fcfs", "fair"], default="fcfs", help="who is next")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait (default: 256)")
    parser.add_argument("--inflight", type=int, default=32, help="requests of one tenant (default: 32)")
    parser.add_argument(
        "--oracle",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of the answers, replayed on merged weights and compared, for which two more copies of the base are kept; "
        "0 is off (default: 0.01)",
    )
    parser.add_argument(
        "--canaries",
        type=float,
        default=60,
        metavar="SECONDS",
        help="between requests whose right answer is known; 0 is off (default: 60)",
    )
    parser.add_argument("--no-base", action="store_true", help="tenants may not use the base itself")
    parser.add_argument(
        "--adapter-root", type=Path, metavar="PATH", help="where adapters may be loaded from over HTTP"
    )


def main(args: argparse.Namespace) -> int:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise LabsError(f"{package} is not installed: `pip install -e '.[serve]'`.")
    if args.canaries < 0 or not 0 <= args.oracle <= 1 or (args.threads is not None and args.threads < 1):
        raise LabsError(
            "--oracle takes a share from 0 to 1, --canaries 0 or more seconds, --threads 1 or more."
        )
    if not (args.allow_remote or is_loopback(args.host)):
        raise LabsError(
            f"{args.host} is not this machine alone, and the server speaks plain HTTP: put a proxy with TLS before it, "
            "or pass --allow-remote."
        )
    if args.adapter_root is not None and not args.adapter_root.is_dir():
        raise LabsError(f"There is no directory {args.adapter_root} to load adapters from: make it first.")
    quiet.silence()
    with contextlib.closing(
        listen(args.host, args.port)
    ) as listener:  # before the model: its mistakes are quick
        _serve(args, listener)
    return 0


def _serve(args: argparse.Namespace, listener: socket.socket) -> None:
    import torch

    from labs_lib.models.base import SIZES, load_base
    from labs_lib.serving.engine import Engine
    from labs_lib.serving.gateway import create_app
    from labs_lib.serving.layout import Layout
    from labs_lib.serving.registry import Registry
    from labs_lib.serving.watch import Watch

    quiet.hub(wanted=args.model not in SIZES and not Path(args.model).is_dir())
    root = args.registry or cache() / "registry"

    def load():
        return load_base(args.model, dtype=getattr(torch, args.dtype), device=args.device)

    model, tokenizer = load()
    threads = args.threads or (1 if model.num_parameters() < SMALL else None)
    if threads and args.device == "cpu":
        torch.set_num_threads(threads)
    with (
        Registry(root, Layout.of(model), args.max_rank) as registry,
        Engine(
            model,
            registry.folder,
            slots=args.slots,
            max_rank=args.max_rank,
            max_batch=args.max_batch,
            kv_tokens=args.kv_tokens,
            host_bytes=args.host_mb << 20,
            policy=args.policy,
            fairness=args.fairness,
            graphs=args.graphs,
            queue_limit=args.queue,
        ) as engine,
        Watch(
            engine,
            registry,
            lambda: load()[0],
            share=args.oracle,
            every=args.canaries,
        ) as watch,
    ):
        given = os.environ.get("LABS_ADMIN_KEY")
        key = given or f"labs-admin-{secrets.token_urlsafe(32)}"
        app = create_app(
            engine,
            registry,
            tokenizer,
            admin_key=key,
            model_name=args.model,
            allow_base=not args.no_base,
            adapter_root=args.adapter_root,
            max_inflight=args.inflight,
            watch=watch,
        )
        engine.start()
        print(_greeting(args, root, listener, None if given else key), flush=True)
        make_server(app).run(sockets=[listener])
        print("Stopped.", flush=True)


def _greeting(args: argparse.Namespace, root: Path, listener: socket.socket, key: str | None) -> str:
    quoted = shlex.quote(str(root))
    lines = [
        f"Serving {args.model} on {address(listener)} (OpenAI's API: {address(listener)}/v1). Ctrl-C stops it.",
        f"Who is where, live: {address(listener)}/ (asks for the admin key)",
        "A tenant, in another terminal:",
        f"    labs tenants --registry {quoted} add NAME          (prints its API key)",
        f"    labs tenants --registry {quoted} publish NAME ADAPTER_FOLDER",
    ]
    if key is not None:
        lines.append(
            f"Admin key for /metrics and /admin, shown only this once (or set LABS_ADMIN_KEY):\n    {key}"
        )
    return "\n".join(lines)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # some other name
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; LabsError, with what to do, if the address cannot be had."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 65536
        raise LabsError(f"There is no port {port}: --port takes 0 (any free one) to 65535.")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise LabsError(
            f"{host}:{port} is no address to listen on ({error}): see --host and --port."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: closes what a client that reads nothing leaves open
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
        listener.bind(where)
        listener.listen(128)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LabsError(
                f"Port {port} is taken: choose another with --port, take any free one with --port 0, or stop what "
                f"listens there (`ss -ltnp 'sport = :{port}'` tells)."
            ) from error
        raise LabsError(f"{host}:{port} cannot be listened on ({error}): see --host and --port.") from error


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: "FastAPI", log_level: str = "warning"):
    """A uvicorn server that answers 503 from the signal on, lets what is under way end, and then returns."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            app.state.gateway.closing = True
            # Not super(): it would raise the signal again at the end, and skip the caller's own clean-up.
            self.force_exit = self.should_exit
            self.should_exit = True

    config = uvicorn.Config(
        app,
        log_level=log_level,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=DRAIN_SECONDS,
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
    )
    return Server(config)


@contextlib.contextmanager
def running_server(app: "FastAPI", host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve an app on a thread: `with running_server(app) as url:`, for a notebook or a test; it stops at the end."""
    listener = listen(host, port)
    server = make_server(app)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="gateway", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        if failed:
            raise LabsError(f"The server did not start: {failed[0]}.") from failed[0]
        yield address(listener)
    finally:
        app.state.gateway.closing = True
        server.should_exit = True
        thread.join(DRAIN_SECONDS + 5)
        listener.close()
