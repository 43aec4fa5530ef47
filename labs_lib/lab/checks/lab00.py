"""Lab 00's checks: a score of copy, two formulas for memory, a piece of arithmetic, and a prediction.

Beside each exercise stand its mutants: mistakes that learners make, which must fail with words of their own.
"""

from statistics import fmean
from types import SimpleNamespace

from labs_lib.lab.check import answer, exercise, expect, mutant
from labs_lib.measure.count import HeldBytes
from labs_lib.world.catalogue import products
from labs_lib.world.grammar import DEFAULT_STYLE, obeyed, render
from labs_lib.world.tenants import load_tenant

LLAMA_2_7B = 6_738_415_616  # parameters; a test counts them on the twin
ONE_STATE = 4 * LLAMA_2_7B  # bytes


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- compliance


@exercise(
    "compliance",
    reference="labs_lib.world.scorers:compliance",
    hints=[
        "obeyed(text, product, style) gives a dict: rule -> True or False. You need its values.",
        "fmean, from the statistics module, takes True as 1 and False as 0.",
        "return fmean(obeyed(text, product, style).values())",
    ],
)
def check_compliance(candidate, ref):
    style, product = load_tenant("aldermoor-tea").style, products("held_out", 1, seed=3)[0]
    default = render(product, DEFAULT_STYLE)
    rules = obeyed(default, product, style)
    got = candidate(default, product, style)
    expect(got is not None, "It gives None: is a `return` missing?")
    expect(
        not isinstance(got, bool),
        "It gives True or False, for the text as a whole: give the share of its rules.",
    )
    expect(is_number(got), f"It gives {type(got).__name__}; a number between 0 and 1 is asked for.")
    expect(got != sum(rules.values()), f"{got} is the number of rules obeyed: divide by the number of rules.")
    broken = 1 - ref(default, product, style)
    expect(abs(got - broken) > 1e-9, f"{got:.3g} is the share of rules broken: count the True ones.")
    right = ref(default, product, style)
    expect(
        abs(got - right) < 1e-9,
        f"A text that obeys {sum(rules.values())} of {len(rules)} rules gets {got:.3g}, not {right:.3g}.",
    )


@mutant("compliance", says="return")
def forgot_to_return(text, product, style):
    fmean(obeyed(text, product, style).values())


@mutant("compliance", says="text as a whole")
def all_or_nothing(text, product, style):
    return all(obeyed(text, product, style).values())


@mutant("compliance", says="divide by the number")
def number_of_rules_obeyed(text, product, style):
    return sum(obeyed(text, product, style).values())


@mutant("compliance", says="rules broken")
def share_broken(text, product, style):
    return fmean(not kept for kept in obeyed(text, product, style).values())


@mutant("compliance", says="a number between 0 and 1")
def the_verdicts_themselves(text, product, style):
    return list(obeyed(text, product, style).values())


@mutant("compliance", says="gets 0, not")
def equal_to_the_reference(text, product, style):
    return float(text == render(product, style))


@mutant("compliance", says="gets 1, not")
def judged_by_another_guide(text, product, style):
    return fmean(obeyed(text, product, DEFAULT_STYLE).values())


# --- the chapter's 42 GB

answer(
    "lab00.adam_bytes",
    reference=2 * ONE_STATE,
    unit="bytes",
    hints=[
        "Adam keeps two running averages per parameter: of the gradient, and of its square.",
        "Each is a float32, so 4 bytes: 2 x 4 x the number of parameters.",
    ],
    mistakes={
        ONE_STATE: "that is one state of 4 bytes, or two of 2; Adam keeps two, and a float32 takes 4",
        3 * ONE_STATE: "that counts the weights or the gradients as well; only Adam's states are asked for",
        42e9: "that is the chapter's figure; compute it: states x bytes x parameters",
        56e9: "that is for a round 7 billion parameters; take the exact number",
        2 * ONE_STATE / 1e9: "that is in GB; the answer is asked for in bytes",
    },
)


# --- training_bytes


@exercise(
    "training_bytes",
    reference="labs_lib.measure.budget:training_bytes",
    hints=[
        "Frozen weights are held like the others, but get neither a gradient nor a state.",
        "A gradient is as wide as its weight; a state has a width of its own, and there are two.",
        "HeldBytes(parameters=(trainable + frozen) * weight, buffers=0, gradients=trainable * weight, "
        "optimizer=2 * trainable * state)",
    ],
)
def check_training_bytes(candidate, ref):
    got = candidate(1000, 0, 4, 4)
    expect(got is not None, "It gives None: is a `return` missing?")
    expect(
        isinstance(got, HeldBytes),
        f"It gives {type(got).__name__}; return HeldBytes(parameters=..., buffers=0, gradients=..., optimizer=...).",
    )
    expect(
        got.optimizer != 4000,
        "Of 1,000 parameters Adam holds 4,000 bytes: that is one state, and it keeps two.",
    )
    expect(
        got.parameters == 4000,
        f"1,000 weights of 4 bytes are 4,000 bytes, not {got.parameters:,}.",
    )
    expect(got.gradients == 4000, f"1,000 gradients of 4 bytes are 4,000 bytes, not {got.gradients:,}.")
    expect(got.optimizer == 8000, f"Two states of 1,000 x 4 bytes are 8,000 bytes, not {got.optimizer:,}.")

    half = candidate(1000, 0, 2, 4)
    expect(
        half.gradients == 2000, "A gradient has the type of its weight: `weight` bytes, not `state` bytes."
    )
    expect(half.optimizer == 8000, "Adam's numbers take `state` bytes each, whatever the weights take.")
    expect(half.parameters == 2000, f"1,000 weights of 2 bytes are 2,000 bytes, not {half.parameters:,}.")

    adapter = candidate(10, 990, 4, 4)
    expect(adapter.parameters == 4000, "Frozen weights lie in memory, too: `trainable + frozen` of them.")
    expect(adapter.gradients == 40, "Frozen weights get no gradient: only the trainable ones count.")
    expect(adapter.optimizer == 80, "Frozen weights have no states: only the trainable ones count.")
    expect(got.buffers == 0, "Leave buffers at 0.")


