"""The settings of the three commands: what can be set, with which bounds and which defaults.

Each setting is described once. What two commands share stands in a base class, so that ``python -m guest`` and
``run_demo.py`` cannot drift apart. Reading them from flags and files is the matter of ``common.options``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from common.errors import UsageError
from common.geometry import TOP_ORDER, check_memory_bytes
from common.names import check_name
from common.options import Settings, add_flags, load, option, switch
from common.units import format_size, parse_duration_ns, parse_seconds, parse_size

__all__ = [
    "BACKENDS",
    "DEFAULT_PLOT",
    "POLICIES",
    "WORKLOADS",
    "DemoSettings",
    "GuestSettings",
    "HostSettings",
    "SharedHostSettings",
    "add_flags",
    "format_size",
    "load",
    "parse_duration_ns",
    "parse_size",
]

# Names only, so that --help need not load compiled code. The tables with the substance are those of guest/reporting and
# guest/workloads; a test holds both to these.
BACKENDS = ("shared", "model")
POLICIES = ("boundary", "off", "scan", "skip-walk", "rotate", "walk-locked", "hint", "bitmap", "hold", "shared")
WORKLOADS = ("memhog", "page-fault", "churn", "burst", "build", "none")
DEFAULT_PLOT = "out/demo.png"

_OF_THE_POLICY = "that of the policy"
_HOUR_NS = 3600 * 1_000_000_000
_LONGEST_RUN_S = 30 * 24 * 3600.0
_WHOLE = re.compile(r"[0-9]{1,20}")
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,12})?")


def _matched(pattern: re.Pattern[str], text: str) -> str:
    # int() and float() take more than a setting should: underscores, infinities, digits of other scripts.
    if not pattern.fullmatch(text):
        raise ValueError(text)
    return text


def _integer(flag: str, default: int | None, low: int, high: int, help: str, unset: str = "") -> Any:  # noqa: A002
    return option(
        flag,
        None if default is None else str(default),
        help=help,
        allowed=f"{low} to {high}",
        parse=lambda text: int(_matched(_WHOLE, text)),
        check=lambda value: low <= value <= high,
        unset=unset,
    )


def _choice(flag: str, choices: tuple[str, ...], help: str) -> Any:  # noqa: A002  argparse's word
    return option(
        flag, choices[0], help=help, allowed=", ".join(choices), parse=str, check=lambda value: value in choices
    )


def _duration(flag: str, default: str | None, help: str, *, low_ns: int = 0, unset: str = "") -> Any:  # noqa: A002
    return option(
        flag,
        default,
        help=help,
        allowed=f"{'1ms' if low_ns else '0'} to 1h with a unit, such as 100ms",
        parse=parse_duration_ns,
        check=lambda value: low_ns <= value <= _HOUR_NS,
        unset=unset,
    )


def _run_time(default: str | None, unset: str = "") -> Any:
    return option(
        "duration",
        default,
        help="how long to run",
        allowed="more than 0 seconds and at most 30 days, such as 20 or 20s",
        parse=parse_seconds,
        check=lambda value: 0 < value <= _LONGEST_RUN_S,
        unset=unset,
    )


def _path(flag: str, default: str, help: str, allowed: str = "a file path") -> Any:  # noqa: A002
    return option(flag, default, help=help, allowed=allowed, parse=str, check=lambda value: "\0" not in value)


def _name(flag: str, default: str, help: str, unset: str = "") -> Any:  # noqa: A002
    def is_name(value: str) -> bool:
        try:
            return value == default or check_name(flag, value) == value
        except UsageError:
            return False

    allowed = "1 to 32 characters of a-z, 0-9 and inner hyphens"
    return option(flag, default, help=help, allowed=allowed, parse=str, check=is_name, unset=unset)


def _is_memory(value: int) -> bool:
    try:
        return check_memory_bytes(value) > 0
    except UsageError:
        return False


def _inhibit_discard() -> Any:
    return switch(
        "inhibit-discard", default=False, help="acknowledge reports, discard nothing, as with pinned memory (S12)"
    )


@dataclass(frozen=True, kw_only=True)
class _RunSettings(Settings):
    """What every command has."""

    duration_s: float | None = _run_time(None, unset="until stopped")
    json: str = _path("json", "", "write the result as one JSON object", "a file path, or - for standard output")
    force: bool = switch("force", default=False, help="overwrite files that exist")
    quiet: bool = switch("quiet", default=False, help="no live view and no lines while running")
    settings: str = _path(
        "settings", "", "read settings from this TOML file; flags win over it", "a path of a TOML file"
    )


@dataclass(frozen=True, kw_only=True)
class _MachineSettings(_RunSettings):
    """A guest's memory, its allocator, its reporting and its work. Values of v9 where v9 has one."""

    memory: int = option(
        "memory",
        "512MiB",
        help="memory of a guest",
        allowed="a multiple of 2MiB from 16MiB to 1TiB, such as 512MiB",
        parse=parse_size,
        check=_is_memory,
    )
    vcpus: int = _integer("vcpus", 2, 1, 64, "vCPU threads of a guest")
    backend: str = _choice("backend", BACKENDS, "real memory, or a model of it without RAM")
    overcommit: bool = switch(
        "overcommit", default=False, help="start even if all guests together may use more than /dev/shm has left"
    )
    policy: str = _choice("policy", POLICIES, "reporting policy")
    min_order: int = _integer("min-order", 9, 0, TOP_ORDER, "smallest order that is reported")  # pageblock_order
    delay_ns: int | None = _duration("delay", None, "wait between request and run", unset=_OF_THE_POLICY)
    capacity: int | None = _integer("capacity", None, 1, 1024, "most blocks in one report", _OF_THE_POLICY)
    high_water_mark: int | None = _integer(
        "high-water-mark", None, 0, 1 << 20, "unreported free blocks of one order that request a run", _OF_THE_POLICY
    )
    deadline_ns: int = _duration("deadline", "1s", "wait for an acknowledgement before giving up", low_ns=1_000_000)
    pcp_batch: int = _integer("pcp-batch", 63, 0, 1024, "pages moved to or from a per-CPU list at once; 0: no lists")
    pcp_high: int = _integer("pcp-high", 0, 0, 1 << 20, "pages a per-CPU slot holds; 0: low watermark / slots")
    shuffle: bool = switch("shuffle", default=False, help="shuffle free pages")
    merge_likely: bool = switch("merge-likely", default=True, help="free to the tail when a merge is likely")
    host_zeroed: bool = switch(
        "host-zeroed", default=False, help="do not clear again what the host proved zero (Z1-Z4); not with --poison"
    )
    poison: int = _integer(
        "poison", 0, 0, 255, "byte that fills freed pages; the host then discards nothing; 0: none"
    )  # PAGE_POISON
    workload: str = _choice("workload", WORKLOADS, "what the vCPUs do")
    work_order: int = _integer("work-order", 9, 0, TOP_ORDER, "order that memhog and page-fault allocate at")
    fill: float = option(
        "fill",
        "0.7",
        help="share of memory that the workload uses",
        allowed="0.01 to 0.95",
        parse=lambda text: float(_matched(_DECIMAL, text)),
        check=lambda value: 0.01 <= value <= 0.95,
    )
    hold_ns: int = _duration("hold", "1s", "how long memhog keeps its memory, and build computes between two chunks")
    idle_ns: int = _duration("idle", "3s", "how long memhog and burst stay idle")
    seed: int = _integer("seed", 1, 0, (1 << 32) - 1, "seed of everything random")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.poison and self.policy == "shared":
            raise UsageError(
                f"poison: {self.poison}; the host of the policy 'shared' is never told and always discards, "
                "allowed is 0 with it"
            )


