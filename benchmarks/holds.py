"""How long the lock is held to pull 32 blocks and to put 32 back, in a small zone and a huge one."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.rows import Row, median, spread
from common.errors import LabError
from common.statistics import new_histogram, percentiles
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Cycle, Outcome

__all__ = ["run"]

_BATCH = 32
_TOP_ORDER = 10
_BATCHES_A_ROUND = 300
_SMALL, _HUGE = 1 << 30, 256 << 30
_PULL_TARGET_NS, _PUT_TARGET_NS = 5_000, 10_000
_INDEPENDENCE = 1.2


class _Zone:
    """A zone of which ``share`` is reported and the rest allocated, and its batches."""

    def __init__(self, memory_bytes: int, share: float) -> None:
        self.zone = Zone.private(ZoneSettings(memory_bytes))
        self.cycle = Cycle(self.zone, capacity=_BATCH)
        blocks = self.zone.n_pages >> _TOP_ORDER
        for _ in range(blocks - max(2 * _BATCH, int(blocks * share))):
            self.zone.alloc(_TOP_ORDER)
        self.cycle.run(lambda _batch: Outcome.DONE)

    def round(self) -> tuple[float, float]:
        """p99 in ns of pull and of put back, over batches of exactly 32 blocks."""
        pulls, put_backs, others = new_histogram(), new_histogram(), new_histogram()
        self.cycle.put_back_holds = put_backs
        for _ in range(_BATCHES_A_ROUND):
            taken = [self.zone.alloc(_TOP_ORDER) for _ in range(_BATCH)]
            for pfn in taken:
                if pfn is None:
                    raise LabError("the benchmark's zone is too small")
                self.zone.free(pfn, _TOP_ORDER)
            self.cycle.begin()
            self.cycle.pull_holds = pulls
            batch = self.cycle.pull()
            if batch is None or batch.pfns.size != _BATCH:
                raise LabError("a pull did not give 32 blocks")
            self.cycle.put_back(batch, Outcome.DONE)
            self.cycle.pull_holds = others  # the pull that finds nothing more
            if self.cycle.pull() is not None:
                raise LabError("a run of the benchmark did not end")
            self.cycle.end()
        return percentiles(pulls).p99, percentiles(put_backs).p99


def run(rounds: int) -> Iterator[Row]:
    """Rows for pull and put back: each zone's p99, and the huge one against the small one."""
    sizes = {"1 GiB": _SMALL, "256 GiB": _HUGE}
    shares = {"10 %": 0.1, "90 %": 0.9}
    zones = {(size, share): _Zone(sizes[size], shares[share]) for size in sizes for share in shares}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in zones}
    for number in range(rounds + 1):
        for key, zone in zones.items():
            sample = zone.round()
            if number:
                found[key].append(sample)
    for column, (what, target_ns) in enumerate((("pull", _PULL_TARGET_NS), ("put back", _PUT_TARGET_NS))):
        smallest = [sample[column] for sample in found["1 GiB", "10 %"]]
        for (size, share), samples in found.items():
            values = [sample[column] for sample in samples]
            ratios = [value / base for value, base in zip(values, smallest, strict=True)]
            yield Row(
                name=f"lock held to {what} {_BATCH}, {size}, {share} reported",
                unit="ns, p99",
                value=median(values),
                spread=spread(values),
                against=f"1 GiB with 10 % reported: {median(smallest):.0f} ns",
                ratio=median(ratios),
                target=f"value <= {target_ns}, ratio <= {_INDEPENDENCE}",
                ok=median(values) <= target_ns and median(ratios) <= _INDEPENDENCE,
            )
