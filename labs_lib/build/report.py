"""`labs course`: runs all labs in order and writes the executed notebooks as pages to browse, in build/report/."""

import argparse
import html
import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from labs_lib.build.notebooks import Course, clean_outputs, read_notebook, this_course
from labs_lib.build.run import Result, Task, run_tasks
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.lab.profiles import NAMES

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .5rem .8rem; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.failed { color: #b3261e; } pre { white-space: pre-wrap; }
"""


def page(notebook: Path, target: Path, title: str) -> None:
    """One executed notebook as an HTML page; folded cells stay out, figures carry their alt text."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    content = read_notebook(notebook)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(output) for output in with_alt(clean_outputs(cell.outputs))]
        else:  # a link to another lab leads to its page
            cell.source = cell.source.replace(".ipynb)", ".html)").replace("(README.md)", "(index.html)")
    content.metadata["title"] = title
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}}})
    body, _ = HTMLExporter(config=config, template_name="lab").from_notebook_node(content)
    target.write_text(body, encoding="utf-8")


def with_alt(outputs: list[dict]) -> Iterator[dict]:
    """nbconvert shows no alt text of a PNG: put the image in as the HTML it would have made, with its alt text.

    The line for screen readers that `show` puts after a figure would then be read twice, and is left out.
    """
    alt = ""
    for output in outputs:
        data, about = output.get("data", {}), output.get("metadata", {}).get("image/png", {})
        if alt and data.get("text/html", "").endswith(f"Figure: {alt}</div>"):
            continue
        alt = html.escape(about.get("alt", ""))
        if "text/markdown" in data:  # a link to another lab leads to its page
            output = {
                **output,
                "data": {**data, "text/markdown": data["text/markdown"].replace(".ipynb)", ".html)")},
            }
        if "image/png" in data and alt:
            width = f' width="{about["width"]}"' if about.get("width") else ""
            image = f'<img alt="{alt}"{width} src="data:image/png;base64,{data["image/png"].strip()}">'
            output = {**output, "data": {"text/html": image, "text/plain": about["alt"]}, "metadata": {}}
        yield output


def index(tasks: Sequence[Task], results: Sequence[Result]) -> str:
    """The report's first page: each lab with how it ended, its time and its memory."""
    failed = sum(bool(result.error) for result in results)
    minutes = sum(result.seconds for result in results) / 60
    summary = f"{len(results) - failed} labs ran, {failed} failed, {minutes:.0f} minutes"
    rows = "".join(_row(task, result) for task, result in zip(tasks, results, strict=True))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>PEFT Labs: report</title>'
        f"<style>{STYLE}</style><h1>PEFT Labs: report</h1>"
        f"<p>{datetime.now():%Y-%m-%d %H:%M}, profile {tasks[0].profile or 'auto'}: {summary}.</p>"
        "<table><thead><tr><th>Lab</th><th>Run</th><th>Time</th><th>Peak memory</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></html>\n"
    )


def _row(task: Task, result: Result) -> str:
    question = html.escape(task.entry.question)
    note = f"<pre>{html.escape(result.error)}</pre>" if result.error else question
    status = '<span class="failed">failed</span>' if result.error else "ok"
    numbers = (f"{result.seconds:.0f} s", f"{result.peak_bytes / 2**30:.1f} GiB")
    return (
        f'<tr><td><a href="{task.entry.stem}.html">{html.escape(task.entry.heading)}</a><br>{note}</td>'
        f"<td>{status}</td>" + "".join(f'<td class="number">{number}</td>' for number in numbers) + "</tr>"
    )


def course(given: Course, profile: str = "", kind: str = SOLUTION, workers: int = 1) -> int:
    """Run every lab of a course and write its report; returns the number of labs that failed."""
    folder = given.root / "build" / "report"
    shutil.rmtree(folder, ignore_errors=True)
    tasks = [Task(entry, kind, profile, strict=kind == SOLUTION) for entry in given.manifest.labs]
    results = run_tasks(given, tasks, folder / "notebooks", workers)
    for task in tasks:
        executed = folder / "notebooks" / f"{task.entry.stem}.{kind}.ipynb"
        if executed.is_file():
            page(executed, folder / f"{task.entry.stem}.html", task.entry.heading)
    (folder / "index.html").write_text(index(tasks, results), encoding="utf-8")
    print(f"The report: {given.name(folder)}/index.html")
    return sum(bool(result.error) for result in results)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-j", "--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default 1)"
    )
    parser.add_argument("--profile", choices=NAMES, default="", help="default: what fits this machine")
    parser.add_argument("--student", action="store_true", help="your notebooks instead of the solutions")


def main(args: argparse.Namespace) -> int:
    return 1 if course(this_course(), args.profile, STUDENT if args.student else SOLUTION, args.jobs) else 0
