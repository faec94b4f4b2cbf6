"""What the boundary saves: list nodes looked at and time in pulls, with it and without, as the reported share grows.

No processes here: the production kernels on a private zone, once without anybody else (what a pull costs), and once
with a vCPU thread that allocates and frees beside (what that does to its throughput).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.errors import LabError
from common.geometry import PAGEBLOCK_ORDER
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.workloads.engine import S_OPERATIONS
from guest.workloads.vcpu import VCpu, WorkloadSettings
from lab.shows.base import Context, Presentation, Table, ratio_text, summary, value_text

__all__ = ["Boundary"]

_GIB = 1 << 30
_POLICIES = ("boundary", "skip-walk", "scan")
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99)
_SHARE_GIB = 64
_SIZES_GIB = (4, 8, 16, 32, 64)
_CAPACITY = 16
_BESIDE_GIB = 32  # the letters' guest
_BESIDE_S = 2.0
_PAUSE_S = 0.001  # between two runs
_STEP_PAGES = 1 << 20
_COLOURS = {"boundary": ("#0072B2", "o"), "skip-walk": ("#009E73", "^"), "scan": ("#D55E00", "s")}


@dataclass(frozen=True)
class _Run:
    """One run of the cycle: blocks pulled, nodes looked at, ns under the lock in all its pulls."""

    blocks: int
    nodes: int
    pull_ns: int


class Boundary:
    """See the module."""

    name = "boundary"
    title = "What the boundary saves"
    question = "What does a pull cost as the reported share of a large zone grows, with a boundary and without?"
    live = True
    rounds = 3

    def answer(self, context: Context) -> Presentation:
        """Everything once a round, policies interleaved."""
        shares: dict[tuple[str, float], list[_Run]] = {}
        sizes: dict[tuple[str, int], list[_Run]] = {}
        beside: dict[str, list[float]] = {}
        for number in range(context.rounds):
            for share in _SHARES:
                for policy in _POLICIES:
                    context.say(f"round {number + 1}: {policy}, {_SHARE_GIB} GiB, {share:.0%} reported")
                    shares.setdefault((policy, share), []).append(_second_run(policy, share))
            for gib in _SIZES_GIB:
                for policy in _POLICIES:
                    context.say(f"round {number + 1}: {policy}, {gib} GiB from nothing reported")
                    sizes.setdefault((policy, gib), []).append(_second_run(policy, 0.0, gib))
            context.say(f"round {number + 1}: a vCPU beside")
            off = _throughput_beside("off", number)
            for policy in _POLICIES:
                beside.setdefault(policy, []).append(_throughput_beside(policy, number) / off)
        return _present(shares, sizes, beside)


def _scattered_blocks(zone: Zone) -> list[int]:
    """Allocate all of a zone as pageblocks; every second one, so that freed ones never merge."""
    blocks = []
    while (pfn := zone.alloc(PAGEBLOCK_ORDER, flags=1)) is not None:
        blocks.append(pfn)
    return sorted(blocks)[::2]


def _second_run(policy: str, share: float, gib: int = _SHARE_GIB) -> _Run:
    """With ``share`` of a zone's free blocks reported by an earlier run: what the run costs that reports the rest."""
    zone = Zone.private(ZoneSettings(gib * _GIB, cpus=1, pcp_batch=0, high_water_mark=0))
    try:
        blocks = _scattered_blocks(zone)
        reported = int(share * len(blocks))
        cycle = Cycle(zone, policy, capacity=_CAPACITY)
        for pfn in blocks[:reported]:
            zone.free(pfn, PAGEBLOCK_ORDER)
        cycle.run(_done)
        for pfn in blocks[reported:]:
            zone.free(pfn, PAGEBLOCK_ORDER)
        cycle.pull_holds[:] = 0
        total_ns = 0
        before = zone.statistics()
        cycle.begin()
        while True:
            start = time.perf_counter_ns()
            batch = cycle.pull()
            total_ns += time.perf_counter_ns() - start
            if batch is None:
                break
            cycle.put_back(batch, Outcome.DONE)
        cycle.end()
        after = zone.statistics()
        pulled = after.pulled_blocks - before.pulled_blocks
        if pulled != len(blocks) - reported:
            raise LabError(f"{policy} pulled {pulled} of {len(blocks) - reported} unreported blocks")
        return _Run(pulled, after.nodes_visited - before.nodes_visited, total_ns)
    finally:
        zone.close()


def _done(_batch: Batch) -> Outcome:
    return Outcome.DONE


def _throughput_beside(policy: str, seed: int) -> float:
    """Page operations a second of a vCPU while a run follows the other; all else is reported already."""
    zone = Zone.private(ZoneSettings(_BESIDE_GIB * _GIB, cpus=2, pcp_batch=0, high_water_mark=0))
    try:
        for pfn in _scattered_blocks(zone):
            zone.free(pfn, PAGEBLOCK_ORDER)
        work = WorkloadSettings("page-fault", 1 << 15, PAGEBLOCK_ORDER, 0, 0, seed + 1)
        vcpu = _Beside(VCpu(zone, 0, work, on_error=_never, timed=False))
        cycle = None if policy == "off" else Cycle(zone, policy, capacity=_CAPACITY)
        if cycle is not None:
            cycle.run(_done)
        vcpu.start()
        end = time.monotonic() + _BESIDE_S
        while time.monotonic() < end:
            if cycle is not None:
                cycle.run(_done)
            time.sleep(_PAUSE_S)
        return vcpu.stop()
    finally:
        zone.close()


