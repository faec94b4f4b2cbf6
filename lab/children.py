"""Child processes of which none is ever left behind.

Each child leads a session of its own, so Ctrl-C at the terminal reaches us alone and we end the children in order.
Signals set a word and wake the selector; nothing here is ever interrupted half-way, so there is no moment at which a
child runs and is not known. If we are killed outright, a leash ends the children (``lab.leash``).

A child that ended stays unreaped until its whole process group was killed: as long as it is a zombie, no other
process can have been given its number.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

__all__ = ["Child", "Children", "Interrupts"]

_LEASH = Path(__file__).with_name("leash.py")
_ROOT = Path(__file__).resolve().parent.parent
_TAIL_BYTES = 4096
_TICK_S = 0.25
_ORPHAN_GRACE_S = 15.0  # for a child to end in order once we were killed: a guest settles for 10 s at most


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP are counted and wake ``descriptor``.

    Only the main thread can handle signals: entered in another one, it counts none and ``descriptor`` stays silent.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self.descriptor, self._write_end = -1, -1

    def __enter__(self) -> Self:
        self.descriptor, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is not threading.main_thread():
            return self
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self.descriptor)
        os.close(self._write_end)

    def drain(self) -> None:
        """Empty the wake-up pipe."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.descriptor, 64):
                pass

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@dataclass
class Child:
    """One child process. ``exit_code`` is None while it runs and negative if a signal ended it."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    stderr: IO[bytes]
    exit_code: int | None = None

    def stderr_tail(self) -> str:
        """The last of what it wrote to standard error, at most 4 KiB."""
        # pread: to seek would move the offset at which the child, which shares it, goes on writing.
        size = os.fstat(self.stderr.fileno()).st_size
        tail = os.pread(self.stderr.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        return tail.decode(errors="replace").strip()


class Children:
    """The children of one run; leaving the context ends every one that still runs."""

    def __init__(self, interrupts: Interrupts, *, tick: Callable[[], None] = lambda: None) -> None:
        self._interrupts = interrupts
        self._tick = tick
        self._children: dict[str, Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(interrupts.descriptor, selectors.EVENT_READ, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill(self._children)
        self._selector.close()
        for child in self._children.values():
            child.stderr.close()

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Run ``python ARGUMENTS`` from the project's folder; its standard output goes nowhere, its error to a file."""
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child; closed on exit
        leash = [sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()), str(_ORPHAN_GRACE_S)]
        try:
            process = subprocess.Popen(  # noqa: S603  our own modules, no shell
                [*leash, sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=_ROOT,
                start_new_session=True,
            )
        except OSError:
            stderr.close()
            raise
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # perhaps it leads no group yet
            process.wait()
            stderr.close()
            raise
        child = Child(name, process, pidfd, stderr)
        self._children[name] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        return child

    def wait(
        self,
        names: Iterable[str],
        *,
        deadline_s: float,
        until: Callable[[Child], bool] = lambda _child: False,
        interrupts_known: int = 0,
    ) -> bool:
        """Wait until all of ``names`` ended, calling the tick meanwhile; True if they did.

        Returns False early at ``deadline_s`` (``time.monotonic``), when there were more signals to stop than
        ``interrupts_known``, or when ``until`` is true of a child, of whatever name, that just ended.
        """
        awaited = set(names)
        next_tick_s = time.monotonic()
        while self.running(awaited):
            now_s = time.monotonic()
            if now_s >= next_tick_s:
                self._tick()
                next_tick_s = now_s + _TICK_S
            if now_s >= deadline_s or self._interrupts.count > interrupts_known:
                return False
            ended = self._collect(min(next_tick_s, deadline_s) - now_s)
            # A list: each of them is asked, also when the first says yes.
            if True in [until(child) for child in ended]:
                return False
        self._tick()
        return True

    @property
    def interrupted(self) -> bool:
        """Whether there was a signal to stop."""
        return self._interrupts.count > 0

    def running(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` that have not ended."""
        return {name for name in names if name in self._children and self._children[name].exit_code is None}

    def stop(self, names: Iterable[str], number: signal.Signals, *, grace_s: float) -> None:
        """Signal those that still run and wait; kill what is left after ``grace_s`` or at a second Ctrl-C."""
        stopping, known = self.running(names), self._interrupts.count
        for name in stopping:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._children[name].pidfd, number)
        if not self.wait(stopping, deadline_s=time.monotonic() + grace_s, interrupts_known=known):
            self.kill(stopping)

    def send(self, name: str, number: signal.Signals) -> None:
        """Signal a child, if it still runs."""
        if self.running([name]):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._children[name].pidfd, number)

    def forget(self, name: str) -> None:
        """Drop what is kept of a child that has ended, in a run that starts very many."""
        assert self._children[name].exit_code is not None
        self._children.pop(name).stderr.close()

    def kill(self, names: Iterable[str]) -> None:
        """End those that still run, with everything they started, at once."""
        for name in self.running(names):
            self._reap(self._children[name])

    def _collect(self, timeout_s: float) -> list[Child]:
        """Wait for one event at most ``timeout_s``; the children that ended, reaped."""
        ended = []
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            if key.data is None:
                self._interrupts.drain()
            else:
                self._reap(key.data)
                ended.append(key.data)
        return ended

    def _reap(self, child: Child) -> None:
        """Kill the group of ``child`` (itself is perhaps gone by itself, which keeps its exit code) and collect it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
        self._selector.unregister(child.pidfd)
        child.exit_code = child.process.wait()
        os.close(child.pidfd)
