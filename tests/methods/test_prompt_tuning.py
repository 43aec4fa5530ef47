"""Our prompt tuning is PEFT's: outputs, gradients, training, files; and what goes wrong in the library is on record."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from labs_lib.errors import LabsError
from labs_lib.methods.lora import trainable_parameters
from labs_lib.methods.prompt_tuning import PromptTuning, add_prompt, init_prompt, nearest_tokens, prepend
from labs_lib.methods.virtual_io import load_prefix, load_prompt, save_prompt

TOKENS, PAD = 5, 4
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def padded(batch):
    """The batch with four pads to the left of every row, and the positions that skip them."""
    ids = batch["input_ids"]
    mask = torch.cat([torch.zeros(len(ids), PAD, dtype=torch.long), torch.ones_like(ids)], dim=1)
    ids = torch.cat([torch.zeros(len(ids), PAD, dtype=torch.long), ids], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.where(mask.bool(), ids, -100),
    }


def tiny_gpt2():
    """A model whose positions are learned vectors: there a shifted position is another input."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    size = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=60, pad_token_id=0))


def values(width=32, tokens=TOKENS, seed=3):
    return 0.5 * torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def peft_prompt(base, tokens=TOKENS, **settings):
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)
    return get_peft_model(base, config)


def pair(make, **kwargs):
    """Our model and PEFT's on equal bases with equal prompts."""
    ours, theirs = PromptTuning(make(**kwargs), values()), peft_prompt(make(**kwargs))
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(ours.prompt)
    return ours.train(), theirs.train()


def peft_weight(model):
    return model.prompt_encoder["default"].embedding.weight


@torch.no_grad()
def logits(model, **inputs):
    return model.eval()(**inputs).logits


# --- the pieces


def test_random_init_is_normal_with_the_given_std():
    embedding = torch.nn.Embedding(50, 400)
    prompt = init_prompt(embedding, 100, "random", generator=torch.Generator().manual_seed(0))
    assert prompt.shape == (100, 400) and prompt.dtype == torch.float32
    assert prompt.std().item() == pytest.approx(1, rel=0.02)
    small = init_prompt(embedding, 100, "random", std=0.02, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small, 0.02 * prompt)


def test_vocab_init_is_rows_of_the_table():
    embedding = torch.nn.Embedding(50, 8).bfloat16()
    prompt = init_prompt(embedding, 20, "vocab", generator=torch.Generator().manual_seed(0))
    assert prompt.dtype == torch.float32 and not prompt.requires_grad
    ids, distances = nearest_tokens(prompt, embedding.weight, metric="euclidean")
    assert torch.equal(embedding.weight[ids[:, 0]].float(), prompt)
    assert distances.max() < 1e-3
    assert len(set(ids[:, 0].tolist())) > 10


@pytest.mark.parametrize("ids", [[7, 3, 9], [7, 3, 9, 1, 2], [7, 3, 9, 1, 2, 4, 5, 6], torch.tensor([7, 3])])
def test_text_init_repeats_or_cuts_the_text(ids):
    embedding = torch.nn.Embedding(10, 4)
    prompt = init_prompt(embedding, 5, "text", ids=ids)
    expected = (list(ids) * 5)[:5]
    assert torch.equal(prompt, embedding.weight[torch.tensor(expected)])


def test_init_draws_from_its_generator_only():
    embedding = torch.nn.Embedding(50, 8)
    state = torch.get_rng_state()
    for init in ("random", "vocab"):
        draws = [
            init_prompt(embedding, 9, init, generator=torch.Generator().manual_seed(4)) for _ in range(2)
        ]
        assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "tokens, settings, says",
    [
        (0, {}, "at least one virtual token"),
        (5, {"init": "RANDOM"}, "'random', 'vocab' or 'text'"),
        (5, {"init": "text"}, r"tokenizer\(text\)\['input_ids'\]"),
        (5, {"init": "text", "ids": [3, 10]}, "from 0 to 9"),
        (5, {"init": "text", "ids": [-1]}, "from 0 to 9"),
    ],
)
def test_bad_inits_say_what_to_do(tokens, settings, says):
    with pytest.raises(ValueError, match=says):
        init_prompt(torch.nn.Embedding(10, 4), tokens, **settings)


