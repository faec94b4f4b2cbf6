"""A process on the zone of a running guest that does what compaction and memory offlining do, and looks at all of it.

``python -m lab.soak.attached LAB GUEST SEED ACCOUNT``. Runs until SIGTERM, then writes its account.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import layout
from common.errors import AllocatorError, InvariantViolation, LabError
from common.geometry import PAGEBLOCK_ORDER, TOP_ORDER, Migratetype
from guest.allocator.zone import Zone

__all__ = ["Compactor", "lost_pages"]

_PATIENCE_S = 60.0
_LONGEST_ISOLATION_S = 0.02
_PAUSE_S = 0.01
_LOOK_EVERY_S = 1.0


def lost_pages(snapshot: bytes) -> int:
    """Managed pages less those that are free, held, in flight or allocated, in a snapshot of a zone: S4 says 0.

    What is allocated is counted in the page records, everything else is what the counters say.
    """
    words = np.frombuffer(snapshot, dtype=np.int64, count=len(snapshot) // 8)
    n_pages, n_cpus = int(words[layout.W_N_PAGES]), int(words[layout.W_N_CPUS])
    counters = (layout.W_FREE_PAGES, layout.W_ISOLATED_PAGES, layout.W_IN_FLIGHT_PAGES, layout.W_HELD_PAGES)
    elsewhere = sum(int(words[word]) for word in counters)
    slots = words[layout.HEADER_WORDS :][: n_cpus * layout.CPU_WORDS].reshape(n_cpus, layout.CPU_WORDS)
    elsewhere += int(slots[:, layout.C_COUNT].sum())
    page = layout.segment_offsets(n_pages, n_cpus).page
    states = np.frombuffer(snapshot, dtype=np.uint16, count=n_pages, offset=page)
    heads = states[(states & layout.KIND_MASK) == layout.ALLOCATED]
    allocated = int((np.int64(1) << (heads & layout.ORDER_MASK).astype(np.int64)).sum())
    return n_pages - elsewhere - allocated


class Compactor:
    """Isolates pageblocks, turns free lists round, and looks at everything now and then. One thread."""

    def __init__(self, zone: Zone, seed: int) -> None:
        self.zone = zone
        self.isolations = self.rotations = self.validations = self.snapshots = self.lost = 0
        self.breaches: list[str] = []
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._next_look_s = 0.0

    def step(self, stop: threading.Event) -> None:
        """One isolation or one rotation, and perhaps a look; sleeps for some ms on ``stop``."""
        if self._random.random() < 0.5:
            self._isolate(stop)
        else:
            self._rotate()
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + _LOOK_EVERY_S
            self.look()
        stop.wait(self._random.uniform(0, _PAUSE_S))

    def look(self) -> None:
        """Validate the zone with every lock held, then count the pages of a copy of it."""
        try:
            self.zone.validate()
        except InvariantViolation as error:
            self.breaches.append(str(error))
        self.validations += 1
        self.lost = max(self.lost, abs(lost_pages(self.zone.snapshot())))
        self.snapshots += 1

    def _isolate(self, stop: threading.Event) -> None:
        pageblock = self._random.randrange(self.zone.n_pages >> PAGEBLOCK_ORDER)
        try:
            self.zone.isolate(pageblock)
        except AllocatorError:  # somebody else has it
            return
        stop.wait(self._random.uniform(0, _LONGEST_ISOLATION_S))
        self.zone.unisolate(pageblock)
        self.isolations += 1

    def _rotate(self) -> None:
        order = self._random.randint(PAGEBLOCK_ORDER - 2, TOP_ORDER)  # longer lists take long to read from Python
        kind = self._random.choice((Migratetype.UNMOVABLE, Migratetype.MOVABLE, Migratetype.RECLAIMABLE))
        entries = self.zone.free_list(order, kind)
        if not entries:
            return
        try:
            self.zone.rotate(order, kind, self._random.choice(entries)[0])
        except LabError:  # it has been allocated in the meantime
            return
        self.rotations += 1

    def account(self) -> dict[str, Any]:
        """What it did and found."""
        return {
            "isolations": self.isolations,
            "rotations": self.rotations,
            "validations": self.validations,
            "snapshots": self.snapshots,
            "lost_pages": self.lost,
            "breaches": len(self.breaches),
            "complaints": self.breaches[:8],
        }


def _attach(lab: str, guest: str, stop: threading.Event) -> Zone | None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not stop.is_set():
        try:
            return Zone.attach(lab, guest)
        except LabError:
            if time.monotonic() >= deadline_s:
                raise
        stop.wait(0.05)
    return None


def _main(lab: str, guest: str, seed: int, account: Path) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    zone = _attach(lab, guest, stop)
    if zone is None:
        found: dict[str, Any] = {"breaches": 0, "complaints": []}
    else:
        compactor = Compactor(zone, seed)
        while not stop.is_set():
            compactor.step(stop)
        compactor.look()
        found = compactor.account()
    account.write_text(json.dumps(found))
    return 4 if found["complaints"] else 0


if __name__ == "__main__":
    of_lab, of_guest, its_seed, path = sys.argv[1:]
    sys.exit(_main(of_lab, of_guest, int(its_seed), Path(path)))
