"""page-fault throughput with reporting against without, as the v9 cover letter tells it.

*inhibited*: reports are sent and acknowledged, nothing is discarded (the cover letters' assigned device). *on*: the
host discards, so pages fault again. What those refaults cost by themselves is measured in the same run, by touching
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
_V9 = {"inhibited": 0.991, "on": 0.967}  # v4..v9 covers, 16 vCPUs (reference 2.2)
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
        adjusted: dict[str, list[float]] = {name: [] for name in cases}
        faults: list[float] = []
        for number in range(rounds + 1):
            fault_ns = fault_cost_ns()
            for name, (where, flags) in cases.items():
                result = run_guest(where, *common, *flags)
                if not number:
                    continue
                rate = _throughput(result)
                lost_s = result["refaults"] * fault_ns / 1e9 / _VCPUS
                rates[name].append(rate)
                adjusted[name].append(rate * result["work_s"] / max(result["work_s"] - lost_s, 1e-9))
            if number:
                faults.append(fault_ns)
    for name, samples in rates.items():
        plain = [sample / off for sample, off in zip(samples, rates["off"], strict=True)]
        label = f"page-fault, order {order}, {_VCPUS} vCPU, {name}"
        against = f"off {median(rates['off']):.0f}/s"
        if name == "off":
            yield Row(label, "pages/s", median(samples), spread(samples), "", None, None, None)
        elif name.startswith("inhibited"):
            against += f"; v9 {_V9['inhibited']}"
            ratio = median(plain)
            yield Row(
                label, "pages/s", median(samples), spread(plain), against, ratio, f">= {_INHIBITED_BOUND}",
                ratio >= _INHIBITED_BOUND,
            )  # fmt: skip
        else:
            net = [sample / off for sample, off in zip(adjusted[name], rates["off"], strict=True)]
            yield Row(
                label, "pages/s", median(samples), spread(plain),
                f"{against}; v9 {_V9['on']}, mainline {_MAINLINE_ON}", median(plain), None, None,
            )  # fmt: skip
            ratio = median(net)
            yield Row(
                f"{label}, refaults taken out", "pages/s", median(adjusted[name]), spread(net),
                f"{against}; a refault costs {median(faults):.0f} ns", ratio, f">= {_REFAULT_BOUND}",
                ratio >= _REFAULT_BOUND,
            )  # fmt: skip
