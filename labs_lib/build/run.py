"""`labs run`: runs notebooks from the first cell to the last with papermill, and says what each took.

Each notebook runs in a worker process, so that the memory of that worker's children is the memory of one kernel.
"""

import argparse
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labs_lib.build.manifest import Entry
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.errors import LabsError
from labs_lib.lab.profiles import NAMES

SAMPLE = 0.1  # seconds between two looks at the kernel's memory
CELL_LIMIT = 1800  # seconds after which a cell is taken to hang


@dataclass(frozen=True)
class Job:
    """One notebook to run: where it is, where the executed copy goes, in which folder, how.

    Unless it runs `alone`, what it measures goes to the cache, even with LABS_RECORD=1: others share the clock.
    """

    notebook: Path
    copy: Path
    folder: Path
    profile: str = ""
    strict: bool = False
    threads: int = 0
    limit: int = CELL_LIMIT
    alone: bool = True


@dataclass(frozen=True)
class Result:
    """What a run took, and how it ended: `error` is empty if every cell ran."""

    seconds: float
    peak_bytes: int
    error: str = ""

    @property
    def cost(self) -> str:
        return f"{self.seconds:5.1f} s  {self.peak_bytes / 2**30:4.1f} GiB"


def run_job(job: Job) -> Result:
    """Run one notebook and write its executed copy, also if it fails. Raises nothing that a notebook can cause."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    job.copy.parent.mkdir(parents=True, exist_ok=True)
    error, start = "", time.perf_counter()
    with _environment(job), _PeakMemory() as memory:
        try:
            papermill.execute_notebook(
                str(job.notebook),
                str(job.copy),
                parameters={"PROFILE": job.profile} if job.profile else {},
                kernel_name="python3",
                cwd=str(job.folder),
                progress_bar=False,
                execution_timeout=job.limit,
                # ipykernel warns, in the terminal, that its sockets on this machine are not encrypted
                extra_arguments=["--log-level=ERROR"],
            )
        except PapermillExecutionError as failure:
            error = _told(failure, job.copy)
        except DeadKernelError:
            error = "the kernel died, most likely for want of memory"
        except Exception as failure:  # a timeout, an unreadable notebook
            error = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
    return Result(time.perf_counter() - start, memory.peak, error)


def run_jobs(
    jobs: Sequence[Job], workers: int = 1, started: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Result]]:
    """(index, result) of each job as it finishes; `started(index)` is called before each when they run one by one."""
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        if workers == 1:
            for i, job in enumerate(jobs):
                if started:
                    started(i)
                yield i, pool.submit(run_job, job).result()
            return
        futures = {pool.submit(run_job, job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _told(failure, copy: Path) -> str:
    """The failing cell, its exception, and the last lines of its traceback."""
    import nbformat

    cells = nbformat.read(copy, as_version=4).cells
    where = next((c.id for c in cells if any(o.output_type == "error" for o in c.get("outputs", []))), "?")
    trace = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in failure.traceback]
    tail = [line for line in "\n".join(trace).splitlines() if line.strip()][-6:]
    said = f"{failure.ename}: {failure.evalue}".splitlines()[0]
    return "\n".join([f"cell {where}: {said}", *(f"    {line[:160]}" for line in tail)])


@contextmanager
def _environment(job: Job) -> Iterator[None]:
    """What the kernel inherits: strictness, threads. PROFILE travels as a parameter, so ours must not interfere."""
    wanted = {"LABS_STRICT": "1" if job.strict else "0"}
    if not job.alone:
        wanted["LABS_RECORD"] = "0"
    if job.threads and "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(job.threads)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class _PeakMemory:
    """Watches the resident memory of this process's children (the kernel and what it starts), in bytes."""

    def __enter__(self) -> "_PeakMemory":
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._done.wait(SAMPLE):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # gone since it was listed
                    continue
            self.peak = max(self.peak, total)


# --- a list of notebooks, with a line for each


@dataclass(frozen=True)
class Task:
    """One notebook of the course, in one profile: as it is saved, or `fresh`, as a build writes it."""

    entry: Entry
    kind: str
    profile: str
    strict: bool
    fresh: bool = False


