"""Discards of real memory: what goes, what stays, and what is counted."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.geometry import PAGE_BYTES
from common.ramobject import RamObject
from host import discard as discard_module
from host.discard import BACKENDS, Discarded, SharedBackend
from host.proof import Proof, StBlocksProof, best_proof, punch_hole
from tests.host.stand_in import N_PAGES, StandIn

BLOCK = 512
BLOCK_BYTES = BLOCK * PAGE_BYTES


@pytest.fixture(params=["best", "st_blocks"])
def proof(request: pytest.FixtureRequest) -> Proof:
    return best_proof() if request.param == "best" else StBlocksProof()


@pytest.fixture
def guest(lab_name: str) -> Iterator[StandIn]:
    with StandIn(lab_name) as stand_in:
        yield stand_in


@pytest.fixture
def ram(guest: StandIn) -> Iterator[RamObject]:
    """The host's end of the guest's memory."""
    with RamObject.open(guest.lab, "g0", ram_bytes=N_PAGES * PAGE_BYTES) as opened:
        yield opened


def discard(backend: SharedBackend, *ranges: tuple[int, int]) -> Discarded:
    starts, ends = np.array(ranges, dtype=np.int64).T
    return backend.discard(starts, ends)


def test_s6_a_discarded_block_reads_zero_and_others_keep_their_bytes(
    guest: StandIn, ram: RamObject, proof: Proof
) -> None:
    guest.touch(0xA5)
    outcome = discard(SharedBackend(ram, N_PAGES, proof), (BLOCK, 2 * BLOCK), (3 * BLOCK, 4 * BLOCK))
    assert outcome == Discarded(freed_bytes=2 * BLOCK_BYTES)
    by_block = guest.memory.reshape(-1, BLOCK_BYTES)
    assert ram.resident_bytes() == (N_PAGES - 2 * BLOCK) * PAGE_BYTES
    for index, block in enumerate(by_block):
        assert (block == (0 if index in {1, 3} else 0xA5)).all(), index


def test_neighbours_are_punched_in_one_call(
    guest: StandIn, ram: RamObject, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.touch()
    punched: list[tuple[int, int]] = []
    punch = punch_hole

    def recording(descriptor: int, offset: int, length: int) -> None:
        punched.append((offset // PAGE_BYTES, length // PAGE_BYTES))
        punch(descriptor, offset, length)

    monkeypatch.setattr(discard_module, "punch_hole", recording)
    outcome = discard(SharedBackend(ram, N_PAGES, proof), (0, 1), (1, 2), (2, 4), (8, 16), (16, 32), (512, 1024))
    assert punched == [(0, 4), (8, 24), (512, 512)]
    assert outcome == Discarded(freed_bytes=(4 + 24 + 512) * PAGE_BYTES)


def test_s11_a_repeated_report_of_a_range_is_harmless_and_counted(guest: StandIn, ram: RamObject, proof: Proof) -> None:
    guest.touch()
    backend = SharedBackend(ram, N_PAGES, proof)
    assert discard(backend, (0, BLOCK)) == Discarded(freed_bytes=BLOCK_BYTES)
    assert discard(backend, (0, BLOCK)) == Discarded(duplicates=1)
    assert (guest.memory[:BLOCK] == 0).all()  # reads fault: the pages are back
    assert discard(backend, (0, BLOCK)) == Discarded(freed_bytes=BLOCK_BYTES)
    guest.memory[3] = 1
    assert discard(backend, (0, BLOCK)) == Discarded(freed_bytes=PAGE_BYTES)


def test_untouched_memory_is_told_from_duplicates(guest: StandIn, ram: RamObject, proof: Proof) -> None:
    backend = SharedBackend(ram, N_PAGES, proof)
    guest.memory[BLOCK : 2 * BLOCK] = 1
    assert discard(backend, (0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, 3 * BLOCK)) == Discarded(
        freed_bytes=BLOCK_BYTES, empty_blocks=2
    )
    assert discard(backend, (0, 2 * BLOCK), (2 * BLOCK, 4 * BLOCK)) == Discarded(duplicates=1, empty_blocks=1)


def test_a_punch_that_frees_nothing_is_a_failure(
    guest: StandIn, ram: RamObject, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.touch()
    monkeypatch.setattr(discard_module, "punch_hole", lambda *_arguments: None)
    backend = SharedBackend(ram, N_PAGES, proof)
    assert discard(backend, (0, 4), (4, 8), (16, 32)) == Discarded(failures=3)


def test_a_punch_that_is_refused_is_a_failure_and_the_rest_goes_on(
    guest: StandIn, ram: RamObject, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.touch()
    punch = punch_hole

    def refusing(descriptor: int, offset: int, length: int) -> None:
        if offset == 0:
            raise PermissionError
        punch(descriptor, offset, length)

    monkeypatch.setattr(discard_module, "punch_hole", refusing)
    backend = SharedBackend(ram, N_PAGES, proof)
    outcome = discard(backend, (0, 4), (4, 8), (16, 32))
    assert outcome == Discarded(freed_bytes=16 * PAGE_BYTES, failures=2)
    monkeypatch.undo()
    assert discard(backend, (0, 8)) == Discarded(freed_bytes=8 * PAGE_BYTES)


def test_s11_a_guest_that_shrinks_its_memory_harms_itself_only(guest: StandIn, ram: RamObject, proof: Proof) -> None:
    os.ftruncate(guest.ram.fileno(), 0)
    outcome = discard(SharedBackend(ram, N_PAGES, proof), (0, BLOCK))
    assert outcome == Discarded(empty_blocks=1)
    assert os.fstat(ram.fileno()).st_size == 0


def test_the_model_backend_marks_what_it_claims(ram: RamObject, guest: StandIn, proof: Proof) -> None:
    guest.touch()
    backend = BACKENDS["model"](ram, N_PAGES, proof)
    outcome = backend.discard(np.array([0, 512]), np.array([1, 1024]))
    assert outcome == Discarded(freed_bytes=513 * PAGE_BYTES, modelled_bytes=513 * PAGE_BYTES)
    assert outcome.zeroed.tolist() == [True, True]  # Z1: it has no contents that could belie it
    assert (guest.memory == 0xA5).all()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 70)), max_size=12), st.integers(0, 63), st.integers(1, 70))
def test_which_pages_were_discarded_is_remembered_exactly(
    discarded: list[tuple[int, int]], start: int, length: int
) -> None:
    class Nowhere:
        def fileno(self) -> int:
            return -1

    backend = SharedBackend(Nowhere(), 136, StBlocksProof())  # type: ignore[arg-type]
    pages: set[int] = set()
    for first, count in discarded:
        backend._mark_discarded(first, first + count)
        pages |= set(range(first, first + count))
    assert backend._was_discarded(start, start + length) == (set(range(start, start + length)) <= pages)


@settings(max_examples=25)
@given(data=st.data())
def test_sum_of_touches_minus_freed_is_what_is_resident(data: st.DataObject) -> None:
    """The account of memory: after any history of touches and discards it balances to the page."""
    lab = f"h{os.getpid()}-{secrets.token_hex(4)}"
    pages = 64
    with (
        RamObject.create(lab, "g0", ram_bytes=pages * PAGE_BYTES) as guest,
        RamObject.open(lab, "g0", ram_bytes=pages * PAGE_BYTES) as ram,
    ):
        guest.unlink()
        backend = SharedBackend(ram, pages, best_proof())
        memory = np.frombuffer(guest.map(), dtype=np.uint8).reshape(pages, PAGE_BYTES)
        resident: set[int] = set()
        freed = touched = 0
        for _step in range(data.draw(st.integers(1, 8))):
            touch = data.draw(st.sets(st.integers(0, pages - 1)))
            for page in touch:
                memory[page, 0] = 1
            touched += len(touch - resident)
            resident |= touch
            order = data.draw(st.integers(0, 4))
            blocks = sorted(data.draw(st.sets(st.integers(0, (pages >> order) - 1), min_size=1)))
            outcome = discard(backend, *[(block << order, (block + 1) << order) for block in blocks])
            resident -= {page for page in resident if page >> order in blocks}
            freed += outcome.freed_bytes
            assert outcome.failures == 0
            assert (touched * PAGE_BYTES - freed) == len(resident) * PAGE_BYTES == ram.resident_bytes()


@pytest.mark.skipif(best_proof().name != "cachestat", reason="st_blocks is a lower bound under load")
def test_freed_bytes_are_exact_while_another_vcpu_faults(guest: StandIn, ram: RamObject) -> None:
    backend = SharedBackend(ram, N_PAGES, best_proof())
    half = N_PAGES // 2
    faulting = threading.Event()

    def other_vcpu() -> None:
        for page in range(half, N_PAGES):
            guest.memory[page, 0] = 1
            if page == half + 8:
                faulting.set()

    vcpu = threading.Thread(target=other_vcpu)
    vcpu.start()
    assert faulting.wait(20)
    touched = freed = 0
    for _round in range(20):
        guest.memory[:half, 0] = 1
        touched += half
        freed += discard(backend, (0, half)).freed_bytes
    vcpu.join()
    assert (touched + half) * PAGE_BYTES - freed == ram.resident_bytes() == half * PAGE_BYTES
