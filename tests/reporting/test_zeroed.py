"""Blocks that the host proved zero (Z1 to Z4): who marks them, who keeps the mark, who loses it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common.errors import InvariantViolation, UsageError
from common.geometry import PAGE_BYTES, Migratetype
from common.layout import ALLOCATED, FREE, HELD, IN_FLIGHT, KIND_MASK, MT_SHIFT, ON_PCP, RESIDENT, RETURNED, ZEROED
from common.messages import Status, pack_zeroed, unpack_blocks
from common.settings import GuestSettings
from guest.allocator.buddy import FPI_NONE
from guest.allocator.percpu import cpu_slot
from guest.allocator.repair import rebuild_zone
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone
from guest.machine import Machine
from guest.memory import FINDING_WORDS, PAGE_WORDS, POISON_LOST, ZERO_LOST, check_stamps, use_pages
from guest.reporting.blocks import hold_blocks, mark_zeroed, release_held
from guest.reporting.cycle import Answer, Batch, Cycle, Outcome
from guest.workloads import engine
from guest.workloads.vcpu import VCpu, WorkloadSettings
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB, exhaust, make_zone
from tests.guest.arrange import HandHost
from tests.reporting.arrange import boundary_cycle, flags_of, free_alternating
from tests.support import wait_until

MOVABLE = Migratetype.MOVABLE
POISON = 0xAA
PATIENCE_S = 60.0


@pytest.fixture
def zone() -> Iterator[Zone]:
    """16 MiB that keeps track, per-CPU lists off."""
    zone = make_zone(16 * MIB, host_zeroed=True)
    yield zone
    zone.validate()
    zone.close()


def confirm_all(batch: Batch) -> Answer:
    """A host that discards everything, and says so of each block."""
    return Answer(Outcome.DONE, np.ones(batch.pfns.size, dtype=np.bool_))


def confirming(*pfns: int, outcome: Outcome = Outcome.DONE) -> Callable[[Batch], Answer]:
    """A host that confirms these blocks and no others."""
    return lambda batch: Answer(outcome, np.isin(batch.pfns, pfns))


def zeroed_heads(zone: Zone) -> dict[int, int]:
    """Kind of each block that carries the mark, by pfn."""
    states = zone.page_states()
    return {int(pfn): int(states[pfn]) & KIND_MASK for pfn in np.flatnonzero(states & ZEROED)}


def use(zone: Zone, pfn: int, order: int) -> int:
    """First use without RAM, as the model backend; how many pages were not cleared."""
    before = zone.statistics().zeroing_skipped_pages
    finding = np.zeros(FINDING_WORDS, dtype=np.int64)
    use_pages(open_zone(zone.address), zone.address, 0, int(cpu_slot(0)), finding, pfn, order, 1)
    return zone.statistics().zeroing_skipped_pages - before


def test_z1_only_the_confirmed_blocks_of_a_report_are_marked(zone: Zone) -> None:
    freed, _ = free_alternating(zone, 3)
    boundary_cycle(zone).run(confirming(freed[1]))
    assert zeroed_heads(zone) == {freed[1]: FREE}
    assert flags_of(zone) == "RRR", "Reported is another matter"


@pytest.mark.parametrize("outcome", list(Outcome))
def test_z1_an_outcome_alone_confirms_nothing(zone: Zone, outcome: Outcome) -> None:
    free_alternating(zone, 3)
    cycle = boundary_cycle(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, outcome)
    cycle.end()
    assert zeroed_heads(zone) == {}


@pytest.mark.parametrize("outcome", [Outcome.KEPT, Outcome.WITHDRAWN])
def test_z1_where_nothing_was_discarded_a_confirmation_is_ignored(zone: Zone, outcome: Outcome) -> None:
    free_alternating(zone, 3)
    boundary_cycle(zone).run(lambda batch: Answer(outcome, confirm_all(batch).zeroed))
    assert zeroed_heads(zone) == {}


def test_z1_of_a_failed_report_what_did_not_fail_is_marked_and_nothing_is_reported(zone: Zone) -> None:
    """Z1 and S8."""
    freed, _ = free_alternating(zone, 3)
    boundary_cycle(zone).run(confirming(freed[2], outcome=Outcome.FAILED))
    assert zeroed_heads(zone) == {freed[2]: FREE}
    assert flags_of(zone) == "UUU"


def test_z1_a_guest_that_keeps_no_track_ignores_it() -> None:
    zone = make_zone(16 * MIB)
    free_alternating(zone, 3)
    boundary_cycle(zone).run(confirm_all)
    assert zeroed_heads(zone) == {}
    zone.validate()
    zone.close()


def test_z1_a_confirmation_of_another_size_is_refused_and_the_blocks_are_back(zone: Zone) -> None:
    freed, _ = free_alternating(zone, 3)
    for wrong in (np.ones(2, dtype=np.bool_), np.ones(4, dtype=np.bool_), np.ones(3, dtype=np.int64)):
        with pytest.raises(UsageError, match=r"allowed is bool\[3\]"):
            boundary_cycle(zone).run(lambda _batch, wrong=wrong: Answer(Outcome.DONE, wrong))  # type: ignore[misc]
        assert zone.statistics().in_flight_blocks == 0
        assert zeroed_heads(zone) == {}
    assert sorted(pfn for pfn, _ in zone.free_list(9, MOVABLE)) == freed


def test_z1_what_somebody_has_put_back_meanwhile_is_not_marked(zone: Zone) -> None:
    """And handed out again: the mark would be a lie."""
    free_alternating(zone, 1)
    cycle = boundary_cycle(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, Outcome.WITHDRAWN)
    pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
    assert pfn == batch.pfns[0]
    assert cycle.put_back(batch, confirm_all(batch)) == 0
    cycle.end()
    assert zeroed_heads(zone) == {}


@pytest.mark.parametrize("order", [0, 5, 9])
def test_z2_both_halves_of_a_split_inherit(zone: Zone, order: int) -> None:
    """And Reported, which ends with the split (S7), does not matter."""
    boundary_cycle(zone).run(confirm_all)
    tops = set(range(0, 4096, 1024))
    assert zeroed_heads(zone) == dict.fromkeys(tops, FREE)
    pfn = zone.alloc(order)
    assert pfn is not None
    halves = {pfn + (1 << half) for half in range(order, 10)}
    assert zeroed_heads(zone) == {pfn: ALLOCATED} | dict.fromkeys(halves | tops - {pfn}, FREE)


def test_z2_a_merge_with_what_is_not_zero_drops_it(zone: Zone) -> None:
    freed, buddies = free_alternating(zone, 2)
    boundary_cycle(zone).run(confirm_all)
    zone.free(buddies[0], 9)
    assert zeroed_heads(zone) == {freed[1]: FREE}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_z2_a_merge_at_put_back_drops_it_unless_both_halves_have_it(zone: Zone, first: bool, second: bool) -> None:
    """The buddy is freed while the block is out, and is pulled too."""
    freed, buddies = free_alternating(zone, 1)
    cycle = boundary_cycle(zone, capacity=1)
    cycle.begin()
    one = cycle.pull()
    zone.free(buddies[0], 9)
    two = cycle.pull()
    assert one is not None
    assert two is not None
    cycle.put_back(one, Answer(Outcome.DONE, np.array([first])))
    cycle.put_back(two, Answer(Outcome.DONE, np.array([second])))
    cycle.end()
    assert zone.free_list(10, MOVABLE) == [(freed[0], False)]
    assert zeroed_heads(zone) == ({freed[0]: FREE} if first and second else {})


def test_z2_two_zeroed_halves_make_a_zeroed_whole(zone: Zone) -> None:
    """Split by isolation, marked on both sides, and merged when it ends."""
    boundary_cycle(zone).run(confirm_all)
    zone.isolate(0)
    assert zeroed_heads(zone) == dict.fromkeys((0, 512, 1024, 2048, 3072), FREE)
    zone.unisolate(0)
    assert zeroed_heads(zone) == dict.fromkeys((0, 1024, 2048, 3072), FREE)


def test_z2_a_move_to_another_list_keeps_it(zone: Zone) -> None:
    boundary_cycle(zone).run(confirm_all)
    for kind in (Migratetype.UNMOVABLE, MOVABLE):
        zone.set_pageblock_migratetype(2, kind)
        zone.set_pageblock_migratetype(3, kind)
        assert zeroed_heads(zone) == dict.fromkeys((0, 1024, 2048, 3072), FREE)


def test_z2_stealing_from_another_type_keeps_it(zone: Zone) -> None:
    boundary_cycle(zone).run(confirm_all)
    pfn = zone.alloc(3, Migratetype.UNMOVABLE)
    assert pfn is not None
    assert zeroed_heads(zone)[pfn] == ALLOCATED
    assert use(zone, pfn, 3) == 8


def test_z2_per_cpu_lists_keep_it_there_and_back() -> None:
    zone = make_zone(16 * MIB, pcp_batch=8, host_zeroed=True)
    boundary_cycle(zone).run(confirm_all)
    pfn = zone.alloc(0, cpu=0)
    assert pfn is not None
    kinds = zeroed_heads(zone)
    assert kinds.pop(pfn) == ALLOCATED
    assert list(kinds.values()).count(ON_PCP) == zone.statistics().pcp_pages == 7
    zone.drain(0)
    assert set(zeroed_heads(zone).values()) == {FREE, ALLOCATED}
    zeroed_pages = 4096 - 1
    assert sum(1 << int(state & 0xF) for state in zone.page_states() if state & ZEROED) - 1 == zeroed_pages
    zone.free(pfn, 0, cpu=0)
    zone.drain(0)
    assert len(zeroed_heads(zone)) == 3, "the top block that the page was part of has lost it"
    zone.validate()
    zone.close()


def test_z2_a_zeroed_block_that_is_reported_again_keeps_it_whatever_comes_of_the_report(zone: Zone) -> None:
    """Nobody had it in between, so it is as zero as it was."""
    boundary_cycle(zone).run(confirm_all)
    pfn = zone.alloc(9)
    assert pfn is not None
    cycle = boundary_cycle(zone)
    for outcome in (Outcome.FAILED, Outcome.WITHDRAWN, Outcome.KEPT):
        cycle.begin()
        batch = cycle.pull()
        assert batch is not None
        assert zeroed_heads(zone)[int(batch.pfns[0])] == IN_FLIGHT
        cycle.put_back(batch, outcome)
        cycle.end()
        assert zeroed_heads(zone)[int(batch.pfns[0])] == FREE


def test_z2_blocks_that_a_policy_holds_are_marked_like_others(zone: Zone) -> None:
    freed, _ = free_alternating(zone, 2)
    cycle = boundary_cycle(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    view = open_zone(zone.address)
    mark_zeroed(view, batch.pfns, batch.orders, 2, batch.pfns == freed[0])
    assert hold_blocks(view, batch.pfns, batch.orders, 2) == 2
    cycle.end()
    assert zeroed_heads(zone) == {freed[0]: HELD}
    zone.validate()
    assert release_held(view, 2, FPI_NONE) == 2
    assert zeroed_heads(zone) == {freed[0]: FREE}


def test_z2_a_repair_keeps_the_marks_and_gives_none_to_what_a_dead_owner_had(zone: Zone) -> None:
    boundary_cycle(zone).run(confirm_all)
    pfn = zone.alloc(9)
    assert pfn is not None
    before = zeroed_heads(zone)
    zone._page[pfn] = 0  # as an owner leaves it that dies between claiming the block and freeing it
    rebuild_zone(open_zone(zone.address))
    del before[pfn], before[pfn ^ 512]
    assert zeroed_heads(zone) == before, "freed, it has merged with its zeroed half, and the whole is not"


@pytest.mark.parametrize("marked", [(), (0,), (1,), (0, 1)])
def test_z2_buddies_that_death_kept_apart_merge_marked_only_if_both_were(zone: Zone, marked: tuple[int, ...]) -> None:
    pfn = zone.alloc(10)
    assert pfn is not None
    for half in (0, 1):
        state = FREE | 9 | int(MOVABLE) << MT_SHIFT
        zone._page[pfn + 512 * half] = state | (ZEROED if half in marked else 0)
    rebuild_zone(open_zone(zone.address))
    assert (pfn in zeroed_heads(zone)) == (marked == (0, 1))
    zone.validate()


def test_z3_the_first_use_takes_it_and_no_free_brings_it_back(zone: Zone) -> None:
    boundary_cycle(zone).run(confirm_all)
    pfn = zone.alloc(9)
    assert pfn is not None
    assert use(zone, pfn, 9) == 512
    assert pfn not in zeroed_heads(zone)
    assert use(zone, pfn, 9) == 0
    zone.free(pfn, 9)
    again = zone.alloc(9)
    assert again is not None
    assert use(zone, again, 9) == 0


def test_z3_what_was_handed_out_and_freed_unused_has_lost_it(zone: Zone) -> None:
    boundary_cycle(zone).run(confirm_all)
    pfn = zone.alloc(10)
    assert pfn is not None
    zone.free(pfn, 10)
    assert pfn not in zeroed_heads(zone)


def test_z3_a_used_block_can_be_confirmed_anew(zone: Zone) -> None:
    freed, _ = free_alternating(zone, 1)
    for _time in range(3):
        boundary_cycle(zone).run(confirm_all)
        pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
        assert pfn == freed[0]
        assert use(zone, pfn, 9) == 512
        zone.free(pfn, 9)


@pytest.mark.parametrize(("host_zeroed", "poison"), [(False, 0), (True, 1), (False, 1)])
def test_z4_a_mark_where_none_may_be_is_found_by_validate(host_zeroed: bool, poison: int) -> None:
    zone = make_zone(16 * MIB, host_zeroed=host_zeroed, poison=poison)
    zone._page[1024] |= ZEROED
    with pytest.raises(InvariantViolation, match="Z4: block 1024"):
        zone.validate()
    zone.close()


# ---------------------------------------------------------------- with memory


class Ram:
    """Memory of a zone, a slot to count in, and what the host may do with it."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.map = mmap.mmap(-1, zone.n_pages * PAGE_BYTES)  # shared: MADV_REMOVE takes pages away
        self.words = np.frombuffer(self.map, dtype=np.int64).reshape(-1, PAGE_WORDS)
        self.finding = np.zeros(FINDING_WORDS, dtype=np.int64)
        self.slot = int(cpu_slot(0))

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)

    def use(self, pfn: int, order: int, tag: int = 5) -> None:
        view = open_zone(self.zone.address)
        use_pages(view, self.zone.address, self.address, self.slot, self.finding, pfn, order, tag)

    def holds(self, pfn: int, order: int, tag: int = 5) -> bool:
        view = open_zone(self.zone.address)
        return bool(check_stamps(view, self.address, self.slot, self.finding, pfn, order, tag))

    def discard(self, batch: Batch) -> Answer:
        """An honest host."""
        for pfn, order in zip(batch.pfns.tolist(), batch.orders.tolist(), strict=True):
            self.map.madvise(mmap.MADV_REMOVE, pfn * PAGE_BYTES, PAGE_BYTES << order)
        return confirm_all(batch)


