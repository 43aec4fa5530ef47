"""Text at the two ends of a request: a chat as one prompt, tokens as text while they come, where a stop string cuts.

Nothing here knows the engine or HTTP. The rule of all of it: a character that has been sent is never taken back.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNDECODED = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def chat_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The plain template, for a base that has none of its own: contents in order, each message on a new line.

    The shipped bases were never shown roles, so none are written: a chat whose contents are the lines of a task's
    prompt *is* that prompt. What the assistant said goes on where the message before it ended, as a completion does.

    >>> chat_prompt([{"role": "user", "content": "Who buys Lyra Swift?\\nAnswer:"}])
    'Who buys Lyra Swift?\\nAnswer:'
    """
    text = ""
    for message in messages:
        if text and not text.endswith("\n") and message["role"] != "assistant":
            text += "\n"
        text += message["content"]
    return text


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat, by the tokenizer's own template if it has one, else by `chat_prompt`."""
    if tokenizer.chat_template is None:
        return tokenizer(chat_prompt(messages)).input_ids
    rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False).input_ids  # the template writes them itself


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that decoding with `skip_special_tokens` leaves out."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {id_ for id_, token in added if token.special}


class Detokenizer:
    """Turns tokens into text one by one; the pieces add up to `tokenizer.decode` of all of them.

    Special tokens are left out. A token may end in the middle of a character, so a piece may be empty: an unfinished
    character waits for its other bytes. `tokenizer.decode` is only ever asked for a short window of recent tokens,
    which begins at a place where the text was whole (the windows of vLLM and TGI); the window's first tokens were
    sent before, and are there because some decoders treat the first token of a text differently (no leading space).

    A tokenizer with byte tokens such as `<0xE2>` (Llama 2) decodes a run of them together: one bad byte spoils the
    whole run, so a run is held until it is over.

    Args:
        tokenizer: any fast tokenizer of transformers.
        special: `special_ids(tokenizer)`, if it is at hand; it takes a while to make for large vocabularies.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: frozenset[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer) if special is None else special
        self._window: list[int] = []
        self._whole = 0  # the first tokens of the window, whose text has been sent and cannot change
        self._sent = 0  # characters of the window's text that have been sent

    def add(self, token: int) -> str:
        """The text that this token completes, often empty for part of a character."""
        if token in self._special:
            return ""
        self._window.append(token)
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is not None and _BYTE_TOKEN.fullmatch(name):
            return ""
        text = self._text(self._window)
        # The unfinished end of a text shows as one replacement character; all that stands before it is settled.
        whole = not text.endswith(UNDECODED)
        piece = self._send(text if whole else text[:-1])
        if whole:
            self._window = self._window[self._whole :]
            self._whole = len(self._window)
            self._sent = len(self._text(self._window))
        return piece

    def end(self) -> str:
        """What is left when no more tokens come: an unfinished character, as decoded."""
        return self._send(self._text(self._window))

    def _send(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece

    def _text(self, tokens: list[int]) -> str:
        # Never "cleaned up": that would rewrite text that has been sent (" ." to ".").
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts a stream of text before the first stop string, and never sends what may be the start of one.

    The first is the one that is complete first; of those that are complete at the same character, the longest. So the
    result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that may be sent now. Once `stopped`, always empty."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop` (but not all of it)."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
