"""Discard backends: what giving a block back means. Whoever adds one writes a class and a line in ``BACKENDS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from common import faults
from common.geometry import PAGE_SHIFT
from common.messages import BackendName
from common.ramobject import RamObject
from host.proof import Proof, punch_hole

__all__ = ["BACKENDS", "Backend", "Discarded", "ModelBackend", "SharedBackend"]

Int64Array: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Discarded:
    """Outcome of one batch. Meanings as in ``host.accounting.Counters``.

    ``zeroed``: bool[n], the blocks that read as zeros now, because their discard succeeded (Z1). Left out of
    comparisons: those are of accounts, and an array has no single answer to one.
    """

    freed_bytes: int = 0
    modelled_bytes: int = 0
    failures: int = 0
    duplicates: int = 0
    empty_blocks: int = 0
    zeroed: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=np.bool_), compare=False)


class Backend(Protocol):
    """One guest's discards."""

    def move_to(self, ram: RamObject) -> None:
        """Go on with another descriptor of the same object."""

    def discard(self, starts: Int64Array, ends: Int64Array) -> Discarded:
        """Give blocks back. ``starts`` and ``ends`` (exclusive): pfns, int64[n], ascending, in bounds, disjoint.

        The caller holds the gate. Whatever the guest does to its object is a counted failure, never an exception.
        """


class SharedBackend:
    """Real memory: holes are punched in the guest's RAM object, neighbouring blocks in one, each proven."""

    def __init__(self, ram: RamObject, n_pages: int, proof: Proof) -> None:
        self._descriptor = ram.fileno()
        self._proof = proof
        # A bit a page, "discarded before": tells a block that was reported twice from one that was never touched.
        # np.zeros, unlike bytearray, takes its pages at first use: a terabyte that is never reported costs nothing.
        self._earlier = np.zeros((n_pages + 7) // 8, dtype=np.uint8).data

    def move_to(self, ram: RamObject) -> None:
        """See ``Backend``."""
        self._descriptor = ram.fileno()

    def discard(self, starts: Int64Array, ends: Int64Array) -> Discarded:
        """See ``Backend``."""
        outcome = Discarded(zeroed=np.zeros(starts.size, dtype=np.bool_))
        breaks = (np.flatnonzero(starts[1:] != ends[:-1]) + 1).tolist()
        for first, behind in zip([0, *breaks], [*breaks, starts.size], strict=True):
            self._discard_range(slice(first, behind), starts, ends, outcome)
        return outcome

    def _discard_range(self, blocks: slice, starts: Int64Array, ends: Int64Array, outcome: Discarded) -> None:
        """Punch and prove the run of neighbouring ``blocks``.

        They read as zeros then by construction, a hole of shared memory has no other contents; a guest that writes to
        them at this moment breaks its own rule (S6), not ours.
        """
        start, end = int(starts[blocks.start]), int(ends[blocks.stop - 1])
        offset, length = start << PAGE_SHIFT, (end - start) << PAGE_SHIFT
        descriptor, proof = self._descriptor, self._proof
        try:
            mark, populated = proof.before(descriptor, offset, length)
            if not populated:
                self._count_empty(starts[blocks].tolist(), ends[blocks].tolist(), outcome)
            punch_hole(descriptor, offset, length)
            faults.reach("host.punched")
            freed_pages, data_left = proof.after(descriptor, offset, length, mark)
            outcome.freed_bytes += freed_pages << PAGE_SHIFT
            if data_left:
                empty = self._empty_blocks(starts[blocks].tolist(), ends[blocks].tolist())
                # At least one failed: if all look empty by now, the guest is touching them this very moment.
                outcome.failures += max(1, empty.count(False))
                outcome.zeroed[blocks] = empty if False in empty else False
            else:
                outcome.zeroed[blocks] = True
        except OSError:
            outcome.failures += blocks.stop - blocks.start
        else:
            self._mark_discarded(start, end)

    def _count_empty(self, starts: list[int], ends: list[int], outcome: Discarded) -> None:
        """Before the punch of a range that is not fully populated: which of its blocks hold nothing, and why."""
        for start, end in zip(starts, ends, strict=True):
            if self._proof.is_empty(self._descriptor, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT):
                if self._was_discarded(start, end):
                    outcome.duplicates += 1
                else:
                    outcome.empty_blocks += 1

    def _empty_blocks(self, starts: list[int], ends: list[int]) -> list[bool]:
        """After the punch of a range that holds data all the same: which of its blocks hold none."""
        return [
            self._proof.is_empty(self._descriptor, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
            for start, end in zip(starts, ends, strict=True)
        ]

    def _mark_discarded(self, start: int, end: int) -> None:
        """Set the bits of pages ``start`` to ``end`` (exclusive, not empty)."""
        bits = self._earlier
        first, last = start >> 3, (end - 1) >> 3
        head, tail = 0xFF << (start & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
        if first == last:
            bits[first] |= head & tail
            return
        bits[first] |= head
        bits[first + 1 : last] = b"\xff" * (last - first - 1)
        bits[last] |= tail

    def _was_discarded(self, start: int, end: int) -> bool:
        """Whether every page from ``start`` to ``end`` was discarded before."""
        wanted = (1 << (end - start)) - 1
        found = int.from_bytes(self._earlier[start >> 3 : (end + 7) >> 3], "little") >> (start & 7)
        return found & wanted == wanted


class ModelBackend:
    """No memory: what is asked counts as freed, and is marked as modelled.

    It counts as zero too (Z1): the guest has no contents that could belie it, and what it then need not clear is part
    of what is modelled.
    """

    def __init__(self, _ram: RamObject, _n_pages: int, _proof: Proof) -> None:
        """Nothing to keep."""

    def move_to(self, ram: RamObject) -> None:
        """See ``Backend``."""

    def discard(self, starts: Int64Array, ends: Int64Array) -> Discarded:
        """See ``Backend``."""
        asked_bytes = int((ends - starts).sum()) << PAGE_SHIFT
        zeroed = np.ones(starts.size, dtype=np.bool_)
        return Discarded(freed_bytes=asked_bytes, modelled_bytes=asked_bytes, zeroed=zeroed)


BACKENDS: dict[BackendName, Callable[[RamObject, int, Proof], Backend]] = {
    "shared": SharedBackend,
    "model": ModelBackend,
}
