"""Our prefix tuning is PEFT's, with and without the projection; and what goes wrong in the library is on record."""

import json
import warnings

import pytest
import torch
import transformers
from packaging.version import Version

from labs_lib.errors import LabsError
from labs_lib.methods.lora import trainable_parameters
from labs_lib.methods.prefix_tuning import (
    DirectPrefix,
    PrefixTuning,
    ProjectedPrefix,
    add_prefix,
    export_prefix,
    gated_attention,
    prefix_shape,
    split_prefix,
    text_prefix,
)
from labs_lib.methods.virtual_io import load_prefix, load_prompt, save_prefix

TOKENS, PAD, HIDDEN = 5, 4, 24
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def cache():
    from transformers import DynamicCache

    return DynamicCache


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
    """A model with learned positions and as many key-value heads as heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    size = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=60, pad_token_id=0))


def peft_prefix(base, **settings):
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **settings)
    return get_peft_model(base, config)


def peft_settings(hidden):
    return {} if hidden is None else {"prefix_projection": True, "encoder_hidden_size": hidden}


def parameters(model):
    """The prefix's parameters in one order, whether ours or PEFT's: embedding (or all), then the two layers."""
    prefix = model.prefix if hasattr(model, "prefix") else model.prompt_encoder["default"]
    return list(prefix.parameters())


def pair(make, cache, hidden=None, **kwargs):
    """Our model and PEFT's on equal bases with equal prefixes."""
    generator = torch.Generator().manual_seed(3)
    ours = add_prefix(make(**kwargs), TOKENS, cache, hidden, generator=generator)
    theirs = peft_prefix(make(**kwargs), **peft_settings(hidden))
    for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
        other.data.copy_(mine)
    return ours.train(), theirs.train()


@torch.no_grad()
def logits(model, **inputs):
    return model.eval()(**inputs).logits


