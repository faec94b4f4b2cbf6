"""What things cost on a machine: measured once by ``python -m lab calibrate``, then the whole truth of virtual time."""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from common.errors import UsageError
from common.files import read_regular

__all__ = ["VERSION", "Costs", "default_path"]

VERSION = 2
_MEASURE = "run: python -m lab calibrate"
_FACTORS = ("fault_slowdown_discard", "fault_slowdown_vcpu", "work_slowdown")
_LARGEST = 1e12
_LARGEST_SPREAD = 0.5


def default_path() -> Path:
    """Where this machine's costs are kept, beside the compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpr-lab" / "costs.json"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Nanoseconds of one processor's time, unless it says otherwise.

    Attributes:
        touch_ns: first use of a resident page by its owner: cleared and stamped.
        zero_ns: the clearing in it, saved where the host has proved the page zero.
        fault_ns: what use of a page that was given back costs on top.
        first_fault_ns: the same for a page that was never touched: the kernel has no place for it yet.
        check_ns: reading a page's stamps before it is freed.
        pcp_alloc_ns, pcp_free_ns: a block from, or onto, a per-CPU list.
        refill_block_ns, drain_block_ns: a block moved between the zone and a per-CPU list.
        zone_alloc_ns, zone_free_ns: a block of order 0 past the lists, lock and all.
        huge_alloc_ns, huge_free_ns: the same for a block of pageblock order.
        lock_ns: an uncontended lock and unlock of the zone.
        step_ns: the fixed part of one call of a workload's kernel.
        pull_ns, put_back_ns: the fixed part of one hold of the lock.
        pull_block_ns, put_back_block_ns: for each block of it.
        node_ns: for each list node that a pull looks at and does not take.
        batch_ns: the reporter's own work on a batch outside the lock.
        message_guest_ns, message_host_ns: processor time of a report and its answer, on either side.
        message_wait_ns: elapsed time of a report and its answer beyond both and beyond the discard: two wake-ups.
        discard_range_ns: punching and proving one range, whatever it holds.
        discard_page_ns: for each resident page in it.
        fault_slowdown_discard: factor on ``fault_ns`` while the host discards.
        fault_slowdown_vcpu: factor on ``fault_ns`` for each other vCPU that runs.
        work_slowdown: factor on everything for each further processor that is at work, since they share memory.
        pace_spread: standard deviation of how long the same work takes from one tenth of a second to the next, a share.
    """

    touch_ns: float
    zero_ns: float
    fault_ns: float
    first_fault_ns: float
    check_ns: float
    pcp_alloc_ns: float
    pcp_free_ns: float
    refill_block_ns: float
    drain_block_ns: float
    zone_alloc_ns: float
    zone_free_ns: float
    huge_alloc_ns: float
    huge_free_ns: float
    lock_ns: float
    step_ns: float
    pull_ns: float
    pull_block_ns: float
    put_back_ns: float
    put_back_block_ns: float
    node_ns: float
    batch_ns: float
    message_guest_ns: float
    message_host_ns: float
    message_wait_ns: float
    discard_range_ns: float
    discard_page_ns: float
    fault_slowdown_discard: float
    fault_slowdown_vcpu: float
    work_slowdown: float
    pace_spread: float

    def __post_init__(self) -> None:
        """Raises ``UsageError`` when a cost is no number, negative, or a factor below 1."""
        for field in fields(self):
            value = getattr(self, field.name)
            low = 1.0 if field.name in _FACTORS else 0.0
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= _LARGEST:
                raise UsageError(f"{field.name}: {value!r}; allowed is {low:g} to {_LARGEST:g}; {_MEASURE} --force")
        if self.pace_spread > _LARGEST_SPREAD:
            raise UsageError(
                f"pace_spread: {self.pace_spread}; allowed is at most {_LARGEST_SPREAD}; {_MEASURE} --force"
            )
        if self.step_ns == 0:
            raise UsageError("step_ns: 0; allowed is more than 0, or a vCPU without memory would stop the clock")
        if self.zero_ns > self.touch_ns:
            raise UsageError(f"zero_ns: {self.zero_ns}; allowed is at most touch_ns, of which it is a part")

    def as_dict(self) -> dict[str, float]:
        """Plain dictionary, for JSON and for results."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The costs that ``as_dict`` described.

        Raises:
            UsageError: one is missing, unknown or out of bounds.
        """
        names = {field.name for field in fields(cls)}
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        if missing or unknown:
            what = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(unknown)} unknown"] * bool(unknown)
            raise UsageError(f"costs: {'; '.join(what)}; {_MEASURE} --force")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """The costs in a file that ``python -m lab calibrate`` wrote, by default this machine's.

        Raises:
            UsageError: there is none, or it is not such a file, or one of another version.
        """
        path = Path(path or default_path())
        measure = _MEASURE
        if os.path.realpath(path) != os.path.realpath(default_path()):
            measure = f"leave --costs away, or {_MEASURE} --out {shlex.quote(str(path))}"
        try:
            content = json.loads(read_regular(path))
        except FileNotFoundError:
            raise UsageError(f"{path}: there is no such file; to measure this machine's costs {measure}") from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; name another file, or leave --costs away") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{path}: is no JSON; to measure anew {measure} --force") from None
        if not isinstance(content, dict) or not isinstance(content.get("costs"), dict):
            raise UsageError(f"{path}: holds no costs; to measure anew {measure} --force")
        version = content.get("version")
        if version != VERSION:
            raise UsageError(f"{path}: costs of version {version!r}; this is version {VERSION}; {measure} --force")
        try:
            return cls.from_dict(content["costs"])
        except UsageError as error:
            cause = str(error).removesuffix(f"; {_MEASURE} --force")
            raise UsageError(f"{path}: {cause}; {measure} --force") from None

    @classmethod
    def example(cls) -> Self:
        """Round numbers of the right size, for tests; no machine has them."""
        return cls(
            touch_ns=100.0,
            zero_ns=80.0,
            fault_ns=900.0,
            first_fault_ns=900.0,
            check_ns=10.0,
            pcp_alloc_ns=15.0,
            pcp_free_ns=15.0,
            refill_block_ns=20.0,
            drain_block_ns=20.0,
            zone_alloc_ns=40.0,
            zone_free_ns=40.0,
            huge_alloc_ns=50.0,
            huge_free_ns=60.0,
            lock_ns=10.0,
            step_ns=2_000.0,
            pull_ns=300.0,
            pull_block_ns=40.0,
            put_back_ns=300.0,
            put_back_block_ns=80.0,
            node_ns=10.0,
            batch_ns=20_000.0,
            message_guest_ns=100_000.0,
            message_host_ns=100_000.0,
            message_wait_ns=100_000.0,
            discard_range_ns=5_000.0,
            discard_page_ns=300.0,
            fault_slowdown_discard=1.5,
            fault_slowdown_vcpu=1.1,
            work_slowdown=1.0,
            pace_spread=0.0,
        )
