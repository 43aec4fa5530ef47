"""Lab 15's checks: what a batch of many adapters looks like when it is wrong, mostly for one tenant at a time.

The arena of a check is tiny and hostile: pages lie scattered, ranks differ, some rows are the base model's, and a
tenant who is not in the batch has infinities in its pages, which must reach nobody.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.serving.batch import Index
from labs_lib.serving.lesson import slot_map
from labs_lib.serving.ops import gather, segments
from labs_lib.serving.types import IsolationError


def fits(call: Callable[[], Any], says: str) -> Any:
    """The call's result; a mismatch of shapes, which torch reports as a RuntimeError, is told as `says`."""
    try:
        return call()
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Diagnosis(f"{says} (torch: {str(error).splitlines()[0]})") from error


# --- slot_map


@exercise(
    "slot_map",
    reference="labs_lib.serving.lesson:slot_map",
    hints=[
        "Three cases for each request: None, an adapter in `resident`, any other.",
        "`resident.get(adapter, 0)` would be shorter. Whose voice would a tenant get whose adapter is not there?",
        "slots += [0 if adapter is None else resident[adapter]] * tokens",
    ],
)
def check_slot_map(candidate, ref):
    resident = {"fathom": 3, "quill": 1}
    got = candidate(["quill", None, "fathom", "quill"], resident)
    expect(got is not None, "slot_map returns None: is a `return` missing?")
    got = [int(slot) for slot in got]
    expect(len(got) == 4, f"{len(got)} slots for 4 requests of one token each.")
    expect(
        got[1] != -1, "The base got slot -1: as an index that is the last slot, and that is some tenant's."
    )
    expect(got[1] == 0, f"A request without an adapter got slot {got[1]}: the base model is slot 0.")
    expect(got == [1, 0, 3, 1], f"The slots are {got}, expected [1, 0, 3, 1].")
    prefill = [int(slot) for slot in candidate(["quill", None], resident, tokens=3)]
    expect(
        prefill != [1, 0, 1, 0, 1, 0],
        "With tokens=3 the requests take turns; the rows of a request stand side by side: 1 1 1 0 0 0.",
    )
    expect(
        prefill == [1, 1, 1, 0, 0, 0], f"With tokens=3 the slots are {prefill}, expected [1, 1, 1, 0, 0, 0]."
    )
    try:
        got = candidate(["fathom", "stranger"], resident)
    except IsolationError:
        return
    except KeyError:
        says = "An adapter that is not on the device ends in a KeyError: say it as an IsolationError."
        raise Diagnosis(says) from None
    raise Diagnosis(
        f"An adapter that is not on the device got slot {list(got)[1]} without an error: its tenant would get "
        "somebody else's words and never know."
    )


@mutant("slot_map", says="without an error")
def quiet_default(adapters, resident, tokens=1):
    return [resident.get(adapter, 0) for adapter in adapters for _ in range(tokens)]


@mutant("slot_map", says="some tenant's")
def minus_one(adapters, resident, tokens=1):
    return [-1 if slot == 0 else slot for slot in slot_map(adapters, resident, tokens)]


@mutant("slot_map", says="say it as an IsolationError")
def key_error(adapters, resident, tokens=1):
    return [0 if adapter is None else resident[adapter] for adapter in adapters for _ in range(tokens)]


@mutant("slot_map", says="expected [1, 1, 1, 0, 0, 0]")
def one_row_each(adapters, resident, tokens=1):
    return slot_map(adapters, resident)


@mutant("slot_map", says="take turns")
def taking_turns(adapters, resident, tokens=1):
    return slot_map(adapters, resident) * tokens


@mutant("slot_map", says="the base model is slot 0")
def counts_from_one(adapters, resident, tokens=1):
    return [slot + 1 for slot in slot_map(adapters, resident, tokens)]


# --- gather and segments: one answer, two ways


IN, OUT = 6, 5
PAGES = {1: [7, 2], 2: [4], 3: [9, 1, 6], 4: [3, 8]}  # slot: its pages, scattered; slot 4 is never in a batch


def arena() -> tuple[Tensor, Tensor, Tensor]:
    """a (P, IN) and b (P, OUT) as strided views of one tensor, and the page table; slot 4 holds infinities."""
    data, table = torch.randn(11, IN + OUT + 3), torch.zeros(5, 3, dtype=torch.long)
    data[0] = 0
    for slot, pages in PAGES.items():
        table[slot, : len(pages)] = torch.tensor(pages)
    data[PAGES[4]] = torch.inf
    return data[:, 1 : 1 + IN], data[:, 2 + IN : 2 + IN + OUT], table