def checkpoint(base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable()
    return base


# --- the pieces


def test_shape_of_a_cache(tiny_llama):
    assert prefix_shape(tiny_llama().config) == (2, 2, 8)  # grouped queries: 4 heads, 2 for keys and values
    assert prefix_shape(tiny_gpt2().config) == (2, 4, 8)


def test_split_by_hand():
    flat = torch.arange(24).view(2, 12).float()  # 2 tokens, 3 layers x 2, 2 heads of size 1
    pairs = split_prefix(flat, layers=3, heads=2, batch=5)
    assert len(pairs) == 3
    keys, values = pairs[1]
    assert keys.shape == values.shape == (5, 2, 2, 1)
    assert keys[4, :, :, 0].tolist() == [[4, 16], [5, 17]]  # head by token
    assert values[4, :, :, 0].tolist() == [[6, 18], [7, 19]]
    with pytest.raises(ValueError, match="12 numbers per token do not divide into 2 x 5 layers"):
        split_prefix(flat, layers=5, heads=2, batch=1)


def test_projection_is_two_layers_with_tanh_between():
    prefix = ProjectedPrefix(3, width=4, hidden=6, layers=2)
    first, last = prefix.transform[0], prefix.transform[2]
    expected = last(torch.tanh(first(prefix.embedding)))
    assert prefix().shape == (3, 16)
    torch.testing.assert_close(prefix(), expected)
    assert prefix.embedding.std() > 0.5
    assert first.weight.abs().max() <= 0.5 and last.weight.abs().max() <= 6**-0.5


def test_draws_come_from_the_generator_only(tiny_llama, cache):
    state = torch.get_rng_state()
    base = tiny_llama()
    torch.set_rng_state(state)
    for hidden in (None, HIDDEN):
        draws = [
            add_prefix(base, TOKENS, cache, hidden, generator=torch.Generator().manual_seed(4)).prefix()
            for _ in range(2)
        ]
        assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_with_a_prefix_is_a_gated_addition():
    """He et al.'s form against the library's attention over prefix and text in one."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((6, 8), (6, 8), (6, 8), (3, 8), (3, 8))
    queries, keys, values, *prefix = (torch.randn(2, 4, *shape, generator=generator) for shape in shapes)
    visible = torch.ones(6, 6).tril().bool()
    both = [torch.cat(pair, dim=-2) for pair in zip(prefix, (keys, values), strict=True)]
    mask = torch.cat([torch.ones(6, 3).bool(), visible], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, *both, attn_mask=mask)
    got, gate = gated_attention(queries, keys, values, prefix, visible)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    weights = (queries @ both[0].mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(gate, weights[..., :3].sum(-1, keepdim=True), rtol=0, atol=1e-6)
    seen, _ = gated_attention(queries, keys, values, prefix)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, *both)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_gate_is_the_share_of_attention_in_a_model(tiny_llama, batch, cache):
    """In a real layer, too: rotary positions are in the keys already, and the prefix has none."""
    base = tiny_llama()
    base.set_attn_implementation("eager")
    model = add_prefix(base, TOKENS, cache, generator=torch.Generator().manual_seed(3)).eval()
    shares, seen = model(input_ids=batch["input_ids"], output_attentions=True).attentions[0], {}
    assert shares.shape == (3, 4, 11, TOKENS + 11)

    def watch(module, args, kwargs):
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        heads = [getattr(module, f"{kind}_proj")(hidden).view(3, 11, -1, 8).transpose(1, 2) for kind in "qkv"]
        seen["heads"] = *apply_rotary_pos_emb(*heads[:2], cos, sin), heads[2]

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer = base.model.layers[0].self_attn
    layer.register_forward_pre_hook(watch, with_kwargs=True)
    model(input_ids=batch["input_ids"])
    queries, keys, values = (each.repeat_interleave(4 // each.shape[1], dim=1) for each in seen["heads"])
    prefix = [each.repeat_interleave(2, dim=1) for each in split_prefix(model.prefix(), 2, 2, 3)[0]]
    _, gate = gated_attention(queries, keys, values, prefix, torch.ones(11, 11).tril().bool())
    torch.testing.assert_close(gate[..., 0], shares[..., :TOKENS].sum(-1), rtol=0, atol=1e-6)


# --- into a model


@torch.no_grad()
def test_the_prefix_of_a_text_is_the_text_itself(tiny_llama, batch, cache):
    """Whatever a written prompt does, a prefix can do: start it from the prompt's keys and values."""
    ids = [4, 17, 50, 2]
    base = tiny_llama().eval()
    model = PrefixTuning(base, text_prefix(base, ids), cache)
    written = torch.cat([torch.tensor([ids] * 3), batch["input_ids"]], dim=1)
    expected = logits(base, input_ids=written)[:, 4:]
    torch.testing.assert_close(logits(model, input_ids=batch["input_ids"]), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="ids of a text"):
        text_prefix(base, [])


@pytest.mark.parametrize(
    "hidden, trainable", [(None, 5 * 64), (HIDDEN, 5 * 16 + 16 * 24 + 24 + 24 * 64 + 64)]
)
def test_only_the_prefix_trains_and_the_base_stays(tiny_llama, batch, cache, hidden, trainable):
    base = tiny_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = add_prefix(base, TOKENS, cache, hidden)
    assert sum(each.numel() for each in trainable_parameters(model)) == trainable
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    assert all(each.grad is not None for each in model.prefix.parameters())
    optimiser.step()
    assert model.base is base
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_logits_keep_their_length_and_embeddings_serve_as_input(tiny_llama, batch, cache):
    model = add_prefix(tiny_llama(), TOKENS, cache)
    embeds = model.base.get_input_embeddings()(batch["input_ids"])
    output = logits(model, inputs_embeds=embeds)
    assert output.shape[1] == 11
    assert torch.equal(output, logits(model, input_ids=batch["input_ids"]))


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_left_padding_changes_nothing_given_positions(tiny_llama, batch, padded, cache, make):
    model = add_prefix(tiny_llama() if make == "llama" else tiny_gpt2(), TOKENS, cache)
    padded.pop("labels")
    alone, beside = logits(model, input_ids=batch["input_ids"]), logits(model, **padded)
    torch.testing.assert_close(beside[:, -11:], alone, rtol=0, atol=1e-6)


def test_reading_on_with_a_cache_equals_reading_all(tiny_llama, batch, cache):
    model, ids = add_prefix(tiny_llama(), TOKENS, cache).eval(), batch["input_ids"]
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        past = model(input_ids=ids[:, :-2], use_cache=True).past_key_values
        assert past.get_seq_length() == TOKENS + 9
        rest = model(input_ids=ids[:, -2:], past_key_values=past, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(rest, whole[:, -2:], rtol=0, atol=1e-6)


def test_two_calls_do_not_share_a_cache(tiny_llama, batch, cache):
    model = add_prefix(tiny_llama(), TOKENS, cache)
    first = logits(model, input_ids=batch["input_ids"])
    assert torch.equal(logits(model, input_ids=batch["input_ids"]), first)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_generation_is_greedy_and_blind_to_left_padding(tiny_llama, batch, padded, cache, make):
    model = add_prefix(tiny_llama() if make == "llama" else tiny_gpt2(), TOKENS, cache).eval()
    ids = expected = batch["input_ids"]
    for _ in range(6):
        last = logits(model, input_ids=expected)[:, -1]
        last[:, 60] = -torch.inf if make == "gpt2" else last[:, 60]  # its end-of-text, which GREEDY forbids
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    ahead = model.generate(padded["input_ids"], padded["attention_mask"], **GREEDY)
    assert torch.equal(ahead[:, PAD:], expected)


def test_export_drops_the_projection_and_nothing_else(tiny_llama, batch, cache):
    model = add_prefix(tiny_llama(), TOKENS, cache, HIDDEN)
    before = logits(model, input_ids=batch["input_ids"])
    assert export_prefix(model) is model
    assert torch.equal(logits(model, input_ids=batch["input_ids"]), before)
    assert sum(each.numel() for each in trainable_parameters(model)) == 5 * 64
    model(**batch).loss.backward()
    assert model.prefix.weight.grad is not None
    with pytest.raises(ValueError, match="no projection"):
        export_prefix(model)


def test_zero_init_is_not_no_change(tiny_llama, batch, cache):
    """Zero keys get the score 0, not minus infinity: they take attention away from the text."""
    inputs = {"input_ids": batch["input_ids"]}
    plain = logits(tiny_llama(), **inputs)
    for hidden in (None, HIDDEN):
        model = add_prefix(tiny_llama(), TOKENS, cache, hidden, init="zero")
        assert torch.count_nonzero(model.prefix()) == 0
        assert (logits(model, **inputs) - plain).abs().max() > 1e-2
        theirs = peft_prefix(tiny_llama(), init_weights="zero", **peft_settings(hidden))
        torch.testing.assert_close(logits(theirs, **inputs), logits(model, **inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "use, says",
    [
        (lambda base, cache: add_prefix(base, 0, cache), "At least one virtual token"),
        (lambda base, cache: add_prefix(add_prefix(base, 2, cache), 2, cache), "already: wrap its `base`"),
        (lambda base, cache: add_prefix(torch.nn.Linear(2, 2), 2, cache), "causal language model"),
        (lambda base, cache: add_prefix(base, 2048, cache), "leave no room for text"),
        (lambda base, cache: add_prefix(base, 2, cache, hidden=0), "width of the projection"),
        (lambda base, cache: add_prefix(base, 2, cache, init="text"), r"start from text_prefix\(base, ids\)"),
        (lambda base, cache: add_prefix(base, 2, cache)(), "exactly one of the two"),
        (
            lambda base, cache: add_prefix(base, 2, cache).generate(torch.ones(1, 2).long(), use_cache=False),
            "use_cache=True",
        ),
    ],
)
def test_wrong_uses_say_what_to_do(tiny_llama, cache, use, says):
    with pytest.raises(ValueError, match=says):
        use(tiny_llama(), cache)


def test_gradient_checkpointing_is_refused_in_training_only(tiny_llama, batch, cache):
    model = add_prefix(checkpoint(tiny_llama()), TOKENS, cache)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model.train()(**batch)
    plain = add_prefix(tiny_llama(), TOKENS, cache)
    plain.prefix = model.prefix
    assert torch.equal(
        logits(model, input_ids=batch["input_ids"]), logits(plain, input_ids=batch["input_ids"])
    )


def test_a_checkpoint_holds_what_trains_alone(tiny_llama, batch, cache):
    """A base with tied embeddings could not even be written with the rest; the base is on disk anyway."""
    model, other = (add_prefix(tiny_llama(tied=True), TOKENS, cache, HIDDEN) for _ in range(2))
    state = model.state_dict()
    layers = [f"prefix.transform.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    assert sorted(state) == ["prefix.embedding", *layers]
    assert other.load_state_dict(state).missing_keys == []
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(logits(other, **inputs), logits(model, **inputs))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


# --- equal to PEFT


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [False, True])
def test_logits_loss_and_gradients_equal_pefts(tiny_llama, batch, padded, cache, dtype, hidden, padding):
    ours, theirs = pair(tiny_llama, cache, hidden, dtype=dtype)
    outputs = [model(**(padded if padding else batch)) for model in (ours, theirs)]
    atol = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=atol)
    for output in outputs:
        output.loss.backward()
    for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
        assert mine.grad.dtype == torch.float32 and mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=atol)


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "projected"])
def test_learned_positions_equal_pefts(batch, padded, cache, hidden):
    ours, theirs = pair(tiny_gpt2, cache, hidden)
    for inputs in (batch, padded):
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        torch.testing.assert_close(logits(ours, **inputs), logits(theirs, **inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "projected"])
def test_ten_training_steps_equal_pefts(tiny_llama, batch, cache, hidden):
    ours, theirs = pair(tiny_llama, cache, hidden)
    before = [each.detach().clone() for each in parameters(ours)]
    losses = []
    for model in (ours, theirs):
        optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]
    for mine, other, start in zip(parameters(ours), parameters(theirs), before, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
        assert (mine - start).abs().max() > 0.02


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "projected"])
def test_the_same_random_stream_gives_pefts_start(tiny_llama, cache, hidden):
    base, other = tiny_llama(), tiny_llama()
    torch.manual_seed(11)
    theirs = peft_prefix(other, **peft_settings(hidden))
    torch.manual_seed(11)
    ours = add_prefix(base, TOKENS, cache, hidden)
    for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("padding", [False, True])
