"""Compile every kernel once, into the cache that all processes share, before any process needs one in a hurry.

A kernel is compiled at its first call with given types, so each is called here as it is called in earnest.
"""

from __future__ import annotations

import time

import numpy as np

from common.errors import LabError
from common.geometry import Migratetype
from common.layout import N_ASKS
from common.native import thread_is_gone
from guest.allocator import entry
from guest.allocator.zone import Zone, ZoneSettings
from guest.memory import set_residence
from guest.reporting import shared
from guest.reporting.claims import take_over
from guest.reporting.cycle import Cycle, Outcome
from guest.reporting.table import POLICIES
from guest.usage import UsageRecorder
from guest.workloads.vcpu import WORKLOADS, VCpu, WorkloadSettings

__all__ = ["load_kernels", "warm_up"]

_MEMORY_BYTES = 16 << 20


def warm_up() -> float:
    """Seconds that it took: minutes with an empty cache, else about one."""
    start = time.monotonic()
    zone = Zone.private(ZoneSettings(_MEMORY_BYTES, shuffle=True, high_water_mark=0))
    ram = np.zeros(_MEMORY_BYTES // 8, dtype=np.int64)
    for workload in sorted(WORKLOADS):
        _work(zone, workload, int(ram.ctypes.data))
    # The kernels branch on the policy's number, so one run compiles the steps of all.
    for policy in POLICIES.values():
        if policy.name != "off" and not policy.host_driven and not policy.virtual_only:
            cycle = Cycle(zone, policy.name)
            cycle.run(lambda _batch: Outcome.DONE)
            cycle.release()
    _share(zone)
    set_residence(zone.address, 0, np.ones(1, dtype=np.uint8))
    pfn = zone.alloc(0)
    if pfn is not None:
        zone.free(pfn)
    zone.isolate(0)
    zone.unisolate(0)
    zone.set_pageblock_migratetype(1, Migratetype.UNMOVABLE)
    listed = zone.free_list(10, Migratetype.MOVABLE)
    if listed:
        zone.rotate(10, Migratetype.MOVABLE, listed[-1][0])
    zone.unreported_pages()
    UsageRecorder(zone.address).take()
    zone.snapshot()
    zone.validate()
    _register(zone)
    zone.close()
    return time.monotonic() - start


def load_kernels(workload: str, policy: str) -> None:
    """Load from the cache what one guest will run: its first step and its first report then take no longer than others.

    Works in a small zone of its own, without memory behind it.
    """
    zone = Zone.private(ZoneSettings(_MEMORY_BYTES, high_water_mark=0))
    if workload != "none":
        _work(zone, workload, 0)
    if policy != "off":
        Cycle(zone, policy).run(lambda _batch: Outcome.DONE)
    UsageRecorder(zone.address).take()
    zone.close()


def _work(zone: Zone, workload: str, ram_address: int) -> None:
    vcpu = VCpu(zone, ram_address, WorkloadSettings(workload, 512, 0, 0, 0, 1), on_error=_raise)
    vcpu.step(64)
    vcpu.release_all()
    zone.release_cpu(vcpu.cpu)


def _share(zone: Zone) -> None:
    """What a host that claims calls in its own process, and what a guest calls for it."""
    shared.set_open(zone.address, 1)
    take_over(zone, 1, None)
    Cycle(zone, "shared").run(lambda _batch: Outcome.DONE)
    shared.set_asking(zone.address, 1)
    shared.collect_asks(zone.address, np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64))
    shared.is_awaited(zone.address, 0, 0)
    shared.answer_ask(zone.address, 0, 0, True)  # there is no such ask: it is merely looked for
    shared.refuse_asks(zone.address)
    thread_is_gone(1)
    entry.unregister_device(zone.address, 1)


def _register(zone: Zone) -> None:
    entry.register_device(zone.address, 1, 0)
    entry.unregister_device(zone.address, 1)
    entry.locked_request(zone.address)


def _raise(error: BaseException) -> None:
    raise LabError(str(error)) from error
