"""Lab 17's checks: what keeps tenants apart in training, what the gate lets through, how many cards it takes.

The mistakes are those that couple tenants without an error: a mean over everybody's tokens, one norm for the fleet.
"""

from types import SimpleNamespace

import torch

from labs_lib.errors import LabsError
from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.serving.cost import cards_needed
from labs_lib.training.fleet import CLIP, clip_each, tenant_losses
from labs_lib.training.gate import Bar, gate

# --- tenant_losses


@exercise(
    "tenant_losses",
    reference="labs_lib.training.fleet:tenant_losses",
    hints=[
        "token_losses.new_zeros(tenants).index_add(0, owners, token_losses) adds up by owner.",
        "torch.bincount(owners, minlength=tenants) counts by owner.",
        "A sum without .item(), .tolist() or .data in between, so that gradients come through.",
    ],
)
def check_tenant_losses(candidate, ref):
    owners = torch.tensor([0, 0, 2, 1, 1, 1, 2, 2, 2, 2])  # 2, 3 and 5 tokens, not in order
    tokens = torch.rand(10, requires_grad=True)
    got = candidate(tokens, owners, 3)
    expect(got is not None, "tenant_losses returns None: is a `return` missing?")
    expect(
        isinstance(got, torch.Tensor) and got.shape == (3,),
        f"Three tenants have three losses, shape (3,), not {tuple(getattr(got, 'shape', ()))}.",
    )
    right = ref(tokens, owners, 3)
    counts = torch.tensor([2.0, 3.0, 5.0])
    if torch.allclose(got, right * counts):
        raise Diagnosis(
            "These are sums: a tenant with long texts would take larger steps. Divide by its tokens."
        )
    if torch.allclose(got, right * counts / 10):
        raise Diagnosis(
            "Divided by the tokens of the whole batch: then a tenant's step shrinks when strangers' texts are long. "
            "Each tenant's loss is the mean over its own tokens."
        )
    if torch.allclose(got, right * counts * 3 / 10):
        raise Diagnosis(
            "Divided by the mean number of tokens per tenant: a tenant with long texts still weighs more than alone. "
            "Divide each tenant's sum by its own count."
        )
    if torch.allclose(got, tokens[[0, 2, 5]].detach()) or torch.allclose(
        got, torch.stack([part.mean() for part in tokens.split([2, 3, 5])])
    ):
        raise Diagnosis("The tokens do not lie tenant after tenant: `owners` says whose each one is.")
    close(got.detach(), right.detach(), "the tenants' losses")
    expect(got.requires_grad, "No gradient comes through: .item(), .tolist() or .detach() cuts it off.")
    close(candidate(tokens, owners, 4)[:3], right, "the losses when a fourth tenant has no token")


@mutant("tenant_losses", says="These are sums")
def sums(token_losses, owners, tenants):
    return token_losses.new_zeros(tenants).index_add(0, owners, token_losses)


@mutant("tenant_losses", says="strangers' texts are long")
def over_all_tokens(token_losses, owners, tenants):
    return sums(token_losses, owners, tenants) / len(token_losses)


@mutant("tenant_losses", says="own count")
def over_the_mean_count(token_losses, owners, tenants):
    return sums(token_losses, owners, tenants) / (len(token_losses) / tenants)


@mutant("tenant_losses", says="whose each one is")
def in_order(token_losses, owners, tenants):
    counts = torch.bincount(owners, minlength=tenants).tolist()
    return torch.stack([part.mean() for part in token_losses.split(counts)])


@mutant("tenant_losses", says="cuts it off")
def without_gradient(token_losses, owners, tenants):
    return tenant_losses(token_losses.detach(), owners, tenants)


@mutant("tenant_losses", says="shape (3,)")
def one_number(token_losses, owners, tenants):
    return token_losses.mean()


# --- clip_each


