"""page-fault throughput with reporting against without, as the v9 cover letter tells it.

*inhibited*: reports are sent and acknowledged, nothing is discarded (the cover letters' assigned device). *on*: the
host discards, so pages fault again. What those faults cost by themselves is measured in the same run, by touching
returned pages and resident ones, and taken out: what is left is the cost of reporting.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.kernels import use_many
from benchmarks.live import LiveHost, live_host, run_guest
from benchmarks.rows import Row, median, spread
from guest.allocator.zone import Zone, ZoneSettings
from guest.memory import FINDING_WORDS
from host.proof import punch_hole

__all__ = ["fault_cost_ns", "run"]

_MEMORY = 512 << 20
_TOUCHED_PAGES = 32 << 8  # 32 MiB
# One processor is left to the host and the reporter: what they compute is not what the vCPUs lose.
_VCPUS = max(1, (os.cpu_count() or 2) - 1)
_DURATION_S = 5  # two runs and more at a delay of 2 s
_V9 = {"inhibited": 0.991, "on": 0.967}  # v4..v9 covers, 16 vCPUs
_MAINLINE_ON = 0.992  # v16 = v17, pf1 x16
_INHIBITED_BOUND, _REFAULT_BOUND = 0.995, 0.99


def fault_cost_ns() -> float:
    """What a touch of a discarded page costs above that of a resident one, ns a page, through the same kernel."""
    zone = Zone.private(ZoneSettings(_MEMORY))
    descriptor = os.memfd_create("fault-cost")
    os.ftruncate(descriptor, _MEMORY)
    ram = mmap.mmap(descriptor, _MEMORY)
    view = np.frombuffer(ram, dtype=np.uint8)
    finding = np.zeros(FINDING_WORDS, dtype=np.int64)
    first = zone.alloc(10) or 0
    address = int(view.ctypes.data)
    costs = []
    use_many(zone.address, address, finding, first, 10, _TOUCHED_PAGES >> 10)
    for _ in range(7):
        start = time.perf_counter_ns()
        use_many(zone.address, address, finding, first, 10, _TOUCHED_PAGES >> 10)
        resident = time.perf_counter_ns() - start
        punch_hole(descriptor, 0, _MEMORY)
        start = time.perf_counter_ns()
        use_many(zone.address, address, finding, first, 10, _TOUCHED_PAGES >> 10)
        costs.append((time.perf_counter_ns() - start - resident) / _TOUCHED_PAGES)
    del view
    ram.close()
    os.close(descriptor)
    zone.close()
    return median(costs)


def _throughput(result: dict[str, float]) -> float:
    """Pages touched a second."""
    return result["page_operations"] / 2 / result["work_s"]


def run(rounds: int) -> Iterator[Row]:
    """Rows for orders 9 and 0: off, inhibited, on at 100 ms and at 2 s."""
    for order in (9, 0):
        yield from _run_order(order, rounds)


def _run_order(order: int, rounds: int) -> Iterator[Row]:
    common = ["--memory", str(_MEMORY), "--vcpus", str(_VCPUS), "--workload", "page-fault"]
    common += ["--work-order", str(order), "--duration", f"{_DURATION_S}"]
    with live_host() as host, live_host("--inhibit-discard") as inhibited:
        cases: dict[str, tuple[LiveHost, list[str]]] = {
            "off": (host, ["--policy", "off"]),
            "inhibited, 100 ms": (inhibited, ["--delay", "100ms"]),
            "on, 100 ms": (host, ["--delay", "100ms"]),
            "on, 2 s": (host, ["--delay", "2s"]),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        net: dict[str, list[float]] = {name: [] for name in cases}
        costs: list[float] = []
        for number in range(rounds + 1):
            fault_ns = fault_cost_ns()
            for name, (where, flags) in cases.items():
                result = run_guest(where, *common, *flags)
                if not number:
                    continue
                # First touches count too: where reported blocks go to the tail, all of memory is handed out in turn;
                # without reporting the same blocks are, again and again.
                faults = result["refaults"] + result["first_touches"]
                lost_s = faults * fault_ns / 1e9 / _VCPUS
                rates[name].append(_throughput(result))
                net[name].append(rates[name][-1] * result["work_s"] / max(result["work_s"] - lost_s, 1e-9))
            if number:
                costs.append(fault_ns)
    for name, samples in rates.items():
        yield from _rows(f"page-fault, order {order}, {_VCPUS} vCPU, {name}", name, samples, rates, net, median(costs))


def _rows(
    label: str,
    name: str,
    samples: list[float],
    rates: dict[str, list[float]],
    net: dict[str, list[float]],
    fault_ns: float,
) -> Iterator[Row]:
    """The plain figure, and the one with the faults taken out, which is judged."""
    if name == "off":
        yield Row(label, "pages/s", median(samples), spread(samples), "", None, None, None)
        return
    plain = [sample / off for sample, off in zip(samples, rates["off"], strict=True)]
    peers = f"v9 {_V9['inhibited']}" if name.startswith("inhibited") else f"v9 {_V9['on']}, mainline {_MAINLINE_ON}"
    against = f"off {median(rates['off']):.0f}/s; {peers}"
    yield Row(label, "pages/s", median(samples), spread(plain), against, median(plain), None, None)
    ratios = [sample / off for sample, off in zip(net[name], net["off"], strict=True)]
    bound = _INHIBITED_BOUND if name.startswith("inhibited") else _REFAULT_BOUND
    yield Row(
        name=f"{label}, faults taken out",
        unit="pages/s",
        value=median(net[name]),
        spread=spread(ratios),
        against=f"off, likewise; a fault costs {fault_ns:.0f} ns",
        ratio=median(ratios),
        target=f">= {bound}",
        ok=median(ratios) >= bound,
    )
