"""Our LLaMA-Adapter is PEFT's AdaptionPrompt: outputs, gradients, training, files; and where PEFT's goes wrong."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.adapters_io import load_llama_adapter, save_llama_adapter
from labs_lib.methods.llama_adapter import (
    PromptedAttention,
    count_llama_adapter,
    inject_llama_adapter,
    llama_adapter_state_dict,
    prompted_layers,
    remove_llama_adapter,
    rotate,
    zero_gated_attention,
)
from labs_lib.methods.lora import trainable_parameters

from .parity import assert_close, assert_same, logits, quantised, weights

TOP = "model.layers.1.self_attn"


def inject(model, prompts=5, layers=2, seed=4):
    return inject_llama_adapter(model, prompts, layers, torch.Generator().manual_seed(seed))


def open_gates(model):
    """With a gate of zero the prompts do nothing and every comparison of them is vacuous."""
    for i, layer in enumerate(prompted_layers(model).values()):
        layer.adaption_gate.data.fill_(0.7 - 1.5 * i)
    return model


def make(kind="llama", **sizes):
    """A tiny model of one of the kinds, with grouped heads, the same random weights every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | sizes
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


# --- the pieces


def test_attention_by_hand():
    """One head of size 1, two prompts: scores 0 and ln 3, so weights 1/4 and 3/4."""
    queries, keys = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)
    keys[0, 0, 1] = torch.tensor(3.0).log()
    values = torch.tensor([10.0, 30.0]).view(1, 1, 2, 1)
    assert zero_gated_attention(queries, keys, values, torch.tensor([0.5])).item() == pytest.approx(0.5 * 25)
    assert zero_gated_attention(queries, keys, values, torch.zeros(1)).item() == 0


def test_attention_is_torchs_with_shared_heads():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 4, 6, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    batched = [each.expand(3, -1, -1, -1) for each in (keys, values)]
    expected = nn.functional.scaled_dot_product_attention(queries, *batched, enable_gqa=True)
    expected = 0.3 * expected.transpose(1, 2).reshape(3, 6, 32)
    torch.testing.assert_close(zero_gated_attention(queries, keys, values, torch.tensor([0.3])), expected)