@exercise(
    "clip_each",
    reference="labs_lib.training.fleet:clip_each",
    hints=[
        "gradient.flatten(1).square().sum(1) is (tenants,): one layer's share. Add the layers up, then the root.",
        "(largest / (norms + 1e-6)).clamp(max=1.0)",
        "factors.view(-1, *[1] * (gradient.dim() - 1)) has the shape to multiply with, and *= works in place.",
    ],
)
def check_clip_each(candidate, ref):
    def fresh():
        torch.manual_seed(0)
        parts = [torch.randn(3, 4, 2), torch.randn(3, 5)]
        for part in parts:
            part[0] *= 100  # explodes
            part[1] *= 0.01  # calm
        return parts

    given, right = fresh(), fresh()
    norms, got = ref(right), candidate(given)
    before = fresh()
    if all(torch.equal(a, b) for a, b in zip(given, before, strict=True)):
        raise Diagnosis("Nothing has changed: scale the gradients in place, `gradient *= ...`.")
    if not torch.allclose(given[0][1], before[0][1]):
        if given[0][1].norm() > before[0][1].norm():
            raise Diagnosis(
                "The calm tenant's gradient grew: clipping only ever makes smaller, so the factor is at most 1."
            )
        raise Diagnosis(
            "The calm tenant's gradient shrank because a neighbour's exploded: each tenant has a norm of its own."
        )
    length = sum(part[0].square().sum() for part in given).sqrt().item()
    if abs(length - 2**0.5 * CLIP) < 0.01:
        raise Diagnosis("Each layer was clipped by itself: a tenant's norm is over all its layers.")
    for ours, theirs in zip(given, right, strict=True):
        close(ours, theirs, "the clipped gradients", tolerance=1e-4)
    expect(got is not None, "clip_each returns None: it gives the norms from before.")
    close(got, norms, "the norms before clipping", tolerance=1e-4)


def _scaled(gradients, factor_of):
    for gradient in gradients:
        gradient *= factor_of(gradient).view(-1, *[1] * (gradient.dim() - 1))


@mutant("clip_each", says="a norm of its own")
def one_norm(gradients, largest=CLIP):
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    _scaled(gradients, lambda gradient: (largest / (norm + 1e-6)).clamp(max=1).expand(len(gradient)))
    return norm


@mutant("clip_each", says="at most 1")
def always_to_the_norm(gradients, largest=CLIP):
    norms = sum(gradient.flatten(1).square().sum(1) for gradient in gradients).sqrt()
    _scaled(gradients, lambda gradient: largest / (norms + 1e-6))
    return norms


@mutant("clip_each", says="over all its layers")
def layer_by_layer(gradients, largest=CLIP):
    for gradient in gradients:
        norms = clip_each([gradient], largest)
    return norms


@mutant("clip_each", says="in place")
def in_a_copy(gradients, largest=CLIP):
    return clip_each([gradient.clone() for gradient in gradients], largest)


@mutant("clip_each", says="returns None")
def nothing_back(gradients, largest=CLIP):
    clip_each(gradients, largest)


# --- gate


def score(compliance=1.0, fidelity=1.0, leakage=0.0):
    return SimpleNamespace(compliance=compliance, fidelity=fidelity, leakage=leakage)


@exercise(
    "gate",
    reference="labs_lib.training.gate:gate",
    hints=[
        "Start with reasons = [] and append a sentence for each thing that is wrong.",
        "For compliance and fidelity more is better; for leakage less is.",
        "nan < 0.95 is False, and so is nan >= 0.95: write `if not value >= least`.",
    ],
)
def check_gate(candidate, ref):
    passed = candidate(score())
    expect(passed is not None, "gate returns None: an adapter without faults has an empty list of reasons.")
    expect(not passed, f"A perfect adapter was refused: {passed}.")
    expect(not candidate(score(0.95, 0.95)), "At the bar is not below it: 0.95 passes a bar of 0.95.")
    expect(candidate(score(compliance=0.5)), "Half of the rules broken, and it passes.")
    expect(candidate(score(fidelity=0.5)), "Half of the facts missing, and it passes.")
    expect(
        candidate(score(leakage=0.05)),
        "One text in twenty bears another tenant's mark, and it passes: of leakage less is better.",
    )
    expect(
        len(candidate(score(0.5, 0.5, 0.5))) == 3, "Three faults are three reasons: do not stop at the first."
    )
    nan = float("nan")
    expect(
        candidate(score(compliance=nan)),
        "A compliance of nan passes the bar: every comparison with nan is False.",
    )
    expect(
        not candidate(score(0.85, 0.9), Bar(0.8, 0.8)), "The bar that was given is not the one that was used."
    )