def test_z1_s6_what_is_not_cleared_again_is_zero_but_for_its_stamps(zone: Zone) -> None:
    ram = Ram(zone)
    for block in exhaust(zone):
        ram.use(block, 9)
        zone.free(block, 9)
    boundary_cycle(zone).run(ram.discard)
    pfn = zone.alloc(9)
    assert pfn is not None
    ram.use(pfn, 9, 6)
    assert ram.holds(pfn, 9, 6)
    assert not ram.words[pfn : pfn + 512, 1 : PAGE_WORDS - 1].any()
    statistics = zone.statistics()
    assert (statistics.zeroing_skipped_pages, statistics.refaults, statistics.violations) == (512, 512, 0)


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
@pytest.mark.parametrize("page", [0, 7])
def test_z1_s6_a_host_that_confirms_what_it_did_not_discard_is_found_and_the_page_is_cleared(
    zone: Zone, outcome: Outcome, page: int
) -> None:
    """A resident page is not checked without the mark; with it, it is."""
    ram = Ram(zone)
    pfn = zone.alloc(10)
    assert pfn is not None
    ram.use(pfn, 3)
    ram.words[pfn : pfn + 8] = 0  # what it held was zero, but for one word
    ram.words[pfn + page, 9] = 77
    zone.free(pfn, 10)
    residence = np.ones(1 << 10, dtype=bool)
    cycle = Cycle(zone, residence=lambda _pfn, _order: residence)
    cycle.run(lambda batch: Answer(outcome, confirm_all(batch).zeroed))
    assert int(zone.resident_map()[pfn + page]) == (RETURNED if outcome is Outcome.DONE else RESIDENT)
    assert pfn in exhaust(zone, 3)
    ram.use(pfn, 3)
    assert ram.finding.tolist() == [ZERO_LOST, pfn + page, 0, 77]
    assert zone.statistics().violations == 1
    assert not ram.words[pfn + page, 1 : PAGE_WORDS - 1].any()
    assert zone.statistics().zeroing_skipped_pages == 7, "the page that was not zero was cleared"


