"""The data card `data/README.md`: every number, table and example in it is what the files and the code say."""

import re
from math import prod

import pytest

from labs_lib.paths import data
from labs_lib.world import tasks
from labs_lib.world.catalogue import COLLECTIONS, MODELS, NAME_PURPOSES
from labs_lib.world.grammar import DEFAULT_STYLE, DIMENSIONS
from labs_lib.world.tenants import load_tenants

CARD = (data() / "README.md").read_text(encoding="utf-8")


def table(first_header: str) -> list[list[str]]:
    """The rows of the card's table whose first column has this header, as lists of cells."""
    block = CARD[CARD.index(f"| {first_header} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("row", table("Task"), ids=lambda row: row[0])
def test_the_sizes_and_columns_are_those_of_the_files(row):
    name, files, *sizes, columns = row
    pattern = re.match(r"`(.+?)`", files).group(1).replace("<slug>", "*")
    paths = sorted(data().glob(pattern))
    if name == "style":
        assert len(paths) == len(load_tenants()) == int(re.search(r"(\d+) files", files).group(1))
    assert len(paths) >= 1
    for path in paths:
        rows = tasks.read_jsonl(str(path.relative_to(data())))
        if name == "knowledge":
            assert [number(sizes[0]), *sizes[1:]] == [len(rows), "same", "same"]
        else:
            counts = [sum(row["split"] == split for row in rows) for split in tasks.SPLITS]
            assert [number(size) for size in sizes] == counts, path.name
        stated = {column for column in columns.split(", ") if column}
        assert {column for row in rows for column in row} - {"split", "prompt", "completion"} == stated


def test_every_task_is_in_the_table():
    assert [row[0] for row in table("Task")] == [
        "style",
        "knowledge",
        "classification",
        "domain",
        "retention",
    ]
    files = {path.name for path in (data() / "tasks").glob("*.jsonl")}
    assert files == {f"{row[0]}.jsonl" for row in table("Task")} - {"style.jsonl"}


def test_the_grammar_s_table_is_the_grammar():
    rows = table("Dimension")
    assert [row[0] for row in rows] == list(DIMENSIONS)
    for dimension, values, _ in rows:
        assert values.replace("**", "").split(", ") == list(DIMENSIONS[dimension])
        assert re.findall(r"\*\*(\w+)\*\*", values) == [DEFAULT_STYLE[dimension]]


def test_the_numbers_in_the_text():
    facts, known = len(tasks.new_facts()), len(tasks.known_facts())
    for sentence in (
        f"the {len(load_tenants())} customers, written by hand",
        f"{len(DIMENSIONS)} dimensions, {prod(map(len, DIMENSIONS.values())):,} combinations",
        f"({len(COLLECTIONS)} × {len(MODELS)} = {len(COLLECTIONS) * len(MODELS):,} pairs)",
        f"exactly {tasks.BITS_PER_FACT} bits a fact, {facts * tasks.BITS_PER_FACT:,} bits in all",
        f"{known:,} facts (each in one split)",
        f"{NAME_PURPOSES['pretraining']:,} to pretraining, {NAME_PURPOSES['held_out']} held out, "
        f"{NAME_PURPOSES['known_facts']} to facts that the base models know, "
        f"{NAME_PURPOSES['new_facts']:,} to facts that they do not",
    ):
        assert sentence in " ".join(CARD.split())


def test_the_example_is_a_row_of_that_customer_s_test_split():
    example = re.search(r"```text\n(.+?)\n```", CARD, re.DOTALL).group(1)
    rows = tasks.read_jsonl("tenants/oakum-and-tar.jsonl")
    assert example in {row["prompt"] + row["completion"] for row in rows if row["split"] == "test"}


def test_every_place_that_the_card_names_exists():
    for pattern in ("tenants/*.yaml", "tenants/*.jsonl", "tasks/*.jsonl", "claims.yaml", "checksums.json"):
        assert f"`{pattern}`" in CARD
        assert list(data().glob(pattern)), pattern
    for module in re.findall(r"`(labs_lib/[\w/]+\.py)`", CARD):
        assert (data().parent / module).is_file(), module
