"""``python -m lab replay``: a recording of a real guest under any policy and settings, and how it compares."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TextIO

from common.cli import EXIT_OK
from common.errors import UsageError
from common.output import STDOUT, check_distinct, check_output, write_json
from common.settings import POLICIES
from common.units import format_size, parse_duration_ns
from lab.commands.trace_flags import MACHINE, START, Flag, add_flags, checked, whole

if TYPE_CHECKING:
    from lab.replay.source import Recording

__all__ = ["add_arguments", "run"]

_HOUR_NS = 3600 * 10**9
_MODES = ("zone",)
_TIMES = ("timer", "recorded")
_REPLAYED = tuple(name for name in POLICIES if name not in {"hint", "shared", "oracle"})


_SECONDS = checked(
    lambda text: round(float(text) * 1e9),
    lambda value: 0 <= value < 1 << 62,
    "seconds on the recording's clock, such as 56.3",
)
_DURATION = checked(parse_duration_ns, lambda value: value <= _HOUR_NS, "0 to 1h with a unit, such as 100ms")


# What is not known, or not as it should be, and what was done about it.
_NOTES = {
    "taken_not_free_pages": "pages taken that were not free here: a free was missed, or the start differs",
    "freed_not_used_pages": "pages freed that were free here: skipped",
    "taken_while_reported_blocks": "blocks that the guest took while they were reported here: the report lost them",
    "frees_without_event": "frees past the per-CPU lists without an event, found by what came after",
    "takes_without_event": "pages or blocks taken without an event, found as they were freed",
    "start_corrected_pages": "pages of the snapshot changed: their first event says otherwise",
}

_FLAGS: tuple[Flag, ...] = (
    START,
    (
        "--from",
        {"dest": "from_ns", "type": _SECONDS, "metavar": "S"},
        "begin here on the recording's clock (default: where a mark says that the snapshot was taken, or the start)",
    ),
    ("--to", {"dest": "to_ns", "type": _SECONDS, "metavar": "S"}, "end here (default: the last event)"),
    (
        "--mode",
        {"choices": _MODES, "default": "zone"},
        "zone: the free lists follow the recorded guest, page by page (default)",
    ),
    ("--policy", {"choices": _REPLAYED, "default": "rotate"}, "who reports (default: rotate, which is mainline)"),
    ("--min-order", {"type": whole(0, 10), "default": 9, "metavar": "N"}, "lowest order reported (default: 9)"),
    (
        "--delay",
        {"dest": "delay_ns", "type": _DURATION, "metavar": "TIME"},
        "from request to pass (default: that of the policy)",
    ),
    ("--capacity", {"type": whole(1, 1024), "metavar": "N"}, "blocks a report (default: that of the policy)"),
    (
        "--high-water-mark",
        {"type": whole(0, 1 << 20), "metavar": "N"},
        "unreported blocks that ask for a run (default: that of the policy)",
    ),
    *MACHINE,
    ("--hz", {"type": whole(10, 1000), "default": 250, "metavar": "N"}, "the guest's CONFIG_HZ (default: 250)"),
    (
        "--tick-phase",
        {"dest": "phase_ns", "type": _DURATION, "metavar": "TIME"},
        "when a tick of its timers fell on the recording's clock (default: unknown, the mean is taken)",
    ),
    (
        "--times",
        {"choices": _TIMES, "default": "timer"},
        "when passes begin: found by trigger and timer (default), or as recorded",
    ),
    (
        "--requested",
        {"action": "store_true"},
        "a pass was asked for just as the recording begins (default: as what was recorded before tells)",
    ),
    (
        "--check",
        {"action": argparse.BooleanOptionalAction, "default": True},
        "check the invariants after every pass (default: yes)",
    ),
    ("--strict", {"action": "store_true"}, "refuse a recording with gaps, as `import --strict` does"),
    (
        "--against",
        {"default": "", "metavar": "FILE"},
        "the real guest's reports beside ours: reports.csv, or a trace that holds them (default: the recording's own)",
    ),
    ("--blocks", {"action": "store_true"}, "with the pfn and order of every block, pass by pass"),
    ("--json", {"default": "", "metavar": "PATH|-"}, "write the result as JSON"),
    (
        "--plot",
        {"default": "", "metavar": "FILE"},
        "a picture of the host's memory over time; the name ends in .png or .svg",
    ),
    ("--force", {"action": "store_true"}, "overwrite files that exist"),
    ("--quiet", {"action": "store_true"}, "no table"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's flags on ``parser``."""
    add_flags(parser, _FLAGS)


