"""Looks at every guest from outside, about 20 times a second, while the guests run and once after they ended.

A guest is watched through a read-only mapping of its zone and a descriptor of its RAM object. Both outlive the names,
so the last reading is taken after the guest has exited: nothing moves any more and its accounts must agree.

Invariants: only the sampling thread touches probes and recorders until ``finish`` has joined it; the view reads
``latest`` alone, a frozen object behind one reference.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from common import layout
from common.errors import LabError
from common.geometry import PAGE_BYTES
from common.names import SHM_DIR, ram_object
from lab.pagemap import PageGrid, classify, grid
from lab.samples import GuestSeries, Reading, SeriesRecorder

if TYPE_CHECKING:
    from guest.allocator.zone import Zone

__all__ = ["GuestProbe", "Observation", "PageSnapshot", "Probe", "Sampler"]

_INTERVAL_S = 0.05
_COPY_BYTES_PER_S = 16 << 20  # of page records: a 512 MiB guest at every reading, a 64 GiB one every three seconds
_MAX_MAP_PAGES = 1 << 24  # 64 GiB: a page map of a larger guest would copy more than 48 MiB at a time
_BLOCK_BYTES = 512  # unit of st_blocks, stat(2)

PageArrays = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]


class Probe(Protocol):
    """What the sampler needs of a guest."""

    def read(self, time_s: float) -> Reading | None:
        """One reading, or None while the guest is not there yet."""

    def pages(self) -> PageArrays | None:
        """Page records and resident map, or None if there is none to draw."""

    def close(self) -> None:
        """Let go of the guest."""


@dataclass(frozen=True)
class PageSnapshot:
    """The page map of one guest at one moment; ``resident_bytes`` is counted in its resident map, page by page."""

    time_s: float
    grid: PageGrid
    resident_bytes: int


@dataclass(frozen=True)
class Observation:
    """All that was seen of one guest; ``last`` is from after its end."""

    series: GuestSeries
    peak: Reading | None
    last: Reading | None
    peak_map: PageSnapshot | None
    last_map: PageSnapshot | None


@dataclass(frozen=True)
class _Pages:
    """Copies of a guest's page records and resident map, as ``Probe.pages`` gives them."""

    time_s: float
    states: npt.NDArray[np.uint16]
    resident: npt.NDArray[np.uint8]


class GuestProbe:
    """A live guest, by its names in shared memory."""

    def __init__(self, lab: str, guest: str, *, backend: str) -> None:
        self._lab, self._guest = lab, guest
        self._has_ram = backend == "shared"
        self._zone: Zone | None = None
        self._ram: int | None = None

    def read(self, time_s: float) -> Reading | None:
        """See ``Probe``. ``resident_bytes`` comes from the machine where the guest has RAM."""
        if not self._attach() or self._zone is None:
            return None
        seen = self._zone.statistics()
        counted_bytes = seen.resident_pages * PAGE_BYTES
        return Reading(
            time_s=time_s,
            resident_bytes=counted_bytes if self._ram is None else _ram_bytes(self._ram),
            counted_bytes=counted_bytes,
            allocated_bytes=seen.allocated_pages * PAGE_BYTES,
            free_bytes=(seen.free_pages + seen.isolated_pages + seen.pcp_pages) * PAGE_BYTES,
            reported_bytes=seen.reported_pages * PAGE_BYTES,
            in_flight_bytes=seen.in_flight_pages * PAGE_BYTES,
            returned_bytes=seen.returned_pages * PAGE_BYTES,
            refaults=seen.refaults,
            pulled_blocks=seen.pulled_blocks,
        )

    def pages(self) -> PageArrays | None:
        """See ``Probe``."""
        if self._zone is None or self._zone.n_pages > _MAX_MAP_PAGES:
            return None
        return self._zone.page_states(), self._zone.resident_map()

    def close(self) -> None:
        """Drop the mapping and the descriptor: only then is the memory of an ended guest free."""
        if self._zone is not None:
            self._zone.close()
            self._zone = None
        if self._ram is not None:
            os.close(self._ram)
            self._ram = None

    def _attach(self) -> bool:
        """True once everything is open. The RAM is there before the zone says that it is ready."""
        if self._zone is not None:
            return True
        from guest.allocator.zone import Zone  # brings Numba: only the process that samples pays for it

        try:
            zone = Zone.attach(self._lab, self._guest, read_only=True)
        except (LabError, FileNotFoundError):
            return False
        if self._has_ram:
            try:
                path = Path(SHM_DIR, ram_object(self._lab, self._guest).lstrip("/"))
                self._ram = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                zone.close()
                return False
        self._zone = zone
        return True


class Sampler:
    """A thread over the probes of all guests, by guest name."""

    def __init__(self, probes: Mapping[str, Probe], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.started_s = clock()
        """Time 0 of every series, on ``clock``."""
        self._clock = clock
        self._probes = dict(probes)
        self._recorders = {name: SeriesRecorder() for name in probes}
        self._peak_pages: dict[str, _Pages] = {}
        self._last_pages: dict[str, _Pages] = {}
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin to sample. Call after all children were started: a fork must not find a thread."""
        self._thread.start()

    def latest(self, guest: str) -> Reading | None:
        """The most recent reading of one guest; any thread."""
        return self._recorders[guest].latest

    def finish(self) -> dict[str, Observation]:
        """Stop, take one reading more of each guest that was ever seen, let go of all, and hand over what was seen.

        Raises whatever ended the thread early.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._failure is not None:
                raise self._failure
            for name in self._probes:
                if self._recorders[name].latest is not None:
                    self.sample(name, last=True)
        finally:
            for probe in self._probes.values():
                probe.close()
        return {name: self._observation(name) for name in self._probes}

    def sample(self, name: str, *, last: bool = False) -> None:
        """One reading of one guest, and a copy of its page records if that is due.

        Only copied here: to make classes of them costs ten times as much, and only two are ever drawn.
        """
        probe, recorder = self._probes[name], self._recorders[name]
        reading = probe.read(self._clock() - self.started_s)
        if reading is None:
            return
        is_peak = recorder.append(reading)
        previous = self._last_pages.get(name)
        if previous is not None and not last:
            cost_s = (previous.states.nbytes + previous.resident.nbytes) / _COPY_BYTES_PER_S
            if reading.time_s - previous.time_s < cost_s:
                return
        pages = probe.pages()
        if pages is None:
            return
        self._last_pages[name] = _Pages(reading.time_s, *pages)
        if is_peak:
            self._peak_pages[name] = self._last_pages[name]

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            for name in self._probes:
                try:
                    self.sample(name)
                except Exception as error:  # noqa: BLE001  raised again by finish, in the thread that can show it
                    self._failure = error
                    return

    def _observation(self, name: str) -> Observation:
        recorder = self._recorders[name]
        return Observation(
            recorder.series(),
            recorder.peak,
            recorder.latest,
            _snapshot(self._peak_pages.pop(name, None)),
            _snapshot(self._last_pages.pop(name, None)),
        )


def _snapshot(pages: _Pages | None) -> PageSnapshot | None:
    if pages is None:
        return None
    resident_pages = int(np.count_nonzero(np.isin(pages.resident, (layout.RESIDENT, layout.INSTALLED))))
    return PageSnapshot(pages.time_s, grid(classify(pages.states, pages.resident)), resident_pages * PAGE_BYTES)


def _ram_bytes(descriptor: int) -> int:
    """Resident bytes of a RAM object without its gate page, which is always there."""
    return max(0, os.fstat(descriptor).st_blocks * _BLOCK_BYTES - PAGE_BYTES)
