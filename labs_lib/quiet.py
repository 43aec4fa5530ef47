"""Known noise of the libraries, silenced at its source: one entry per message, with the reason it tells nothing.

Nothing is imported for it: loggers and warning filters are set by name, before the library loads. Every message not
listed here still appears.
"""

import logging
import os
import sys
import warnings


class _Drop(logging.Filter):
    """Drops records whose message starts with one of the given texts."""

    def __init__(self, *starts: str) -> None:
        super().__init__()
        self.starts = starts

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.starts)

    def __eq__(self, other: object) -> bool:  # a second setup() adds no second filter
        return isinstance(other, _Drop) and self.starts == other.starts

    __hash__ = object.__hash__


class _Once(_Drop):
    """Lets the first such record through, drops its repetitions."""

    def filter(self, record: logging.LogRecord) -> bool:
        if super().filter(record):
            return True
        seen, self.seen = getattr(self, "seen", False), True
        return not seen


_LOGGERS = {
    # bitsandbytes 0.50 looks for an optional AVX512 kernel package as it is imported (by PEFT, by the Trainer), and
    # warns that it has none; its own kernel does the same work.
    "bitsandbytes.backends.cpu.ops": _Drop("Failed to load CPU gemm_4bit_forward"),
    # 8-bit layers compute in float16, said again by each of the model's layers: once is enough.
    "bitsandbytes.autograd._functions": _Once("MatMul8bitLt: inputs will be cast"),
}

_WARNINGS = (
    # PEFT 0.21 reads a property that transformers 5 has renamed. Neither name is ours to change.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    # PEFT's LN_TUNING says it of each norm layer that it was asked to tune.
    (r"Unsupported layer type", UserWarning),
    # transformers' TrainingArguments asks for pinned memory by default, also where there is no GPU to copy to.
    (r"'pin_memory' argument is set as true but no accelerator", UserWarning),
)

_ENVIRONMENT = {
    # A data loader or papermill forks after the tokenizer has run: tokenizers would warn and do the same thing.
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # `Dataset.map` over some thousand rows takes less time than it takes to read the bar.
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def silence() -> None:
    """Silence the messages listed in this file. Idempotent."""
    for name, drop in _LOGGERS.items():
        logging.getLogger(name).addFilter(drop)
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "datasets" in sys.modules:  # imported before setup(): it has read its variable already
        sys.modules["datasets"].disable_progress_bars()


def hub(wanted: bool) -> None:
    """Open or close the way to the Hugging Face hub for this process; a user's own HF_HUB_OFFLINE stands.

    Closed, nothing waits for a network that is not needed, and loading a file of this repository draws no bar. Both
    are read from the environment as the libraries load; where they are loaded already, their own switch is turned.
    """
    offline, bars = "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"
    ours = os.environ.get("LABS_CLOSED_HUB") == "1"
    if wanted and not ours or not wanted and offline in os.environ and not ours:
        return
    for name in (offline, bars, "LABS_CLOSED_HUB"):
        if wanted:
            os.environ.pop(name, None)
        else:
            os.environ[name] = "1"
    if "huggingface_hub.constants" in sys.modules:
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = not wanted
    if "huggingface_hub.utils.tqdm" in sys.modules:
        sys.modules["huggingface_hub.utils.tqdm"].HF_HUB_DISABLE_PROGRESS_BARS = None if wanted else True
    if "transformers.utils.logging" in sys.modules:
        logs = sys.modules["transformers.utils.logging"]
        (logs.enable_progress_bar if wanted else logs.disable_progress_bar)()
