"""The tasks as shipped: splits that share nothing, rows that are true, files that rebuild bit for bit."""

import json
import random
import re
import shutil
from argparse import ArgumentParser
from collections import Counter
from itertools import combinations

import pytest

from labs_lib.errors import LabsError
from labs_lib.paths import data
from labs_lib.world import build, tasks
from labs_lib.world.catalogue import COLOURS, PEOPLE, TOWNS, Product, names
from labs_lib.world.grammar import DEFAULT_STYLE, render
from labs_lib.world.scorers import score_style
from labs_lib.world.tasks import SPLITS, STYLE_ROWS, load_task, read_jsonl
from labs_lib.world.tenants import load_tenants

TENANTS = load_tenants()
PAIRS_OF_SPLITS = list(combinations(SPLITS, 2))


@pytest.fixture(scope="module")
def rows():
    """task -> split -> its rows, as shipped; the style rows are those of the first tenant."""
    files = {name: f"tasks/{name}.jsonl" for name in ("classification", "domain", "retention")}
    files["style"] = f"tenants/{TENANTS[0].slug}.jsonl"
    return {
        name: {split: [row for row in read_jsonl(path) if row["split"] == split] for split in SPLITS}
        for name, path in files.items()
    }


# ------------------------------------------------------------------------------------------------------------- style


@pytest.mark.parametrize("tenant", TENANTS[::5], ids=lambda tenant: tenant.slug)
def test_a_tenant_has_perfect_copy_about_names_of_the_right_purpose(tenant):
    split_names = {split: [] for split in SPLITS}
    texts, items = [], []
    for row in tasks.style_rows(tenant):
        product = Product.from_dict(row["product"])
        split_names[row["split"]].append(product.name)
        assert row["prompt"] == f"Facts: {product.facts()}\nCopy:\n"
        texts.append(row["completion"])
        items.append(product)
    score = score_style(texts, items, tenant)
    assert (score.compliance, score.fidelity, score.leakage, score.exact) == (1, 1, 0, 1)
    assert {split: len(set(found)) for split, found in split_names.items()} == STYLE_ROWS
    assert set(split_names["train"]) <= set(names("pretraining"))
    held_out = split_names["validation"] + split_names["test"]
    assert len(set(held_out)) == len(held_out)
    assert set(held_out) <= set(names("held_out"))


def test_tenants_do_not_write_about_the_same_products():
    prompts = [row["prompt"] for tenant in TENANTS for row in read_jsonl(f"tenants/{tenant.slug}.jsonl")]
    assert len(prompts) == len(set(prompts)) == 50 * sum(STYLE_ROWS.values())


# --------------------------------------------------------------------------------------------------------- knowledge


@pytest.mark.parametrize(
    ("facts", "purpose"), [(tasks.known_facts(), "known_facts"), (tasks.new_facts(), "new_facts")]
)
def test_each_fact_is_asked_once_and_answered_by_one_of_64(facts, purpose):
    assert len(facts) == 4 * len(names(purpose))
    assert len({fact["prompt"] for fact in facts}) == len(facts)
    assert {fact["name"] for fact in facts} == set(names(purpose))
    for fact in facts:
        question, answers = tasks.RELATIONS[fact["relation"]]
        assert fact["prompt"] == f"{question} {fact['name']}?\nAnswer:"
        assert fact["completion"].removeprefix(" ") in answers
        assert len(answers) == 2**tasks.BITS_PER_FACT


def test_answers_are_uniform_and_independent_of_each_other():
    """Six bits per fact hold only if no answer is likelier than another, nor given away by another relation's."""
    answer = {(f["relation"], f["name"]): f["completion"].strip() for f in tasks.new_facts()}
    for relation, (_, values) in tasks.RELATIONS.items():
        counts = Counter(answer[relation, name] for name in names("new_facts"))
        chi_square = sum((counts[value] - 16) ** 2 / 16 for value in values)
        assert chi_square < 63 + 5 * (2 * 63) ** 0.5, relation
    for one, other in (("supplier", "depot"), ("buyer", "tester")):
        agree = sum(answer[one, name] == answer[other, name] for name in names("new_facts"))
        assert agree < 16 + 5 * 4, (one, other)  # 1,024 names, one in 64 by chance


def test_new_facts_are_about_no_name_of_pretraining():
    new = {fact["name"] for fact in tasks.new_facts()}
    assert not new & {*names("pretraining"), *names("known_facts"), *names("held_out")}


def test_the_knowledge_task_grows_and_its_splits_are_the_same_facts():
    small, large = load_task("knowledge", facts=256), load_task("knowledge", facts=4096)
    assert small["train"][:] == large["train"][:256]
    assert len(large["train"]) == max(tasks.KNOWLEDGE_SIZES) == 4096
    for split in SPLITS:
        assert small[split][:] == small["train"][:]
    sizes = [facts * tasks.BITS_PER_FACT for facts in tasks.KNOWLEDGE_SIZES]
    assert sizes[0] < 2_000 and sizes[-1] > 10_000  # bits: 1 to 10+ kbit


# ---------------------------------------------------------------------------------------------------- classification


