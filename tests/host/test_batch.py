"""One report: the rules, the gate, the account."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.geometry import PAGE_BYTES, TOP_ORDER
from common.messages import Ack, Hello, Report, Status, pack_blocks, unpack_zeroed
from common.ramobject import RamObject
from host import discard as discard_module
from host.accounting import Counters
from host.batch import Discarding, check_blocks, process_report
from host.discard import SharedBackend
from host.proof import best_proof, punch_hole
from tests.host.stand_in import N_PAGES, StandIn

HELLO = Hello("g0", 1, 1, N_PAGES, "shared", 16, 3)


def pack(*blocks: tuple[int, int]) -> bytes:
    pfns, orders = np.array(blocks, dtype=np.int64).T
    return pack_blocks(pfns, orders)


def invalid(*blocks: tuple[int, int], hello: Hello = HELLO) -> int:
    return check_blocks(pack(*blocks), hello)[1]


@pytest.mark.parametrize(
    ("blocks", "bad"),
    [
        ([(0, 9)], 0),
        ([(1024, 10), (0, 9), (512, 3), (N_PAGES - 8, 3)], 0),
        ([(8, 3)] * 2, 1),
        ([(8, 3)] * 4, 3),
        ([(0, 10), (512, 9), (1024, 9)], 1),
        ([(512, 9), (0, 10)], 1),
        ([(0, 9), (8, 3), (504, 3), (512, 3)], 2),
        ([(4, 3)], 1),
        ([(256, 9), (1024, 9)], 1),
        ([(256, 9), (512, 9)], 2),
        ([(0, 2)], 1),
        ([(0, TOP_ORDER + 1)], 1),
        ([(0, 15)], 1),
        ([(N_PAGES, 3)], 1),
        ([(N_PAGES - 512, 10)], 1),
        ([(0xFFFFFF8, 3), (0, 3)], 1),
        ([(8 * index, 3) for index in range(16)], 0),
        ([(8 * index, 3) for index in range(18)], 2),
    ],
)
def test_s11_blocks_that_break_a_rule_are_counted(blocks: list[tuple[int, int]], bad: int) -> None:
    assert invalid(*blocks) == bad


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12)), min_size=1, max_size=20))
def test_s11_rules_against_an_obvious_oracle(blocks: list[tuple[int, int]]) -> None:
    hello = dataclasses.replace(HELLO, n_pages=256, min_order=1)
    pages = [set(range(pfn, pfn + (1 << order))) for pfn, order in blocks]
    fine = len(blocks) <= hello.capacity and all(
        1 <= order <= TOP_ORDER and pfn % (1 << order) == 0 and pfn + (1 << order) <= 256 for pfn, order in blocks
    )
    fine = fine and sum(map(len, pages)) == len(set().union(*pages))
    checked, bad = check_blocks(pack(*blocks), hello)
    assert (bad == 0) == fine
    assert bad <= len(blocks)
    if fine:
        assert checked.starts.tolist() == sorted(pfn for pfn, _order in blocks)
        assert (checked.ends[:-1] <= checked.starts[1:]).all()


class Arranged:
    """A guest with all memory touched, and everything that the host needs for its reports."""

    def __init__(self, guest: StandIn, ram: RamObject) -> None:
        self.guest = guest
        self.ram = ram
        self.counters = Counters()
        self.backend = SharedBackend(ram, N_PAGES, best_proof())
        guest.touch()

    def process(self, *blocks: tuple[int, int], seq: int = 1, discarding: Discarding = Discarding()) -> Status:  # noqa: B008
        return self.acknowledge(*blocks, seq=seq, discarding=discarding).status

    def acknowledge(
        self,
        *blocks: tuple[int, int],
        seq: int = 1,
        discarding: Discarding = Discarding(),  # noqa: B008
        hello: Hello = HELLO,
    ) -> Ack:
        report = Report(1, seq, True, 0, pack(*blocks))
        ack = process_report(report, hello, self.ram, self.backend, self.counters, discarding)
        assert (ack.epoch, ack.seq) == (1, seq)
        return ack

    def untouched(self) -> bool:
        """Whether nothing at all was discarded."""
        return bool((self.guest.memory == 0xA5).all()) and self.counters.freed_bytes == 0


@pytest.fixture
def arranged(lab_name: str) -> Iterator[Arranged]:
    with StandIn(lab_name) as guest, RamObject.open(lab_name, "g0", ram_bytes=N_PAGES * PAGE_BYTES) as ram:
        yield Arranged(guest, ram)


def test_a_report_is_discarded_proven_and_counted(arranged: Arranged) -> None:
    assert arranged.process((512, 9), (0, 9), (1024, 3)) is Status.DONE
    counters = arranged.counters
    assert (counters.reports, counters.blocks) == (1, 3)
    assert counters.asked_bytes == counters.freed_bytes == (1024 + 8) * PAGE_BYTES
    assert {order: n for order, n in enumerate(counters.order_histogram) if n} == {3: 1, 9: 2}
    assert counters.discard_ns.percentiles().max > 0
    assert arranged.ram.resident_bytes() == (N_PAGES - 1032) * PAGE_BYTES


def test_s11_one_bad_block_and_nothing_is_discarded(arranged: Arranged) -> None:
    assert arranged.process((0, 9), (513, 9)) is Status.REJECTED
    assert arranged.untouched()
    assert (arranged.counters.rejected, arranged.counters.invalid_blocks, arranged.counters.blocks) == (1, 1, 0)


def test_s5_a_withdrawn_report_never_discards(arranged: Arranged) -> None:
    assert arranged.guest.ram.try_gate()
    arranged.guest.ram.withdraw(2)
    arranged.guest.ram.ungate()
    assert arranged.process((0, 9), seq=1) is Status.WITHDRAWN
    assert arranged.process((0, 9), seq=2) is Status.WITHDRAWN
    assert arranged.untouched()
    assert arranged.process((0, 9), seq=3) is Status.DONE
    assert (arranged.counters.withdrawn, arranged.counters.reports) == (2, 3)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_s5_withdrawing_while_the_host_is_slow(arranged: Arranged, where: str) -> None:
    """Before the gate the guest gets its blocks back; inside it, the guest sees that it must wait."""
    withdrawn: list[bool] = []

    def guest_loses_patience(_seconds: float) -> None:
        withdrawn.append(arranged.guest.ram.try_gate())
        if withdrawn[0]:
            arranged.guest.ram.withdraw(1)
            arranged.guest.ram.ungate()

    slow = Discarding(1, "inside" if where == "inside" else "before", False, guest_loses_patience)
    status = arranged.process((0, 9), discarding=slow)
    assert (status, withdrawn) == ((Status.WITHDRAWN, [True]) if where == "before" else (Status.DONE, [False]))
    assert arranged.untouched() == (where == "before")


def test_s5_a_guest_at_the_gate_means_busy_and_no_discard(arranged: Arranged) -> None:
    assert arranged.guest.ram.try_gate()
    assert arranged.process((0, 9)) is Status.BUSY
    assert arranged.untouched()
    arranged.guest.ram.ungate()
    assert arranged.process((0, 9), seq=2) is Status.DONE
    assert arranged.counters.busy == 1


def test_the_gate_is_open_again_after_every_kind_of_report(arranged: Arranged) -> None:
    for blocks in ([(0, 9)], [(1, 9)], [(0, 9)]):
        arranged.process(*blocks)
        assert arranged.guest.ram.try_gate()
        arranged.guest.ram.ungate()


def test_s12_inhibited_reports_are_acknowledged_and_discard_nothing(arranged: Arranged) -> None:
    assert arranged.process((0, 9), discarding=Discarding(inhibit=True)) is Status.INHIBITED
    assert arranged.untouched()
    assert (arranged.counters.inhibited, arranged.counters.asked_bytes) == (1, 512 * PAGE_BYTES)


def test_s11_a_guest_without_gate_page_fails_its_own_report(arranged: Arranged) -> None:
    os.ftruncate(arranged.guest.ram.fileno(), N_PAGES * PAGE_BYTES)
    assert arranged.process((0, 9), (512, 9)) is Status.FAILED
    assert arranged.untouched()
    assert arranged.counters.failures == 2
    assert arranged.guest.ram.try_gate()


def zeroed_of(ack: Ack, count: int) -> list[bool]:
    flags: list[bool] = unpack_zeroed(ack.zeroed, count).tolist()
    return flags


def test_z1_what_was_discarded_is_confirmed_one_bit_a_block(arranged: Arranged) -> None:
    ack = arranged.acknowledge((1536, 9), (0, 9), (512, 9), (3072, 3))
    assert ack.status is Status.DONE
    assert zeroed_of(ack, 4) == [True] * 4
    for pfn, order in ((1536, 9), (0, 9), (512, 9), (3072, 3)):
        assert not arranged.guest.memory[pfn : pfn + (1 << order)].any()


@pytest.mark.parametrize("bad", [0, 512, 1536])
def test_z1_a_block_whose_discard_was_refused_is_not_confirmed_and_the_order_is_the_report_s(
    arranged: Arranged, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    def refusing(descriptor: int, offset: int, length: int) -> None:
        if offset == bad * PAGE_BYTES:
            raise PermissionError
        punch_hole(descriptor, offset, length)

    monkeypatch.setattr(discard_module, "punch_hole", refusing)
    pfns = [1536, 0, 512] if bad != 512 else [1536, 512]  # 0 and 512 are neighbours: punched in one call, or by itself
    ack = arranged.acknowledge(*((pfn, 9) for pfn in pfns))
    assert ack.status is Status.FAILED
    discarded = [not arranged.guest.memory[pfn : pfn + 512].any() for pfn in pfns]
    assert zeroed_of(ack, len(pfns)) == discarded
    assert any(discarded)
    assert not all(discarded)


def test_z1_of_neighbours_punched_together_only_those_without_data_are_confirmed(
    arranged: Arranged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(descriptor: int, offset: int, length: int) -> None:
        punch_hole(descriptor, offset, length // 2)

    monkeypatch.setattr(discard_module, "punch_hole", half)
    ack = arranged.acknowledge((512, 9), (0, 9))
    assert ack.status is Status.FAILED
    assert zeroed_of(ack, 2) == [False, True]


def test_z1_s12_nothing_is_confirmed_where_nothing_was_discarded(arranged: Arranged) -> None:
    """Inhibited, rejected, withdrawn, busy."""
    acks = [
        arranged.acknowledge((0, 9), discarding=Discarding(inhibit=True)),
        arranged.acknowledge((0, 9), (513, 9), seq=2),
    ]
    assert arranged.guest.ram.try_gate()
    acks.append(arranged.acknowledge((0, 9), seq=3))
    arranged.guest.ram.withdraw(4)
    arranged.guest.ram.ungate()
    acks.append(arranged.acknowledge((0, 9), seq=4))
    assert [ack.status for ack in acks] == [Status.INHIBITED, Status.REJECTED, Status.BUSY, Status.WITHDRAWN]
    assert [ack.zeroed for ack in acks] == [b""] * 4
    assert arranged.untouched()


@pytest.mark.parametrize("poison", [1, 0xAA, 255])
def test_z4_s12_of_a_guest_that_poisons_nothing_is_discarded_nor_confirmed(arranged: Arranged, poison: int) -> None:
    ack = arranged.acknowledge((0, 9), hello=dataclasses.replace(HELLO, poison=poison))
    assert (ack.status, ack.zeroed) == (Status.INHIBITED, b"")
    assert arranged.untouched()
    assert arranged.counters.inhibited == 1