def test_prepend_by_hand():
    prompt = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    embeds = torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]], dtype=torch.bfloat16)
    one = torch.tensor([[1], [0]])
    read = prepend(prompt, embeds, mask=one, labels=one + 40, positions=one)
    assert read["inputs_embeds"].dtype == torch.bfloat16
    assert read["inputs_embeds"].tolist() == [[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [7, 8]]]
    assert read["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert read["labels"].tolist() == [[-100, -100, 41], [-100, -100, 40]]
    assert read["position_ids"].tolist() == [[0, 1, 3], [0, 1, 2]]
    assert list(prepend(prompt, embeds)) == ["inputs_embeds"]


def test_nearest_tokens_by_hand():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 0.0]])
    vectors = torch.tensor([[9.0, 1.0], [0.0, 0.2]])
    ids, distances = nearest_tokens(vectors, table, k=2)
    assert ids[1, 0] == 1 and set(ids[0].tolist()) == {0, 2}  # by angle alone, 0 and 2 are one token
    assert distances[1].tolist() == pytest.approx([0, 1])
    ids, distances = nearest_tokens(vectors, table, k=3, metric="euclidean")
    assert ids.tolist() == [[2, 0, 1], [1, 0, 2]]
    assert distances[0, 0].item() == pytest.approx(2**0.5)
    for settings in ({"k": 0}, {"k": 4}, {"metric": "l2"}):
        with pytest.raises(ValueError, match=r"k is from 1|'cosine' or 'euclidean'"):
            nearest_tokens(vectors, table, **settings)


# --- into a model


def test_a_prompt_of_tokens_is_the_text_itself(tiny_llama, batch):
    """Soft vectors that happen to be tokens act exactly as those tokens written before the input."""
    ids = [4, 17, 50]
    model = add_prompt(tiny_llama(), 3, "text", ids=ids)
    written = torch.cat([torch.tensor([ids] * 3), batch["input_ids"]], dim=1)
    torch.testing.assert_close(
        logits(model, input_ids=batch["input_ids"]),
        logits(tiny_llama(), input_ids=written),
        rtol=0,
        atol=1e-6,
    )