def run_tasks(course, tasks: Sequence[Task], folder: Path, workers: int = 1) -> list[Result]:
    """Run the tasks, print a line for each and a summary; executed copies go to `folder`."""
    from labs_lib.lab.setup import available_cores

    threads = max(1, available_cores() // workers)
    jobs, names = [], []
    for task in tasks:
        path = course.path(task.entry, task.kind)
        if not path.is_file():
            raise LabsError(f"{course.name(path)} is missing: run `labs build {task.entry.number}`.")
        copy = folder / f"{task.entry.stem}.{task.kind}.ipynb"
        given = _fresh(course, task, folder) if task.fresh else path
        jobs.append(Job(given, copy, path.parent, task.profile, task.strict, threads, alone=workers == 1))
        names.append(course.name(path))
    width, results = max(map(len, names), default=0), {}

    def line(i: int) -> str:
        return f"[{i + 1:2d}/{len(jobs)}] {names[i]:<{width}}  {tasks[i].profile or 'auto':<5}"

    alone = workers == 1
    for i, result in run_jobs(
        jobs, workers, lambda i: print(line(i), end="  ", flush=True) if alone else None
    ):
        results[i] = result
        print(
            f"{'' if alone else line(i) + '  '}{'FAILED' if result.error else 'ok    '}  {result.cost}",
            flush=True,
        )
        if result.error:
            print(f"  {result.error}\n  the executed copy is {_near(jobs[i].copy)}", flush=True)
    failed = sum(bool(result.error) for result in results.values())
    total = sum(result.seconds for result in results.values())
    print(f"{len(results) - failed} passed, {failed} failed ({total:.0f} s of notebooks)")
    return [results[i] for i in range(len(jobs))]


def _fresh(course, task: Task, folder: Path) -> Path:
    """The notebook as a build writes it, in a file of its own."""
    from labs_lib.build.notebooks import dumps, generate

    path = folder / "fresh" / f"{task.entry.stem}.{task.kind}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(generate(course, task.entry).notebooks[task.kind]), encoding="utf-8")
    return path


def _near(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _record(tasks: Sequence[Task], results: Sequence[Result], workers: int) -> None:
    """With LABS_RECORD=1: a record of what each notebook took, or where it failed, on the profile's device."""
    from labs_lib.lab.profiles import choose_profile
    from labs_lib.measure.records import Record, recording, save_record

    if not recording():
        return
    rows = [
        {
            "lab": task.entry.number,
            "notebook": task.kind,
            "profile": task.profile,
            "passed": not result.error,
            "seconds": round(result.seconds, 1),
            "peak_bytes": result.peak_bytes,
        }
        for task, result in zip(tasks, results, strict=True)
    ]
    device = "cuda" if choose_profile(tasks[0].profile).cuda else "cpu"
    note = f"Notebooks from the first cell to the last, {workers} at a time; memory of the host, not of the card."
    save_record(Record("lab_runs", rows, note=note), device=device)


# --- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labs", nargs="*", metavar="LAB", help="a number or name, as in 01; default: all")
    parser.add_argument(
        "-j", "--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default 1)"
    )
    parser.add_argument(
        "--profile", choices=NAMES, default="", help="default: smoke for students, cpu for solutions"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--student", action="store_true", help="student notebooks only")
    which.add_argument("--solution", action="store_true", help="solution notebooks only")
    parser.add_argument(
        "--strict", action="store_true", help="a check that is not OK fails; the solutions' default"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="the notebooks as the course ships them, without your work"
    )


def main(args: argparse.Namespace) -> int:
    from labs_lib.build.notebooks import this_course

    course = this_course()
    if args.jobs < 1:
        raise LabsError("-j takes the number of notebooks to run at a time: at least 1.")
    kinds = [STUDENT] if args.student else [SOLUTION] if args.solution else [STUDENT, SOLUTION]
    tasks = [
        Task(
            entry,
            kind,
            args.profile or ("smoke" if kind == STUDENT else "cpu"),
            args.strict or kind == SOLUTION,
            args.fresh,
        )
        for kind in kinds
        for entry in course.manifest.select(args.labs)
    ]
    folder = course.root / "build" / "executed"
    results = run_tasks(course, tasks, folder, args.jobs)
    _record(tasks, results, args.jobs)
    for task, result in zip(tasks, results, strict=True):
        if not result.error:
            (folder / f"{task.entry.stem}.{task.kind}.ipynb").unlink(missing_ok=True)
    if not any(result.error for result in results):
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any(result.error for result in results) else 0