def test_generation_equals_pefts(tiny_llama, batch, padded, cache, padding, more):
    ours, theirs = (model.eval() for model in pair(tiny_llama, cache))
    inputs = padded if padding else {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **GREEDY, **more}
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))


@pytest.mark.parametrize(
    "twin, hidden, expected",
    [
        ("llama-2-7b", 1024, 273_015_808),  # the chapter's configuration while it trains: 4 % of the model
        ("llama-2-7b", None, 7_864_320),  # without projection, and what is saved in any case
        ("llama-3-8b", None, 1_966_080),  # grouped queries: a quarter
    ],
)
def test_parameters_of_public_models_equal_pefts(cache, twin, hidden, expected):
    from peft import PrefixTuningConfig

    from labs_lib.models.twins import peft_parameter_count, random_like

    base = random_like(twin)
    settings = {"num_virtual_tokens": 30, **peft_settings(hidden)}
    count = peft_parameter_count(base, PrefixTuningConfig(task_type="CAUSAL_LM", **settings))
    model = add_prefix(base, 30, cache, hidden)
    assert sum(each.numel() for each in trainable_parameters(model)) == count == expected


def test_a_prefix_costs_its_cache(tiny_llama, cache):
    """Per sequence: tokens x 2 x layers x width numbers. On Llama-2-7B in half precision, 30 tokens are 15.7 MB."""
    model = add_prefix(tiny_llama(dtype=torch.bfloat16), TOKENS, cache)
    one, many = model.fill(1), model.fill(8)
    sizes = [sum(each.nbytes for keys, values, *_ in past for each in (keys, values)) for past in (one, many)]
    assert sizes == [2 * model.prefix().numel(), 8 * 2 * model.prefix().numel()]
    assert 2 * 7_864_320 == 15_728_640