@dataclass(frozen=True, kw_only=True)
class GuestSettings(_MachineSettings):
    """``python -m guest``."""

    table: ClassVar[str] = "guest"

    host: str = _name("host", "lab", "name of the lab, the one that a host was started with")
    name: str = _name("name", "", "name of this guest", unset="guest-PID")
    keep: bool = switch(
        "keep", default=False, help="should this process be killed, its names stay, for another one with --attach"
    )
    attach: bool = switch(
        "attach",
        default=False,
        help="take the zone of a guest of this name that was killed over, with all that is allocated; implies --keep",
    )
    join: bool = switch(
        "join", default=False, help="be one more process of the running guest of this name: vCPUs without a reporter"
    )
    spare_slots: int = _integer(
        "spare-slots", 2, 0, 64, "per-CPU slots beyond those of the vCPUs, for processes that join"
    )
    work_pages: int = _integer("work-pages", 0, 0, 1 << 50, "stop after so many page operations; 0: go on")
    wait_for_ack: bool = switch(
        "wait-for-ack",
        default=True,
        help="--no-wait-for-ack, for the policy hint alone, CORRUPTS THE GUEST ON PURPOSE: blocks are reused before "
        "the host has discarded them",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.wait_for_ack and self.policy != "hint":
            raise UsageError(f"wait_for_ack: False; the policy {self.policy!r} always waits, allowed is it with 'hint'")
        if (self.attach or self.join) and not self.name:
            raise UsageError(f"{'join' if self.join else 'attach'}: which guest? name it with --name")
        if self.join and (self.attach or self.keep):
            raise UsageError("join: a process that joins owns no names; leave --attach and --keep to the guest itself")
        if self.join and self.workload == "none":
            raise UsageError("join: with --workload none it has nothing to do; choose another")
        if (self.keep or self.attach) and self.policy == "shared":
            raise UsageError("keep: the zone of the policy 'shared' belongs to its host as well; allowed without it")


@dataclass(frozen=True, kw_only=True)
class HostSettings(_RunSettings):
    """``python -m host``."""

    table: ClassVar[str] = "host"

    name: str = _name("name", "lab", "name of the lab; guests find the host by it")
    slow_ns: int = _duration("slow", "0", "sleep at every report, to see how guests fare with a slow host")
    slow_where: str = _choice("slow-where", ("before", "inside"), "sleep before the gate is taken, or while holding it")
    inhibit_discard: bool = _inhibit_discard()
    hint_every_ns: int = _duration(
        "hint-every", "2s", "from the start of one run to the next at guests that wait for commands; 0: only once"
    )
    max_reports_per_s: int = _integer(
        "max-reports-per-s",
        10_000,
        0,
        1 << 20,
        "most reports a second of one guest; whoever sends more, or rubbish, is read more seldom; 0: no limit",
    )


@dataclass(frozen=True, kw_only=True)
class SharedHostSettings(_RunSettings):
    """``python -m lab shared-host``."""

    table: ClassVar[str] = "shared-host"

    name: str = _name("name", "lab", "name of the lab whose guests of the policy shared are served")
    every_ns: int = _duration("every", "100ms", "from a guest's request to the claims", low_ns=1_000_000)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(_MachineSettings):
    """``run_demo.py``: one host and some guests."""

    table: ClassVar[str] = "demo"

    guests: int = _integer("guests", 2, 1, 64, "how many guests")
    duration_s: float = _run_time("12s")
    plot: str = _path("plot", DEFAULT_PLOT, "draw the picture to this file", "a file path (.png, .svg, .pdf)")
    inhibit_discard: bool = _inhibit_discard()

    @property
    def may_overwrite_plot(self) -> bool:
        """Whether the picture may replace a file: asked for, or the default place that each run replaces."""
        return self.force or self.plot == DEFAULT_PLOT