def _verdict(review: str) -> str:
    """The verdict by the rule that the data card states, written again from scratch."""
    text = review.split(", ", 1)[1].split(" but ")[-1]
    votes = []
    for clause in text.split(" and "):
        adjective = clause.split()[-1]
        assert (adjective in tasks._PRAISE) != (adjective in tasks._BLAME)
        votes.append((adjective in tasks._PRAISE) != (" not " in clause))
    assert len(set(votes)) == 1
    return "good" if votes[0] else "bad"


def test_every_review_has_the_verdict_it_deserves(rows):
    for split in SPLITS:
        for row in rows["classification"][split]:
            review = re.fullmatch(r"Review: (.+)\nVerdict:", row["prompt"]).group(1)
            assert row["completion"].strip() == _verdict(review)
            plain = " but " not in review and " not " not in review
            assert (row["kind"] == "plain") == plain
            assert (row["kind"] == "but") == (" but " in review)


def test_verdicts_are_balanced_and_kinds_as_stated(rows):
    test = rows["classification"]["test"]
    assert 0.43 < sum(row["completion"] == " good" for row in test) / len(test) < 0.57
    shares = {kind: count / len(test) for kind, count in Counter(row["kind"] for row in test).items()}
    assert shares == pytest.approx({"plain": 0.4, "but": 0.4, "not": 0.2}, abs=0.07)


def test_counting_good_words_does_not_solve_it(rows):
    """The task must need more than what pretraining taught: the first clause, or the bare adjective, misleads."""
    test = [row for row in rows["classification"]["test"] if row["kind"] != "plain"]
    first = [row["prompt"].split(" is ")[1].removeprefix("not ").split()[0] for row in test]
    naive = ["good" if re.sub(r"\W", "", word) in tasks._PRAISE else "bad" for word in first]
    assert not any(guess == row["completion"].strip() for guess, row in zip(naive, test, strict=True))


# ------------------------------------------------------------------------------------------------------------ domain


def test_waybills_are_consistent(rows):
    pattern = (
        r"Waybill \d{4}\nload (\d) crates, (\d) \w+ \w+ each, total (\d+)\nroute (\w+) to (\w+) by (\w+)\n"
        r"leave day (\d+), arrive day (\d+)\n(?:keep (\w+)|seal (\w+)), clerk (\w+)"
    )
    carriers = {}
    for row in (row for split in SPLITS for row in rows["domain"][split]):
        note = re.fullmatch(pattern, row["completion"])
        assert note, row["completion"]
        crates, count, total, start, end, carrier, leave, arrive, _, seal, clerk = note.groups()
        assert row["prompt"] == ""
        assert int(crates) * int(count) == int(total)
        assert int(arrive) - int(leave) == 2
        assert start != end and clerk in PEOPLE and (seal is None or seal in COLOURS)
        region = TOWNS.index(start) // 8, TOWNS.index(end) // 8
        assert (
            carriers.setdefault(region, carrier) == carrier
        )  # the carrier follows from the two towns' regions
    assert len(carriers) == 64
    assert len(set(carriers.values())) == 8


# --------------------------------------------------------------------------------------------------------- retention


def test_retention_asks_what_the_base_was_taught(rows):
    known = {fact["prompt"]: fact["completion"] for fact in tasks.known_facts()}
    for row in (row for split in SPLITS for row in rows["retention"][split]):
        if row["kind"] == "fact":
            assert known[row["prompt"]] == row["completion"]
        elif row["kind"] == "review":
            assert row["completion"].strip() == _verdict(row["prompt"].removesuffix("\nVerdict:"))
        else:
            assert row["completion"] == render(Product.from_dict(row["product"]), row["style"])
            assert (row["prompt"].startswith("Guide: ")) == (row["kind"] == "guided")
            assert row["kind"] == "guided" or row["style"] == DEFAULT_STYLE


def test_retention_holds_every_known_fact_once(rows):
    asked = [r["prompt"] for split in SPLITS for r in rows["retention"][split] if r["kind"] == "fact"]
    assert sorted(asked) == sorted(fact["prompt"] for fact in tasks.known_facts())


# ------------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("task", ["style", "classification", "domain", "retention"])
@pytest.mark.parametrize(("one", "other"), PAIRS_OF_SPLITS)
def test_no_row_and_no_product_name_is_in_two_splits(rows, task, one, other):
    def keys(split):
        items = rows[task][split]
        return {(r["prompt"], r["completion"]) for r in items}, {
            r["product"]["name"] for r in items if "product" in r
        }

    for ours, theirs in zip(keys(one), keys(other), strict=True):
        assert not ours & theirs