def run(namespace: argparse.Namespace) -> int:
    """Replay; the exit code.

    Raises:
        UsageError: the recording, the snapshot, a setting or an output cannot be used; nothing is written then.
        InvariantViolation: a zone's lists, records and counters disagree, which is a bug.
    """
    traces: list[str] = namespace.trace
    outputs = {"--json": namespace.json, "--plot": namespace.plot}
    check_distinct({**outputs, **{f"TRACE {path}": path for path in traces}, "--start": namespace.start})
    for path in outputs.values():
        if path:
            check_output(path, force=namespace.force)
    if namespace.plot and not namespace.plot.lower().endswith((".png", ".svg")):
        raise UsageError(f"--plot: {namespace.plot!r}; allowed is a file name that ends in .png or .svg")
    found = _replayed(namespace)
    if namespace.plot:
        from lab.replay.picture import draw

        draw([(traces[0], found)], namespace.plot, force=namespace.force)
    if not namespace.quiet:
        _print(sys.stderr if namespace.json == STDOUT else sys.stdout, found)
    if namespace.json:
        write_json(found, namespace.json, force=namespace.force)
    return EXIT_OK


def _replayed(namespace: argparse.Namespace) -> dict[str, Any]:
    """The answer."""
    from lab.replay import answer as told
    from lab.replay.against import passes_of, read_real
    from lab.replay.engine import ReplaySettings
    from lab.replay.source import read_recording
    from lab.trace.snapshot import read_snapshot

    start = read_snapshot(namespace.start) if namespace.start else None
    recording = read_recording(namespace.trace, start, namespace.from_ns, namespace.to_ns)
    if namespace.strict and recording.refusals:
        raise UsageError(f"--strict: {namespace.trace[0]}: {'; '.join(recording.refusals)}")
    scene = told.scene_of(recording, start, memory_bytes=namespace.memory, min_free_kbytes=namespace.min_free_kbytes)
    settings = ReplaySettings(
        policy=namespace.policy,
        min_order=namespace.min_order,
        delay_ns=namespace.delay_ns,
        capacity=namespace.capacity,
        high_water_mark=namespace.high_water_mark,
        hz=namespace.hz,
        phase_ns=namespace.phase_ns,
        begins_ns=_recorded(recording, told.recorded_begins(recording)) if namespace.times == "recorded" else None,
        requested_ns=recording.begin_ns if namespace.requested else recording.pending_ns(namespace.min_order),
        check=namespace.check,
    )
    real = (
        read_real(namespace.against, recording.begin_ns, recording.end_ns)
        if namespace.against
        else passes_of(recording.rows)
    )
    done = told.replay(scene, settings)
    done.run()
    found = told.answer(done, scene, blocks=namespace.blocks)
    if real or namespace.against:
        found["against"] = told.beside(done, scene, real)
    return found


def _recorded(recording: Recording, begins_ns: tuple[int, ...]) -> tuple[int, ...]:
    if not begins_ns:
        raise UsageError(f"--times recorded: {recording.name} holds no event `process`; leave it to the timer")
    return begins_ns


def _print(talk: TextIO, found: dict[str, Any]) -> None:
    """The figures for people."""
    settings, unknown = found["settings"], found["unknown"]
    talk.write(
        f"{settings['policy']}, order {settings['min_order']}, delay {settings['delay_ns'] / 1e9:g} s, "
        f"{settings['capacity']} blocks a report; {found['begin_s']:.3f} to {found['end_s']:.3f} s, "
        f"{found['moves']} moves\n"
    )
    against = found.get("against")
    for one in found["passes"] if against is None else against["passes"]:
        if against is None:
            size = format_size(one["bytes"])
            talk.write(f"  {one['t_s']:10.3f} s  {one['reports']} reports, {one['blocks']} blocks, {size}\n")
            continue
        ours, real = (f"{one[key]:10.3f} s" if one[key] is not None else "      none" for key in ("t_s", "real_t_s"))
        shared = f", {one['blocks_shared']} of {one['real_blocks']} blocks" if "real_blocks" in one else ""
        talk.write(f"  ours {ours} {format_size(one['bytes'])}, real {real} {format_size(one['real_bytes'])}{shared}\n")
    talk.write(
        f"reported {format_size(found['reported_bytes'])}, {found['gib_min']:.3f} GiB·min, "
        f"{found['refaults']} refaults ({found['refault_s']:.3f} s), host {found['host_cpu_s']:.3f} s\n"
    )
    talk.write("".join(f"  note: {count} {_NOTES[key]}\n" for key, count in unknown.items() if count))
    if against is not None:
        blocks, ratio = against["blocks_found"], against["bytes_ratio"]
        talk.write(
            f"against the real guest: {against['passes_within_5_percent']:.0%} of passes within 5 %"
            + ("" if ratio is None else f", bytes {ratio:.4f}")
            + ("" if blocks is None else f", blocks {blocks:.2%}")
            + (f", memory off by {against['resident_off_mean']:.3%}" if "resident_off_mean" in against else "")
            + "\n"
        )
