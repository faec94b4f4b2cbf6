"""What one run is: every setting that can change its result, and nothing else.

Two runs of the same specification and the same costs give the same result to the byte in virtual time, so the key of
a specification names its result in a directory, and an interrupted sweep knows what it has.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

from common.errors import UsageError

__all__ = ["ORACLE", "Mode", "RunSpec"]

Mode = Literal["virtual", "live"]
ORACLE = "oracle"  # the policy that knows the future: in virtual time only


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run of one guest and its host. Sizes in bytes, durations in ns.

    Attributes:
        capacity, delay_ns, high_water_mark: None means that of the policy. Of ``hint`` and ``shared`` the delay is the
            host's period, see ``lab.hosts``.
        cores: processors that vCPUs, reporter and host share, in virtual time; a live run has those of the machine.
        duration_ns: how long the workload runs; afterwards it frees all it holds and the guest settles.
        work_pages: stop once that many page operations are done, however long it takes (a job); 0: run for the
            duration.
        inhibit_discard: the host acknowledges and discards nothing (the cover letters' row "MADV disabled").
        host_zeroed: a block that the host proved zero need not be cleared again (Z1-Z4).
        label: told apart in tables when two runs of one policy are compared; empty for the policy's name.
    """

    mode: Mode = "virtual"
    policy: str = "boundary"
    workload: str = "memhog"
    memory: int = 512 << 20
    vcpus: int = 1
    cores: int = 2
    min_order: int = 9
    work_order: int = 9
    capacity: int | None = None
    delay_ns: int | None = None
    high_water_mark: int | None = None
    fill: float = 0.7
    hold_ns: int = 1_000_000_000
    idle_ns: int = 3_000_000_000
    duration_ns: int = 10_000_000_000
    work_pages: int = 0
    pcp_batch: int = 63
    pcp_high: int = 0
    shuffle: bool = False
    merge_likely: bool = True
    host_zeroed: bool = False
    inhibit_discard: bool = False
    backend: str = "shared"
    seed: int = 1
    label: str = ""

    @property
    def name(self) -> str:
        """What a table calls it."""
        return self.label or self.policy

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary, keys in order, for JSON."""
        return dict(sorted(asdict(self).items()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The specification that ``as_dict`` described.

        Raises:
            UsageError: a key that a specification does not have.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UsageError(f"{', '.join(sorted(unknown))}: no setting of a run")
        return cls(**values)

    def key(self) -> str:
        """16 hexadecimal digits that name this specification."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def but(self, **changes: Any) -> RunSpec:
        """A copy with some settings changed."""
        return replace(self, **changes)