@pytest.mark.parametrize("task", ["classification", "domain"])
def test_no_row_is_there_twice(rows, task):
    everything = [(r["prompt"], r["completion"]) for split in SPLITS for r in rows[task][split]]
    assert len(set(everything)) == len(everything)


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ({"name": "style", "tenant": TENANTS[0].slug}, ["prompt", "completion", "product"]),
        ({"name": "knowledge", "facts": 8}, ["prompt", "completion", "name", "relation"]),
        ({"name": "classification"}, ["prompt", "completion", "kind"]),
        ({"name": "domain"}, ["prompt", "completion"]),
        ({"name": "retention"}, ["prompt", "completion", "kind", "product", "style"]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_task_loads_as_three_splits_with_its_columns(task, columns):
    loaded = load_task(**task)
    assert list(loaded) == list(SPLITS)
    for split in SPLITS:
        assert set(loaded[split].column_names) == set(columns)


def test_loaded_rows_are_the_shipped_rows(rows):
    loaded = load_task("retention")["test"]
    for row, shipped in zip(loaded, rows["retention"]["test"], strict=True):
        assert {k: v for k, v in row.items() if v is not None} == {
            k: v for k, v in shipped.items() if k != "split"
        }


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "poetry"}, "No task 'poetry': style, knowledge, classification, domain or retention"),
        ({"name": "style"}, r'The style task is per tenant: load_task\("style", tenant="..."\)'),
        ({"name": "style", "tenant": "acme"}, "No tenant 'acme': one of aldermoor-tea"),
        ({"name": "knowledge", "facts": 0}, "The knowledge task holds 1 to 4096 facts, not 0"),
        ({"name": "knowledge", "facts": 5000}, "The knowledge task holds 1 to 4096 facts, not 5000"),
    ],
)
def test_a_task_that_does_not_exist_is_one_clear_sentence(task, message):
    with pytest.raises(LabsError, match=f"^{message}"):
        load_task(**task)


# ---------------------------------------------------------------------------------------------- rebuilding, checksums


def test_generated_files_are_rebuilt_bit_for_bit():
    """What the generators make today is what is shipped, byte for byte."""
    random.seed(0)  # the global generator plays no part
    for relative, make in build.generated_files().items():
        assert (data() / relative).read_bytes() == make(), f"data/{relative}: run `labs data build`"


def test_every_generated_file_and_guide_has_a_checksum():
    sums = json.loads((data() / build.CHECKSUMS).read_text(encoding="utf-8"))
    guides = {f"tenants/{tenant.slug}.yaml" for tenant in TENANTS}
    assert {*build.generated_files(), *guides} <= set(sums)
    build.verify(*build.generated_files(), *guides)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A course folder with two tenants and freshly built data, to be damaged."""
    folder = tmp_path / "data" / "tenants"
    folder.mkdir(parents=True)
    for tenant in TENANTS[:2]:
        shutil.copy(data() / "tenants" / f"{tenant.slug}.yaml", folder)
    monkeypatch.setenv("LABS_HOME", str(tmp_path))
    load_tenants.cache_clear()
    build._checksums.cache_clear()
    yield tmp_path / "data"
    load_tenants.cache_clear()
    build._checksums.cache_clear()


def run(action: str) -> int:
    parser = ArgumentParser()
    build.add_arguments(parser)
    return build.main(parser.parse_args([action]))


def test_build_then_check_then_build_again(home, capsys):
    assert run("build") == 0
    assert "6 files generated, 6 changed." in capsys.readouterr().out
    first = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert run("check") == 0
    assert run("build") == 0
    assert "6 files generated, 0 changed." in capsys.readouterr().out
    assert first == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_check_names_what_was_damaged_and_build_repairs_it(home, capsys):
    run("build")
    domain, guide = home / "tasks" / "domain.jsonl", home / "tenants" / f"{TENANTS[0].slug}.yaml"
    good = domain.read_bytes()
    domain.write_bytes(good.replace(b"crates", b"crabs", 1))
    guide.write_text(guide.read_text(encoding="utf-8") + "# a note\n", encoding="utf-8")
    capsys.readouterr()
    assert run("check") == 1
    said = capsys.readouterr().out
    assert "data/tasks/domain.jsonl" in said and f"data/tenants/{TENANTS[0].slug}.yaml" in said
    assert "2 files differ" in said
    assert run("build") == 0
    assert run("check") == 0
    assert domain.read_bytes() == good


def test_check_notices_a_style_guide_that_went_missing(home, capsys):
    run("build")
    (home / "tenants" / f"{TENANTS[1].slug}.yaml").unlink()
    load_tenants.cache_clear()
    assert run("check") == 1
    assert f"data/tenants/{TENANTS[1].slug}.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not the file that was shipped"),
        (lambda path: path.write_bytes(b""), "is not the file that was shipped"),
        (lambda path: path.unlink(), "is missing: restore it with `git checkout data/tasks/classification"),
    ],
    ids=["truncated", "empty", "missing"],
)
def test_a_damaged_file_is_one_clear_sentence(home, damage, message):
    build.build()
    load_task("classification")
    damage(home / "tasks" / "classification.jsonl")
    with pytest.raises(LabsError, match=f"^data/tasks/classification.jsonl {message}") as caught:
        load_task("classification")
    assert "\n" not in str(caught.value)
    load_task("domain")  # the others still load


def test_missing_checksums_are_one_clear_sentence(home):
    build.build()
    (home / build.CHECKSUMS).unlink()
    build._checksums.cache_clear()
    with pytest.raises(LabsError, match=r"^data/checksums.json is missing: restore it with `git checkout"):
        load_task("domain")
