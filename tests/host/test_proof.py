"""The proof of a discard, in both its forms."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from common import pagecount
from common.geometry import PAGE_BYTES
from host.proof import CachestatProof, Proof, StBlocksProof, best_proof, punch_hole

RANGE_BYTES = 16 * PAGE_BYTES

needs_cachestat = pytest.mark.skipif(best_proof().name != "cachestat", reason="this kernel has no cachestat")
proofs = pytest.mark.parametrize("proof", [pytest.param(CachestatProof(), marks=needs_cachestat), StBlocksProof()])


@pytest.fixture
def memory() -> Iterator[int]:
    """Descriptor of 64 pages of shared memory, of which the last is populated, as a gate page is."""
    descriptor = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 64 * PAGE_BYTES)
    os.pwrite(descriptor, b"\1", 63 * PAGE_BYTES)
    yield descriptor
    os.close(descriptor)


def populate(descriptor: int, first: int, limit: int) -> None:
    for page in range(first, limit):
        os.pwrite(descriptor, b"\1", page * PAGE_BYTES)


def punch(proof: Proof, descriptor: int, offset: int, length: int) -> tuple[int, bool]:
    mark, _populated = proof.before(descriptor, offset, length)
    punch_hole(descriptor, offset, length)
    return proof.after(descriptor, offset, length, mark)


@proofs
@pytest.mark.parametrize("pages", [0, 1, 7, 16])
def test_freed_pages_are_those_that_held_data(proof: Proof, memory: int, pages: int) -> None:
    populate(memory, 16, 16 + pages)
    assert punch(proof, memory, RANGE_BYTES, RANGE_BYTES) == (pages, False)
    assert os.fstat(memory).st_blocks * 512 == PAGE_BYTES


@proofs
def test_neighbours_are_neither_counted_nor_freed(proof: Proof, memory: int) -> None:
    populate(memory, 0, 48)
    assert punch(proof, memory, RANGE_BYTES, RANGE_BYTES) == (16, False)
    assert os.pread(memory, 1, RANGE_BYTES - PAGE_BYTES) == os.pread(memory, 1, 2 * RANGE_BYTES) == b"\1"
    assert os.fstat(memory).st_blocks * 512 == 33 * PAGE_BYTES


@proofs
def test_data_that_is_left_is_seen(proof: Proof, memory: int) -> None:
    """A discard that frees nothing must not pass for one."""
    populate(memory, 16, 32)
    mark, _populated = proof.before(memory, RANGE_BYTES, RANGE_BYTES)
    assert proof.after(memory, RANGE_BYTES, RANGE_BYTES, mark) == (0, True)


@proofs
def test_emptiness(proof: Proof, memory: int) -> None:
    populate(memory, 17, 18)
    assert proof.is_empty(memory, 0, RANGE_BYTES)
    assert not proof.is_empty(memory, RANGE_BYTES, RANGE_BYTES)
    os.ftruncate(memory, 16 * PAGE_BYTES)
    assert proof.is_empty(memory, RANGE_BYTES, RANGE_BYTES)


@needs_cachestat
def test_exact_while_the_guest_faults_elsewhere(memory: int) -> None:
    exact, drop = CachestatProof(), StBlocksProof()
    for proof, proven in ((exact, 16), (drop, 12)):
        populate(memory, 16, 32)
        mark, _populated = proof.before(memory, RANGE_BYTES, RANGE_BYTES)
        populate(memory, 40, 44)  # another vCPU
        punch_hole(memory, RANGE_BYTES, RANGE_BYTES)
        assert proof.after(memory, RANGE_BYTES, RANGE_BYTES, mark) == (proven, False)
        punch_hole(memory, 40 * PAGE_BYTES, 4 * PAGE_BYTES)


@needs_cachestat
def test_a_populated_range_is_known_by_its_count(memory: int) -> None:
    populate(memory, 16, 32)
    assert CachestatProof().before(memory, RANGE_BYTES, RANGE_BYTES) == (16, True)
    assert CachestatProof().before(memory, RANGE_BYTES - PAGE_BYTES, RANGE_BYTES) == (15, False)


def test_a_refused_punch_is_an_os_error(memory: int) -> None:
    import fcntl

    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(PermissionError):
        punch_hole(memory, 0, PAGE_BYTES)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        punch_hole(-1, 0, PAGE_BYTES)


def test_without_cachestat_the_drop_in_blocks_is_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecount, "_NR_CACHESTAT", 100_000)
    assert best_proof().name == "st_blocks"