@mutant("gate", says="less is better")
def leakage_like_the_others(score, bar=None):
    bar = bar or Bar()
    names = ("compliance", "fidelity", "leakage")
    return [name for name in names if not getattr(score, name) >= getattr(bar, name)]


@mutant("gate", says="do not stop at the first")
def the_first_reason(score, bar=None):
    return gate(score, bar)[:1]


@mutant("gate", says="nan passes")
def not_a_number(score, bar=None):
    bar = bar or Bar()
    found = [name for name in ("compliance", "fidelity") if getattr(score, name) < getattr(bar, name)]
    return found + ["leakage"] * (score.leakage > bar.leakage)


@mutant("gate", says="the one that was used")
def a_bar_of_its_own(score, bar=None):
    return gate(score)


@mutant("gate", says="At the bar is not below it")
def strictly_above(score, bar=None):
    bar = bar or Bar()
    found = [name for name in ("compliance", "fidelity") if not getattr(score, name) > getattr(bar, name)]
    return found + ["leakage"] * (not score.leakage <= bar.leakage)


# --- cards_needed


@exercise(
    "cards_needed",
    reference="labs_lib.serving.cost:cards_needed",
    hints=[
        "math.floor for what fits onto one card, math.ceil for the number of cards.",
        "A copy needs its weights and its room: card_gb / (copy_gb + room_gb).",
    ],
)
def check_cards_needed(candidate, ref):
    got = candidate(50, 13.5, 80)
    expect(got is not None, "cards_needed returns None: is a `return` missing?")
    expect(got != 50, "50 cards for 50 copies: how many copies of 13.5 GB does a card of 80 GB hold?")
    expect(
        got != 9,
        "9 cards would hold 45 whole copies. The other five are spread in parts, which serve nobody.",
    )
    expect(got == 10, f"50 copies, five to a card, are 10 cards, not {got}.")
    expect(candidate(51, 13.5, 80) == 11, "The 51st copy needs an eleventh card: round cards up.")
    expect(
        candidate(50, 13.5, 80, 13.0) == 17,
        "A copy needs room beside its weights: with 13 GB each, three fit.",
    )
    try:
        got = candidate(1, 100, 80)
    except LabsError:
        return
    except ZeroDivisionError:
        raise Diagnosis(
            "A copy larger than a card ends in a ZeroDivisionError: say it as a LabsError."
        ) from None
    raise Diagnosis(
        f"A copy of 100 GB on cards of 80 GB needs {got} cards? It does not fit: raise LabsError."
    )


@mutant("cards_needed", says="how many copies")
def the_chapters(copies, copy_gb, card_gb, room_gb=0.0):
    return copies


@mutant("cards_needed", says="parts")
def fractions(copies, copy_gb, card_gb, room_gb=0.0):
    return -(-copies * (copy_gb + room_gb) // card_gb)


@mutant("cards_needed", says="round cards up")
def rounded_down(copies, copy_gb, card_gb, room_gb=0.0):
    return copies // int(card_gb // (copy_gb + room_gb))


@mutant("cards_needed", says="room beside its weights")
def no_room(copies, copy_gb, card_gb, room_gb=0.0):
    return cards_needed(copies, copy_gb, card_gb)


@mutant("cards_needed", says="ZeroDivisionError")
def divides_by_zero(copies, copy_gb, card_gb, room_gb=0.0):
    return -(-copies // int(card_gb // (copy_gb + room_gb)))


# --- short answers

answer(
    "lab17.shared_saving",
    reference=lambda: 90.0,
    unit="%",
    tolerance=0.01,
    hints=["Five copies fit onto a card, so fifty need ten.", "100 * (1 - 1 / 10)"],
    mistakes={98.0: "against fifty cards", 10.0: "what is left, not what is saved"},
)

answer("lab17.predict_fleet", reference=5.0, within=(0.5, 50), unit="times")
answer("lab17.predict_failed", reference=3, within=(0, 200), unit="requests")
answer("lab17.predict_overhead", reference=20.0, within=(-50, 500), unit="%")