# --- files


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "projected"])
def test_ours_loads_in_peft_and_back_to_the_same_bytes(tiny_llama, batch, cache, tmp_path, hidden):
    from peft import PeftModel

    ours, inputs = add_prefix(tiny_llama(), TOKENS, cache, hidden), {"input_ids": batch["input_ids"]}
    save_prefix(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert torch.equal(logits(ours, **inputs), logits(theirs, **inputs))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_prefix(tiny_llama(), tmp_path / "theirs", cache)
    save_prefix(again, tmp_path / "again")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs", "again")
    ]
    assert files[0] == files[1] == files[2]
    assert isinstance(again.prefix, DirectPrefix)
    again(**batch).loss.backward()  # what is loaded trains on
    assert again.prefix.weight.grad is not None


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "projected"])
def test_pefts_loads_in_ours(tiny_llama, batch, cache, tmp_path, hidden):
    theirs, inputs = peft_prefix(tiny_llama(), **peft_settings(hidden)), {"input_ids": batch["input_ids"]}
    theirs.save_pretrained(tmp_path)
    ours = load_prefix(tiny_llama(), tmp_path, cache)
    torch.testing.assert_close(logits(ours, **inputs), logits(theirs, **inputs), rtol=0, atol=1e-6)


def test_a_prefix_of_another_model_says_so_and_leaves_this_one_alone(tiny_llama, cache, tmp_path):
    save_prefix(add_prefix(tiny_llama(), TOKENS, cache), tmp_path, base="data/base/small")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["token_dim"], config["num_attention_heads"], config["prefix_projection"]) == (16, 2, False)
    other = tiny_gpt2()  # twice the width: no grouped queries
    with pytest.raises(LabsError, match=r"\(5, 64\).*expected \(5, 128\).*data/base/small"):
        load_prefix(other, tmp_path, cache)
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(LabsError, match="PREFIX_TUNING, not PROMPT_TUNING"):
        load_prompt(tiny_llama(), tmp_path)
    with pytest.raises(LabsError, match="add_prefix"):
        save_prefix(tiny_llama(), tmp_path)
    with pytest.raises(LabsError, match="already"):
        load_prefix(add_prefix(tiny_llama(), 2, cache), tmp_path, cache)