def test_only_the_prompt_trains_and_the_base_stays(tiny_llama, batch):
    base = tiny_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = add_prompt(base, TOKENS, "random")
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["prompt"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimiser.step()
    assert model.base is base and model.prompt.grad.abs().max() > 0
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_the_starting_values_are_copied(tiny_llama):
    base = tiny_llama()
    model = PromptTuning(base, base.get_input_embeddings().weight[:3])
    with torch.no_grad():
        model.prompt.zero_()
    assert base.get_input_embeddings().weight[:3].abs().max() > 0


def test_embeddings_instead_of_ids(tiny_llama, batch):
    model = add_prompt(tiny_llama(), TOKENS)
    embeds = model.base.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(logits(model, inputs_embeds=embeds), logits(model, input_ids=batch["input_ids"]))


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_left_padding_changes_nothing_given_positions(tiny_llama, batch, padded, make):
    model = PromptTuning(tiny_llama() if make == "llama" else tiny_gpt2(), values())
    padded.pop("labels")
    alone, beside = logits(model, input_ids=batch["input_ids"]), logits(model, **padded)
    torch.testing.assert_close(beside[:, -11:], alone[:, -11:], rtol=0, atol=1e-6)
    padded.pop("position_ids")
    assert (logits(model, **padded)[:, -11:] - alone[:, -11:]).abs().max() > 1e-4


def test_reading_on_with_a_cache_equals_reading_all(tiny_llama, batch):
    model, ids = PromptTuning(tiny_llama(), values()).eval(), batch["input_ids"]
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        past = model(input_ids=ids[:, :-2], use_cache=True).past_key_values
        positions = torch.tensor([[9, 10]] * 3)
        rest = model(
            input_ids=ids[:, -2:],
            past_key_values=past,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
        )
    assert rest.logits.shape[1] == 2
    torch.testing.assert_close(rest.logits, whole[:, -2:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_generation_is_greedy_and_blind_to_left_padding(tiny_llama, batch, padded, make):
    model = PromptTuning(tiny_llama() if make == "llama" else tiny_gpt2(), values()).eval()
    ids = expected = batch["input_ids"]
    for _ in range(6):
        last = logits(model, input_ids=expected)[:, -1]
        last[:, 60] = -torch.inf if make == "gpt2" else last[:, 60]  # its end-of-text, which GREEDY forbids
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    ahead = model.generate(padded["input_ids"], padded["attention_mask"], **GREEDY)
    assert torch.equal(ahead[:, PAD:], expected)


@pytest.mark.parametrize(
    "use, says",
    [
        (lambda base: add_prompt(base, 0), "At least one virtual token"),
        (lambda base: add_prompt(add_prompt(base, 2), 2), "already: wrap its `base`"),
        (lambda base: add_prompt(torch.nn.Linear(2, 2), 2), "causal language model of transformers"),
        (lambda base: add_prompt(base, 2048), "leave no room for text in 2048"),
        (lambda base: add_prompt(base, 2)(), "exactly one of the two"),
        (
            lambda base: add_prompt(base, 2).generate(torch.ones(1, 2).long(), use_cache=False),
            "use_cache=True",
        ),
    ],
)
def test_wrong_uses_say_what_to_do(tiny_llama, use, says):
    with pytest.raises(ValueError, match=says):
        use(tiny_llama())


def test_an_encoder_decoder_is_refused(tiny_llama):
    base = tiny_llama()
    base.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        add_prompt(base, 2)


def test_a_checkpoint_holds_what_trains_alone(tiny_llama, batch):
    """A base with tied embeddings could not even be written with the rest; the base is on disk anyway."""
    model, other = (add_prompt(tiny_llama(tied=True), TOKENS) for _ in range(2))
    state = model.state_dict()
    assert sorted(state) == ["prompt"]
    assert other.load_state_dict(state).missing_keys == []
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(logits(other, **inputs), logits(model, **inputs))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


# --- equal to PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [False, True])
def test_logits_loss_and_gradients_equal_pefts(tiny_llama, batch, padded, dtype, padding):
    ours, theirs = pair(tiny_llama, dtype=dtype)
    inputs = {key: padded[key] for key in ("input_ids", "attention_mask", "labels")} if padding else batch
    outputs = [model(**inputs) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    assert ours.prompt.grad.dtype == torch.float32 and ours.prompt.grad.abs().max() > 0
    atol = 1e-6 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(ours.prompt.grad, peft_weight(theirs).grad, rtol=0, atol=atol)


def test_learned_positions_equal_pefts(batch):
    ours, theirs = pair(tiny_gpt2)
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(logits(ours, **inputs), logits(theirs, **inputs))


def test_ten_training_steps_equal_pefts(tiny_llama, batch):
    ours, theirs = pair(tiny_llama)
    losses = []
    for model in (ours, theirs):
        optimiser = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
        losses.append([])
        for _ in range(10):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(ours.prompt, peft_weight(theirs), rtol=0, atol=1e-5)
    assert (ours.prompt - values()).abs().max() > 0.05


def test_the_same_random_stream_gives_pefts_start(tiny_llama):
    """PEFT draws N(0, 1) first, even where it then overwrites it with the vocabulary's rows."""
    base = tiny_llama()
    for init, name in (("random", "RANDOM"), ("vocab", "SAMPLE_VOCAB")):
        torch.manual_seed(11)
        theirs = peft_weight(peft_prompt(copy.deepcopy(base), prompt_tuning_init=name))
        torch.manual_seed(11)
        if init == "vocab":
            torch.randn(TOKENS, 32)
        assert torch.equal(init_prompt(base.get_input_embeddings(), TOKENS, init), theirs)


def test_text_init_equals_pefts():
    from labs_lib.models.base import base_folder, load_base

    base, tokenizer = load_base("tiny")
    text = "Product copy in a friendly tone"
    settings = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": str(base_folder("tiny"))}
    theirs = peft_weight(peft_prompt(copy.deepcopy(base), 30, prompt_tuning_init="TEXT", **settings))
    ids = tokenizer(text)["input_ids"]
    assert 1 < len(ids) < 30
    assert torch.equal(init_prompt(base.get_input_embeddings(), 30, "text", ids=ids), theirs)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generation_equals_pefts(tiny_llama, batch, more):
    ours, theirs = (model.eval() for model in pair(tiny_llama))
    ids = batch["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY, **more}
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))


def test_llama_2_7b_takes_40960_numbers():
    from peft import PromptTuningConfig

    from labs_lib.models.twins import peft_parameter_count, random_like

    twin = random_like("llama-2-7b")
    count = peft_parameter_count(twin, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    model = add_prompt(twin, 10)
    assert sum(each.numel() for each in trainable_parameters(model)) == count == 40_960
    assert count / 6_738_415_616 == pytest.approx(0.0006 / 100, rel=0.02)  # the chapter's share


# --- files


def test_ours_loads_in_peft_and_back_to_the_same_bytes(tiny_llama, batch, tmp_path):
    from peft import PeftModel

    ours = PromptTuning(tiny_llama(), values())
    save_prompt(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert torch.equal(
        logits(ours, input_ids=batch["input_ids"]), logits(theirs, input_ids=batch["input_ids"])
    )
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_prompt(tiny_llama(), tmp_path / "theirs")
    save_prompt(again, tmp_path / "again")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs", "again")
    ]
    assert files[0] == files[1] == files[2]
    again(**batch).loss.backward()  # what is loaded trains on
    assert again.prompt.grad is not None


def test_the_config_is_the_usual_one(tiny_llama, tmp_path):
    save_prompt(PromptTuning(tiny_llama(), values()), tmp_path, base="data/base/small")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"], config["token_dim"]) == (
        "PROMPT_TUNING",
        5,
        32,
    )
    assert config["base_model_name_or_path"] == "data/base/small"


def test_pefts_loads_in_ours(tiny_llama, batch, tmp_path):
    theirs = peft_prompt(tiny_llama(), prompt_tuning_init="SAMPLE_VOCAB")
    theirs.save_pretrained(tmp_path)
    ours = load_prompt(tiny_llama(), tmp_path)
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(logits(ours, **inputs), logits(theirs, **inputs))


def damage_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def change_config(**settings):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return damage


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "damaged"),
        (change_config(peft_type="LORA"), "LORA, not PROMPT_TUNING"),
        (change_config(num_virtual_tokens=7), r"\(5, 32\).*expected \(7, 32\)"),
        (change_config(num_layers=3), "for 3 layers.*Load the base it was trained on"),
        (change_config(num_transformer_submodules=2), "load it with PEFT"),
        (damage_tensors(lambda each: each.update(more=torch.ones(1))), "more than one tensor"),
        (damage_tensors(lambda each: each.update(prompt_embeddings=torch.ones(5, 8))), r"\(5, 8\)"),
    ],
)
def test_a_damaged_prompt_says_so_and_leaves_the_model_alone(tiny_llama, tmp_path, damage, says):
    save_prompt(PromptTuning(tiny_llama(), values()), tmp_path)
    damage(tmp_path)
    model = tiny_llama()
    with pytest.raises(LabsError, match=says):
        load_prompt(model, tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_prompt_is_no_prefix_and_a_plain_model_has_none(tiny_llama, tmp_path):
    save_prompt(PromptTuning(tiny_llama(), values()), tmp_path)
    with pytest.raises(LabsError, match="PROMPT_TUNING, not PREFIX_TUNING"):
        load_prefix(tiny_llama(), tmp_path, cache=None)
    with pytest.raises(LabsError, match="add_prompt"):
        save_prompt(tiny_llama(), tmp_path)
    with pytest.raises(LabsError, match="already"):
        load_prompt(add_prompt(tiny_llama(), 2), tmp_path)


# --- what goes wrong in the library, on these versions


def test_hazard_the_logits_include_the_virtual_positions(tiny_llama, batch):
    """Whoever compares logits with labels by hand must cut the first positions; the loss does so by its labels."""
    from torch.nn.functional import cross_entropy

    ours, theirs = pair(tiny_llama)
    for model in (ours, theirs):
        output = model(**batch)
        assert output.logits.shape[1] == TOKENS + batch["labels"].shape[1]
        cut = output.logits[:, TOKENS:-1].flatten(0, 1)
        after = cross_entropy(cut, batch["labels"][:, 1:].flatten())
        # the prompt's last position predicts the text's first token, which counts as well
        first = cross_entropy(output.logits[:, TOKENS - 1], batch["labels"][:, 0])
        assert output.loss.item() == pytest.approx((10 * after.item() + first.item()) / 11, abs=1e-5)


def test_hazard_peft_ignores_position_ids_so_left_padding_changes_logits(tiny_llama, batch, padded):
    _, theirs = pair(tiny_llama)
    padded.pop("labels")
    alone = logits(theirs, input_ids=batch["input_ids"])[:, -11:]
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        beside = logits(theirs, **padded)[:, -11:]
    assert (beside - alone).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_hazard_pefts_generation_depends_on_left_padding(batch, padded):
    """With learned positions even the generated text changes; in a batch of unequal lengths nobody sees it."""
    _, theirs = (model.eval() for model in pair(tiny_gpt2))
    peft_weight(theirs).data.mul_(4)
    ids = batch["input_ids"]
    alone = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    keys = ("input_ids", "attention_mask")
    beside = theirs.generate(**{key: padded[key] for key in keys}, **GREEDY)[:, PAD:]
    assert not torch.equal(alone, beside)


def test_hazard_adapter_names_is_silently_ignored(tiny_llama, batch):
    """A mixed batch gets the active prompt in every row; generate at least complains."""
    from peft import PromptTuningConfig

    _, theirs = pair(tiny_llama)
    theirs.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    ids, names = batch["input_ids"], ["default", "other", "other"]
    default = logits(theirs, input_ids=ids)
    theirs.set_adapter("other")
    assert (logits(theirs, input_ids=ids) - default).abs().max() > 1e-3
    theirs.set_adapter("default")
    assert torch.equal(logits(theirs, input_ids=ids, adapter_names=names), default)
    with pytest.raises(ValueError, match="adapter_names"):
        theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **GREEDY)


