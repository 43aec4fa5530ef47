"""A fleet trains each adapter as `fit` trains it alone: outputs, gradients, weights; nobody touches another's."""

import json

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.measure.quality import collate, encode_rows
from labs_lib.measure.records import load_record
from labs_lib.methods.lora import inject_lora, lora_state_dict
from labs_lib.models.base import load_base
from labs_lib.training import fleet as module
from labs_lib.training.fit import fit
from labs_lib.training.fleet import Fleet, Recipe, clip_each, orders, save_adapter, tenant_losses, train
from labs_lib.training.sweep import best_rate
from labs_lib.world.tasks import load_task

TENANTS = ("fathom-eleven", "quillfeather-post", "ampersea")
RECIPE = Recipe(rank=3, alpha=6, steps=5, batch=4, lr=1e-2, seed=7)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def data():
    return {slug: load_task("style", tenant=slug)["train"][:16] for slug in TENANTS}


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("tiny")[1]


def base():
    return load_base("tiny")[0]


def alone(recipe=RECIPE):
    generator = torch.Generator().manual_seed(recipe.seed)
    return inject_lora(base(), "all-linear", recipe.rank, recipe.alpha, generator=generator)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


def first_batch(tokenizer, data, slugs):
    rows = [
        row
        for slug in slugs
        for row in encode_rows(tokenizer, data[slug]["prompt"], data[slug]["completion"])[:4]
    ]
    return collate(rows, tokenizer.pad_token_id)


def shaken(fleet: Fleet) -> Fleet:
    """With a B that is not zero, another one for each tenant: else outputs and A's gradients prove nothing."""
    generator = torch.Generator().manual_seed(1)
    for layer in fleet.layers.values():
        layer.b.data[fleet.recipe.rank :] = 0.1 * torch.randn(
            len(layer.b) - fleet.recipe.rank, layer.b.shape[1], generator=generator
        )
    return fleet


@pytest.mark.parametrize("op", ["", "loop", "gather", "tiles", "blocks", "segments"])
def test_outputs_and_gradients_are_those_of_each_alone(op, tokenizer, data):
    """With every op of the engine that runs on a CPU."""
    fleet = shaken(Fleet(base(), TENANTS, RECIPE, op))
    states = {slug: fleet.state(slug) for slug in TENANTS}
    losses = fleet.losses(first_batch(tokenizer, data, TENANTS))
    losses.sum().backward()
    for place, slug in enumerate(TENANTS):
        model = alone()
        own = lora_state_dict(model)
        for key, tensor in states[slug].items():
            own[key].copy_(tensor)
        loss = model(**first_batch(tokenizer, data, [slug])).loss
        loss.backward()
        assert far(losses[place], loss) < CLOSE
        rank = RECIPE.rank
        for name, layer in fleet.layers.items():
            mine, start = model.get_submodule(name), (place + 1) * rank
            assert far(layer.a.grad[start : start + rank], mine.lora_A.grad) < CLOSE, (slug, name)
            assert far(layer.b.grad[start : start + rank].T, mine.lora_B.grad) < CLOSE, (slug, name)


def test_weights_after_training_are_those_of_fit(tokenizer, data):
    """The whole way of `fit`: same batches in the same order, schedule, clipping, AdamW; five steps, three tenants."""
    trained = train(base(), tokenizer, data, RECIPE)
    settings = {"steps": RECIPE.steps, "lr": RECIPE.lr, "batch_size": RECIPE.batch, "seed": RECIPE.seed}
    for slug in TENANTS:
        model = alone()
        run = fit(model, tokenizer, data[slug], progress=False, **settings)
        assert torch.tensor(trained.losses[slug]).allclose(torch.tensor(run.losses), rtol=CLOSE)
        for key, tensor in lora_state_dict(model).items():
            assert (trained.adapters[slug][key] - tensor).abs().max() < CLOSE, (slug, key)


def test_in_double_precision_they_are_the_same_to_nine_digits(tokenizer, data):
    """So what is left in single precision is rounding, which AdamW magnifies where a gradient is nearly zero."""
    from transformers import get_scheduler

    trained = train(load_base("tiny", dtype=torch.float64)[0], tokenizer, data, RECIPE)
    for slug in TENANTS:
        model = load_base("tiny", dtype=torch.float64)[0]
        generator = torch.Generator().manual_seed(RECIPE.seed)
        inject_lora(model, "all-linear", RECIPE.rank, RECIPE.alpha, generator=generator)
        parameters = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RECIPE.lr, weight_decay=0.0)
        schedule = get_scheduler("linear", optimizer, 1, RECIPE.steps)
        rows, order = (
            encode_rows(tokenizer, data[slug]["prompt"], data[slug]["completion"]),
            orders(16, RECIPE),
        )
        for _ in range(RECIPE.steps):
            batch = collate([rows[i] for i in next(order)], tokenizer.pad_token_id)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        for key, tensor in lora_state_dict(model).items():
            assert far(trained.adapters[slug][key], tensor) < 1e-9, (slug, key)