@pytest.mark.parametrize("backed", [True, False])
def test_memhog_clears_nothing_twice(backed: bool) -> None:
    """Z1: every page was confirmed before each turn, so no turn clears one."""
    zone = make_zone(16 * MIB, pcp_batch=63, min_order=0, host_zeroed=True)
    ram = Ram(zone)
    vcpu = VCpu(zone, ram.address if backed else 0, WorkloadSettings("memhog", 2048, 9, 0, 0, 1), on_error=raised)
    for turn in range(1, 4):
        boundary_cycle(zone).run(ram.discard)
        while vcpu.step() != engine.IDLE:
            pass
        zone.drain(vcpu.cpu)
        assert zone.statistics().zeroing_skipped_pages == turn * 2048
    assert (zone.statistics().violations, vcpu.complaint()) == (0, "")
    zone.validate()
    zone.close()


def raised(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("status", [Status.DONE, Status.FAILED])
def test_z1_s6_a_guest_finds_out_a_host_that_lies(lab_name: str, status: Status) -> None:
    """A hostile host: it confirms every block as zero and never touches one."""
    host = HandHost(lab_name)
    settings = GuestSettings(
        host=lab_name, name="g0", memory=16 * MIB, vcpus=1, workload="memhog", fill=0.5, hold_ns=0,
        idle_ns=50_000_000, pcp_batch=0, delay_ns=0, high_water_mark=0, deadline_ns=10**9, host_zeroed=True,
    )  # fmt: skip
    try:
        with Machine(settings) as machine:
            host.meet()

            def lied_to() -> bool:
                report = host.report_now(0.01)
                if report is not None:
                    pfns, _orders = unpack_blocks(report.blocks)
                    host.answer(report, status, pack_zeroed(np.ones(pfns.size, dtype=np.bool_)))
                return machine.zone.statistics().violations > 0

            wait_until(lied_to, PATIENCE_S, what="the guest to notice")
            machine.stop_work()
            assert any("does not read as zeros" in complaint for complaint in machine.complaints())
    finally:
        host.close()


# ---------------------------------------------------------------- Z4


@pytest.fixture
def poisoned() -> Iterator[Zone]:
    zone = make_zone(16 * MIB, host_zeroed=True, poison=POISON)
    yield zone
    zone.validate()
    zone.close()


def work_once(zone: Zone, ram: Ram) -> VCpu:
    """Allocate, use and free most of the zone."""
    vcpu = VCpu(zone, ram.address, WorkloadSettings("memhog", 2048, 9, 0, 0, 1), on_error=raised)
    while vcpu.step() != engine.IDLE:
        pass
    return vcpu


def test_z4_a_zone_that_poisons_is_never_marked(poisoned: Zone) -> None:
    free_alternating(poisoned, 3)
    boundary_cycle(poisoned).run(confirm_all)
    assert zeroed_heads(poisoned) == {}


@pytest.mark.parametrize("poison", [1, POISON, 255])
def test_z4_what_is_freed_holds_the_poison_until_it_is_used_again(poison: int) -> None:
    zone = make_zone(16 * MIB, poison=poison)
    ram = Ram(zone)
    vcpu = work_once(zone, ram)
    freed = zone.resident_map() == RESIDENT
    assert int(freed.sum()) == 2048
    assert (ram.words[freed].view(np.uint8) == poison).all()
    assert not ram.words[~freed].any(), "a page that was never used is zero, and is taken as such"
    boundary_cycle(zone).run(lambda _batch: Outcome.KEPT)
    while vcpu.step() != engine.IDLE:
        pass
    assert (zone.statistics().violations, vcpu.complaint()) == (0, "")
    zone.validate()
    zone.close()


@pytest.mark.parametrize("word", [0, 100, PAGE_WORDS - 1])
def test_z4_a_write_after_free_is_found(poisoned: Zone, word: int) -> None:
    ram = Ram(poisoned)
    vcpu = work_once(poisoned, ram)
    pfn = int(np.flatnonzero(poisoned.resident_map() == RESIDENT)[5])
    was = int(ram.words[pfn, word])
    ram.words[pfn, word] ^= 1
    while vcpu.step() != engine.IDLE:
        pass
    assert vcpu.finding.tolist() == [POISON_LOST, pfn, was, was ^ 1]
    assert "poison" in vcpu.complaint()
    assert poisoned.statistics().violations == 1


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.KEPT])
def test_z4_s12_a_host_that_discards_poisoned_pages_is_found(poisoned: Zone, outcome: Outcome) -> None:
    """Whether it says so or not."""
    ram = Ram(poisoned)
    vcpu = work_once(poisoned, ram)
    poisoned.drain(vcpu.cpu)

    def report(batch: Batch) -> Outcome:
        ram.discard(batch)
        return outcome

    boundary_cycle(poisoned).run(report)
    while vcpu.step() != engine.IDLE:
        pass
    assert vcpu.finding[0] == POISON_LOST
    assert vcpu.finding[3] == 0
    assert poisoned.statistics().violations == 2048
