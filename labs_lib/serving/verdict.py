"""What one result proves about the engine that gave it, for somebody who knows the truth."""

from labs_lib.serving.types import Result


def misserved(result: Result, truth) -> str:
    """What this result proves to be wrong with the engine, in a few words; "" if nothing.

    Args:
        result: how a request ended. `result.request.adapter` is the sha256 that it asked for (None: the base),
            `result.provenance.adapter` the one that the engine says it used, `result.error` why it failed, or None.
        truth: `truth.shas["gone"]` is an adapter whose files have been deleted; `truth.right(result)` compares every
            token with what the adapter's own merged model says.

    Steps:
        1. A request for the deleted adapter must fail. If it did, nothing is wrong; if not, who has answered?
        2. No other request may fail: one tenant's trouble has reached another.
        3. The provenance must name the adapter that was asked for.
        4. The tokens must be that adapter's own: the provenance is only what the engine believes.
    """
    asked = result.request.adapter
    if asked == truth.shas["gone"]:
        return "" if result.error else "a deleted adapter answers"
    if result.error:
        return "fails by another tenant's trouble"
    if result.provenance.adapter != asked:
        return "names another adapter"
    return "" if truth.right(result) else "tokens of other weights"
