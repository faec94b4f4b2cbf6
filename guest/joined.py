"""One more process of a running guest: vCPUs on its zone and its RAM, without reporter, link or names of its own."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from common import names
from common.errors import InvariantViolation, MachineError
from common.ramobject import RamObject
from common.settings import GuestSettings
from guest.allocator.zone import Zone
from guest.warmup import load_kernels
from guest.workloads import engine
from guest.workloads.vcpu import VCpu, WorkloadSettings

__all__ = ["Joined", "JoinedResult"]

_LOOK_S = 0.2


@dataclass(frozen=True)
class JoinedResult:
    """What this process did. ``page_operations``: pages allocated plus pages freed by its vCPUs."""

    ok: bool
    name: str
    pid: int
    violations: int
    complaints: tuple[str, ...]
    page_operations: int
    turns: int
    duration_s: float


class Joined:
    """vCPUs of this process in somebody else's zone. Use as a context manager.

    Should this process be killed, the guest frees what it has. Should the guest be killed, this one goes on; it ends
    when the guest has ended in order, and its zone has lost its name.

    Raises:
        SegmentError, PeerError: there is no such guest, or it is not ours. MachineError: no per-CPU slot is left.
    """

    def __init__(self, settings: GuestSettings) -> None:
        self.settings = settings
        self.name = names.check_name("name", settings.name)
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.vcpus: list[VCpu] = []
        self._started = time.monotonic()
        lab = names.check_name("host", settings.host)
        self.zone = Zone.attach(lab, self.name)
        self._close = contextlib.ExitStack()
        self._close.callback(self.zone.close)
        try:
            self._memory = self._map(lab)
            # SAFETY: the array keeps the mapping alive; it is dropped after the vCPU threads have been joined.
            address = 0 if self._memory is None else int(self._memory.ctypes.data)
            load_kernels(settings.workload, "off")
            self._build(address)
        except BaseException:
            self._close.close()
            raise

    def _map(self, lab: str) -> np.ndarray | None:
        if not self.zone.ram_bytes:
            return None
        ram = self._close.enter_context(RamObject.open(lab, self.name, ram_bytes=self.zone.ram_bytes))
        return np.frombuffer(ram.map(), dtype=np.uint8)

    def _build(self, ram_address: int) -> None:
        settings = self.settings
        try:
            for index in range(settings.vcpus):
                work = WorkloadSettings.of(settings, self.zone.n_pages, index)
                self.vcpus.append(VCpu(self.zone, ram_address, work, on_error=self._fail))
        except MachineError as error:
            for vcpu in self.vcpus:
                self.zone.release_cpu(vcpu.cpu)
            raise MachineError(str(error)) from error

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.ended.set()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        for vcpu in self.vcpus:
            vcpu.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
        self._memory = None
        self._close.close()

    def wait(self, seconds: float | None) -> None:
        """Sleep until the time is up (None: never), the guest has ended, or something ended this process."""
        end = None if seconds is None else time.monotonic() + seconds
        while not self.ended.wait(_LOOK_S if end is None else min(_LOOK_S, max(0.0, end - time.monotonic()))):
            if not self.zone.is_named() or (end is not None and time.monotonic() >= end):
                return

    def stop(self) -> None:
        """Stop the vCPUs: they check and free all they hold, and give their slots up."""
        for vcpu in self.vcpus:
            vcpu.stop()
        for vcpu in self.vcpus:
            if vcpu.ident is not None:
                vcpu.join()

    def result(self) -> dict[str, Any]:
        """``JoinedResult`` as a plain dictionary. Call it after ``stop``."""
        complaints = tuple(text for vcpu in self.vcpus if (text := vcpu.complaint()))
        pages = sum(int(vcpu.state[engine.S_OPERATIONS]) for vcpu in self.vcpus)
        return asdict(
            JoinedResult(
                ok=not complaints and self.error is None,
                name=self.name,
                pid=os.getpid(),
                violations=len(complaints),
                complaints=complaints,
                page_operations=pages,
                turns=sum(int(vcpu.state[engine.S_TURNS]) for vcpu in self.vcpus),
                duration_s=time.monotonic() - self._started,
            )
        )

    def check(self) -> None:
        """Raises what went wrong: an error of a vCPU, or ``InvariantViolation`` with what they found."""
        if self.error is not None:
            raise self.error
        complaints = [text for vcpu in self.vcpus if (text := vcpu.complaint())]
        if complaints:
            raise InvariantViolation("; ".join(complaints))
