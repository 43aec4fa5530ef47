"""The step between what requests say and what the ops compute with: names of adapters become numbers of slots."""

from collections.abc import Mapping, Sequence

from labs_lib.serving.types import IsolationError


def slot_map(adapters: Sequence[str | None], resident: Mapping[str, int], tokens: int = 1) -> list[int]:
    """The slot of each row of a batch: where on the device its adapter lies, 0 for the base model.

    Args:
        adapters: what each request names, an adapter or None for the base model.
        resident: the slot of each adapter that is on the device. Slot 0 is never among them.
        tokens: rows of the batch that each request has, side by side: 1 in decoding, its prompt in prefill.

    Raises IsolationError for an adapter that is not on the device.

    Steps:
        1. No adapter: slot 0.
        2. An adapter on the device: its slot.
        3. Any other is an error, not a default: slot 0 would answer in the base's voice, -1 in the last tenant's.
        4. Each request's slot `tokens` times, one request after the other.
    """
    slots = []
    for adapter in adapters:
        if adapter is not None and adapter not in resident:
            raise IsolationError(
                f"Adapter {adapter} is not on the device: load it before its requests start."
            )
        slots += [0 if adapter is None else resident[adapter]] * tokens
    return slots
