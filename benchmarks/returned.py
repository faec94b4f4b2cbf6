"""How much of what memhog freed comes back once it is idle, and how soon."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.live import live_host
from benchmarks.rows import Row, median, spread
from common.errors import LabError
from common.settings import GuestSettings
from guest.machine import Machine
from guest.workloads import engine
from guest.workloads.vcpu import VCpu, WorkloadSettings

__all__ = ["run"]

_MEMORY = 512 << 20
_MARGIN_S = 1.0
_SHARE = 0.99


def run(rounds: int) -> Iterator[Row]:
    """Rows for delays of 100 ms and 2 s: the share returned within delay + 1 s, and when 99 % were."""
    for delay in ("100ms", "2s"):
        shares, times = [], []
        for number in range(rounds):
            share, seconds = _once(delay, seed=number + 1)
            shares.append(share)
            times.append(seconds)
        yield Row(
            name=f"memhog, delay {delay}: returned within delay + 1 s",
            unit="share of bytes freed at order >= 9",
            value=median(shares),
            spread=spread(shares),
            against="what it freed",
            ratio=min(shares),
            target=f">= {_SHARE} in every run",
            ok=min(shares) >= _SHARE,
        )
        yield Row(
            name=f"memhog, delay {delay}: time from the last free to {_SHARE:.0%} returned",
            unit="s",
            value=median(times),
            spread=spread(times),
            against=f"delay {delay}",
            ratio=None,
            target=None,
            ok=None,
        )


def _once(delay: str, seed: int) -> tuple[float, float]:
    from common.units import parse_duration_ns

    delay_ns = parse_duration_ns(delay)
    with live_host() as host:
        settings = GuestSettings(host=host.lab, memory=_MEMORY, workload="none", delay_ns=delay_ns, seed=seed)
        with Machine(settings) as machine:
            machine.settle()  # the first run, which reports everything
            work = WorkloadSettings("memhog", int(machine.zone.n_pages * 0.7), 9, 0, 0, seed)
            errors: list[BaseException] = []
            vcpu = VCpu(machine.zone, machine.ram_address, work, on_error=errors.append)
            before = machine.zone.statistics().returned_pages
            while vcpu.step() != engine.REST:
                pass
            while vcpu.step() != engine.IDLE:
                pass
            machine.zone.release_cpu(vcpu.cpu)
            freed_at = time.monotonic()
            freed = int(vcpu.state[engine.S_FREED_BIG_PAGES])
            limit = delay_ns / 1e9 + _MARGIN_S
            seconds = limit
            while time.monotonic() - freed_at < limit:
                if machine.zone.statistics().returned_pages - before >= _SHARE * freed:
                    seconds = time.monotonic() - freed_at
                    break
                time.sleep(0.002)
            machine.settle()
            returned = machine.zone.statistics().returned_pages - before
            if errors:
                raise LabError(str(errors[0]))
            if seconds >= limit:
                returned = min(returned, int(_SHARE * freed) - 1)  # it came, but too late
            return min(1.0, returned / freed), seconds
