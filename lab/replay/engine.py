"""The replay itself: the recorded moves up to the next pass, then the pass, in the trace's own time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import PAGE_BYTES
from common.layout import ALLOCATED, FREE, KIND_MASK, ORDER_MASK, RESIDENT
from guest.allocator import entry
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Cycle, Outcome
from guest.reporting.table import Policy, find_policy
from lab.replay import kernels, lists
from lab.replay.plan import Plan
from lab.replay.start import Part, Place, Watermarks, batch_pages, build_zone
from lab.replay.timer import Timer

__all__ = ["MODES", "REFUSED", "Pass", "Prices", "Replay", "ReplaySettings", "list_sizes"]

MODES = ("zone", "page", "demand")

REFUSED = ("hint", "shared", "oracle")  # a host begins their runs, or they know the future
_LEAST_STEP_NS = 1_000_000
_SAMPLES = 4000
_SAMPLE_NS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a report and a refault cost, ns. The defaults are those of the recorded guest, which was emulated.

    Attributes:
        report_ns: a report, whatever is in it. range_ns: each block. page_ns: each page that the host holds.
        refault_ns: touching a page that was given back.
    """

    report_ns: float = 50_000.0
    range_ns: float = 11_000.0
    page_ns: float = 820.0
    refault_ns: float = 1_000.0


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """One policy and its settings. None: that of the policy.

    Attributes:
        begins_ns: when passes begin, in place of what the policy's own trigger and timer find.
        requested_ns: when a pass was asked for that had not begun as the recording began; None: there was none.
        check: validate every zone after each pass and at the end.
        shuffle, merge_likely, seed: how the allocator places pages; of a demand replay.
        pcp_batch, pcp_high: of the per-CPU lists of a page or demand replay; None: as the kernel derives them.
    """

    policy: str = "rotate"
    min_order: int = 9
    delay_ns: int | None = None
    capacity: int | None = None
    high_water_mark: int | None = None
    hz: int = 250
    phase_ns: int | None = None
    begins_ns: tuple[int, ...] | None = None
    requested_ns: int | None = None
    check: bool = True
    shuffle: bool = False
    merge_likely: bool = True
    seed: int = 1
    pcp_batch: int | None = None
    pcp_high: int | None = None


@dataclass
class Pass:
    """One pass that reported, or found nothing. ``blocks``: (pfn, order) in the order of the reports.

    Attributes:
        t_ns, end_ns: when it began and when its last report was answered.
        report_ends: length of ``blocks`` after each report.
    """

    t_ns: int
    end_ns: int = 0
    report_ends: list[int] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """Pages reported in it."""
        return sum(1 << order for _, order in self.blocks)


@dataclass
class _Lane:
    """One zone, its plan, and how far it is.

    Attributes:
        aside: what the kernels of a page or demand replay keep beside the zone, as they say.
    """

    place: Place
    zone: Zone
    plan: Plan
    cycle: Cycle | None
    aside: npt.NDArray[Any]
    row: int = 0


