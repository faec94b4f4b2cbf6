"""What guests may still take of shared memory is counted, and a guest that does not fit beside them is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import MachineError
from common.names import SHM_DIR, ram_object
from common.promises import Promises, check_promises, promises
from common.ramobject import RamObject

MIB = 1 << 20
PAGE = 4096
DIES = """
import sys
from common.ramobject import RamObject
RamObject.create(sys.argv[1], "g0", ram_bytes=8 << 20)
"""


@pytest.fixture
def only_this_lab(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may run beside this one."""
    real: Callable[[str], list[str]] = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [name for name in real(path) if f".{lab_name}." in name])


def free(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    real = os.statvfs(SHM_DIR)
    blocks = size_bytes // real.f_frsize
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((*real[:3], blocks, blocks, *real[5:])))


def test_what_is_untouched_is_promised_and_what_is_touched_is_not(lab_name: str, only_this_lab: None) -> None:
    with RamObject.create(lab_name, "g0", ram_bytes=8 * MIB) as ram:
        assert promises().promised_bytes == 8 * MIB
        ram.map()[: 3 * PAGE] = bytes(3 * PAGE)
        found = promises()
        assert (found.promised_bytes, found.guests, found.bytes_of_others) == (8 * MIB - 3 * PAGE, 1, 0)
        assert promises(but=ram.identity).promised_bytes == 0
        ram.unlink()
    assert promises().promised_bytes == 0


def test_a_dead_guest_takes_no_more(lab_name: str, only_this_lab: None) -> None:
    subprocess.run([sys.executable, "-c", DIES, lab_name], check=True)
    left = Path(SHM_DIR + ram_object(lab_name, "g0"))
    assert left.exists()
    assert promises().promised_bytes == 0
    left.unlink()


def test_several_that_fit_one_by_one_and_not_together(
    lab_name: str, only_this_lab: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 20 * MIB)
    with RamObject.create(lab_name, "g0", ram_bytes=8 * MIB) as first:
        check_promises(first)
        with RamObject.create(lab_name, "g1", ram_bytes=8 * MIB) as second:
            check_promises(second)
            with RamObject.create(lab_name, "g2", ram_bytes=8 * MIB) as third:
                with pytest.raises(MachineError, match=r"16MiB is promised to 2 other guests.*--overcommit"):
                    check_promises(third)
                third.unlink()
            second.unlink()
        first.unlink()


def test_objects_of_other_users_count_and_are_told(
    lab_name: str, only_this_lab: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RamObject.create(lab_name, "g0", ram_bytes=8 * MIB) as ram:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert promises() == Promises(promises().free_bytes, 8 * MIB, 1, 8 * MIB)
        ram.unlink()


def test_what_is_none_of_ours_does_not_count(lab_name: str, only_this_lab: None) -> None:
    path = Path(f"{SHM_DIR}/fpr.{lab_name}.something-else")
    with path.open("wb") as stream:
        stream.truncate(MIB)
    assert promises().promised_bytes == 0
    path.unlink()
