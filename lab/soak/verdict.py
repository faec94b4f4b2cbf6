"""What came of a soak: the figures, the checks that decide, and the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.units import format_size
from lab.outcome import ProcessEnd, RunOutcome
from lab.result import Check, account_checks
from lab.soak.flat import Trend

__all__ = ["Final", "Findings", "checks", "exit_code", "summary", "summary_text"]

_VIOLATION, _FAILED, _INTERRUPTED = 4, 1, 130


@dataclass(frozen=True)
class Final:
    """A guest that stayed, after its end. Pages; ``resident_bytes`` is the machine's word, None without RAM."""

    allocated: int
    in_flight: int
    held: int
    counted_resident_bytes: int
    resident_bytes: int | None


@dataclass
class Findings:
    """What was counted while it ran. ``hosts`` by lab; ``guests`` by lab, those that came and went among them."""

    duration_s: float = 0.0
    page_operations: int = 0
    stamped_operations: int = 0
    reports: int = 0
    returned_bytes: int = 0
    refaults: int = 0
    repairs: int = 0
    violations: int = 0
    breaches: int = 0
    lost_pages: int = 0
    validations: int = 0
    snapshots: int = 0
    isolations: int = 0
    rotations: int = 0
    host_stops: int = 0
    guests: int = 0
    attached: int = 0
    hung: list[str] = field(default_factory=list)
    names_left: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    host_ends: dict[str, ProcessEnd] = field(default_factory=dict)
    guest_ends: dict[str, list[ProcessEnd]] = field(default_factory=dict)
    finals: dict[str, Final] = field(default_factory=dict)
    trends: Mapping[str, Sequence[Trend]] = field(default_factory=dict)
    interrupted: bool = False


def checks(found: Findings) -> Iterator[Check]:
    """Everything that must hold."""
    counted = {"violations": found.violations, "breaches": found.breaches, "lost pages": found.lost_pages}
    for name, number in counted.items():
        yield Check(f"no {name}", number == 0, "; ".join([str(number), *found.complaints[:4]]))
    yield Check("nobody hung", not found.hung, ", ".join(found.hung))
    yield Check("no name is left", not found.names_left, ", ".join(found.names_left[:8]))
    for name, final in found.finals.items():
        pages = f"{final.allocated} allocated, {final.in_flight} in flight, {final.held} held"
        free = final.allocated == final.in_flight == final.held == 0
        yield Check(f"{name}: every page is free at the end", free, pages)
        if final.resident_bytes is not None:
            yield Check(
                f"{name}: the machine holds what the counters say",
                final.resident_bytes == final.counted_resident_bytes,
                f"{final.resident_bytes}, {final.counted_resident_bytes}",
            )
    for lab, host in found.host_ends.items():
        outcome = RunOutcome(
            lab=lab,
            duration_s=found.duration_s,
            started_s=0.0,
            host=host,
            guests=tuple(found.guest_ends.get(lab, ())),
            observations={},
            interrupted=found.interrupted,
            problem=None,
            watched=False,
        )
        # A visitor that had nothing to report may leave while its host is stopped, before that has read its hello.
        brief = {
            f"{end.name}: known to the host"
            for end in outcome.guests
            if end.name not in found.finals and end.account and not end.account["reports"]
        }
        yield from (check for check in account_checks(outcome) if check.ok or check.name not in brief)
    for name, trends in found.trends.items():
        for trend in trends:
            detail = f"grew by {trend.growth:.0f}, may by {trend.bound:.0f}"
            yield Check(f"{name}: {trend.figure} flat", trend.flat, detail)


def summary(found: Findings, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data for JSON."""
    every = list(checks(found))
    failed = [check for check in every if not check.ok]
    return {
        "ok": not failed and not found.failures and not found.interrupted,
        **settings,
        "duration_s": round(found.duration_s, 3),
        "page_operations": found.page_operations,
        "stamped_operations": found.stamped_operations,
        "page_operations_per_s": round(found.page_operations / max(found.duration_s, 1e-9)),
        "reports": found.reports,
        "returned_bytes": found.returned_bytes,
        "refaults": found.refaults,
        "violations": found.violations,
        "breaches": found.breaches,
        "lost_pages": found.lost_pages,
        "names_left": len(found.names_left),
        "hung": len(found.hung),
        "validations": found.validations,
        "snapshots": found.snapshots,
        "isolations": found.isolations,
        "rotations": found.rotations,
        "host_stops": found.host_stops,
        "guests": found.guests,
        "attached": found.attached,
        "repairs": found.repairs,
        "interrupted": found.interrupted,
        "checks": len(every),
        "failed": [{"name": check.name, "detail": check.detail} for check in failed],
        "failures": found.failures,
        "complaints": found.complaints[:32],
        "processes": {
            name: {trend.figure: trend.as_dict() for trend in trends} for name, trends in found.trends.items()
        },
    }


def exit_code(found: Findings, result: Mapping[str, Any]) -> int:
    """130 interrupted, 4 if something did not hold, 1 if a process failed otherwise, else 0."""
    if result["failed"] and not (found.interrupted and not (found.violations or found.breaches or found.lost_pages)):
        return _VIOLATION
    if found.interrupted:
        return _INTERRUPTED
    return _FAILED if found.failures else 0


def summary_text(result: Mapping[str, Any]) -> list[str]:
    """The figures for a person."""
    returned = format_size(result["returned_bytes"])
    lines = [
        "{page_operations:,} page operations in {duration_s:.0f} s ({page_operations_per_s:,} a second)",
        "  {stamped_operations:,} of them on real memory, each page stamped and checked",
        "  {guests} guests, {attached} attached processes, {host_stops} times a host was stopped",
        "  {reports:,} reports, " + returned + " returned, {refaults:,} refaults",
        "  {isolations:,} isolations, {rotations:,} rotations, {validations:,} validations, {snapshots:,} snapshots",
        "  violations {violations}, breaches {breaches}, lost pages {lost_pages}, names left {names_left}, hung {hung}",
    ]
    lines = [line.format_map(result) for line in lines]
    for name, figures in result["processes"].items():
        if not figures:
            lines.append(f"  {name:24} seen too briefly to be judged")
            continue
        memory = figures["memory"]
        counts = ", ".join(
            f"{what} {figures[what]['median']:.0f} ({figures[what]['growth']:+.0f})"
            for what in ("descriptors", "threads")
        )
        used = f"{memory['median'] / (1 << 20):7.1f} MiB ({memory['growth'] / 1024:+.0f} KiB in the second half)"
        lines.append(f"  {name:24} {used}, {counts}")
    lines += [f"  FAILED {check['name']}: {check['detail']}".rstrip(": ") for check in result["failed"]]
    lines += [f"  FAILED {text}" for text in result["failures"]]
    if not result["failed"]:
        lines.append(f"  all {result['checks']} checks hold, the accounts of hosts and guests to the byte")
    return lines
