"""Builds .venv from requirements.lock: the first thing every `make` target runs, with whatever `python3` there is.

Standard library only, and the syntax of Python 3.6, so that a machine with the wrong Python gets a sentence instead
of a traceback. A finished environment carries a stamp: the next run sees it and is instant. An environment without
one was interrupted, and is completed. `--clean` removes the environment and the caches.
"""

import hashlib
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

OLDEST, NEWEST = (3, 10), (3, 13)
PREFERRED = (
    "3.11",
    "3.12",
    "3.13",
    "3.10",
)  # tried in this order when the running Python is of another version
GB_CPU, GB_CUDA = (
    3.0,
    9.0,
)  # measured on disk after installation: 2.2 and about 7, plus what pip unpacks on the way
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
CACHES = (".cache", "build", ".pytest_cache", ".ruff_cache", ".hypothesis")
PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2], sys._base_executable)"


class SetupError(Exception):
    """Why the environment could not be built, and what to do about it."""


# --- what the machine has


def supported(version):
    return OLDEST <= tuple(version[:2]) <= NEWEST


def find_python():
    """Path of a Python 3.10-3.13 that can make environments: the running one if it will do, else one on the PATH."""
    running = "%d.%d" % sys.version_info[:2]
    names = [sys.executable] if supported(sys.version_info) else []
    names += ["python" + version for version in PREFERRED]
    without_venv = None
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        done = subprocess.run([path, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode == 0:
            version, executable = done.stdout.decode().strip().split(" ", 1)
            if supported([int(part) for part in version.split(".")]):
                return executable
        elif b"ensurepip" in done.stderr or b"venv" in done.stderr:
            without_venv = without_venv or path
    if without_venv:
        raise SetupError(
            "%s cannot make virtual environments: install its venv package "
            "(Debian and Ubuntu: sudo apt install python3-venv) and try again." % without_venv
        )
    raise SetupError(
        "PEFT Labs needs Python 3.10, 3.11, 3.12 or 3.13; `python3` here is %s and no other was found. Install one "
        "(python.org, your package manager, or `uv python install 3.12`) and try again; if it is not on the PATH, "
        "name it: make PYTHON=/path/to/python3.12 lab." % running
    )


def has_nvidia_gpu():
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        done = subprocess.run([smi, "-L"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and b"GPU" in done.stdout


def reachable(url, seconds=3.0):
    """Whether the address answers in time. In a thread, because a name look-up ignores every timeout."""
    answer = []

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answer.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answer)


def size_gb(folder):
    paths = (os.path.join(top, name) for top, _, names in os.walk(str(folder)) for name in names)
    return sum(os.lstat(path).st_size for path in paths) / 1e9


def check_disk(root, need):
    free = shutil.disk_usage(str(root)).free / 1e9
    if free < need:
        raise SetupError(
            "The environment needs about %.1f GB more in %s and only %.1f GB are free: make room there, or clone "
            "the repository onto a larger disk." % (need, root, free)
        )


# --- the environment


def fingerprint(root):
    """What a finished environment was made from. The path counts: environments cannot be moved."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("requirements.lock", "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def clean_environ():
    """The environment variables for pip: none that would send packages elsewhere."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
    return dict({k: v for k, v in os.environ.items() if k not in dropped}, PIP_USER="0")


def make_venv(python, env):
    """A new, empty environment. One that was moved, or whose Python is gone or unsupported, is replaced."""
    done = subprocess.run(
        [python, "-m", "venv", "--clear", str(env)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        reason = done.stdout.decode(errors="replace").strip().splitlines()
        raise SetupError(
            "%s could not make an environment in %s: %s" % (python, env, reason[-1] if reason else "?")
        )


def usable(env):
    """Whether the environment's Python runs, is of a supported version, has pip and was made in this place."""
    code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [str(env / "bin" / "python"), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError:
        return False
    if done.returncode:
        return False
    script = env / "bin" / "pip"  # names its interpreter by full path
    moved = not script.exists() or str(env) not in script.read_text()
    return supported([int(part) for part in done.stdout.decode().split(".")]) and not moved


def drop_half_installed(env):
    """Forget packages whose installation was cut off, so that pip installs them anew.

    pip unpacks a package's files first and writes INSTALLER near the end: without it, files may be missing.
    """
    for folder in (env / "lib").glob("python*/site-packages/*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(str(folder))


class Pip:
    """Runs the environment's pip, shows one short line of progress, keeps all of its words in a log."""

    def __init__(self, env):
        self.command = [
            str(env / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--progress-bar",
            "off",
            "--no-input",
        ]
        self.command += ["--disable-pip-version-check", "--retries", "2"]
        self.log = env / "install.log"
        self.started = time.time()
        self.collected = 0

    def install(self, *arguments):
        """Raises SetupError with the reason when pip fails."""
        lines = queue.Queue()
        with self.log.open("a") as log:
            log.write("\n$ pip install %s\n" % " ".join(arguments))
            process = subprocess.Popen(
                self.command + list(arguments),
                cwd=str(self.log.parent.parent),
                env=clean_environ(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            threading.Thread(target=pump, args=(process.stdout, lines), daemon=True).start()
            words = []
            try:
                line = ""
                while line is not None:
                    try:
                        line = lines.get(timeout=1.0)
                    except queue.Empty:
                        self.show()
                        continue
                    if line is not None:
                        words.append(line)
                        log.write(line + "\n")
                        self.follow(line)
                process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            raise SetupError(self.diagnosis("\n".join(words)))

    now = "starting"

    def follow(self, line):
        """Turn pip's words into what is being done."""
        collecting = re.match(r"Collecting (\S+?)(==|$| |;)", line)
        downloading = re.match(r"\s+Downloading (\S+?)-\d\S*\.whl \((\S+ [MG]B)\)", line)
        if collecting:
            self.collected += 1
            self.now = "package %d: %s" % (self.collected, collecting.group(1))
        elif downloading:
            self.now = "downloading %s (%s)" % downloading.groups()
        elif line.startswith("Installing collected packages"):
            self.now = "installing %d of them" % (line.count(",") + 1)
        else:
            return
        self.show(fresh=not collecting or self.collected % 25 == 0)

    def show(self, fresh=False):
        seconds = int(time.time() - self.started)
        line = "  %d:%02d  %s" % (seconds // 60, seconds % 60, self.now)
        if sys.stdout.isatty():
            sys.stdout.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
            sys.stdout.flush()
        elif fresh:
            print(line, flush=True)

    def diagnosis(self, words):
        network = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ReadTimeoutError")
        network += (
            "Could not fetch URL",
            "Connection broken",
            "Network is unreachable",
            "ProxyError",
            "SSLError",
        )
        if "No space left on device" in words or "Disk quota exceeded" in words:
            return (
                "The disk is full (packages go to %s, temporary files to %s): make room, or set TMPDIR to a folder "
                "on a larger disk, and run the same command again." % (self.log.parent, tempfile.gettempdir())
            )
        if any(word in words for word in network):
            return (
                "The package index cannot be reached: the first run needs a network (about 0.6 GB; none afterwards). "
                "Connect, or set your proxy or mirror (HTTPS_PROXY, PIP_INDEX_URL), and run the same command again: "
                "it goes on where it stopped."
            )
        errors = [line for line in words.splitlines() if line.lower().startswith("error")]
        return "pip failed: %s (all of its words: %s)" % (
            errors[-1] if errors else "no reason given",
            self.log,
        )


def pump(stream, lines):
    for raw in iter(stream.readline, b""):
        lines.put(raw.decode(errors="replace").rstrip())
    lines.put(None)


def torch_pin(root):
    return re.search(r"^torch==\S+", (root / "requirements.lock").read_text(), re.M).group(0)


def ensure(root):
    """Make root/.venv complete. Does nothing, quickly, when it is."""
    env, stamp, wanted = root / ".venv", root / ".venv" / "complete", fingerprint(root)
    if stamp.exists() and stamp.read_text() == wanted and os.access(str(env / "bin" / "python"), os.X_OK):
        return
    cuda = has_nvidia_gpu()
    need = GB_CUDA if cuda else GB_CPU
    # The standard Linux build of torch brings gigabytes of CUDA libraries, also to machines without use for them.
    cpu_only = platform.system() == "Linux" and not cuda
    cpu_build = cpu_only and reachable(TORCH_CPU + "/torch/")
    if usable(env):
        check_disk(root, max(need - size_gb(env), 0.3))
        print("Completing the environment in %s." % env, flush=True)
        drop_half_installed(env)
    else:
        python = find_python()
        check_disk(root, need)
        print("Making the environment in %s, once: a few minutes and up to %.0f GB." % (env, need))
        print("  with %s, torch %s" % (python, "with CUDA" if cuda else "for CPU"), flush=True)
        if cpu_only and not cpu_build:
            print(
                "  %s does not answer: torch may come with its CUDA libraries, and take %.0f GB"
                % (TORCH_CPU, GB_CUDA),
                flush=True,
            )
        make_venv(python, env)
    if stamp.exists():
        stamp.unlink()
    pip = Pip(env)
    if cpu_build:
        try:  # only torch itself is taken from there
            pip.install("--no-deps", "--index-url", TORCH_CPU, torch_pin(root))
        except SetupError as reason:
            print("\nNo CPU build of torch from %s, taking the standard one. %s" % (TORCH_CPU, reason))
    pip.install("-r", "requirements.lock")
    pip.install("--no-deps", "--no-build-isolation", "-e", ".")
    stamp.write_text(wanted)
    pip.now = "the environment is ready\n"
    pip.show(fresh=True)


def clean(root, environment):
    """Remove the caches of the course and its tools, and the environment too if asked."""
    for name in CACHES + ((".venv",) if environment else ()):
        shutil.rmtree(str(root / name), ignore_errors=True)
    for top, folders, _ in os.walk(str(root)):
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        if "__pycache__" in folders:
            shutil.rmtree(os.path.join(top, "__pycache__"), ignore_errors=True)


def main(arguments):
    root = Path(__file__).resolve().parent.parent
    try:
        if "--clean" in arguments:
            clean(root, environment=True)
        else:
            ensure(root)
    except SetupError as reason:
        print("\n%s" % reason, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: it goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