@torch.no_grad()
def test_hazard_a_decoding_loop_through_peft_reads_the_prompt_again(tiny_llama, batch):
    ours, theirs = (model.eval() for model in pair(tiny_llama))
    ids = batch["input_ids"]
    for model, positions, right in ((ours, 1, True), (theirs, 1 + TOKENS, False)):
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past).logits
        assert step.shape[1] == positions
        close = torch.allclose(step[:, -1], logits(model, input_ids=ids)[:, -1], rtol=0, atol=1e-5)
        assert close == right


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_hazard_peft_cannot_generate_with_a_static_cache(tiny_llama, batch):
    ours, theirs = (model.eval() for model in pair(tiny_llama))
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
        **GREEDY,
    }
    expected = ours.generate(**inputs)
    assert torch.equal(ours.generate(**inputs, cache_implementation="static"), expected)
    with pytest.raises(KeyError, match="cache_position"):
        theirs.generate(**inputs, cache_implementation="static")


def test_hazard_peft_refuses_to_train_a_saved_prompt_on(tiny_llama, batch, tmp_path):
    """And yet, loaded without the switch that it refuses, the prompt gets a gradient."""
    from peft import PeftModel

    peft_prompt(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    theirs(**batch).loss.backward()
    assert peft_weight(theirs).grad.abs().max() > 0


def test_hazard_there_is_nothing_to_merge_into(tiny_llama):
    with pytest.raises(AttributeError, match="merge_and_unload"):
        peft_prompt(tiny_llama()).merge_and_unload()


def test_hazard_peft_takes_zero_tokens_and_a_base_of_another_depth(tiny_llama, batch, tmp_path):
    """Nothing is said; ours names both (tests above)."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    assert peft_prompt(tiny_llama(), 0)(**batch).logits.shape[1] == 11
    peft_prompt(tiny_llama()).save_pretrained(tmp_path)
    config = copy.deepcopy(tiny_llama().config)
    config.num_hidden_layers = 3
    deeper = LlamaForCausalLM(config)
    PeftModel.from_pretrained(deeper, tmp_path)(input_ids=batch["input_ids"])
    with pytest.raises(LabsError, match="for 2 layers"):
        load_prompt(LlamaForCausalLM(config), tmp_path)


def test_gradient_checkpointing_works(tiny_llama, batch):
    """No hazard here, unlike for prefixes: there is no cache to lose."""
    gradients = []
    for checkpointing in (False, True):
        model = PromptTuning(tiny_llama(), values()).train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.base.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append(model.prompt.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
