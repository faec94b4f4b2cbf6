"""``python -m lab replay``: a recording of a real guest under any policy and settings, and how it compares."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from common.cli import EXIT_OK
from common.errors import UsageError
from common.output import STDOUT, check_distinct, check_one_stream, check_output, write_json
from common.settings import POLICIES
from common.units import parse_duration_ns
from lab.commands.trace_flags import MACHINE, START, Flag, add_flags, checked, whole

if TYPE_CHECKING:
    from lab.replay.source import Recording

__all__ = ["add_arguments", "run"]

_HOUR_NS = 3600 * 10**9
_MODES = ("zone", "page", "demand")
_OWN_LISTS, _PLACEMENT = ("pcp_batch", "pcp_high"), ("shuffle", "merge_likely", "seed")  # settings of some modes alone
_TIMES = ("timer", "recorded")
_REPLAYED = tuple(name for name in POLICIES if name not in {"hint", "shared", "oracle"})


_SECONDS = checked(
    lambda text: round(float(text) * 1e9),
    lambda value: 0 <= value < 1 << 62,
    "seconds on the recording's clock, such as 56.3",
)
_DURATION = checked(parse_duration_ns, lambda value: value <= _HOUR_NS, "0 to 1h with a unit, such as 100ms")

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
        (
            "zone: the free lists follow the recorded guest (default); page: its allocations and frees, through "
            "per-CPU lists of our own; demand: and our allocator chooses the pages"
        ),
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
    ("--pcp-batch", {"type": whole(0, 4096), "metavar": "N"}, "page, demand: pages moved to and from a per-CPU list"),
    ("--pcp-high", {"type": whole(1, 1 << 28), "metavar": "N"}, "page, demand: pages of a CPU's lists at most"),
    ("--shuffle", {"action": "store_true", "default": None}, "demand: shuffle the free lists"),
    (
        "--merge-likely",
        {"action": argparse.BooleanOptionalAction},
        "demand: put a block to the tail where it is likely to merge (default: yes)",
    ),
    ("--seed", {"type": whole(0, (1 << 32) - 1), "metavar": "N"}, "demand: of the shuffle (default: 1)"),
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
    check_one_stream([*traces, namespace.start])
    check_distinct({**outputs, **{f"TRACE {path}": path for path in traces}, "--start": namespace.start})
    for path in outputs.values():
        if path:
            check_output(path, force=namespace.force)
    if namespace.plot and not namespace.plot.lower().endswith((".png", ".svg")):
        raise UsageError(f"--plot: {namespace.plot!r}; allowed is a file name that ends in .png or .svg")
    _check_mode(namespace)
    found = _replayed(namespace)
    if namespace.plot:
        from lab.replay.picture import draw

        draw([(traces[0], found)], namespace.plot, force=namespace.force)
    if not namespace.quiet:
        from lab.replay.words import tell

        tell(sys.stderr if namespace.json == STDOUT else sys.stdout, found)
    if namespace.json:
        write_json(found, namespace.json, force=namespace.force)
    return EXIT_OK


def _replayed(namespace: argparse.Namespace) -> dict[str, Any]:
    """The answer."""
    from lab.replay import answer as told
    from lab.replay.against import passes_of, read_real
    from lab.replay.engine import ReplaySettings
    from lab.replay.source import read_recording
    from lab.trace.health import STRICT_SHARE
    from lab.trace.snapshot import read_snapshot

    start = read_snapshot(namespace.start) if namespace.start else None
    recording = read_recording(namespace.trace, start, namespace.from_ns, namespace.to_ns)
    if namespace.strict and recording.refusals:
        raise UsageError(f"--strict: {namespace.trace[0]}: {'; '.join(recording.refusals)}")
    scene = told.scene_of(
        recording,
        start,
        mode=namespace.mode,
        memory_bytes=namespace.memory,
        min_free_kbytes=namespace.min_free_kbytes,
    )
    if namespace.strict and scene.correction.share > STRICT_SHARE:
        raise UsageError(
            f"--strict: {namespace.start}: contradicts {scene.correction.share:.2%} of the pages that {recording.name} "
            f"names; expected a snapshot taken as the recording begins, at most {STRICT_SHARE:.1%}"
        )
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
        **_chosen(namespace),
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


def _chosen(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings of a mode that were given."""
    return {key: getattr(namespace, key) for key in (*_OWN_LISTS, *_PLACEMENT) if getattr(namespace, key) is not None}


def _check_mode(namespace: argparse.Namespace) -> None:
    """Raises: UsageError: a setting is given that the mode does not have."""
    for key in _chosen(namespace):
        modes = ("page", "demand") if key in _OWN_LISTS else ("demand",)
        if namespace.mode not in modes:
            raise UsageError(
                f"--{key.replace('_', '-')}: a {namespace.mode} replay follows the recorded guest in this; it is for "
                f"--mode {' or '.join(modes)}"
            )


def _recorded(recording: Recording, begins_ns: tuple[int, ...]) -> tuple[int, ...]:
    if not begins_ns:
        raise UsageError(f"--times recorded: {recording.name} holds no event `process`; leave it to the timer")
    return begins_ns