class _Beside(threading.Thread):
    """Steps of a vCPU that are long against the moments in which Python has the say."""

    def __init__(self, vcpu: VCpu) -> None:
        super().__init__(name="beside", daemon=True)
        self._vcpu = vcpu
        self._stopping = threading.Event()
        self._rate = 0.0

    def run(self) -> None:
        """Work until ``stop``."""
        began = time.monotonic()
        while not self._stopping.is_set():
            self._vcpu.step(_STEP_PAGES)
        self._rate = int(self._vcpu.state[S_OPERATIONS]) / (time.monotonic() - began)

    def stop(self) -> float:
        """Page operations a second."""
        self._stopping.set()
        self.join()
        return self._rate


def _never(error: BaseException) -> None:
    raise LabError(str(error)) from error


def _present(
    shares: dict[tuple[str, float], list[_Run]],
    sizes: dict[tuple[str, int], list[_Run]],
    beside: dict[str, list[float]],
) -> Presentation:
    by_share = Table(
        f"{_SHARE_GIB} GiB, blocks of order {PAGEBLOCK_ORDER}: a run that reports the rest, batches of {_CAPACITY}",
        ("reported before", *(f"{policy}: {what}" for policy in _POLICIES for what in ("nodes a block", "ns a block"))),
        tuple(
            (
                f"{share:.0%}",
                *(
                    text
                    for policy in _POLICIES
                    for text in (
                        value_text([run.nodes / run.blocks for run in shares[policy, share]]),
                        value_text([run.pull_ns / run.blocks for run in shares[policy, share]], 1, 0),
                    )
                ),
            )
            for share in _SHARES
        ),
        "Time of the pulls, lock and call included, over the blocks pulled; median of the rounds ± half the quartiles' "
        "distance.",
    )
    totals = Table(
        "The whole zone from nothing reported: list nodes looked at, in millions",
        ("zone", *_POLICIES),
        tuple(
            (f"{gib} GiB", *(value_text([run.nodes for run in sizes[policy, gib]], 1e-6, 3) for policy in _POLICIES))
            for gib in _SIZES_GIB
        ),
    )
    vcpu = Table(
        f"A vCPU that allocates and frees huge pages beside a run every millisecond, {_BESIDE_GIB}"
        " GiB, all else reported: throughput against no reporting",
        ("", *_POLICIES),
        (("page operations a second", *(ratio_text(beside[policy]) for policy in _POLICIES)),),
        "The letters say 18 to 20 % more overhead without the boundary in a guest of 32 GiB (v11 to v13).",
    )
    data = {
        "shares": [[policy, share, [vars(run) for run in runs]] for (policy, share), runs in shares.items()],
        "sizes": [[policy, gib, [vars(run) for run in runs]] for (policy, gib), runs in sizes.items()],
        "beside": beside,
    }
    return Presentation(_finding(shares, sizes, beside), (by_share, totals, vcpu), _figure(shares, sizes), data)


def _nodes(runs: list[_Run]) -> float:
    return (summary([run.nodes / run.blocks for run in runs]) or (0.0, 0.0))[0]


def _finding(
    shares: dict[tuple[str, float], list[_Run]],
    sizes: dict[tuple[str, int], list[_Run]],
    beside: dict[str, list[float]],
) -> tuple[str, ...]:
    small, large = _SIZES_GIB[0], _SIZES_GIB[-1]
    growth = {policy: sizes[policy, large][0].nodes / sizes[policy, small][0].nodes for policy in ("boundary", "scan")}
    lost = {policy: 1 - (summary(list(beside[policy])) or (1.0, 0.0))[0] for policy in _POLICIES}
    none, most = _SHARES[0], _SHARES[-1]
    nodes = {
        (policy, share): _nodes(shares[policy, share]) for policy in ("boundary", "scan") for share in (none, most)
    }
    return (
        (
            f"With the boundary a pulled block costs {nodes['boundary', none]:.2f} list nodes when nothing is reported "
            f"and {nodes['boundary', most]:.2f} when {most:.0%} is; without it {nodes['scan', none]:.0f} and "
            f"{nodes['scan', most]:.0f}."
        ),
        (
            f"From {small} to {large} GiB ({large // small} times the memory) the whole zone costs "
            f"{growth['boundary']:.1f} times the nodes with the boundary and {growth['scan']:.0f} times without."
        ),
        f"A vCPU beside loses {lost['boundary']:.1%} with the boundary and {lost['scan']:.1%} without.",
    )


def _figure(shares: dict[tuple[str, float], list[_Run]], sizes: dict[tuple[str, int], list[_Run]]) -> Figure:
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2)
    for policy in _POLICIES:
        colour, marker = _COLOURS[policy]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": policy}
        axes[0].plot([100 * share for share in _SHARES], [_nodes(shares[policy, share]) for share in _SHARES], **style)
        totals = [float(np.median([run.nodes for run in sizes[policy, gib]])) for gib in _SIZES_GIB]
        axes[1].plot(_SIZES_GIB, totals, **style)
    axes[0].set_yscale("log")
    axes[0].set_xlabel(f"share of a {_SHARE_GIB} GiB zone that is reported already, %")
    axes[0].set_ylabel("list nodes looked at per pulled block")
    axes[1].set_xscale("log", base=2)
    axes[1].set_yscale("log")
    axes[1].set_xticks(_SIZES_GIB, [f"{gib} GiB" for gib in _SIZES_GIB])
    axes[1].set_xlabel("size of the zone, all of it to be reported")
    axes[1].set_ylabel("list nodes looked at in all")
    for panel in axes:
        panel.grid(alpha=0.3)
    axes[0].legend()
    return figure