class Replay:
    """One recording under one policy.

    Args:
        parts: the zones, in the order in which the kernel walks them.
        mode: one of ``MODES``, for which their plans were made.
        begin_ns, end_ns: the part of the trace's clock that is replayed.

    Raises:
        UsageError: there is no such policy, or it cannot be replayed.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        settings: ReplaySettings,
        prices: Prices,
        *,
        mode: str = "zone",
        begin_ns: int,
        end_ns: int,
    ) -> None:
        if settings.policy in REFUSED:
            raise UsageError(f"--policy: {settings.policy!r} cannot be replayed; a host begins its runs")
        self.policy: Policy = find_policy(settings.policy)
        self.settings = settings
        self.prices = prices
        self.mode = mode
        self.begin_ns, self.end_ns = begin_ns, end_ns
        self.counts: npt.NDArray[np.int64] = np.zeros(kernels.COUNTS, np.int64)
        self.passes: list[Pass] = []
        self.samples: list[tuple[int, int]] = []
        self.host_cpu_ns = 0.0
        self.delay_ns = self.policy.delay_ns if settings.delay_ns is None else settings.delay_ns
        self.capacity = self.policy.capacity if settings.capacity is None else settings.capacity
        self._timer = Timer(self.delay_ns, settings.hz, settings.phase_ns)
        self._pending_ns = self._pending()
        self._sample_ns = max(_SAMPLE_NS, (end_ns - begin_ns) // _SAMPLES)
        self._next_sample_ns = begin_ns
        self._lanes = [self._lane(part) for part in parts]
        self.counts[kernels.C_RESIDENT] = sum(
            int(np.count_nonzero(lane.zone.resident_map() == RESIDENT)) for lane in self._lanes
        )

    def _lane(self, part: Part) -> _Lane:
        place, own, settings, policy = part.place, part.plan, self.settings, self.policy
        high_water_mark = policy.high_water_mark if settings.high_water_mark is None else settings.high_water_mark
        batch, high = list_sizes(place, part.marks, own.cpus, settings)
        zone = build_zone(
            part,
            ZoneSettings(
                memory_bytes=0,
                cpus=own.cpus,
                pcp_batch=batch,
                pcp_high=high,
                shuffle=settings.shuffle,
                merge_likely=settings.merge_likely,
                seed=settings.seed,
                min_order=settings.min_order,
                high_water_mark=high_water_mark,
                trigger=policy.trigger,
            ),
        )
        cycle = None
        if policy.name != "off":
            cycle = Cycle(zone, policy.name, capacity=settings.capacity)
            entry.register_device(zone.address, os.getpid(), 0)
            if self._pending_ns is None:  # the device was registered long ago
                cycle.begin()
                cycle.end(abandon=True)
        return _Lane(place, zone, own, cycle, self._aside(zone))

    def _aside(self, zone: Zone) -> npt.NDArray[Any]:
        if self.mode == "page":
            return np.zeros(zone.n_pages, np.int16)
        if self.mode == "demand":  # what is in use at the start is where it was recorded
            used = zone.page_states() & KIND_MASK == ALLOCATED
            return np.where(used, np.arange(zone.n_pages), lists.NOWHERE).astype(np.int32)
        return np.zeros(0, np.int16)

    def _pending(self) -> int | None:
        """When the pass is due that was asked for before the beginning; one that should have been is none."""
        if self.settings.requested_ns is None:
            return None
        fires_ns = self._timer.fires_ns(self.settings.requested_ns)
        return fires_ns if fires_ns >= self.begin_ns else None

    def run(self) -> None:
        """All of it.

        Raises:
            InvariantViolation: with ``check``, the lists, the records and the counters of a zone disagree.
        """
        now = self.begin_ns
        if self.settings.begins_ns is not None:
            for begins_ns in self.settings.begins_ns:
                if self.begin_ns <= begins_ns <= self.end_ns:
                    self._advance(begins_ns, stop=False)
                    self._pass(begins_ns)
        elif self.policy.name != "off":
            fires_ns = self._pending_ns
            while now < self.end_ns:
                if fires_ns is None:
                    now, requested_ns = self._until_request(now)
                    if requested_ns is None:
                        continue
                    fires_ns = self._timer.fires_ns(requested_ns)
                if fires_ns > self.end_ns:
                    break
                fires_ns = max(fires_ns, now)
                self._advance(fires_ns, stop=False)
                now, again = self._pass(fires_ns)
                fires_ns = self._timer.fires_ns(now) if again else None
        self._advance(self.end_ns, stop=False)
        self.samples.append((self.end_ns, int(self.counts[kernels.C_RESIDENT])))
        self._check()

    def _until_request(self, now: int) -> tuple[int, int | None]:
        """Go on until a free asks for a pass, but no further than a pass that it asks for may begin."""
        until = min(self.end_ns, max(now + max(self._timer.delay_ns, _LEAST_STEP_NS), self._alone_until()))
        requested = self._advance(until, stop=True)
        return (until, None) if requested is None else (requested, requested)

    def _alone_until(self) -> int:
        """Up to when nothing happens but in the zone with the most to come: it may go so far ahead of the others."""
        *others, _ = sorted(self._lanes, key=lambda lane: len(lane.plan) - lane.row)
        coming = [int(lane.plan.t_ns[lane.row]) for lane in others if lane.row < len(lane.plan)]
        return min(coming, default=self.end_ns + 1) - 1

    def _advance(self, until_ns: int, *, stop: bool) -> int | None:
        """Apply what the recording did up to ``until_ns``; with ``stop``, when a pass was asked for first, if it was.

        A zone that asks stays where it is: the time of each is at least that of the request, or ``until_ns``.
        """
        requests = []
        waiting = set(range(len(self._lanes)))
        while True:
            target = min(until_ns, self._next_sample_ns)
            for index in sorted(waiting):
                lane = self._lanes[index]
                end = int(np.searchsorted(lane.plan.t_ns, target, side="right"))
                if end > lane.row:
                    self._move(lane, end, stop=stop)
                if stop and lane.zone.requested():
                    requests.append(int(lane.plan.t_ns[lane.row - 1]))
                    waiting.discard(index)
            if requests or target == until_ns:
                break
            self.samples.append((target, int(self.counts[kernels.C_RESIDENT])))
            self._next_sample_ns += self._sample_ns
        return min(requests) if requests else None

    def _move(self, lane: _Lane, end: int, *, stop: bool) -> None:
        """Apply the rows of a lane's plan before ``end``; with ``stop``, no further than one that asks for a pass."""
        plan, address = lane.plan, lane.zone.address
        if self.mode == "zone":
            lane.row = int(
                kernels.apply(
                    address, plan.op, plan.pfn, plan.order, plan.migratetype, lane.row, end, stop, self.counts
                )
            )
            return
        move = lists.apply_by_page if self.mode == "page" else lists.apply_by_demand
        columns = (plan.op, plan.cpu, plan.pfn, plan.order, plan.migratetype)
        lane.row = int(move(address, *columns, lane.aside, lane.row, end, stop, plan.repeats, self.counts))

    def _pass(self, now: int) -> tuple[int, bool]:
        """One pass over every zone; when it ended, and whether another one is asked for."""
        this = Pass(now)
        lanes = [lane for lane in self._lanes if self.policy.one_pass or lane.zone.requested()]
        together = lanes if self.policy.one_pass else []
        again = False
        for lane in together:
            _cycle(lane).begin()
        for lane in lanes:
            cycle = _cycle(lane)
            if not together:
                cycle.begin()
            while (batch := cycle.pull()) is not None:
                now += self._report(this, lane, batch.pfns, batch.orders)
                if not self.policy.under_lock:
                    self._advance(now, stop=False)
                cycle.put_back(batch, Outcome.KEPT)  # what the host gave back is in our own books
            if not together:
                again |= cycle.end()
        for lane in together:
            again |= _cycle(lane).end()
        this.end_ns = now
        self.passes.append(this)
        self._check()
        return now, again

    def _report(self, this: Pass, lane: _Lane, pfns: npt.NDArray[np.int64], orders: npt.NDArray[np.int64]) -> int:
        """Report a batch: the host gives it back; how long that takes, ns."""
        held = int(kernels.pages_held(lane.zone.address, pfns, orders, self.counts))
        this.blocks += zip((pfns + lane.place.first).tolist(), orders.tolist(), strict=True)
        this.report_ends.append(len(this.blocks))
        spent = self.prices.report_ns + pfns.size * self.prices.range_ns + held * self.prices.page_ns
        self.host_cpu_ns += spent
        return int(spent)

    def _check(self) -> None:
        if self.settings.check:
            for lane in self._lanes:
                lane.zone.validate()

    def resident_map(self) -> npt.NDArray[np.uint8]:
        """Copy of what the host holds: uint8[pages of all zones], as ``Zone.resident_map``."""
        return np.concatenate([lane.zone.resident_map() for lane in self._lanes])

    def free_blocks(self) -> dict[int, int]:
        """Order by pfn of what is free now, on the recorded machine's numbers."""
        found = {}
        for lane in self._lanes:
            states = lane.zone.page_states()
            for pfn in np.flatnonzero(states & KIND_MASK == FREE).tolist():
                found[pfn + lane.place.first] = int(states[pfn] & ORDER_MASK)
        return found

    def gib_minutes(self) -> float:
        """Memory held by the host over time."""
        times = np.array([when for when, _ in self.samples], np.float64) / 60e9
        held = np.array([pages for _, pages in self.samples], np.float64) * PAGE_BYTES / 2**30
        return float(((held[1:] + held[:-1]) / 2 * np.diff(times)).sum())


def list_sizes(place: Place, marks: Watermarks, cpus: int, settings: ReplaySettings) -> tuple[int, int]:
    """pcp->batch and pcp->high of a zone's per-CPU lists, pages (zone_batchsize, zone_highsize)."""
    batch = batch_pages(place) if settings.pcp_batch is None else settings.pcp_batch
    return batch, settings.pcp_high or max(marks.boot_low // cpus, 4 * batch, 1)


def _cycle(lane: _Lane) -> Cycle:
    assert lane.cycle is not None
    return lane.cycle