# --- what goes wrong in the library, on these versions


def test_hazard_gradient_checkpointing_raises_early_or_late(tiny_llama, batch, cache):
    """Checkpointing drops the cache. Before: a clear error; switched on afterwards: a riddle about sizes."""
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        peft_prefix(checkpoint(tiny_llama()))
    theirs = peft_prefix(tiny_llama()).train()
    checkpoint(theirs.base_model)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(11\) must match the size of tensor b \(16\)"):
        theirs(**batch)


def test_hazard_left_padding_shifts_the_text_unless_positions_are_given(tiny_llama, batch, padded, cache):
    for model in pair(tiny_llama, cache):
        alone = logits(model, input_ids=batch["input_ids"])
        inputs = {key: padded[key] for key in ("input_ids", "attention_mask")}
        assert (logits(model, **inputs)[:, -11:] - alone).abs().max() > 1e-3
        inputs["position_ids"] = padded["position_ids"]
        torch.testing.assert_close(logits(model, **inputs)[:, -11:], alone, rtol=0, atol=1e-6)


def test_hazard_adapter_names_is_silently_ignored(tiny_llama, batch, cache):
    """A mixed batch gets the active prefix in every row; generate at least complains."""
    from peft import PrefixTuningConfig

    _, theirs = pair(tiny_llama, cache)
    theirs.add_adapter("other", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    ids, names = batch["input_ids"], ["default", "other", "other"]
    default = logits(theirs, input_ids=ids)
    theirs.set_adapter("other")
    assert (logits(theirs, input_ids=ids) - default).abs().max() > 1e-3
    theirs.set_adapter("default")
    assert torch.equal(logits(theirs, input_ids=ids, adapter_names=names), default)
    with pytest.raises(ValueError, match="adapter_names"):
        theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **GREEDY)


@torch.no_grad()
def test_hazard_a_decoding_loop_through_peft_loses_what_was_read(tiny_llama, batch, cache):
    """PEFT puts its own cache in place of the caller's: the next token sees the prefix and nothing else."""
    ours, theirs = (model.eval() for model in pair(tiny_llama, cache))
    ids = batch["input_ids"]
    for model, right in ((ours, True), (theirs, False)):
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
        assert step.past_key_values.get_seq_length() == (TOKENS + 11 if right else TOKENS + 1)
        close = torch.allclose(step.logits[:, -1], logits(model, input_ids=ids)[:, -1], rtol=0, atol=1e-5)
        assert close == right


def test_hazard_peft_cannot_generate_without_its_own_cache(tiny_llama, batch, cache):
    _, theirs = (model.eval() for model in pair(tiny_llama, cache))
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
        **GREEDY,
    }
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        theirs.generate(**inputs, use_cache=False)
    if Version(transformers.__version__) < Version("5.18"):
        return  # 5.17 does not ask for it
    with pytest.raises(AttributeError, match="max_cache_len"):
        theirs.generate(**inputs, cache_implementation="static")


def test_hazard_a_saved_projection_is_gone(tiny_llama, tmp_path):
    """PEFT writes what the projection gives: it can be used, but not trained on, nor read back by its own model."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    theirs = peft_prefix(tiny_llama(), **peft_settings(HIDDEN))
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(theirs, get_peft_model_state_dict(theirs))
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prefix_projection"]
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert len(parameters(PeftModel.from_pretrained(tiny_llama(), tmp_path))) == 1


def test_hazard_one_training_step_is_not_the_same_with_and_without_projection(tiny_llama, batch, cache):
    """Exporting keeps the outputs, not the training: the same numbers move differently through the projection."""
    projected = add_prefix(
        tiny_llama(), TOKENS, cache, HIDDEN, generator=torch.Generator().manual_seed(3)
    ).train()
    direct = PrefixTuning(tiny_llama(), projected.prefix.export(), cache).train()
    moves = []
    for model in (projected, direct):
        before = model.prefix().detach().clone()
        optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
        model(**batch).loss.backward()
        optimiser.step()
        moves.append((model.prefix() - before).detach())
    # directly, Adam moves every number by its learning rate; through the projection, whole directions move further
    assert moves[1].abs().max() < 0.011
    assert moves[0].abs().mean() > 2 * moves[1].abs().mean()
