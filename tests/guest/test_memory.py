"""First use, stamps, and the resident map, on a RAM object whose pages are really given back."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import pytest

from common.geometry import PAGE_BYTES
from common.layout import INSTALLED, NEVER_TOUCHED, RESIDENT, RETURNED, W_POISON
from common.ramobject import RamObject
from guest.allocator.percpu import cpu_slot
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone
from guest.memory import (
    FINDING_WORDS,
    PAGE_WORDS,
    STAMP_LOST,
    ZERO_LOST,
    check_stamps,
    mark_returned,
    set_residence,
    stamp_of,
    use_pages,
)
from tests.allocator.arrange import MIB, make_zone

TAG = 5


class Ram:
    """A zone, its RAM mapped, and the slot that the one user counts in."""

    def __init__(self, lab: str) -> None:
        self.zone: Zone = make_zone(16 * MIB)
        self.object = RamObject.create(lab, "g0", ram_bytes=16 * MIB)
        self.map: mmap.mmap = self.object.map()
        self.words = np.frombuffer(self.map, dtype=np.int64).reshape(-1, PAGE_WORDS)
        self.finding = np.zeros(FINDING_WORDS, dtype=np.int64)
        self.slot = int(cpu_slot(self.zone.claim_cpu()))

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)

    def use(self, pfn: int, order: int, tag: int = TAG, *, model: bool = False) -> int:
        """Pages that were not resident."""
        zone = self.zone
        address = 0 if model else self.address
        return int(use_pages(open_zone(zone.address), zone.address, address, self.slot, self.finding, pfn, order, tag))

    def check(self, pfn: int, order: int, tag: int = TAG, *, model: bool = False) -> bool:
        address = 0 if model else self.address
        return bool(check_stamps(open_zone(self.zone.address), address, self.slot, self.finding, pfn, order, tag))

    def give_back(self, pfn: int, order: int, *, discard: bool = True) -> int:
        """What host and reporter do together; ``discard`` False: the host lies."""
        if discard:
            self.map.madvise(mmap.MADV_REMOVE, pfn * PAGE_BYTES, PAGE_BYTES << order)
        return int(mark_returned(self.zone.address, np.array([pfn]), np.array([order])))

    def residence(self, pfn: int, order: int) -> list[int]:
        return sorted({int(state) for state in self.zone.resident_map()[pfn : pfn + (1 << order)]})

    def close(self) -> None:
        del self.words
        self.object.unlink()
        self.object.close()
        self.zone.close()


@pytest.fixture
def ram(lab_name: str) -> Iterator[Ram]:
    opened = Ram(lab_name)
    yield opened
    opened.close()


def test_the_first_use_of_a_page_is_a_first_touch_and_stamps_it(ram: Ram) -> None:
    assert ram.residence(0, 9) == [NEVER_TOUCHED]
    assert ram.use(0, 9) == 512
    assert ram.residence(0, 9) == [RESIDENT]
    statistics = ram.zone.statistics()
    assert (statistics.first_touches, statistics.refaults, statistics.resident_pages) == (512, 0, 512)
    assert ram.words[7, 0] == ram.words[7, PAGE_WORDS - 1] == int(stamp_of(7, TAG))
    assert not ram.words[7, 1 : PAGE_WORDS - 1].any()
    assert ram.object.resident_bytes() == 512 * PAGE_BYTES
    assert ram.check(0, 9)
    assert not ram.finding.any()


def test_the_next_use_of_a_resident_page_is_neither_and_clears_it(ram: Ram) -> None:
    ram.use(0, 3)
    ram.words[:8] = -1
    assert ram.use(0, 3, TAG + 1) == 0
    assert not ram.words[3, 1 : PAGE_WORDS - 1].any()
    assert not ram.finding.any()
    assert ram.zone.statistics().first_touches == 8


def test_a_page_that_was_given_back_is_a_refault_and_reads_as_zeros(ram: Ram) -> None:
    """S6."""
    ram.use(0, 9)
    assert ram.give_back(0, 9) == 512
    assert ram.residence(0, 9) == [RETURNED]
    assert ram.object.resident_bytes() == 0
    assert ram.zone.statistics().resident_pages == 0
    assert ram.use(0, 8, TAG + 1) == 256
    statistics = ram.zone.statistics()
    assert (statistics.refaults, statistics.returned_pages, statistics.resident_pages) == (256, 512, 256)
    assert ram.object.resident_bytes() == 256 * PAGE_BYTES
    assert not ram.finding.any()


def test_only_what_was_resident_is_counted_as_returned(ram: Ram) -> None:
    ram.use(0, 3)
    assert ram.give_back(0, 9) == 8
    assert ram.give_back(0, 9) == 0
    assert ram.residence(8, 3) == [NEVER_TOUCHED]


def test_s6_a_page_that_was_given_back_and_does_not_read_as_zeros_is_a_violation(ram: Ram) -> None:
    ram.use(0, 3)
    ram.give_back(0, 3, discard=False)
    ram.use(0, 3, TAG + 1)
    assert ram.finding.tolist() == [ZERO_LOST, 0, 0, int(stamp_of(0, TAG))]
    assert ram.zone.statistics().violations == 8


@pytest.mark.parametrize("word", [0, 1, 255, PAGE_WORDS - 1])
def test_s6_any_word_of_a_fresh_page_that_is_not_zero_is_found(ram: Ram, word: int) -> None:
    ram.words[2, word] = 1 << 40
    ram.use(0, 2)
    assert ram.finding.tolist() == [ZERO_LOST, 2, 0, 1 << 40]
    assert ram.zone.statistics().violations == 1


@pytest.mark.parametrize("word", [0, PAGE_WORDS - 1])
@pytest.mark.parametrize("page", [16, 20, 31])
def test_s3_s6_a_stamp_that_is_gone_is_found(ram: Ram, page: int, word: int) -> None:
    ram.use(16, 4)
    ram.words[page, word] = 0
    assert not ram.check(16, 4)
    assert ram.finding.tolist() == [STAMP_LOST, page, int(stamp_of(page, TAG)), 0]
    assert ram.zone.statistics().violations == 1


def test_s3_a_block_in_two_hands_is_found_by_the_first(ram: Ram) -> None:
    ram.use(16, 4, TAG)
    ram.use(16, 4, TAG + 1)
    assert not ram.check(16, 4, TAG)
    assert ram.finding.tolist() == [STAMP_LOST, 16, int(stamp_of(16, TAG)), int(stamp_of(16, TAG + 1))]


def test_the_first_finding_is_kept_and_all_are_counted(ram: Ram) -> None:
    ram.use(0, 2)
    ram.words[1:3] = 0
    ram.check(0, 2)
    assert ram.finding[1] == 1
    assert ram.zone.statistics().violations == 2


def test_stamps_are_never_zero_and_never_alike(ram: Ram) -> None:
    pfns, tags = [0, 1, (1 << 28) - 1], [1, 2, (1 << 34) - 1]
    stamps = [int(stamp_of(np.int64(pfn), np.int64(tag))) for pfn in pfns for tag in tags]
    assert len(set(stamps)) == 9
    assert min(stamps) > 0


def test_an_uncertain_discard_is_settled_by_what_is_there(ram: Ram) -> None:
    ram.use(0, 2)
    ram.map.madvise(mmap.MADV_REMOVE, PAGE_BYTES, PAGE_BYTES)  # the host came as far as page 1
    ram.map.madvise(mmap.MADV_REMOVE, 3 * PAGE_BYTES, PAGE_BYTES)
    now = np.array([RESIDENT, RETURNED, RESIDENT, RETURNED, RETURNED], dtype=np.uint8)
    set_residence(ram.zone.address, 0, now)
    assert ram.zone.resident_map()[:5].tolist() == [RESIDENT, RETURNED, RESIDENT, RETURNED, NEVER_TOUCHED]
    assert ram.zone.statistics().returned_pages == 2
    assert ram.use(0, 2, TAG + 1) == 2
    assert not ram.finding.any()


def test_without_ram_only_the_map_is_kept(ram: Ram) -> None:
    """The model backend."""
    assert ram.use(0, 9, model=True) == 512
    assert ram.check(0, 9, model=True)
    assert ram.give_back(0, 9, discard=False) == 512
    assert ram.use(0, 9, model=True) == 512
    assert ram.object.resident_bytes() == 0
    statistics = ram.zone.statistics()
    assert (statistics.first_touches, statistics.refaults, statistics.violations) == (512, 512, 0)


@pytest.mark.parametrize("poison", [0, 0xAA])
@pytest.mark.parametrize("found", [0, 7])
def test_s6_a_page_that_was_populated_beforehand_must_read_as_zeros(ram: Ram, poison: int, found: int) -> None:
    """S6: with no mark of Z1, and in a zone that poisons too: it was not there before, so it holds no poison."""
    zone = ram.zone
    zone._control[W_POISON] = poison
    pfn = zone.alloc(0)
    assert pfn is not None
    zone._resident[pfn] = INSTALLED
    ram.words[pfn, PAGE_WORDS // 2] = found
    ram.use(pfn, 0)
    assert ram.finding.tolist() == ([ZERO_LOST, pfn, 0, found] if found else [0, 0, 0, 0])
    assert zone.resident_map()[pfn] == RESIDENT
