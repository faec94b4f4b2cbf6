"""Who answers a guest that asks for a block back, as the host of the policy ``shared`` does with a thread of its own.

The asking kernel waits inside its step, so the answer comes from another thread, at once and always: kernel and answer
alternate strictly, and what a step does depends on no timing. What the wait costs is priced like everything else.
"""

from __future__ import annotations

import os
import threading

import numpy as np

from common.errors import LabError
from common.layout import N_ASKS, W_ASKS_WORK
from common.mutex import post_semaphore, wait_semaphore
from guest.allocator.zone import Zone
from guest.reporting import shared

__all__ = ["Populator"]


class Populator:
    """From construction to ``close`` every ask of ``zone`` is answered. Its device is this process already."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._asks = np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64)
        self._work = zone.address + 8 * W_ASKS_WORK
        self._stopping = False
        # Once here, for nothing: compiling them must not keep an asker waiting.
        shared.collect_asks(zone.address, self._asks)
        shared.answer_ask(zone.address, 0, -1, populated=False)
        shared.set_open(zone.address, 1)
        self._thread = threading.Thread(target=self._answer, name="populate", daemon=True)
        self._thread.start()
        shared.set_asking(zone.address, os.getpid())

    def _answer(self) -> None:
        address = self._zone.address
        while True:
            wait_semaphore(self._work)
            if self._stopping:
                return
            count = int(shared.collect_asks(address, self._asks))
            for index, _pfn, _order, sequence in self._asks[: max(count, 0)].tolist():
                shared.answer_ask(address, index, sequence, populated=True)

    def check(self) -> None:
        """Raises ``LabError`` if an ask went without its answer: this machine had no processor for it for a second."""
        if withdrawn := self._zone.statistics().asks_withdrawn:
            raise LabError(f"{withdrawn} asks were not answered in a second; run fewer processes at once")

    def close(self) -> None:
        """Nothing is asked for any more. No step may be in progress."""
        shared.refuse_asks(self._zone.address)
        self._stopping = True
        post_semaphore(self._work)
        self._thread.join()