def test_rotation_is_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = make()
    x = torch.randn(2, 4, 7, 8)
    cos, sin = model.model.rotary_emb(x, torch.arange(7)[None].expand(2, -1))
    assert torch.equal(rotate(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_prompts_are_standard_normal_from_the_generator_only():
    state = torch.get_rng_state()
    first, second = (inject(make(), prompts=50) for _ in range(2))
    torch.set_rng_state(state)
    assert_same(llama_adapter_state_dict(first), llama_adapter_state_dict(second))
    drawn = torch.cat([layer.adaption_prompt.flatten() for layer in prompted_layers(first).values()])
    assert drawn.std().item() == pytest.approx(1, abs=0.05) and abs(drawn.mean().item()) < 0.05


# --- into a model


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_injecting_changes_nothing_until_a_gate_opens(batch, kind):
    model = inject(make(kind))
    assert torch.equal(logits(model, batch), logits(make(kind), batch))
    assert not torch.equal(logits(open_gates(model), batch), logits(make(kind), batch))


def test_only_the_top_layers_get_prompts(tiny_llama):
    model = inject(tiny_llama(), prompts=3, layers=1)
    assert list(prompted_layers(model)) == [TOP]
    numbers = sum(parameter.numel() for parameter in trainable_parameters(model))
    assert numbers == count_llama_adapter(32, prompts=3, layers=1) == 3 * 32 + 1


def test_at_init_only_the_gates_get_a_gradient(tiny_llama, batch):
    """What the prompts do is multiplied by the gate, and so is their gradient: they wait one step for it."""
    model = inject(tiny_llama())
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("adaption_" in name)
    for layer in prompted_layers(model).values():
        assert torch.count_nonzero(layer.adaption_prompt.grad) == 0
        assert layer.adaption_gate.grad.item() != 0


def test_half_precision_base_trains_in_float32(tiny_llama, batch):
    model = open_gates(inject(tiny_llama(dtype=torch.bfloat16)))
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trainable_parameters(model))


def test_generating_with_a_cache_and_without_is_the_same(tiny_llama, batch):
    """The prompts are in no cache: each layer makes their keys and values anew."""
    model = open_gates(inject(tiny_llama())).eval()
    ids = batch["input_ids"][:1]
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached, plain = (model.generate(ids, use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(cached, plain)
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, logits(model, {"input_ids": ids})[:, 7:], rtol=0, atol=1e-6)


def test_left_padding_changes_nothing(tiny_llama, batch):
    model = open_gates(inject(tiny_llama())).eval()
    ids = batch["input_ids"]
    padded = torch.cat([torch.zeros(3, 4, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(15) >= 4).long().expand(3, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(got, logits(model, batch), rtol=0, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama, batch):
    plain, saving = (open_gates(inject(tiny_llama())).train() for _ in range(2))
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(**batch, use_cache=False).loss.backward()
    assert_close(gradients(saving), gradients(plain))


@pytest.mark.parametrize("layers", [0, -1, 3, 30])
def test_a_wrong_number_of_layers_says_how_many_there_are(tiny_llama, layers):
    model = tiny_llama()
    with pytest.raises(ValueError, match="has 2: ask for 1 to 2"):
        inject_llama_adapter(model, layers=layers)
    assert not prompted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_mistakes(tiny_llama):
    with pytest.raises(ValueError, match="at least 1: got 0"):
        inject(tiny_llama(), prompts=0)
    with pytest.raises(ValueError, match="already carries"):
        inject(inject(tiny_llama()))
    with pytest.raises(ValueError, match="known: llama, mistral, qwen2"):
        inject(make("qwen3"))  # it normalises its queries
    with pytest.raises(ValueError, match="None makes its queries"):
        inject(nn.Linear(3, 3))


def test_remove_gives_the_base_back(tiny_llama):
    model = open_gates(inject(tiny_llama()))
    assert_same(weights(remove_llama_adapter(model)), weights(tiny_llama()))


def test_a_learners_own_class_counts(tiny_llama):
    class Mine(PromptedAttention):
        pass

    model = inject_llama_adapter(tiny_llama(), 5, 2, kind=Mine)
    assert {type(layer) for layer in prompted_layers(model).values()} == {Mine}


# --- equal to PEFT


def peft_prompt(base, prompts=5, layers=2):
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(adapter_len=prompts, adapter_layers=layers, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def pair(base, prompts=5, layers=2):
    """Our model and PEFT's on equal bases with equal prompts and open gates."""
    from peft import set_peft_model_state_dict

    ours = open_gates(inject(copy.deepcopy(base), prompts, layers))
    theirs = peft_prompt(copy.deepcopy(base), prompts, layers)
    set_peft_model_state_dict(theirs, llama_adapter_state_dict(ours))
    return ours.train(), theirs.train()


def peft_tensors(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def gradients(model):
    return {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


CASES = [
    {},
    {"prompts": 1, "layers": 1},
    {"num_key_value_heads": 4},
    {"kind": "mistral", "num_key_value_heads": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_gradients_equal_pefts(batch, case):
    case = dict(case)
    numbers = {key: case.pop(key) for key in ("prompts", "layers") if key in case}
    ours, theirs = pair(make(**case), **numbers)
    outputs = [model(**batch) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert_same(gradients(ours), gradients(theirs))
    assert all(torch.count_nonzero(gradient) > 0 for gradient in gradients(ours).values())


def test_ten_training_steps_equal_pefts(tiny_llama, batch):
    ours, theirs = pair(tiny_llama())
    before = {key: value.clone() for key, value in llama_adapter_state_dict(ours).items()}
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
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert_same(llama_adapter_state_dict(ours), peft_tensors(theirs))
    assert all(not torch.equal(before[key], value) for key, value in llama_adapter_state_dict(ours).items())
    assert_same(weights(remove_llama_adapter(ours)), weights(tiny_llama()))  # the base is untouched


def test_on_a_quantised_base_ours_is_pefts(tiny_llama, batch):
    from peft import set_peft_model_state_dict

    ours = open_gates(inject(quantised(tiny_llama())))
    theirs = peft_prompt(quantised(tiny_llama()))
    set_peft_model_state_dict(theirs, llama_adapter_state_dict(ours))
    outputs = [model.train()(**batch) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert_same(gradients(ours), gradients(theirs))


def test_as_many_parameters_as_peft_trains_on_llama_2_7b():
    from peft import AdaptionPromptConfig

    from labs_lib.models.twins import peft_parameter_count, random_like

    model = random_like("llama-2-7b")
    config = AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM")
    assert peft_parameter_count(model, config) == count_llama_adapter(4096, 10, 30) == 1_228_830
    assert sum(p.numel() for p in trainable_parameters(inject_llama_adapter(model))) == 1_228_830


# --- on disk


@pytest.mark.parametrize("layers", [1, 2])
def test_ours_loads_in_peft_and_pefts_in_ours(tiny_llama, batch, tmp_path, layers):
    from peft import PeftModel

    ours = open_gates(inject(tiny_llama(), layers=layers)).eval()
    save_llama_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert_same(llama_adapter_state_dict(ours), peft_tensors(theirs))
    assert torch.equal(logits(theirs, batch), logits(ours, batch))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_llama_adapter(tiny_llama(), tmp_path / "theirs").eval()
    assert torch.equal(logits(again, batch), logits(ours, batch))
    save_llama_adapter(again, tmp_path / "again")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs", "again")
    ]
    assert files[0] == files[1] == files[2]
    again.train()(**batch).loss.backward()  # what is loaded can be trained on
    assert all(parameter.grad is not None for parameter in trainable_parameters(again))


def change(edit):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def setting(**more):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return damage


KEY = f"base_model.model.{TOP}.adaption_prompt"


@pytest.mark.parametrize(
    "damage, says",
    [
        (
            change(lambda tensors: tensors.update({KEY: torch.ones(1, 5, 7)})),
            r"is \(1, 5, 7\), expected \(1, 5, 32\)",
        ),
        (change(lambda tensors: tensors.pop(KEY)), "adaption_prompt is missing"),
        (change(lambda tensors: tensors.update(stray=torch.ones(1))), "it has stray"),
        (setting(adapter_len=6), r"expected \(1, 6, 32\)"),
        (setting(adapter_layers=1), "layers.0.self_attn.adaption_gate, which this model has no place for"),
        (setting(peft_type="LORA"), "LORA, not ADAPTION_PROMPT"),
    ],
)
def test_a_misfit_says_why_and_leaves_the_model_alone(tiny_llama, tmp_path, damage, says):
    save_llama_adapter(inject(tiny_llama()), tmp_path)
    damage(tmp_path)
    model = tiny_llama()
    with pytest.raises(LabsError, match=says):
        load_llama_adapter(model, tmp_path)
    assert not prompted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_save(tiny_llama, tmp_path):
    with pytest.raises(LabsError, match="inject_llama_adapter"):
        save_llama_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    "depth, what", [(1, "layers.0.self_attn|layers.1.self_attn"), (4, "no place|missing")]
)
def test_another_depth_is_refused(tiny_llama, tmp_path, depth, what):
    save_llama_adapter(inject(tiny_llama()), tmp_path)
    with pytest.raises(LabsError, match=what):
        load_llama_adapter(make(num_hidden_layers=depth), tmp_path)


# --- what PEFT 0.21 does that a learner will meet


def test_pefts_thirty_layers_raise_on_a_shallower_model(tiny_llama):
    with pytest.raises(ValueError, match="more adapter layers '30' than the model has '2'"):
        peft_prompt(tiny_llama(), layers=30)


def test_zero_layers_are_all_layers_in_peft(tiny_llama):
    """layers[-0:] is the whole list."""
    model = peft_prompt(tiny_llama(), layers=0)
    assert len(trainable_parameters(model)) == 2 * 2


def test_peft_does_not_know_qwen():
    with pytest.raises(ValueError, match="Unsupported model type"):
        peft_prompt(make("qwen2"))


def by_hand(model, base, x, cos, sin):
    """What one layer adds, written as plainly as possible: loops over text, heads and prompts."""
    attention, size = base, base.head_dim
    prompt, gate = model.adaption_prompt[0], model.adaption_gate
    queries = rotate(attention.q_proj(x).unflatten(-1, (-1, size)).transpose(1, 2), cos, sin)
    keys = attention.k_proj(prompt).unflatten(-1, (-1, size))
    values = attention.v_proj(prompt).unflatten(-1, (-1, size))
    shared = queries.shape[1] // keys.shape[1]
    rows = []
    for t in range(x.shape[1]):
        heads = []
        for h in range(queries.shape[1]):
            scores = torch.stack([queries[0, h, t] @ key for key in keys[:, h // shared]]) / size**0.5
            heads.append(gate * (scores.softmax(0)[:, None] * values[:, h // shared]).sum(0))
        rows.append(torch.cat(heads) @ attention.o_proj.weight.T)
    return torch.stack(rows)[None]


@pytest.mark.parametrize("sizes", [{}, {"head_dim": 16}, {"attention_bias": True}], ids=str)
@torch.no_grad()
def test_ours_also_fits_heads_of_any_size_and_biases(sizes):
    """There PEFT cannot say what is right (next two tests), so a plain reference does."""
    model = open_gates(inject(make(**sizes)))
    layer, x = prompted_layers(model)[TOP], torch.randn(1, 6, 32)
    cos, sin = model.model.rotary_emb(x, torch.arange(6)[None])
    got, _ = layer(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
    plain, _ = layer.base(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
    torch.testing.assert_close(got - plain, by_hand(layer, layer.base, x, cos, sin), rtol=0, atol=1e-6)


def test_peft_fails_where_heads_are_not_width_over_heads(batch):
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        logits(peft_prompt(make(head_dim=16)), batch)


def test_peft_adds_a_bias_twice_so_that_its_start_is_not_the_base(batch):
    """The gated result goes through o_proj, whose bias is there even where the gate is zero."""
    base = make(attention_bias=True)
    expected = logits(base, batch)
    assert (logits(peft_prompt(copy.deepcopy(base)), batch) - expected).abs().max() > 1e-2
    assert torch.equal(logits(inject(copy.deepcopy(base)), batch), expected)


def test_peft_trains_in_the_bases_half_precision(tiny_llama):
    model = peft_prompt(tiny_llama(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trainable_parameters(model)} == {torch.bfloat16}


def test_pefts_has_no_merge_and_no_unload(tiny_llama):
    for missing in ("merge_and_unload", "merge_adapter", "unload"):
        with pytest.raises(AttributeError, match=missing):
            getattr(peft_prompt(tiny_llama()), missing)()


def test_peft_ignores_adapter_names_in_a_batch(tiny_llama, batch):
    from peft import AdaptionPromptConfig

    model = pair(tiny_llama())[1].eval()
    model.add_adapter("other", AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM"))
    with torch.no_grad():
        mixed = model(input_ids=batch["input_ids"], adapter_names=["default", "other", "__base__"]).logits
    assert torch.equal(mixed, logits(model, batch))  # every row got the active adapter
    assert not torch.allclose(
        mixed[1:], logits(tiny_llama(), batch)[1:]
    )  # what rows 1 and 2 should have been


def test_peft_loads_an_adapter_of_a_shallower_model_into_the_wrong_place(
    tiny_llama, batch, tmp_path, recwarn
):
    """Its tensors name layers 0 and 1, the top of the deeper model is layers 2 and 3: nothing is loaded, or said."""
    from peft import PeftModel

    save_llama_adapter(open_gates(inject(tiny_llama())), tmp_path)
    deeper = make(num_hidden_layers=4)
    expected = logits(deeper, batch)
    loaded = PeftModel.from_pretrained(deeper, tmp_path)
    assert torch.equal(logits(loaded, batch), expected)  # all gates are still zero
    assert not [w for w in recwarn if "adaption" in str(w.message)]
