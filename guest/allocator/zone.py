"""A process's handle on a zone: the readable face of the kernels."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import faults, layout
from common.errors import (
    AllocatorError,
    DoubleFreeError,
    InvariantViolation,
    MachineError,
    OutOfRangeError,
    SegmentError,
    UsageError,
    WrongOrderError,
)
from common.geometry import N_ORDERS, TOP_ORDER, Migratetype, check_memory_bytes
from common.mutex import initialise_mutex, initialise_semaphore
from common.names import zone_object
from common.segment import Segment
from guest.allocator import entry, locked, percpu, validate
from guest.allocator.header import TRIGGERS, ZoneSettings, check_settings, fill_header, new_epoch, read_settings

__all__ = ["Zone", "ZoneSettings", "ZoneStatistics"]


@dataclass(frozen=True)
class ZoneStatistics:
    """One look at the counters. Pages unless the name says otherwise; cumulative where it names events."""

    n_pages: int
    free_pages: int
    isolated_pages: int
    pcp_pages: int
    in_flight_pages: int
    in_flight_blocks: int
    in_flight_max_blocks: int
    allocated_pages: int
    nr_free: tuple[int, ...]
    reported: tuple[int, ...]
    reported_pages: int
    resident_pages: int
    returned_pages: int
    refaults: int
    first_touches: int
    allocations: int
    frees: int
    failed_allocations: int
    allocated_bytes: int
    freed_bytes: int
    violations: int
    zeroing_skipped_pages: int
    requested: bool
    active: bool
    requests: int
    runs: int
    pulled_blocks: int
    nodes_visited: int
    nodes_hold_max: int
    held_pages: int
    held_blocks: int
    pressure: int
    steals: int
    repairs: int
    installs: int
    installed_pages: int
    reinstalled_pages: int
    install_wait_ns: int
    asks_withdrawn: int


_CLAIMS = 50  # tries to get a slot, with a pause in between: half a second in all
_CLAIM_PAUSE_S = 0.01


class Zone:
    """The zone, mapped here. Methods may be called from any thread; a method that takes locks says so."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.address = segment.address
        header = segment.header
        self.n_pages = int(header["n_pages"])
        self.n_cpus = int(header["n_cpus"])
        self.metadata_bytes = int(header["total_bytes"])
        self.ram_bytes = int(header["ram_bytes"])
        self.min_order = int(header["min_order"])
        self.owner_pid = int(header["owner_pid"])
        self.epoch = int(header["epoch"])
        self.work_address = segment.address + 8 * layout.W_WORK
        parts = layout.segment_offsets(self.n_pages, self.n_cpus)
        control_words = layout.HEADER_WORDS + self.n_cpus * layout.CPU_WORDS
        self._control = segment.bytes[: 8 * control_words].view(np.int64)
        self._page = segment.bytes[parts.page : parts.page + 2 * self.n_pages].view(np.uint16)
        self._resident = segment.bytes[parts.resident : parts.resident + self.n_pages]

    # -- life ---------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, lab: str, guest: str, *, settings: ZoneSettings) -> Zone:
        """A new named zone, all of it free. Raises ``UsageError``, ``NameInUseError`` or ``MachineError``."""
        return cls._create(settings, zone_object(lab, guest))

    @classmethod
    def private(cls, settings: ZoneSettings) -> Zone:
        """A zone in this process's own memory: tests, virtual time."""
        return cls._create(settings, "")

    @classmethod
    def attach(cls, lab: str, guest: str, *, read_only: bool = False) -> Zone:
        """The zone of a running guest. Raises ``SegmentError`` (missing, a stranger's, another version)."""
        return cls(Segment.attach(zone_object(lab, guest), writable=not read_only))

    @classmethod
    def _create(cls, settings: ZoneSettings, name: str) -> Zone:
        n_pages = check_memory_bytes(settings.memory_bytes)
        check_settings(settings)
        offsets = layout.segment_offsets(n_pages, settings.cpus)
        segment = Segment.create(name, offsets.total) if name else Segment.private(offsets.total)
        try:
            fill_header(segment.header, settings, n_pages, offsets)
            faults.reach("header.filled")
            initialise_mutex(segment.address + 8 * layout.W_ZONE_LOCK)
            initialise_semaphore(segment.address + 8 * layout.W_WORK)
            initialise_semaphore(segment.address + 8 * layout.W_ASKS_WORK)
            for ask in range(layout.N_ASKS):
                initialise_semaphore(segment.address + 8 * (layout.W_ASKS + ask * layout.ASK_WORDS))
            blocks = np.arange(n_pages >> TOP_ORDER, dtype=np.int64) << TOP_ORDER
            if settings.shuffle:
                blocks = np.random.default_rng(settings.seed).permutation(blocks)  # shuffle_free_memory
            entry.initialise_zone(segment.address, blocks)
            faults.reach("header.listed")
            segment.header["ready"] = 1
            return cls(segment)
        except BaseException:
            segment.unlink()
            raise

    def close(self) -> None:
        """Drop the mapping. No other call may be in progress or follow."""
        del self._control, self._page, self._resident
        self._segment.close()

    def take_ownership(self, trigger: str, high_water_mark: int) -> None:
        """This process is the guest now: a new epoch, and what asks for a run. For who has adopted its RAM object."""
        header = self._segment.header
        header["epoch"] = self.epoch = new_epoch()
        header["trigger"] = TRIGGERS[trigger]
        header["high_water_mark"] = high_water_mark
        header["owner_pid"] = self.owner_pid = os.getpid()

    def settings(self) -> ZoneSettings:
        """What it was created with, watermarks as derived."""
        return read_settings(self._segment.header)

    def is_named(self) -> bool:
        """Whether the segment's name still stands for this segment: no more once its guest has ended."""
        return self._segment.is_named()

    def unlink(self) -> None:
        """Remove the name."""
        self._segment.unlink()

    # -- allocate and free --------------------------------------------------------------------------------------------

    def alloc(
        self, order: int = 0, migratetype: Migratetype = Migratetype.MOVABLE, *, cpu: int = -1, flags: int = 0
    ) -> int | None:
        """First pfn of 2**order pages (alloc_pages), or None when the watermark or the lists forbid.

        ``cpu`` is the caller's per-CPU slot, -1 to go past the per-CPU lists. Takes the slot lock, then the zone lock.

        Raises:
            OutOfRangeError: no such order or migratetype.
        """
        if not 0 <= order < N_ORDERS:
            raise OutOfRangeError(f"order {order}; allowed is 0 to {TOP_ORDER}")
        if not 0 <= migratetype < Migratetype.ISOLATE:
            raise OutOfRangeError(f"migratetype {migratetype}; nothing is allocated from ISOLATE")
        self._check_cpu(cpu)
        pfn = int(entry.zone_alloc(self._open(), cpu, order, int(migratetype), flags))
        if pfn >= 0:
            return pfn
        if pfn == locked.E_NO_MEMORY:
            return None
        raise _error(pfn, f"allocation of order {order}")

    def free(self, pfn: int, order: int = 0, *, cpu: int = -1) -> None:
        """Free a block (free_pages). A refused free changes nothing.

        Raises:
            DoubleFreeError, WrongOrderError, OutOfRangeError: what is wrong with it.
        """
        self._check_cpu(cpu)
        if not (0 <= pfn < self.n_pages and 0 <= order < N_ORDERS):
            raise OutOfRangeError(f"free of pfn {pfn}, order {order}: the zone has {self.n_pages} pages, orders to 10")
        code = int(entry.zone_free(self._open(), cpu, pfn, order))
        if code:
            state = int(self._page[pfn])
            raise _error(code, f"free of pfn {pfn}, order {order} (its state is {state:#06x})")

    def drain(self, cpu: int) -> int:
        """Give what a slot's lists hold back to the zone (drain_pages); returns the pages. Both locks."""
        self._check_cpu(cpu)
        pages = int(percpu.drain_slot(self._open(), cpu))
        if pages < 0:
            raise _error(pages, f"drain of slot {cpu}")
        return pages

    def claim_cpu(self, ram_address: int = 0) -> int:
        """A per-CPU slot for this thread until ``release_cpu``. If all are taken, what dead processes have is freed.

        ``ram_address``: where the guest's RAM is mapped here; 0: it has none, or this process does not use it.

        Raises:
            MachineError: all slots are taken.
        """
        from guest.inherit import reap  # it frees through a zone

        for attempt in range(_CLAIMS):
            cpu = int(entry.claim_slot(self._open(), os.getpid()))
            if cpu >= 0:
                return cpu
            if not reap(self, ram_address) and attempt:  # somebody else may be at it: it is done in a moment
                time.sleep(_CLAIM_PAUSE_S)
        raise MachineError(
            f"all {self.n_cpus} per-CPU slots are taken: use fewer --vcpus, end a process that joined, or give the "
            "guest more --spare-slots"
        )

    def release_cpu(self, cpu: int) -> None:
        """Drain a claimed slot and give it up."""
        self.drain(cpu)
        entry.release_slot(self._open(), cpu, os.getpid())

    def give_to_guest(self, cpu: int) -> None:
        """The slot, which is this process's, is the guest's own from now on: its successor has it, and nobody else."""
        self._control[int(percpu.cpu_slot(cpu)) + layout.C_OF_GUEST] = 1

    def owner(self) -> int:
        """Pid of the guest, as the header has it now. Read without a lock."""
        return int(self._control[layout.W_OWNER_PID])

    def slot_word(self, cpu: int, word: int) -> int:
        """Word ``word`` (``C_*`` of the layout) of a slot. Read without a lock."""
        return int(self._control[int(percpu.cpu_slot(cpu)) + word])

    # -- pageblocks ---------------------------------------------------------------------------------------------------

    def isolate(self, pageblock: int) -> None:
        """Isolate a pageblock (start_isolate_page_range, one block). Takes the zone lock.

        Raises:
            OutOfRangeError: no such pageblock. AllocatorError: isolated already.
        """
        self._pageblock_call(entry_code=int(locked.locked_isolate(self._open(), pageblock)), pageblock=pageblock)
        for cpu in range(self.n_cpus):  # drain_all_pages: what per-CPU lists hold of it must not be handed out either
            self.drain(cpu)

    def unisolate(self, pageblock: int) -> None:
        """End a pageblock's isolation (undo_isolate_page_range). Raises as ``isolate``."""
        self._pageblock_call(entry_code=int(locked.locked_unisolate(self._open(), pageblock)), pageblock=pageblock)

    def set_pageblock_migratetype(self, pageblock: int, migratetype: Migratetype) -> None:
        """Change a pageblock's type and move its free blocks along. Takes the zone lock. Not for ISOLATE."""
        if not 0 <= migratetype < Migratetype.ISOLATE:
            raise OutOfRangeError(f"migratetype {migratetype}; use isolate() for ISOLATE")
        code = int(locked.locked_set_type(self._open(), pageblock, int(migratetype)))
        self._pageblock_call(entry_code=code, pageblock=pageblock)

    def _pageblock_call(self, *, entry_code: int, pageblock: int) -> None:
        if entry_code == locked.E_NOT_ISOLATED:
            raise AllocatorError(f"pageblock {pageblock}: its isolation is not what this call expects")
        if entry_code:
            raise _error(entry_code, f"pageblock {pageblock}")

    def rotate(self, order: int, migratetype: Migratetype, pfn: int) -> None:
        """Turn a free list so that ``pfn`` comes first, as compaction does. Takes the zone lock.

        Raises:
            OutOfRangeError: ``pfn`` is not on that list.
        """
        code = int(locked.locked_rotate(self._open(), order, int(migratetype), pfn))
        if code:
            raise _error(code, f"rotation of list ({order}, {int(migratetype)}) to pfn {pfn}")

    # -- look ---------------------------------------------------------------------------------------------------------

    def free_list(self, order: int, migratetype: Migratetype) -> list[tuple[int, bool]]:
        """(pfn, reported) of one list, front to tail. Takes the zone lock.

        Raises:
            OutOfRangeError: no such order or migratetype.
        """
        if not (0 <= order < N_ORDERS and 0 <= migratetype <= Migratetype.ISOLATE):
            raise OutOfRangeError(f"list ({order}, {migratetype}); orders go to {TOP_ORDER}, types to ISOLATE")
        out = np.zeros(1024, dtype=np.int64)
        while True:
            length = int(entry.read_list(self._open(), order, int(migratetype), out))
            if length < 0:
                raise _error(length, "free_list")
            if length <= out.size:
                break
            out = np.zeros(2 * length, dtype=np.int64)
        return [(int(pfn), bool(self._page[pfn] & layout.REPORTED)) for pfn in out[:length]]

    def statistics(self) -> ZoneStatistics:
        """Counters as they are now, read without a lock: each is right, together they may be a moment apart."""
        header = self._segment.header
        slots = self._control[layout.HEADER_WORDS :].reshape(self.n_cpus, layout.CPU_WORDS)

        def over_cpus(word: int) -> int:
            return int(slots[:, word].sum())

        values: dict[str, Any] = {
            name: int(header[name])
            for name in (
                "free_pages",
                "isolated_pages",
                "in_flight_pages",
                "in_flight_blocks",
                "in_flight_max_blocks",
                "returned_pages",
                "failed_allocations",
                "requests",
                "runs",
                "pulled_blocks",
                "nodes_visited",
                "nodes_hold_max",
                "held_pages",
                "held_blocks",
                "pressure",
                "steals",
                "repairs",
                "installs",
                "installed_pages",
                "reinstalled_pages",
                "install_wait_ns",
                "asks_withdrawn",
            )
        }
        pcp_pages = over_cpus(layout.C_COUNT)
        reported = tuple(int(count) for count in header["reported"])
        first_touches, refaults = over_cpus(layout.C_FIRST_TOUCHES), over_cpus(layout.C_REFAULTS)
        outside = pcp_pages + sum(
            values[name] for name in ("free_pages", "isolated_pages", "in_flight_pages", "held_pages")
        )
        return ZoneStatistics(
            n_pages=self.n_pages,
            pcp_pages=pcp_pages,
            allocated_pages=self.n_pages - outside,
            nr_free=tuple(int(count) for count in header["nr_free"]),
            reported=reported,
            reported_pages=sum(count << order for order, count in enumerate(reported)),
            resident_pages=first_touches + refaults + values["installed_pages"] - values["returned_pages"],
            refaults=refaults,
            first_touches=first_touches,
            allocations=int(header["allocations"]) + over_cpus(layout.C_ALLOCATIONS),
            frees=int(header["frees"]) + over_cpus(layout.C_FREES),
            allocated_bytes=over_cpus(layout.C_ALLOCATED_BYTES),
            freed_bytes=over_cpus(layout.C_FREED_BYTES),
            violations=over_cpus(layout.C_VIOLATIONS),
            zeroing_skipped_pages=over_cpus(layout.C_ZEROING_SKIPPED),
            requested=bool(header["requested"]),
            active=bool(header["active"]),
            **values,
        )

    def page_states(self) -> np.ndarray:
        """Copy of the page records, uint16[n_pages] (bits in ``common.layout``); no lock."""
        return np.array(self._page)

    def resident_map(self) -> np.ndarray:
        """Copy of the resident map, uint8[n_pages]: 0 never touched, 1 resident, 2 returned; no lock."""
        return np.array(self._resident)

    def requested(self) -> bool:
        """REQUESTED: somebody asked for a run that has not begun its last batch. Read without the lock."""
        return bool(self._control[layout.W_REQUESTED])

    def device_pid(self) -> int:
        """Pid of the registered reporting device, 0 for none. Read without the lock."""
        return int(self._control[layout.W_DEVICE_PID])

    def open_to_host(self) -> bool:
        """Whether the guest lets a host claim blocks itself. Read without the lock."""
        return bool(self._control[layout.W_OPEN_TO_HOST])

    def unreported_pages(self) -> int:
        """Free pages of at least the minimum order that are not Reported."""
        return int(entry.unreported_pages(self.address))

    def snapshot(self) -> bytes:
        """The whole segment as bytes, taken with every lock held."""
        target = np.zeros(self.metadata_bytes, dtype=np.uint8)
        code = int(entry.locked_copy(self._open(), target))
        if code:
            raise _error(code, "snapshot")
        return target.tobytes()

    def validate(self) -> None:
        """Walk every list and record with every lock held.

        Raises:
            InvariantViolation: names each breach by its identifier.
        """
        found = np.zeros(1 + 3 * validate.MAX_BREACHES, dtype=np.int64)
        count = int(validate.locked_find_breaches(self._open(), found))
        if count < 0:
            raise _error(locked.E_LOCK, "validate")
        if count:
            triples = found[1:].reshape(-1, 3)[: min(count, validate.MAX_BREACHES)]
            lines = [validate.BREACHES[int(code)].format(int(one), int(two)) for code, one, two in triples]
            raise InvariantViolation(f"{count} breaches: " + "; ".join(lines))

    def _open(self) -> int:
        """The address, for calls that take a lock.

        Raises:
            UsageError: attached to look only.
        """
        if not self._segment.writable:
            raise UsageError("this zone is attached read-only: a lock cannot be taken; attach with read_only=False")
        return self.address

    def _check_cpu(self, cpu: int) -> None:
        if not -1 <= cpu < self.n_cpus:
            raise OutOfRangeError(f"cpu {cpu}; the zone has slots 0 to {self.n_cpus - 1}, -1 goes past them")


def _error(code: int, what: str) -> Exception:
    """The exception for a kernel's code."""
    if code == locked.E_DOUBLE_FREE:
        return DoubleFreeError(f"{what}: not allocated; it is free, in flight, or inside another block")
    if code == locked.E_WRONG_ORDER:
        return WrongOrderError(f"{what}: allocated with another order")
    if code == locked.E_OUT_OF_RANGE:
        return OutOfRangeError(f"{what}: outside the zone, or not aligned to its order")
    return SegmentError(f"{what}: the lock is beyond recovery; end the guest and start a new one")
