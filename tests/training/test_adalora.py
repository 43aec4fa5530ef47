"""AdaLoRA as an arm of a sweep: it ends at its budget, reports the ranks it kept, and plants what it is told to."""

import torch

from labs_lib import load_base
from labs_lib.training.adapt import damage
from labs_lib.training.sweep import run_point
from labs_lib.training.sweeps import SWEEPS


def point(name, arm, steps=12, **more):
    arms = {each.name: each for each in SWEEPS[name].arms}
    task = SWEEPS[name].tasks[0].settings() | {"steps": steps, "batch": 8}
    return task | {"arm": arms[arm].to_dict(), "stage": "sweep", "seed": 0, "lr": 1e-2} | more


def test_an_arm_ends_at_its_budget_and_one_that_never_prunes_keeps_all():
    pruned = run_point(point("adalora", "AdaLoRA r3 to r2, all linear", facts=16), "tiny")
    assert sum(pruned["ranks"].values()) == 2 * 28 and max(pruned["ranks"].values()) == 3
    assert 0 < pruned["cross_entropy"] < pruned["loss"]  # the loss holds the penalty
    whole = run_point(point("adalora", "SVD form r8, never pruned", facts=16), "tiny")
    assert set(whole["ranks"].values()) == {8}


def test_damage_is_of_the_named_block_rank_and_size():
    before, after = load_base("tiny")[0], load_base("tiny")[0]
    damage(after, block=1, size=2.0, rank=2, seed=3)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        change = new.detach() - old.detach()
        if "layers.1." in name and "proj" in name:
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
            torch.testing.assert_close(change.norm(), 2 * old.detach().norm(), rtol=1e-4, atol=0)
        else:
            assert not change.any(), name


def test_a_repair_is_scored_by_what_the_base_knew():
    row = run_point(point("adalora_planted", "block 1 damaged", steps=2), "tiny")
    assert row["score"] == row["kept"] < 1