def expected(x: Tensor, a: Tensor, b: Tensor, slots: Sequence[int]) -> Tensor:
    """Row by row, as the formula has it."""
    rows = [x[i] @ a[PAGES[s]].T @ b[PAGES[s]] if s else torch.zeros(OUT) for i, s in enumerate(slots)]
    return torch.stack(rows)


def check_op(candidate: Callable, mistakes: Callable[..., dict[str, Tensor]]) -> None:
    """What both ops have to do; `mistakes` gives the wrong results that have words of their own."""
    a, b, table = arena()
    for slots in ([3, 0, 1, 3, 2, 0, 1], [0, 1, 1, 2, 3, 3]):
        x, index = torch.randn(len(slots), IN), Index(slots, table)
        right = expected(x, a, b, slots)
        got = fits(
            lambda x=x, index=index: candidate(x, a, b, index),
            "The shapes do not fit: rows (T, in) times A (R, in) transposed, then times B (R, out).",
        )
        expect(isinstance(got, Tensor), f"The update should be a tensor, got {type(got).__name__}.")
        if got.shape == right.shape:
            expect(
                bool(torch.isfinite(got).all()),
                "Infinities: the pages of a tenant who is not in this batch have reached it.",
            )
            for says, wrong in mistakes(x, a, b, index, slots, right).items():
                if wrong.shape == right.shape and torch.allclose(got, wrong, atol=1e-5):
                    raise Diagnosis(says)
            base = torch.tensor(slots) == 0
            expect(not got[base].any(), "The base model's rows are changed: slot 0 adds nothing.")
        close(got, right, "the update")
        before = torch.randn(len(slots), OUT)
        out = before.clone()
        got = candidate(x, a, b, index, out)
        expect(got is not None, "With `out` given, nothing is returned: return `out`.")
        expect(
            not torch.allclose(out, right, atol=1e-5),
            "`out` is overwritten: it holds the base layer's result, the update is added to it.",
        )
        expect(not torch.equal(out, before), "`out` is as it was: the update has to be added to it in place.")
        close(out, before + right, "`out` after the update")
        close(got, before + right, "what is returned when `out` is given")
    none = Index([0, 0], table)
    got = candidate(torch.randn(2, IN), a, b, none)
    close(got, torch.zeros(2, OUT), "the update of a batch without adapters")


@exercise(
    "gather",
    reference="labs_lib.serving.ops:gather",
    hints=[
        "index.row_pages is (T, R): page numbers. As an index into a, (P, in), it gives (T, R, in).",
        "torch.bmm multiplies (T, 1, in) by (T, in, R): one small product for each row.",
        "torch.bmm(torch.bmm(x.unsqueeze(1), A.mT), B).squeeze(1)",
    ],
)
def check_gather(candidate, ref):
    def mistakes(x, a, b, index, slots, right):
        page = index.slot
        first = index.row_pages[:, 0]
        all_pages = [page for slot in sorted(set(slots) - {0}) for page in PAGES[slot]]
        return {
            "A slot's number is not a page's: index.row_pages says which pages each row uses.": (
                (x * a[page]).sum(1, keepdim=True).nan_to_num() * b[page].nan_to_num(0, 0, 0)
            ),
            "Only the first page of each adapter is used: that is rank 1 of it.": (
                (x * a[first]).sum(1, keepdim=True) * b[first]
            ),
            "Every row gets every tenant's adapter: each row has its own A and B.": x
            @ a[all_pages].T
            @ b[all_pages],
        }

    check_op(candidate, mistakes)


def _added(update: Tensor, out: Tensor | None) -> Tensor:
    return update if out is None else out.add_(update)


@mutant("gather", says="not a page's")
def slot_as_page(x, a, b, index, out=None):
    pages = index.slot
    return (x * a[pages]).sum(1, keepdim=True).nan_to_num() * b[pages].nan_to_num(0, 0, 0)


@mutant("gather", says="rank 1")
def first_page_only(x, a, b, index, out=None):
    pages = index.row_pages[:, 0]
    return _added((x * a[pages]).sum(1, keepdim=True) * b[pages], out)


@mutant("gather", says="every tenant's adapter")
def everybody_for_everybody(x, a, b, index, out=None):
    pages = index.row_pages.unique()
    return _added(x @ a[pages].T @ b[pages], out)


@mutant("gather", says="not in this batch")
def whole_arena(x, a, b, index, out=None):
    return _added(x @ a.T @ b, out)


@mutant("gather", says="shapes do not fit")
def not_transposed(x, a, b, index, out=None):
    A, B = a[index.row_pages], b[index.row_pages]
    return _added(torch.bmm(torch.bmm(x.unsqueeze(1), A), B).squeeze(1), out)