def test_the_order_goes_on_into_the_second_epoch_as_fit_has_it(tokenizer, data):
    """Sixteen rows in batches of four: step five begins anew, shuffled otherwise (covered by the five steps above)."""
    order = orders(16, RECIPE)
    epochs = [[next(order) for _ in range(4)] for _ in range(2)]
    assert all(sorted(i for picked in epoch for i in picked) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    with pytest.raises(LabsError, match="do not divide"):
        next(orders(10, RECIPE))


def test_a_neighbour_changes_nothing(tokenizer, data):
    """Not its texts, not their length, not its gradient: the others' weights stay what they were."""
    strange = {**data[TENANTS[1]], "completion": ["x " * 60] * 16}
    calm, wild = (
        train(base(), tokenizer, {TENANTS[0]: data[TENANTS[0]], "other": other}, RECIPE)
        for other in (data[TENANTS[1]], strange)
    )
    for key, tensor in calm.adapters[TENANTS[0]].items():
        assert (wild.adapters[TENANTS[0]][key] - tensor).abs().max() < CLOSE
    assert calm.adapters["other"].keys() == wild.adapters["other"].keys()
    assert any(
        not torch.equal(calm.adapters["other"][key], wild.adapters["other"][key])
        for key in calm.adapters["other"]
    )


def test_slot_zero_stays_zero_and_the_base_what_it_was(tokenizer, data):
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fleet = Fleet(model, TENANTS, RECIPE)
    module.train_fleet(fleet, tokenizer, data)
    assert all(
        not layer.a[: RECIPE.rank].any() and not layer.b[: RECIPE.rank].any()
        for layer in fleet.layers.values()
    )
    fleet.close()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_saved_adapter_is_pefts(tokenizer, data, tmp_path):
    """PEFT loads the folder and says what the fleet says; the serving engine's preflight takes it."""
    from peft import PeftModel

    from labs_lib.serving.adapter import check_weights
    from labs_lib.serving.layout import Layout

    model = base()
    fleet = shaken(Fleet(model, TENANTS, RECIPE))
    folder = fleet.save(TENANTS[1], tmp_path / "adapter")
    losses = fleet.losses(first_batch(tokenizer, data, TENANTS))
    fleet.close()
    assert check_weights(folder, Layout.of(model)).rank == RECIPE.rank
    theirs = PeftModel.from_pretrained(base(), folder)
    loss = theirs(**first_batch(tokenizer, data, [TENANTS[1]])).loss
    assert far(losses[1], loss) < CLOSE
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == RECIPE.rank and config["lora_alpha"] == RECIPE.alpha


def test_what_cannot_be_trained_is_refused(tokenizer, data):
    with pytest.raises(LabsError, match="at least one tenant"):
        Fleet(base(), [], RECIPE)
    with pytest.raises(LabsError, match="each of them once"):
        Fleet(base(), ["a", "a"], RECIPE)
    short = {
        slug: {key: values[: 8 + 4 * i] for key, values in data[slug].items()}
        for i, slug in enumerate(TENANTS)
    }
    with pytest.raises(LabsError, match="equally many"):
        train(base(), tokenizer, short, RECIPE)


def test_a_loss_that_breaks_names_the_tenant(tokenizer, data, monkeypatch):
    real = module.tenant_losses

    def broken(tokens, owners, tenants):
        return real(tokens, owners, tenants) * torch.tensor([1.0, float("nan"), 1.0])

    monkeypatch.setattr(module, "tenant_losses", broken)
    model = base()
    with pytest.raises(LabsError, match=f"{TENANTS[1]}.*step 1"):
        train(model, tokenizer, data, RECIPE)
    assert not any("fleet" in type(layer).__name__.lower() for layer in model.modules())


def test_losses_and_clipping_by_hand():
    owners = torch.tensor([0, 0, 1, 1, 1, 2])
    losses = tenant_losses(torch.tensor([1.0, 3.0, 1.0, 1.0, 4.0, 5.0]), owners, 3)
    assert losses.tolist() == [2.0, 2.0, 5.0]
    gradients = [torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[4.0], [0.4]])]
    norms = clip_each(gradients)
    assert norms.tolist() == pytest.approx([5.0, 0.5])
    assert gradients[0][0].tolist() == pytest.approx([0.6, 0.0]) and gradients[1][
        1
    ].tolist() == pytest.approx([0.4])


def test_the_recipe_is_the_recorded_sweeps():
    rows = load_record("sweep_tune_lora_style", device="cpu").rows
    recipe = Recipe()
    name = f"LoRA r{recipe.rank}, all linear"
    mine = [row for row in rows if row["arm"]["name"] == name]
    rates = tuple(row["lr"] for row in mine if row["stage"] == "sweep")

    class Named:
        pass

    arm = Named()
    arm.name = name
    assert recipe.lr == best_rate(rows, arm, "style", rates)
    assert {(row["steps"], row["batch"], row["arm"]["alpha"]) for row in mine} == {
        (recipe.steps, recipe.batch, recipe.alpha)
    }


def test_save_adapter_names_the_base(tmp_path):
    tensors = {
        "base_model.model.a.q_proj.lora_A.weight": torch.zeros(2, 4),
        "base_model.model.a.q_proj.lora_B.weight": torch.zeros(4, 2),
    }
    config = json.loads(
        (save_adapter(tmp_path / "x", tensors, Recipe(), "small") / "adapter_config.json").read_text()
    )
    assert config["base_model_name_or_path"] == "small" and config["target_modules"] == ["q_proj"]
