"""The RAM object and its gate, seen from both sides."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common.errors import MachineError, NameInUseError, PeerError
from common.geometry import PAGE_BYTES
from common.names import SHM_DIR, ram_object
from common.ramobject import GATE_BYTES, RamObject

RAM_BYTES = 16 << 20
HOLD_GATE = """
import sys
from common.ramobject import RamObject
ram = RamObject.open(sys.argv[1], "g0", ram_bytes=int(sys.argv[2]))
print(ram.try_gate(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def guest(lab_name: str) -> Iterator[RamObject]:
    """As its guest has it."""
    with RamObject.create(lab_name, "g0", ram_bytes=RAM_BYTES) as ram:
        yield ram
        ram.unlink()


@pytest.fixture
def host(guest: RamObject, lab_name: str) -> Iterator[RamObject]:
    """The same object as the host has it."""
    with RamObject.open(lab_name, "g0", ram_bytes=RAM_BYTES) as ram:
        yield ram


def test_a_new_object_is_private_sparse_and_has_withdrawn_nothing(guest: RamObject, host: RamObject) -> None:
    status = os.fstat(guest.fileno())
    assert (status.st_size, status.st_mode & 0o777) == (RAM_BYTES + GATE_BYTES, 0o600)
    assert guest.resident_bytes() == host.resident_bytes() == 0
    assert host.withdrawn_seq() == 0
    assert guest.identity == host.identity


def test_resident_bytes_counts_touched_pages_exactly(guest: RamObject, host: RamObject) -> None:
    memory = np.frombuffer(guest.map(), dtype=np.uint8)
    memory[: 10 * PAGE_BYTES : PAGE_BYTES] = 1
    memory[-1] = 1
    assert host.resident_bytes() == 11 * PAGE_BYTES


def test_one_side_has_the_gate_at_a_time(guest: RamObject, host: RamObject) -> None:
    assert guest.try_gate()
    assert not host.try_gate()
    guest.ungate()
    assert host.try_gate()
    assert not guest.try_gate()
    host.ungate()
    assert guest.try_gate()


def test_the_gate_of_a_dead_process_opens(guest: RamObject, lab_name: str) -> None:
    command = [sys.executable, "-c", HOLD_GATE, lab_name, str(RAM_BYTES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not guest.try_gate()
        holder.kill()
        holder.wait()
        assert guest.try_gate()


def test_withdrawing_is_monotonic(guest: RamObject, host: RamObject) -> None:
    for seq, seen in ((3, 3), (2, 3), ((1 << 63) - 1, (1 << 63) - 1), (5, (1 << 63) - 1)):
        guest.withdraw(seq)
        assert host.withdrawn_seq() == seen


def test_the_gate_word_does_not_change_resident_memory(guest: RamObject, host: RamObject) -> None:
    guest.withdraw(7)
    assert host.resident_bytes() == 0


def test_the_mapping_ends_before_the_gate(guest: RamObject) -> None:
    assert len(guest.map()) == RAM_BYTES
    assert guest.map() is guest.map()


def test_the_model_backend_has_a_gate_and_no_memory(lab_name: str) -> None:
    with RamObject.create(lab_name, "g1", ram_bytes=0) as ram, RamObject.open(lab_name, "g1", ram_bytes=0) as host:
        ram.unlink()
        ram.withdraw(4)
        assert (host.withdrawn_seq(), host.resident_bytes()) == (4, 0)
        with pytest.raises(ValueError, match="no memory"):
            ram.map()


def test_a_name_in_use_is_refused(guest: RamObject, lab_name: str) -> None:
    with pytest.raises(NameInUseError):
        RamObject.create(lab_name, "g0", ram_bytes=RAM_BYTES)


def test_more_memory_than_shared_memory_has_is_refused_with_the_fix(lab_name: str) -> None:
    space = os.statvfs(SHM_DIR)
    with pytest.raises(MachineError, match="--backend model"):
        RamObject.create(lab_name, "g0", ram_bytes=space.f_blocks * space.f_frsize + PAGE_BYTES)


def test_the_umask_does_not_matter(lab_name: str) -> None:
    before = os.umask(0o777)
    try:
        ram = RamObject.create(lab_name, "g0", ram_bytes=0)
    finally:
        os.umask(before)
    with ram:
        ram.unlink()
        assert os.fstat(ram.fileno()).st_mode & 0o777 == 0o600


def test_views_of_the_mapping_survive_close(guest: RamObject) -> None:
    memory = np.frombuffer(guest.map(), dtype=np.uint8)
    guest.close()
    guest.close()
    assert memory[0] == 0


def test_a_missing_object_is_refused(lab_name: str) -> None:
    with pytest.raises(PeerError, match="cannot open"):
        RamObject.open(lab_name, "g0", ram_bytes=RAM_BYTES)


@pytest.mark.parametrize("change_bytes", [-PAGE_BYTES, PAGE_BYTES, 1])
def test_an_object_of_another_size_is_refused(guest: RamObject, lab_name: str, change_bytes: int) -> None:
    with pytest.raises(PeerError, match="bytes, not"):
        RamObject.open(lab_name, "g0", ram_bytes=RAM_BYTES + change_bytes)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o400, 0o700])
def test_an_object_of_another_mode_is_refused(guest: RamObject, lab_name: str, mode: int) -> None:
    os.fchmod(guest.fileno(), mode)
    with pytest.raises(PeerError, match=r"0600|Permission"):
        RamObject.open(lab_name, "g0", ram_bytes=RAM_BYTES)


def test_links_and_fifos_are_refused(guest: RamObject, lab_name: str) -> None:
    path = SHM_DIR + ram_object(lab_name, "g1")
    makers: list[Callable[[], None]] = [
        lambda: os.symlink(SHM_DIR + guest.name, path),
        lambda: os.link(SHM_DIR + guest.name, path),
        lambda: os.mkfifo(path, 0o600),
        lambda: os.mkdir(path),
    ]
    for make in makers:
        make()
        try:
            with pytest.raises(PeerError):
                RamObject.open(lab_name, "g1", ram_bytes=RAM_BYTES)
        finally:
            (os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)


def test_a_guest_that_shrinks_its_object_is_an_os_error(guest: RamObject, host: RamObject) -> None:
    os.ftruncate(guest.fileno(), RAM_BYTES)
    with pytest.raises(OSError, match="gate page"):
        host.withdrawn_seq()