@mutant("training_bytes", says="one state, and it keeps two")
def one_state(trainable, frozen=0, weight=4, state=4):
    return HeldBytes((trainable + frozen) * weight, 0, trainable * weight, trainable * state)


@mutant("training_bytes", says="Frozen weights get no gradient")
def gradients_for_all(trainable, frozen=0, weight=4, state=4):
    n = trainable + frozen
    return HeldBytes(n * weight, 0, n * weight, 2 * n * state)


@mutant("training_bytes", says="Frozen weights have no states")
def states_for_all(trainable, frozen=0, weight=4, state=4):
    n = trainable + frozen
    return HeldBytes(n * weight, 0, trainable * weight, 2 * n * state)


@mutant("training_bytes", says="lie in memory, too")
def forgot_the_frozen(trainable, frozen=0, weight=4, state=4):
    return HeldBytes(trainable * weight, 0, trainable * weight, 2 * trainable * state)


@mutant("training_bytes", says="`state` bytes each")
def states_as_wide_as_weights(trainable, frozen=0, weight=4, state=4):
    return HeldBytes((trainable + frozen) * weight, 0, trainable * weight, 2 * trainable * weight)


@mutant("training_bytes", says="type of its weight")
def gradients_as_wide_as_states(trainable, frozen=0, weight=4, state=4):
    return HeldBytes((trainable + frozen) * weight, 0, trainable * state, 2 * trainable * state)


@mutant("training_bytes", says="return HeldBytes(")
def only_the_total(trainable, frozen=0, weight=4, state=4):
    return (trainable + frozen) * weight + trainable * weight + 2 * trainable * state


# --- cache_bytes


@exercise(
    "cache_bytes",
    reference="labs_lib.measure.budget:cache_bytes",
    hints=[
        "Count numbers first, for one token in one layer: a key and a value for each key-value head.",
        "The head's width is config.hidden_size // config.num_attention_heads.",
        "2 * tokens * config.num_hidden_layers * config.num_key_value_heads * head * number",
    ],
)
def check_cache_bytes(candidate, ref):
    config = SimpleNamespace(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=5,
        intermediate_size=100,
    )
    right, got = ref(7, config, 4), candidate(7, config, 4)
    expect(got is not None, "It gives None: is a `return` missing?")
    expect(is_number(got), f"It gives {type(got).__name__}; a number of bytes is asked for.")
    expect(2 * got != right, "Half of it: a token leaves a key and a value.")
    expect(5 * got != right, "One layer only: every layer has a cache of its own.")
    expect(7 * got != right, "One token only: multiply by `tokens`.")
    expect(4 * got != right, "You counted numbers; multiply by `number`, the bytes of one.")
    expect(
        got != 3 * right,
        "Three times too large here: keys and values come per key-value head (2), not per attention head (6).",
    )
    expect(got != 6 * right, "A head is not hidden_size wide: divide by the number of attention heads.")
    expect(got == right, f"{got:,} bytes where {right:,} are expected.")


@mutant("cache_bytes", says="a key and a value")
def keys_only(tokens, config, number=2):
    head = config.hidden_size // config.num_attention_heads
    return tokens * config.num_hidden_layers * config.num_key_value_heads * head * number


@mutant("cache_bytes", says="One layer only")
def one_layer(tokens, config, number=2):
    return (
        2 * tokens * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * number
    )


@mutant("cache_bytes", says="per key-value head")
def ungrouped_heads(tokens, config, number=2):
    return 2 * tokens * config.num_hidden_layers * config.hidden_size * number


@mutant("cache_bytes", says="hidden_size wide")
def heads_as_wide_as_the_model(tokens, config, number=2):
    return 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size * number


@mutant("cache_bytes", says="You counted numbers")
def numbers_not_bytes(tokens, config, number=2):
    head = config.hidden_size // config.num_attention_heads
    return 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * head


@mutant("cache_bytes", says="are expected")
def head_width_from_the_wrong_heads(tokens, config, number=2):
    head = config.hidden_size // config.num_key_value_heads
    return 2 * tokens * config.num_hidden_layers * config.num_attention_heads * head * number


# --- a prediction: any share is OK, and the measurement answers it

answer(
    "lab00.predicted_share",
    reference=0.5,
    within=(0, 1),
    hints=["A share, between 0 (no rule obeyed) and 1 (all of them)."],
)
