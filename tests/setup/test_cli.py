"""The `labs` command: what is offered, how an error reads, and the exit status of each way out."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib import import_module
from importlib.util import find_spec

import pytest

from labs_lib import cli, launch


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Make a room with the given body of `main`, reachable as `labs trial`."""

    def make(body: str) -> None:
        (tmp_path / "trial_room.py").write_text(
            f"def add_arguments(parser):\n    parser.add_argument('--n', type=int)\ndef main(args):\n    {body}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "trial_room", raising=False)
        monkeypatch.setitem(cli.COMMANDS, "trial", ("trial_room", "try something"))

    return make


def test_a_room_gets_its_arguments_and_its_status_is_returned(room):
    room("return args.n")
    assert cli.main(["trial", "--n", "7"]) == 7


def test_no_status_is_success(room):
    room("pass")
    assert cli.main(["trial"]) == 0


def test_a_users_error_is_one_line_and_status_2(room, capsys):
    room("from labs_lib.errors import LabsError; raise LabsError('No such lab: choose 00.')")
    assert cli.main(["trial"]) == 2
    assert capsys.readouterr() == ("", "labs: No such lab: choose 00.\n")


def test_ctrl_c_is_status_130(room, capsys):
    room("raise KeyboardInterrupt")
    assert cli.main(["trial"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_not_hidden(room):
    room("raise ValueError('a bug')")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["trial"])


def test_a_reader_that_left_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m labs_lib --help | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_an_absent_room_is_told(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "absent", ("labs_lib.absent_room", "nothing"))
    assert cli.main(["absent"]) == 2
    assert "`labs absent` is not part of this version" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "peft-labs" in out if words == ["--version"] else all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_room_with_help(command, capsys):
    module, _ = cli.COMMANDS[command]
    if find_spec(module) is None:
        pytest.fail(f"`labs {command}` names {module}, which does not exist")
    assert callable(import_module(module).main)
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: labs {command}" in capsys.readouterr().out


# --- labs lab


def fetch(url: str) -> dict:
    """The address is printed a moment before the server listens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_jupyterlab_opens_the_first_notebook_also_when_the_port_is_taken(tmp_path):
    """For real: the server starts, names the address of the notebook, and gives the notebook out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("RUNTIME", "CONFIG", "DATA")}
        command = [sys.executable, "-m", "labs_lib", "lab", "--no-browser", "--port", str(port)]
        server = subprocess.Popen(
            command,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        watchdog = threading.Timer(240, os.killpg, (server.pid, signal.SIGKILL))
        watchdog.start()
        try:
            words = []
            for line in server.stdout:
                words.append(line)
                address = re.search(
                    r"http://localhost:(\d+)/lab/tree/(notebooks/00_\w+\.ipynb)\?(token=\w+)", line
                )
                if address:
                    break
            else:
                pytest.fail("".join(words))
            used, notebook, token = address.groups()
            contents = fetch(f"http://localhost:{used}/api/contents/{notebook}?{token}")
            assert contents["path"] == launch.FIRST
        finally:
            watchdog.cancel()
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()
    assert int(used) != port
    assert f"port {port} is already in use" in "".join(words)


def test_a_missing_notebook_is_told(capsys):
    assert cli.main(["lab", "notebooks/none.ipynb", "--no-browser"]) == 2
    assert "There is no notebook notebooks/none.ipynb" in capsys.readouterr().err
