"""`check()`: is an exercise TODO, FAIL or OK? And the registry that the checks of each lab fill.

In a notebook:

    lora_delta = check(lora_delta)                       # a function or class: the check is found by its name
    adam_bytes = check(adam_bytes, "lab00.adam_bytes")   # a short answer: a value and the check's name

`check` prints the outcome, and on TODO or FAIL hands back the course's own version, so that every later cell still
runs. It never raises on a learner's mistake, unless LABS_STRICT=1.

In `labs_lib/lab/checks/labNN.py`, loaded when a name of that lab is asked for:

    @exercise("lora_delta", reference="labs_lib.methods.lora:lora_delta", hints=["...", "..."])
    def check_lora_delta(candidate, ref):                # returns if right, raises Diagnosis if wrong
        close(candidate(a, b), ref(a, b), "the update")

    @mutant("lora_delta", says="1/r")                    # a wrong answer, whose diagnosis must contain "1/r"
    def missing_rank(...): ...

    answer("lab00.adam_bytes", reference=lambda: 8 * n, unit="bytes", mistakes={4e9: "one state only"})
"""

import inspect
import json
import linecache
import math
import numbers
import os
import pkgutil
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from labs_lib.errors import LabsError
from labs_lib.measure import context

TODO, FAIL, OK = "TODO", "FAIL", "OK"
CHECKS = "labs_lib.lab.checks"
OUTCOMES = "LABS_OUTCOMES"  # names a file that gets a line of JSON for each outcome; `labs grade` sets it


class Diagnosis(AssertionError):  # noqa: N818 (a finding, not an error of the program)
    """A check's verdict on a wrong answer: one sentence, best a question that names the likely mistake."""


class CheckFailed(LabsError):  # noqa: N818
    """A check that is not OK under LABS_STRICT=1."""


@dataclass(frozen=True)
class Mutant:
    """A wrong answer, and a piece of the diagnosis that it must get."""

    says: str
    candidate: Any


@dataclass
class Exercise:
    """One registered exercise: how it is judged, what stands in for it, what helps, and what must fail."""

    name: str
    judge: Callable[[Any, Any], None]
    reference: Callable[[], Any]
    hints: Sequence[str]
    module: str
    is_answer: bool = False
    mutants: list[Mutant] = field(default_factory=list)

    @property
    def lab(self) -> str:
        """The number of the lab it belongs to, from its module's name."""
        found = re.search(r"lab(\d\d)$", self.module)
        return found[1] if found else ""

    @property
    def title(self) -> str:
        """The name as a notebook shows it: without the lab's prefix."""
        return self.name.partition(".")[2] or self.name


@dataclass(frozen=True)
class Outcome:
    """What judging one candidate gave: TODO, FAIL or OK, and the sentence that goes with it."""

    status: str
    message: str = ""


@dataclass
class Attempt:
    """Where a learner stands with one exercise, in this kernel."""

    status: str = TODO
    calls: int = 0
    fails: int = 0


_registry: dict[str, Exercise] = {}
_attempts: dict[str, Attempt] = {}


# --- what a notebook calls


