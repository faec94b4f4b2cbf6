"""A guest whose creation is refused at any step says why, with the fix, and leaves nothing."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import posix_ipc
import pytest

from common.cli import run_command
from common.errors import LabError, MachineError
from common.ramobject import RamObject
from common.refusals import fix_of
from guest.machine import Machine
from tests.guest.test_machine import GUEST, small
from tests.support import leftovers

STEPS: tuple[tuple[Any, str], ...] = (
    (os, "open"),
    (os, "fchmod"),
    (os, "ftruncate"),
    (os, "pwrite"),
    (os, "posix_fallocate"),
    (os, "eventfd"),
    (mmap, "mmap"),
    (fcntl, "lockf"),
    (posix_ipc, "MessageQueue"),
)


class Refusing:
    """Counts calls, and refuses the one that is due. A look at the object of another lab's guest does not count:
    who else is there changes from one time to the next.
    """

    def __init__(self, lab: str, due: int, error: Exception) -> None:
        self.lab, self.due, self.error, self.calls = lab, due, error, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **others: Any) -> Any:
            if arguments and isinstance(arguments[0], str) and f"fpr.{self.lab}." not in arguments[0]:
                return function(*arguments, **others)
            self.calls += 1
            if self.calls == self.due:
                raise self.error
            return function(*arguments, **others)

        return call


def build(lab: str, monkeypatch: pytest.MonkeyPatch, refusing: Refusing) -> LabError | OSError | None:
    """Build a machine and take it apart again; what it raised."""
    with monkeypatch.context() as patched:
        for module, name in STEPS:
            patched.setattr(module, name, refusing.around(getattr(module, name)))
        try:
            machine = Machine(small(lab))
        except (LabError, OSError) as error:
            return error
    with machine:
        pass
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EFBIG, errno.EPERM])
def test_a_refusal_at_any_step_is_told_with_its_fix_and_leaves_nothing(
    lab_name: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    due = 1
    while True:
        refusing = Refusing(lab_name, due, OSError(number, os.strerror(number)))
        error = build(lab_name, monkeypatch, refusing)
        assert leftovers(lab_name, [GUEST]) == [], due
        if refusing.calls < due:
            break  # there are no more steps
        due += 1
        assert error is not None, "absorbed"
        if isinstance(error, LabError):
            assert isinstance(error, MachineError), error
            assert "; " in str(error)
        else:
            assert fix_of(error), error
    assert due - 1 == 14, "memory, zone, their maps, the wakeup, the hello, two queues"


@pytest.mark.parametrize("due", [1, 2, 3])
def test_a_thread_that_is_refused_ends_the_guest_in_order(
    lab_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], due: int
) -> None:
    refusing = Refusing(lab_name, due, RuntimeError("can't start new thread"))
    monkeypatch.setattr(threading.Thread, "start", refusing.around(threading.Thread.start))

    def life() -> int:
        with Machine(small(lab_name)):
            return 0

    assert run_command(life) == 3
    assert "ulimit -u" in capsys.readouterr().err
    assert leftovers(lab_name, [GUEST]) == []


def test_a_guest_that_does_not_fit_beside_the_others_is_refused_unless_overcommitted(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs
    with RamObject.create(lab_name, "g1", ram_bytes=64 << 20) as other:
        free = 70 << 20  # enough for 16 MiB, and not for what the other has been promised besides

        def nearly_full(path: str) -> os.statvfs_result:
            space = real(path)
            return os.statvfs_result((*space[:3], free // space.f_frsize, free // space.f_frsize, *space[5:]))

        monkeypatch.setattr(os, "statvfs", nearly_full)
        with pytest.raises(MachineError, match="--overcommit"):
            Machine(small(lab_name))
        assert not [name for name in leftovers(lab_name, [GUEST]) if f".{GUEST}." in name]
        with Machine(small(lab_name, overcommit=True)):
            pass
        other.unlink()
