"""The manifest: order, titles, times and address of the course, and the cells and tables made from them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs_lib.errors import LabsError

MANIFEST = Path(__file__).with_name("manifest.yaml")
MACHINES = {"cpu": "2 CPU cores", "t4": "T4", "h100": "H100"}
YOUR_TIME = f"Your time in minutes, estimated: {' / '.join(MACHINES.values())}"
CLONE = "peft-labs"  # the folder that a notebook clones into


@dataclass(frozen=True)
class Entry:
    """One lab, as the manifest has it."""

    number: str
    slug: str
    title: str
    question: str
    outcomes: Sequence[str]
    prerequisites: Sequence[str]
    minutes: Mapping[str, int]
    sections: Sequence[str]

    @property
    def stem(self) -> str:
        """The name of its files: `01_lora`."""
        return f"{self.number}_{self.slug}"

    @property
    def heading(self) -> str:
        return f"Lab {self.number}: {self.title}"

    @property
    def times(self) -> str:
        """Minutes per machine of MACHINES, in its order: "45 / 35 / 30"."""
        return " / ".join(str(self.minutes.get(machine, "?")) for machine in MACHINES)


@dataclass(frozen=True)
class Manifest:
    """All labs in order, and where the course can be fetched from ("" = nowhere yet)."""

    labs: Sequence[Entry]
    repository: str = ""
    release: str = ""

    def select(self, names: Sequence[str]) -> list[Entry]:
        """The labs called by number ("01", "1"), slug or file name, in order; all if none is named."""
        chosen = [self._called(name) for name in names]
        return [entry for entry in self.labs if entry in chosen] if names else list(self.labs)

    def _called(self, name: str) -> Entry:
        stem = Path(name).stem
        for entry in self.labs:
            if stem in (entry.stem, entry.slug) or (stem.isdigit() and stem.zfill(2) == entry.number):
                return entry
        raise LabsError(f"There is no lab {name!r}: the labs are {', '.join(e.stem for e in self.labs)}.")

    # --- cells

    def header(self, entry: Entry) -> str:
        """The first cell: title, question, what it teaches, what it takes."""
        badge = self._badge(entry)
        outcomes = "\n".join(f"- {outcome}" for outcome in entry.outcomes)
        facts = {
            "Before this": ", ".join(self._prerequisite(p) for p in entry.prerequisites) or "nothing",
            YOUR_TIME: entry.times,
            "In the chapter": _sections(entry.sections),
        }
        return (
            f"# {entry.heading}\n\n"
            + (badge + "\n\n" if badge else "")
            + f"**{entry.question}**\n\nAfter this lab you can\n\n{outcomes}\n\n"
            + f"| {' | '.join(facts)} |\n|{' :-- |' * len(facts)}\n| {' | '.join(facts.values())} |"
        )

    def footer(self, entry: Entry) -> str:
        """The last cell: the way on and the way back."""
        i = self.labs.index(entry)
        links = ["[All labs](README.md)"]
        if i > 0:
            links.insert(0, f"Previous: {_link(self.labs[i - 1])}")
        if i + 1 < len(self.labs):
            links.append(f"Next: {_link(self.labs[i + 1])}")
        return "---\n" + " | ".join(links)

    def bootstrap(self) -> str:
        """The lines before a notebook's `setup`: fetch the course where it is missing, and leave torch as it is."""
        missing = 'if importlib.util.find_spec("labs_lib") is None:'
        if not self.repository:
            return (
                f"import importlib.util\n\n{missing}\n"
                '    raise ModuleNotFoundError("labs_lib is not installed in this kernel: open this notebook with "\n'
                '                              "`make lab` in a clone of the course, or `pip install -e .` there.")\n'
            )
        command = ["git", "-c", "advice.detachedHead=false", "clone", "-q", "--depth", "1"]
        command += ["--branch", self.release] if self.release else []
        command += ["--", self.repository, CLONE]
        install = f"{CLONE}/labs_lib/lab/install.py"
        return (
            "import importlib.util, pathlib, subprocess, sys\n\n"
            f"{missing}  # Colab, say: fetch the course; torch stays as it is\n"
            f'    if not pathlib.Path("{install}").is_file():\n'
            f"        subprocess.run({command!r}, check=True)\n"
            f'    subprocess.run([sys.executable, "{install}"], check=True)\n'
            f'    sys.path.insert(0, "{CLONE}")\n'
        )

    def _badge(self, entry: Entry) -> str:
        path = self.repository.partition("github.com/")[2].removesuffix(".git").strip("/")
        if not path:  # Colab opens notebooks from GitHub only
            return ""
        colab = "https://colab.research.google.com"
        url = f"{colab}/github/{path}/blob/{self.release or 'main'}/notebooks/{entry.stem}.ipynb"
        return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({url})"

    def _prerequisite(self, name: str) -> str:
        entry = next((entry for entry in self.labs if entry.number == name), None)
        return _link(entry) if entry else name

    # --- index

    def link(self, number: str, folder: str = "") -> str:
        """A short Markdown link to a lab by its number; the bare number if there is no such lab."""
        entry = next((entry for entry in self.labs if entry.number == number), None)
        return f"[{number}]({folder}{entry.stem}.ipynb)" if entry else number

    def index(self, folder: str = "notebooks/") -> str:
        """The table of all labs; `folder` leads from the page to the notebooks."""
        head = f"| Lab | Question | {YOUR_TIME} |\n| :-- | :-- | :-- |\n"
        return head + "\n".join(
            f"| [{entry.number} {entry.title}]({folder}{entry.stem}.ipynb) | {entry.question} | {entry.times} |"
            for entry in self.labs
        )

    def notebooks_page(self) -> str:
        """The whole of notebooks/README.md."""
        return (
            "# The labs\n\n"
            "Open them with `make lab`, in this order. Generated by `labs build`: edits belong in `solutions/*.py`.\n\n"
            f"{self.index(folder='')}\n"
        )


def load_manifest(path: Path = MANIFEST) -> Manifest:
    """Read a manifest; the environment's LABS_REPOSITORY and LABS_RELEASE override its address.

    Raises:
        LabsError: a key is missing or unknown, or two labs share a number or slug.
    """
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    labs = [_entry(given, path.name) for given in content.get("labs", [])]
    for attribute in ("number", "slug"):
        values = [getattr(entry, attribute) for entry in labs]
        for value in values:
            if values.count(value) > 1:
                raise LabsError(f"{path.name}: two labs have the {attribute} {value!r}.")
    return Manifest(
        labs,
        os.environ.get("LABS_REPOSITORY", content.get("repository") or ""),
        os.environ.get("LABS_RELEASE", content.get("release") or ""),
    )


def _entry(given: Mapping[str, Any], name: str) -> Entry:
    fields = Entry.__dataclass_fields__.keys()
    if given.keys() != fields:
        odd = sorted(given.keys() ^ fields)
        raise LabsError(f"{name}, lab {given.get('number', '?')}: missing or unknown key {odd[0]!r}.")
    if not isinstance(given["number"], str):
        raise LabsError(f'{name}: write the number {given["number"]} in quotes, as in "01".')
    return Entry(**given)


def _link(entry: Entry) -> str:
    return f"[{entry.number} {entry.title}]({entry.stem}.ipynb)"


def _sections(sections: Sequence[str]) -> str:
    numbers = [s for s in sections if s[:1].isdigit()]
    named = [s for s in sections if s not in numbers]
    plural = "sections" if len(numbers) > 1 else "section"
    return ", ".join(named + ([f"{plural} {', '.join(numbers)}"] if numbers else []))