def check(candidate: Any, name: str = "") -> Any:
    """Judge `candidate`, say how it stands, and return what later cells should use.

    Args:
        candidate: a function or class (its own name finds the check) or, with `name`, a value.
        name: the check's name, as in "lab00.adam_bytes".

    Returns:
        The candidate if it is right; otherwise the reference, announced.

    Raises:
        LabsError: there is no such check.
        CheckFailed: the outcome is TODO or FAIL, and LABS_STRICT=1.
    """
    exercise = find(name or getattr(candidate, "__name__", ""))
    outcome = judge(exercise, candidate)
    attempt = _attempts.setdefault(exercise.name, Attempt())
    attempt.status, attempt.calls = outcome.status, attempt.calls + 1
    if OUTCOMES in os.environ:
        row = {"name": exercise.name, "status": outcome.status, "message": outcome.message}
        with Path(os.environ[OUTCOMES]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if outcome.status == OK:
        print(f"OK    {exercise.title}")
        return candidate
    lines = [f"{outcome.status}  {exercise.title}: {outcome.message}"]
    if outcome.status == FAIL:
        attempt.fails += 1
        lines += _hint(exercise.hints, attempt.fails)
    if os.environ.get("LABS_STRICT") == "1":
        raise CheckFailed(" ".join(line.strip() for line in lines))
    what = "The course's answer" if exercise.is_answer else f"The course's own {exercise.title}"
    print("\n      ".join([*lines, f"{what} stands in for yours from here on, so that the cells below run."]))
    return exercise.reference()


def _hint(hints: Sequence[str], fails: int) -> list[str]:
    if not hints:
        return []
    i = min(fails, len(hints))
    return [f"Hint {i} of {len(hints)}: {hints[i - 1]}"]


def attempts() -> Mapping[str, Attempt]:
    """Every exercise checked in this kernel, by name."""
    return _attempts


# --- judging


def judge(exercise: Exercise, candidate: Any) -> Outcome:
    """The outcome of one candidate: no printing, no fallback, the random state left as it was."""
    if _is_empty(candidate):
        return Outcome(TODO, "no answer yet: fill it in, then run its cell and this one again.")
    reference = exercise.reference()
    try:
        with _fixed_randomness():
            exercise.judge(candidate, reference)
    except NotImplementedError as error:
        if str(error).startswith(TODO):
            return Outcome(
                TODO, f"{_what_is_left(error, exercise)}: write it, then run its cell and this one again."
            )
        return Outcome(FAIL, _crash(error, exercise, candidate))
    except Diagnosis as error:
        return Outcome(FAIL, str(error))
    except Exception as error:  # whatever a learner's code may do
        return Outcome(FAIL, _crash(error, exercise, candidate))
    return Outcome(OK)


def _is_empty(candidate: Any) -> bool:
    """None or ..., or a tuple or list that holds one: what a stub leaves."""
    if isinstance(candidate, tuple | list):
        return any(map(_is_empty, candidate))
    return candidate is None or candidate is ...


def _what_is_left(error: NotImplementedError, exercise: Exercise) -> str:
    left = str(error).removeprefix(TODO).strip(": ")
    return "not written yet" if left in ("", exercise.title) else f"{left} is not written yet"


def _crash(error: Exception, exercise: Exercise, candidate: Any) -> str:
    """The exception in one line and, if the learner's own code is on the way to it, the line it came from."""
    said = traceback.format_exception_only(error)[-1].strip()
    own = _code_files(candidate)
    steps = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for code, number in reversed(steps):
        if code.co_filename in own and code is not exercise.judge.__code__:
            text = linecache.getline(code.co_filename, number).strip()
            return f"{said} (line {number} of your code: `{text}`)"
    return f"the check could not use what it gave: {said}"


def _code_files(candidate: Any) -> set[str]:
    """The files (in a notebook: the cells) that hold the code of a function or of a class's methods."""
    members = [candidate, *vars(candidate).values()] if inspect.isclass(candidate) else [candidate]
    members = [m.fget if isinstance(m, property) else getattr(m, "__func__", m) for m in members]
    codes = [getattr(inspect.unwrap(m), "__code__", None) for m in members if callable(m)]
    return {code.co_filename for code in codes if code}


@contextmanager
def _fixed_randomness() -> Iterator[None]:
    """Checks draw the same numbers each time, and the cells below draw what they would have drawn without the check."""
    python, torch, numpy = random.getstate(), sys.modules.get("torch"), sys.modules.get("numpy")
    states = (numpy and numpy.random.get_state(), torch and torch.get_rng_state())
    random.seed(0)
    if numpy:
        numpy.random.seed(0)
    if torch:
        torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(states[0])
        if torch:
            torch.set_rng_state(states[1])


# --- what a check is written with


def exercise(
    name: str, *, reference: str | Callable[[], Any], hints: Sequence[str] = ()
) -> Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]:
    """Register the decorated `check(candidate, ref)` under `name`, the name of the function or class it is about.

    Args:
        name: unique in the course.
        reference: "module:attribute", imported when first needed, or a function of no arguments that makes it.
        hints: shown one by one, the next at each failing call.
    """
    make = _importer(reference) if isinstance(reference, str) else reference

    def register(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        _register(Exercise(name, function, make, tuple(hints), function.__module__))
        return function

    return register


def mutant(name: str, says: str) -> Callable[[Any], Any]:
    """List the decorated function or class as a wrong answer to `name`; its diagnosis must contain `says`."""

    def register(candidate: Any) -> Any:
        if name not in _registry:
            raise LabsError(f"@mutant({name!r}) must come after the exercise of that name.")
        _registry[name].mutants.append(Mutant(says, candidate))
        return candidate

    return register


def answer(
    name: str,
    *,
    reference: Any,
    unit: str = "",
    tolerance: float = 0.01,
    within: tuple[float, float] | None = None,
    mistakes: Mapping[Any, str] | None = None,
    hints: Sequence[str] = (),
) -> None:
    """Register a short answer: a number, a word, or a list of them.

    Args:
        name: "labNN.what", unique in the course.
        reference: the value, or a function of no arguments that computes it.
        unit: of the number, for messages.
        tolerance: relative; 0.01 accepts a value rounded to two or three digits. 0 demands equality.
        within: for a prediction, which has no right answer: any number between the two is OK, and the reference only
            stands in for an empty one.
        mistakes: wrong value -> diagnosis. Each is a mutant, too.
        hints: shown one by one, the next at each failing call.
    """
    mistakes = dict(mistakes or {})

    def function(candidate: Any, ref: Any) -> None:
        if within is not None:
            _in_range(candidate, within, unit)
            return
        if _same(candidate, ref, tolerance):
            return
        for value, says in mistakes.items():
            if _same(candidate, value, tolerance):
                raise Diagnosis(f"{_show(candidate, unit)}: {says}")
        raise Diagnosis(_how_far(candidate, ref, unit))

    make = reference if callable(reference) else lambda: reference
    entry = Exercise(name, function, make, tuple(hints), _caller_module(), is_answer=True)
    entry.mutants += [Mutant(says, value) for value, says in mistakes.items()]
    if within is not None:
        entry.mutants += [Mutant("cannot be", value) for value in (within[0] - 1, within[1] + 1)]
    _register(entry)


def expect(condition: Any, diagnosis: str) -> None:
    """Raise Diagnosis(diagnosis) unless the condition holds."""
    if not condition:
        raise Diagnosis(diagnosis)


def close(got: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """Raise Diagnosis unless two numbers or tensors agree in shape and within `tolerance` (absolute and relative)."""
    import torch

    expect(got is not None, f"{what} is None: is a `return` missing?")
    try:
        got = torch.as_tensor(got)
    except (TypeError, ValueError, RuntimeError):
        raise Diagnosis(f"{what} should be a tensor or a number, got {type(got).__name__}") from None
    expected = torch.as_tensor(expected)
    shapes = tuple(got.shape), tuple(expected.shape)
    expect(shapes[0] == shapes[1], f"{what} has shape {shapes[0]}, expected {shapes[1]}")
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    expect(not (got.isnan() & ~expected.isnan()).any(), f"{what} contains nan")
    if torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        return
    worst = int((got - expected).abs().argmax())
    observed, wanted = got.flatten()[worst].item(), expected.flatten()[worst].item()
    raise Diagnosis(f"{what} is off: observed {observed:.4g} where {wanted:.4g} is expected")


# --- comparing short answers


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12 if tolerance else 0.0)
    if isinstance(a, str) and isinstance(b, str):
        return a.strip().casefold() == b.strip().casefold()
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _show(value: Any, unit: str) -> str:
    said = f"{value:.6g}" if isinstance(value, float) else f"{value!r}"
    return f"{said} {unit}".strip()


def _how_far(got: Any, expected: Any, unit: str) -> str:
    """Observed against expected, without giving the answer away."""
    if _is_number(expected):
        if not _is_number(got):
            return f"a number is asked for, got {got!r}"
        if got and expected and got / expected > 0:
            power = round(math.log10(got / expected))
            if power and math.isclose(got, expected * 10.0**power, rel_tol=0.05):
                size = "large" if power > 0 else "small"
                return f"{_show(got, unit)} is {10 ** abs(power):,} times too {size}: check the units"
        return f"{_show(got, unit)} is too {'large' if got > expected else 'small'}"
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple) and len(got) != len(expected):
        return f"{len(expected)} values are asked for, got {len(got)}"
    return f"{got!r} is not it"


