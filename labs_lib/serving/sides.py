"""What many adapters cost, side by side: this engine's records by device, what others have published, the chapter."""

from collections.abc import Iterable

from labs_lib.measure.records import Record, load_published, load_records
from labs_lib.measure.sides import Sides, interval

THROUGHPUT = "tokens/s with many adapters, base alone = 1"
ADDED = "ms per token that adapters add"
COMMAND = "labs bench serving --model llama-2-7b --device cuda"


def headline(rows: Iterable[dict]) -> dict[str, dict]:
    """The rows of a `bench_serving` record that answer the two questions: by quantity, where they were measured.

    The fleet's or else the throughput section's row of most adapters up to 100; the step of the batch nearest to 32
    rows, each with its own adapter.
    """
    rows = [row for row in rows if row.get("arm", "").startswith("engine") and "missing" not in row]
    found: dict[str, dict] = {}
    many = [row for row in rows if row["section"] in ("fleet", "throughput") and row["adapters"] <= 100]
    if many:
        # S-LoRA's figures are of rank 8; of two patterns the uniform one is the harder
        row = max(many, key=lambda row: (row["adapters"], row.get("rank") == 8, row.get("pattern") != "zipf"))
        found[THROUGHPUT] = row
    steps = [row for row in rows if row["section"] in ("grid", "decode") and row["arm"] == "engine"]
    if steps:
        found[ADDED] = min(steps, key=lambda row: (abs(row["batch"] - 32), row.get("rank") != 8))
    return found


def added_ms(row: dict, rows: Iterable[dict]) -> float:
    """Milliseconds of a step with adapters, less those of the base's step at the same batch."""
    if "added_ms" in row:
        return row["added_ms"]
    base = next(each for each in rows if each["section"] == row["section"] and each["arm"] == "base")
    return row["ms"] - base["ms"]


def _device(record: Record) -> str:
    return f"{record.device}, {record.provenance.get('settings', {}).get('model', record.provenance.get('model'))}"


def _records() -> list[Record]:
    """The newest of the CPU and the newest of a GPU that have what `headline` looks for."""
    found = []
    for device in ("cpu", "gpu"):
        records = [each for each in load_records("bench_serving", device) if headline(each.rows)]
        found += [max(records, key=lambda each: each.date)] if records else []
    return found


def serving_sides() -> Sides:
    """A row for each quantity, a column for each device with a record, the published figures and the chapter's."""
    tables = load_published("serving")
    chapter, tables = tables["chapter"], tables["tables"]
    slora = {
        row["adapters"]: row["throughput"]
        for row in tables["slora_throughput"]["rows"]
        if row["engine"] == "S-LoRA"
    }
    vllm = {row["arm"]: row["throughput"] for row in tables["vllm_overhead"]["rows"]}
    punica = tables["punica_latency"]["rows"][0]["added_latency"]
    rows = {THROUGHPUT: {"": THROUGHPUT}, ADDED: {"": ADDED}}
    said, records = [], _records()
    for record in records:
        column, found = _device(record), headline(record.rows)
        if row := found.get(THROUGHPUT):
            of_base = interval(row, "of_base")
            rows[THROUGHPUT][column] = f"{of_base} ({row['adapters']} adapters)"
            said.append(
                f"{record.device}: {row['adapters']} adapters keep {row['of_base']:.0%} of the base's throughput"
            )
        if row := found.get(ADDED):
            more = added_ms(row, record.rows)
            rows[ADDED][column] = f"{more:+.3g} (batch {row['batch']})"
            said.append(f"a token takes {more:.2g} ms more, a response of 100 tokens {100 * more:.0f} ms")
    rows[THROUGHPUT]["published, A100, 7B"] = (
        f"S-LoRA {slora[100] / slora[5]:.2f} (as reported; 100 adapters against 5); "
        f"vLLM {vllm['LoRA, 1 slot'] / vllm['base']:.2f} (1)"
    )
    rows[ADDED]["published, A100, 7B"] = f"Punica +{punica}"
    rows[THROUGHPUT]["the chapter"] = "1"
    rows[ADDED]["the chapter"] = f"+{chapter['added_median_latency_ms']} for a whole response"
    if not any(record.device != "cpu" for record in records):
        said.append(f"there is no GPU record yet: `{COMMAND}` makes one")
    return Sides(list(rows.values()), "; ".join(said) + ".")
