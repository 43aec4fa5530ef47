"""Text that leaves in pieces is the text that would have left whole: any tokens, any cut, any stop strings."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from labs_lib.paths import data
from labs_lib.serving.text import Detokenizer, StopStrings, chat_prompt, encode_chat
from labs_lib.world.catalogue import products
from labs_lib.world.tasks import copy_prompt
from labs_lib.world.tenants import load_tenants

SHIPPED = AutoTokenizer.from_pretrained(data() / "base" / "tiny")


def llama2_like() -> PreTrainedTokenizerFast:
    """A SentencePiece-style BPE: `▁` for a space, byte tokens for what has no token of its own."""
    words = ["<unk>", "<s>", "</s>", "<pad>"]
    words += [f"<0x{i:02X}>" for i in range(256)]
    words += [*"abcdefgh.,▁", "ab", "▁a", "▁ab", "▁▁", "é"]
    core = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "▁")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


LLAMA2 = llama2_like()
TOKENIZERS = {"shipped": SHIPPED, "llama2": LLAMA2}


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, tokens):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(token) for token in tokens] + [detokenizer.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.data())
def test_pieces_add_up_to_the_text_of_all_tokens(name, seed):
    """Any token ids: special ones in the middle, bytes that are no character, spaces first."""
    tokenizer = TOKENIZERS[name]
    tokens = seed.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=20))
@example(text="naïve 日本 👩‍👩‍👧 a  b")
def test_a_piece_never_holds_part_of_a_character(name, text):
    """Real text has no undecodable bytes, so no piece may have the replacement character."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer(text.replace("\ufffd", ""), add_special_tokens=False).input_ids
    parts = pieces(tokenizer, tokens)
    assert "".join(parts) == whole(tokenizer, tokens)
    assert "\ufffd" not in "".join(parts)


def test_a_character_of_several_tokens_comes_in_one_piece():
    tokens = SHIPPED("a👍b", add_special_tokens=False).input_ids
    assert len(tokens) == 6  # four of them are bytes of the thumb
    assert pieces(SHIPPED, tokens) == ["a", "", "", "", "👍", "b", ""]


def test_pieces_come_at_once_where_they_can():
    tokens = SHIPPED("The lilac speaker", add_special_tokens=False).input_ids
    parts = pieces(SHIPPED, tokens)
    assert all(parts[:-1]), "plain text waits for nothing"
    assert parts[-1] == ""


def test_an_unfinished_character_is_told_at_the_end():
    tokens = SHIPPED("👍", add_special_tokens=False).input_ids[:2]
    assert pieces(SHIPPED, tokens) == ["", "", "\ufffd"]


def test_bad_bytes_are_not_held_for_ever():
    """A model gone wrong may emit nothing but bytes that are no character: the text still flows."""
    (lone,) = SHIPPED.convert_tokens_to_ids(["Ģ"])  # byte 0x80, which begins no character
    parts = pieces(SHIPPED, [lone] * 5)
    assert parts == ["", *["\ufffd"] * 4, "\ufffd"]


def test_one_bad_byte_spoils_a_run_and_no_part_of_the_run_was_sent():
    """Where the naive window fails: `A` alone decodes well, `A` and a broken byte do not."""
    ids = LLAMA2.convert_tokens_to_ids(["a", "<0x41>", "<0xE2>", "b"])
    assert pieces(LLAMA2, ids) == ["a", "", "", "\ufffd\ufffdb", ""]


def test_a_special_token_does_not_eat_the_space_after_it():
    ids = LLAMA2.convert_tokens_to_ids(["▁ab", "</s>", "▁ab"])
    assert "".join(pieces(LLAMA2, ids)) == whole(LLAMA2, ids) == "ab ab"


# --- stop strings

LETTERS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    """The definition, one character at a time: stop when any stop string is complete; cut the longest."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


@given(LETTERS, STOPS, st.lists(st.integers(0, 12), max_size=6))
@example("abcd", ["abcd", "bc"], [1, 2, 3])
def test_stop_strings_cut_the_same_however_the_text_is_split(text, stops, cuts):
    at = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    stopper, sent = StopStrings(stops), ""
    for start, end in pairwise(at):
        sent += stopper.add(text[start:end])
        assert cut(text, stops).startswith(sent), "sent what had to be cut"
    if not stopper.stopped:
        sent += stopper.end()
    assert sent == cut(text, stops)
    assert stopper.stopped == (cut(text, stops) != text or any(text.endswith(stop) for stop in stops))


def test_only_the_possible_start_of_a_stop_is_held():
    stopper = StopStrings(["\n\n"])
    assert [stopper.add(piece) for piece in ("one", "\n", "two", "\n", "\nthree", "four")] == [
        "one",
        "",
        "\ntwo",
        "",
        "",
        "",
    ]
    assert stopper.stopped


def test_what_was_held_comes_at_the_end():
    stopper = StopStrings(["END"])
    assert stopper.add("the EN") == "the "
    assert stopper.end() == "EN"
    assert stopper.end() == ""


# --- chats


def test_a_chat_of_a_tasks_lines_is_the_tasks_prompt():
    """Guide as system message, facts as user message: exactly what the base was trained on."""
    product, style = products("pretraining", 1, 0)[0], load_tenants()[0].style
    guide, facts = copy_prompt(product, style).split("\n", 1)
    messages = [{"role": "system", "content": guide}, {"role": "user", "content": facts}]
    assert chat_prompt(messages) == copy_prompt(product, style)
    assert encode_chat(SHIPPED, messages) == SHIPPED(copy_prompt(product, style)).input_ids


def test_an_earlier_answer_goes_on_where_the_question_ended():
    question = "Who buys Lyra Swift?\nAnswer:"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": " Ines"},
        {"role": "user", "content": question},
    ]
    assert chat_prompt(messages) == f"{question} Ines\n{question}"


def test_a_template_of_the_tokenizers_own_is_used():
    tokenizer = llama2_like()
    each = "{% for m in messages %}{{ m['content'] }},{% endfor %}"
    tokenizer.chat_template = "{{ bos_token }}" + each + "{% if add_generation_prompt %}a{% endif %}"
    ids = encode_chat(tokenizer, [{"role": "user", "content": "b"}])
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<s>"
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("b,a")
