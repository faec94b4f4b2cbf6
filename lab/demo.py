"""The demo: one host, some guests, one screen, one picture, one result."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UsageError
from common.output import check_distinct, check_output, write_bytes, write_json
from common.settings import DEFAULT_PLOT, DemoSettings, GuestSettings
from lab.flags import flags_of
from lab.hosts import check_host, host_period_ns, host_process
from lab.orchestrate import LabPlan, ProcessPlan, run_lab
from lab.outcome import ProcessEnd, RunOutcome
from lab.result import build_result, exit_code
from lab.summary import failure_text, headline, subtitle, summary_text
from lab.view import make_view

__all__ = ["make_plan", "run_demo"]

_OURS = {"json", "force", "quiet", "settings"}  # settings that say what to do with results, not how to run
_FORMATS = (".png", ".svg", ".pdf")
_SEEDS = 1 << 32  # as many as --seed takes


def run_demo(settings: DemoSettings) -> int:
    """Run the demo and say what came of it; the exit code of the process (see ``lab.result.exit_code``).

    Raises:
        UsageError: a result could not be written where it shall go, or no host does what is asked for; found out before
            anything runs.
        MachineError: a result could not be written after all.
    """
    check_host(settings.policy, inhibit_discard=settings.inhibit_discard)
    _check_outputs(settings)
    view = make_view(quiet=settings.quiet)
    try:
        with tempfile.TemporaryDirectory(prefix="fpr-demo-") as folder:
            outcome = run_lab(make_plan(settings, Path(folder)), view)
    finally:
        view.close()
    result = build_result(outcome)
    result["settings"] = {
        setting.name: getattr(settings, setting.name) for setting in fields(settings) if setting.name not in _OURS
    }
    if settings.json:
        write_json(result, settings.json, force=settings.force)
    _say_failures(outcome)
    plot = _draw(settings, outcome, result)
    for line in summary_text(result, plot=plot):
        view.say(line)
    return exit_code(outcome, result)


def make_plan(settings: DemoSettings, folder: Path) -> LabPlan:
    """Command lines of all processes; accounts go to ``folder``. Every lab has a name of its own."""
    lab = f"demo-{os.getpid()}-{secrets.token_hex(2)}"
    host = host_process(
        settings.policy,
        lab,
        folder / "host.json",
        delay_ns=settings.delay_ns,
        inhibit_discard=settings.inhibit_discard,
    )
    return LabPlan(
        lab=lab,
        backend=settings.backend,
        memory_bytes=settings.memory,
        duration_s=settings.duration_s,
        warm_up=("-m", "guest", "--warm-up"),
        host=host,
        guests=tuple(_guest_plan(settings, lab, number, folder) for number in range(1, settings.guests + 1)),
    )


def _guest_plan(settings: DemoSettings, lab: str, number: int, folder: Path) -> ProcessPlan:
    """One guest with the demo's settings and a seed of its own."""
    name = f"guest-{number}"
    account = folder / f"{name}.json"
    given = {setting.name: getattr(settings, setting.name) for setting in fields(settings) if setting.name not in _OURS}
    own = {
        "host": lab,
        "name": name,
        "json": str(account),
        "quiet": True,
        "seed": (settings.seed + number - 1) % _SEEDS,
    }
    if host_period_ns(settings.policy, settings.delay_ns) is not None:
        own["delay_ns"] = None  # the host's
    return ProcessPlan(name, ("-m", "guest", *flags_of(GuestSettings, given | own)), account)


def _check_outputs(settings: DemoSettings) -> None:
    check_distinct({"--json": settings.json, "--plot": settings.plot})
    if settings.json:
        check_output(settings.json, force=settings.force)
    if settings.plot:
        if Path(settings.plot).suffix not in _FORMATS:
            raise UsageError(f"--plot: {settings.plot!r}; allowed is a file name that ends in {', '.join(_FORMATS)}")
        check_output(settings.plot, force=settings.may_overwrite_plot, make_folder=settings.plot == DEFAULT_PLOT)


def _draw(settings: DemoSettings, outcome: RunOutcome, result: dict[str, Any]) -> str | None:
    """Write the picture; its path, or None if there is none. An interrupted run has nothing to show but haste."""
    if not settings.plot or outcome.interrupted or not any(seen.last for seen in outcome.observations.values()):
        return None
    from lab.figure import GuestPicture, draw  # Matplotlib: after the guests have had the processors

    pictures = [
        GuestPicture(end.name, settings.memory, outcome.observations[end.name], _reports(end, outcome.started_s))
        for end in outcome.guests
    ]
    suffix = Path(settings.plot).suffix[1:]
    picture = draw(pictures, title=headline(result), subtitle=subtitle(result), suffix=suffix)
    write_bytes(picture, settings.plot, force=settings.may_overwrite_plot)
    return settings.plot


def _reports(end: ProcessEnd, started_s: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A guest's reports as the picture wants them: seconds since the lab started, bytes."""
    timeline = [] if end.account is None else end.account.get("reports_timeline", [])
    table = np.array(timeline, dtype=np.float64).reshape(-1, 3)
    return np.column_stack([table[:, 0] / 1e9 - started_s, table[:, 2]])


def _say_failures(outcome: RunOutcome) -> None:
    """Even a quiet run says why it failed."""
    if outcome.interrupted:
        return
    if outcome.problem is not None:
        print(outcome.problem, file=sys.stderr)
    for end in outcome.processes:
        if end.exit_code:
            print(failure_text(end.name, end.exit_code, end.stderr_tail), file=sys.stderr)