@mutant("gather", says="as it was")
def ignores_out(x, a, b, index, out=None):
    return gather(x, a, b, index)


@mutant("gather", says="overwritten")
def overwrites_out(x, a, b, index, out=None):
    update = gather(x, a, b, index)
    return update if out is None else out.copy_(update)


@exercise(
    "segments",
    reference="labs_lib.serving.ops:segments",
    hints=[
        "Segments count in sorted rows: x.index_select(0, index.order), unless the batch is grouped already.",
        "Of each segment: x[start:stop] @ a[pages].T @ b[pages], and zeros of (stop - start, out) where pages is None.",
        "torch.cat puts the segments together, in sorted order; index.back says where each row came from.",
    ],
)
def check_segments(candidate, ref):
    def mistakes(x, a, b, index, slots, right):
        order = torch.tensor(slots).argsort(stable=True)
        unsorted = torch.cat(
            [
                x.new_zeros(stop - start, OUT) if pages is None else x[start:stop] @ a[pages].T @ b[pages]
                for _, start, stop, pages in index.segments
            ]
        )
        wrong = {}
        if not index.grouped:
            wrong["The updates are in sorted order: put them back where their rows stand."] = right[order]
            wrong["Segments count in sorted rows: sort x before cutting it."] = (
                unsorted if index.back is None else unsorted[index.back]
            )
            wrong["Segments count in sorted rows: x is neither sorted nor are its updates put back."] = (
                unsorted
            )
        return wrong

    check_op(candidate, mistakes)


@mutant("segments", says="sorted order")
def not_put_back(x, a, b, index, out=None):
    update = segments(x, a, b, index)
    return _added(update if index.order is None else update[index.order], out)


@mutant("segments", says="before cutting")
def not_sorted(x, a, b, index, out=None):
    y = both_forgotten(x, a, b, index)
    return _added(y if index.back is None else y[index.back], out)


@mutant("segments", says="neither sorted")
def both_forgotten(x, a, b, index, out=None):
    parts = [
        x.new_zeros(stop - start, b.shape[1]) if pages is None else x[start:stop] @ a[pages].T @ b[pages]
        for _, start, stop, pages in index.segments
    ]
    return _added(torch.cat(parts), out)


@mutant("segments", says="has shape")
def skips_the_base(x, a, b, index, out=None):
    x = x if index.order is None else x[index.order]
    parts = [
        x[start:stop] @ a[pages].T @ b[pages] for _, start, stop, pages in index.segments if pages is not None
    ]
    return torch.cat(parts)


@mutant("segments", says="slot 0 adds nothing")
def base_copies_its_input(x, a, b, index, out=None):
    update = segments(x, a, b, index)
    update[index.slot == 0] = x[index.slot == 0][:, : b.shape[1]]
    return _added(update, out)


@mutant("segments", says="as it was")
def segments_ignore_out(x, a, b, index, out=None):
    return segments(x, a, b, index)


# --- short answers


answer(
    "lab15.gather_megabytes",
    reference=32 * 16 * (4096 + 4096) * 2 / 1e6,
    unit="MB",
    mistakes={
        16 * (4096 + 4096) * 2 / 1e6: "that is one adapter: every one of the 32 rows gets a copy",
        32 * 16 * (4096 + 4096) / 1e6: "that is one byte per number: half precision takes 2",
        32 * 16 * 4096 * 2 / 1e6: "that is A or B alone: a row needs both",
        4096 * 4096 * 2 / 1e6: "that is W itself, which is read once for all rows and not copied",
        32 * 16 * (4096 + 4096) * 2 / 2**20: "that is MiB (2**20 bytes); a megabyte is 10**6 bytes",
    },
    hints=["A is (16, 4096) and B is (4096, 16): numbers per adapter.", "Times 32 rows, times 2 bytes."],
)
answer(
    "lab15.fifty_tenants_gb",
    reference=(6_738_415_616 + 50 * 39_976_960) * 2 / 1e9,
    unit="GB",
    mistakes={
        50 * 6_738_415_616 * 2 / 1e9: "that is fifty models: the base is there once",
        6_738_415_616 * 2 / 1e9: "that is the base alone: add fifty adapters",
        (6_738_415_616 + 50 * 39_976_960) / 1e9: "that is one byte per number: half precision takes 2",
    },
    hints=["One base and fifty adapters.", "Numbers times 2 bytes, divided by 10**9."],
)

# --- predictions


answer("lab15.predict_crossover", reference=32, within=(1, 10_000), unit="rows")
answer("lab15.predict_share", reference=50, within=(0, 100), unit="%")
answer("lab15.predict_silent", reference=1, within=(0, 8), unit="of 8")
