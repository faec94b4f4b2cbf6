"""Processes by the hundred: forked from one that has everything loaded and compiled, so that a start takes no time.

A ``Nursery`` is one process, ``python -m lab.nursery``, told by lines of JSON what to start. It has one thread and
opens no shared object, which is what makes forking sound. A child begins in ``host.cli``, ``guest.cli`` or another
function, as if it had been started by itself, and may be killed at any moment.

No child outlives the nursery, nor the nursery whoever started it: the kernel kills them with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import faults
from common.errors import MachineError

__all__ = ["Nursery", "Nursling", "main"]

_ROOT = Path(__file__).resolve().parent.parent
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOADED = ("guest.cli", "guest.joined", "guest.machine", "guest.view", "host.cli", "host.loop", "host.view")


@dataclass
class Nursling:
    """A child of a nursery. ``pidfd`` is readable once it has ended; ``close`` it."""

    nursery: Nursery
    name: str
    pid: int
    pidfd: int
    out: Path
    err: Path

    def running(self) -> bool:
        """Whether it has not ended."""
        return not select.select([self.pidfd], [], [], 0)[0]

    def ended_within(self, timeout_s: float) -> bool:
        """Wait for its end, at most so long; whether it has ended."""
        return bool(select.select([self.pidfd], [], [], timeout_s)[0])

    def send(self, number: int) -> None:
        """Send it a signal; none if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int:
        """Its exit code, once it has ended; negative if a signal ended it."""
        return int(self.nursery.ask({"reap": self.pid})["code"])

    def close(self) -> None:
        """Close the descriptor."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Nursery:
    """The process that forks. Use as a context manager; for one thread.

    Args:
        folder: where the children's streams go, a file each.
        fault: what ``FPR_FAULT`` is in it (``common.faults``): empty, ``later`` or ``kernels``.
        compiled: False runs the kernels as plain Python.
    """

    def __init__(self, folder: Path, *, fault: str = "", compiled: bool = True) -> None:
        self._folder = folder
        self._count = 0
        environment = {**os.environ, faults.VARIABLE: fault}
        if not compiled:
            environment["NUMBA_DISABLE_JIT"] = "1"
        self._process = subprocess.Popen(  # noqa: S603  this interpreter, and a module of ours
            [sys.executable, "-m", "lab.nursery", str(os.getpid())],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()

    def start(self, name: str, target: str, arguments: list[str], *, fault: str = "") -> Nursling:
        """Fork a child that calls ``target`` (``module:function``) with ``arguments`` and exits with what it returns.

        ``fault``: where it dies, see ``common.faults.arm``.
        """
        self._count += 1
        out, err = (self._folder / f"{self._count:04}-{name}.{kind}" for kind in ("out", "err"))
        request = {"target": target, "arguments": arguments, "fault": fault, "out": str(out), "err": str(err)}
        pid = int(self.ask(request)["pid"])
        return Nursling(self, name, pid, os.pidfd_open(pid), out, err)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            MachineError: the nursery is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise MachineError("the process that starts the others has ended; see its messages above") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MachineError(f"the process that starts the others has ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it, and with it every child that is left."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main(arguments: list[str]) -> None:
    """The nursery's own process."""
    _die_with(int(arguments[0]))
    from guest.warmup import warm_up

    for module in _LOADED:
        importlib.import_module(module)
    if os.environ.get("NUMBA_DISABLE_JIT") != "1":
        warm_up()
    # The terminal's are our parent's to answer. Blocked as well, for the children: one that is meant for a child may
    # come before it has handlers, and a signal that is blocked waits where one that is merely ignored is lost.
    for number in _OF_THE_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_TERMINAL)
    children: set[int] = set()
    _say({"ready": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _pid, status = os.waitpid(request["reap"], 0)
            children.discard(request["reap"])
            _say({"code": os.waitstatus_to_exitcode(status)})
        else:
            children.add(_fork(request))
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fork(request: dict[str, Any]) -> int:
    parent = os.getpid()
    child = os.fork()
    if child:
        _say({"pid": child})
        return child
    code = 1
    try:
        _die_with(parent)
        for number in _OF_THE_TERMINAL:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_TERMINAL)
        for descriptor, path in ((1, request["out"]), (2, request["err"])):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        if request["fault"]:
            faults.arm(request["fault"])
        module, _, name = request["target"].partition(":")
        code = getattr(importlib.import_module(module), name)(request["arguments"]) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError  # not reached: the child has exited


def _die_with(parent: int) -> None:
    # SAFETY: prctl(2) with integers; no address is passed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
