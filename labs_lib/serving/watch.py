"""The running server's guard over isolation: the shadow oracle on a share of the traffic, and canaries now and then.

It judges with models of its own, merged by PEFT from the registry's files. The first proof that somebody else's
weights have answered closes the server: `found` says what was seen, and the gateway turns everybody away.
"""

import contextlib
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.canary import Canary, CanaryProbe
from labs_lib.serving.oracle import TIES, Difference, ShadowOracle, Witness
from labs_lib.serving.types import QueueFull

log = logging.getLogger(__name__)

PROMPT, ANSWER = 12, 8  # tokens of a canary's prompt and of its answer
KEPT = 256  # canaries remembered, least recently used forgotten


class Watch:
    """Watches an engine that runs on its own thread, until `stop()`.

    Args:
        engine: as it serves.
        registry: whose current versions the canaries sing for.
        load: loads the base once more, for the oracle: about three times its memory in all.
        share: of the greedy results, judged by the oracle; 0 turns it off.
        every: seconds between two rounds of canaries; 0 turns them off.
        birds: tenants per round, drawn anew each time.
    """

    def __init__(
        self,
        engine,
        registry,
        load: Callable[[], torch.nn.Module],
        share: float = 0.01,
        every: float = 60.0,
        birds: int = 4,
    ) -> None:
        self.engine, self.registry, self.every, self.birds = engine, registry, every, birds
        self.witness = Witness(load, registry.folder)
        tie = TIES[engine.model.get_input_embeddings().weight.dtype]
        self.oracle = ShadowOracle(self.witness, share, tie=tie, on_mismatch=self._mismatch)
        self.sung = 0  # canaries that were answered right
        self.found: str | None = None
        self._draw = random.Random()
        self._known: OrderedDict[str, Canary | None] = OrderedDict()  # None: no prompt tells it from the base
        self._over = threading.Event()
        self._singing = threading.Thread(target=self._sing, name="canaries", daemon=True)

    def start(self) -> None:
        if self.oracle.share:
            self.engine.observers.append(self.oracle)
            self.oracle.start()
        if self.every:
            self._singing.start()

    def stop(self) -> None:
        """End both threads; what waits for the oracle is still judged."""
        self._over.set()
        if self.oracle in self.engine.observers:
            self.engine.observers.remove(self.oracle)
        self.oracle.stop()
        if self._singing.is_alive():
            self._singing.join()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def report(self) -> dict:
        """What has been proved so far; JSON-ready."""
        return {"isolated": self.found is None, "found": self.found, "canaries": self.sung} | {
            "oracle": self.oracle.report()
        }

    def round(self) -> None:
        """One round of canaries, here and now; returns when the engine has answered."""
        current = [
            version for each in self.registry.tenants() if (version := self.registry.current(each.name))
        ]
        chosen = self._draw.sample(current, min(self.birds, len(current)))
        canaries = [canary for version in chosen if (canary := self._canary(version.sha256))]
        if not canaries:
            return
        probe = CanaryProbe(self.engine, canaries, on_leak=lambda leak: self._close(str(leak)))
        with contextlib.suppress(QueueFull):  # tenants come first; those sent before it are still listened to
            probe.send()
        while probe.pending and not self._over.wait(0.01):
            pass
        self.sung += probe.sung

    # -- inside --------------------------------------------------------------------------------------------------

    def _sing(self) -> None:
        torch.set_num_threads(1)  # the cores belong to serving
        while not self._over.wait(self.every):
            try:
                self.round()
            except Exception as error:  # a version retired just now, a full disk: the watch goes on
                log.warning("a round of canaries failed: %s", error)

    def _canary(self, adapter: str) -> Canary | None:
        """A prompt whose answer tells this adapter from the base, found by trying a few."""
        if adapter not in self._known:
            self._known[adapter] = None
            for _ in range(8):
                prompt = [self._draw.randrange(self.engine.vocabulary) for _ in range(PROMPT)]
                try:
                    # A name of its own, so that no tenant's account or metrics pay for it.
                    self._known[adapter] = Canary.of(self.witness, "(canary)", adapter, prompt, ANSWER)
                    break
                except LabsError:
                    continue
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(adapter)
        return self._known[adapter]

    def _mismatch(self, difference: Difference) -> None:
        self._close(str(difference))

    def _close(self, proof: str) -> None:
        log.critical("ISOLATION IS BROKEN, nobody is served any more: %s", proof)
        self.found = self.found or proof
