"""``python -m lab sweep``: a grid of settings, in virtual time unless told otherwise, going on where it was stopped."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from common.errors import UsageError
from common.options import Settings, add_flags, load, switch
from common.output import check_distinct, check_output
from lab.commands.flags import COSTS_HELP, as_elsewhere, text
from lab.experiment.outputs import check_not_inside

__all__ = ["SweepSettings", "add_arguments", "read", "run"]


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """What is swept, where it runs and where it goes. The runs' own settings are in the grid file."""

    grid: str = text("grid", "", "lists of settings, one run for each combination", "a path of a TOML file")
    out: str = text("out", "", "keep everything there; the same sweep goes on in it", "a folder path")
    engine: str = text(
        "engine",
        "",
        "where the runs take place; if not given, processes, and inline with --live",
        "inline, processes, processes:N, or dask://HOST:PORT",
    )
    live: bool = switch("live", default=False, help="run the real processes, one run at a time")
    costs: str = text("costs", "", COSTS_HELP, "a path of a JSON file")
    json: str = as_elsewhere("json")
    force: bool = switch("force", default=False, help="overwrite files that exist, and another sweep in the folder")
    quiet: bool = as_elsewhere("quiet")

    @property
    def address(self) -> str:
        """Of the engine."""
        return self.engine or ("inline" if self.live else "processes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_flags(parser, SweepSettings)


def read(namespace: argparse.Namespace) -> SweepSettings:
    """Settings of the flags.

    Raises:
        UsageError: a wrong or missing value; names flag, value and what is allowed.
    """
    settings = load(SweepSettings, namespace)
    for flag, value, example in (("--grid", settings.grid, "sweep.toml"), ("--out", settings.out, "results/sweep")):
        if not value:
            raise UsageError(f"{flag}: missing; name one, such as {flag} {example}")
    if settings.live and settings.engine.startswith("dask:"):
        raise UsageError("--live: runs take place one at a time on this machine; leave --engine away")
    if settings.live and settings.costs:
        raise UsageError("--costs: real processes cost what they cost; leave it away with --live")
    check_distinct({"--grid": settings.grid, "--costs": settings.costs, "--json": settings.json})
    if settings.json:
        check_not_inside("--json", settings.json, settings.out)
        check_output(settings.json, force=settings.force)
    return settings


def run(namespace: argparse.Namespace) -> int:
    """Sweep; the exit code."""
    settings = read(namespace)
    from lab.experiment.execute import execute, load_costs
    from lab.experiment.sweep import run_sweep

    costs = None if settings.live else load_costs(settings.costs)
    command = getattr(namespace, "command_line", None) or list(sys.orig_argv)
    return run_sweep(settings, costs=costs, function=execute, command=command)