def _in_range(got: Any, within: tuple[float, float], unit: str) -> None:
    low, high = within
    expect(_is_number(got), f"a number is asked for, got {got!r}")
    expect(low <= got <= high, f"{_show(got, unit)} cannot be: it lies between {low:g} and {high:g}")


# --- the registry


def find(name: str) -> Exercise:
    """The exercise called `name`; loads the checks of its lab, or of the current one, or of all, until it turns up."""
    prefix = re.match(r"lab(\d\d)\.", name)
    for lab in dict.fromkeys([prefix[1] if prefix else "", context.current().lab, *labs_with_checks()]):
        if name in _registry:
            break
        load_checks(lab)
    if name not in _registry:
        close_by = get_close_matches(name, _registry, n=3)
        raise LabsError(
            f"There is no check called {name!r}"
            + (
                f": did you mean {' or '.join(close_by)}?"
                if close_by
                else "; pass its name: check(value, 'labNN.name')."
            )
        )
    return _registry[name]


def load_checks(lab: str) -> list[Exercise]:
    """Register the checks of one lab ("01"), if it has any; returns its exercises in their order in the file."""
    if lab in labs_with_checks():
        import_module(f"{CHECKS}.lab{lab}")
    return [entry for entry in _registry.values() if lab and entry.lab == lab]


def labs_with_checks() -> list[str]:
    """Numbers of the labs that have a module of checks."""
    package = import_module(CHECKS)
    return sorted(
        m.name.removeprefix("lab") for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("lab")
    )


def _register(entry: Exercise) -> None:
    old = _registry.get(entry.name)
    if old and old.module != entry.module:
        raise LabsError(
            f"Two checks are called {entry.name!r}, in {old.module} and {entry.module}: rename one."
        )
    _registry[entry.name] = entry


def _importer(path: str) -> Callable[[], Any]:
    module, _, attribute = path.partition(":")
    return lambda: getattr(import_module(module), attribute)


def _caller_module() -> str:
    return sys._getframe(2).f_globals["__name__"]
