"""``python -m lab compare``: policies on the same work, in interleaved runs, live and in virtual time."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.cli import EXIT_OK
from common.errors import InvariantViolation
from common.options import Settings, add_flags, load, option, switch
from common.output import check_distinct, check_output, write_json
from common.settings import WORKLOADS
from lab.commands.flags import (
    COSTS_HELP,
    add_run_flags,
    as_elsewhere,
    comma_list,
    read_rivals,
    read_run,
    text,
    whole_number,
)
from lab.experiment.compare import OFF, Engine, Execute, Plan, make_plan
from lab.experiment.outputs import check_not_inside
from lab.experiment.spec import Mode

if TYPE_CHECKING:
    from lab.experiment.comparison import Comparison

__all__ = ["CompareSettings", "add_arguments", "describe", "read", "run", "run_comparison"]


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """What is compared, how often, where it runs and where it goes. The runs' own settings are in ``RunSpec``."""

    workload: tuple[str, ...] = option(
        "workload",
        "memhog",
        help="what the vCPUs do",
        **comma_list(tuple(name for name in WORKLOADS if name != "none")),
    )
    policies: str = text(
        "policies",
        f"boundary,{OFF}",
        "what is compared; the first is what the others are tested against, and a policy's own settings follow it "
        "after colons",
        "a comma list such as boundary,rotate:delay=250ms:capacity=512",
    )
    repeat: int = option(
        "repeat",
        "5",
        help="runs of each policy and workload; run r has the seed plus r",
        **whole_number(1, 1000),
    )
    live: bool = switch("live", default=False, help="live runs only; without this and --virtual, both")
    virtual: bool = switch("virtual", default=False, help="runs in virtual time only")
    engine: str = text(
        "engine",
        "processes",
        "where runs in virtual time go; live runs are one at a time, here",
        "processes, processes:N, inline, or dask://HOST:PORT",
    )
    costs: str = text("costs", "", COSTS_HELP, "a path of a JSON file")
    out: str = text("out", "", "keep settings, command, environment, results and series there", "a folder path")
    json: str = as_elsewhere("json")
    force: bool = as_elsewhere("force")
    quiet: bool = as_elsewhere("quiet")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Live first: while real processes run, nothing else does."""
        if self.live == self.virtual:
            return ("live", "virtual")
        return ("live",) if self.live else ("virtual",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_flags(parser, CompareSettings)
    add_run_flags(parser.add_argument_group("the runs", "settings that all of them share"))


def read(namespace: argparse.Namespace) -> tuple[CompareSettings, Plan]:
    """Settings and plan of the flags.

    Raises:
        UsageError: a wrong value; names flag, value and what is allowed.
    """
    settings = load(CompareSettings, namespace)
    check_distinct({"--costs": settings.costs, "--json": settings.json})
    check_not_inside("--json", settings.json, settings.out)
    rivals = read_rivals(settings.policies, virtual_only=settings.modes == ("virtual",))
    if namespace.cores is None and settings.modes == ("live", "virtual"):
        namespace.cores = str(len(os.sched_getaffinity(0)))  # those that the live runs have
    base = read_run(namespace)
    plan = make_plan(rivals, base, workloads=settings.workload, repeat=settings.repeat, modes=settings.modes)
    return settings, plan


def run(namespace: argparse.Namespace) -> int:
    """Compare with this project's own engines."""
    settings, plan = read(namespace)
    if settings.json:
        check_output(settings.json, force=settings.force)
    from lab.experiment.engines import check_address, open_engine
    from lab.experiment.execute import execute, load_costs

    check_address(settings.engine)
    costs = load_costs(settings.costs) if "virtual" in plan.modes else None
    return run_comparison(settings, plan, namespace.command_line, costs=costs, execute=execute, open_engine=open_engine)


def run_comparison(
    settings: CompareSettings,
    plan: Plan,
    command: list[str],
    *,
    costs: dict[str, Any] | None,
    execute: Execute,
    open_engine: Callable[[str], AbstractContextManager[Engine]],
) -> int:
    """Do the runs of ``plan`` and say what came of them; the exit code.

    Args:
        costs: of virtual time, as their dictionary. execute, open_engine: see ``run_plan``.

    Raises:
        InvariantViolation: a run found violations; raised once everything has been written.
    """
    from lab.experiment.compare import run_plan
    from lab.experiment.comparison import Sample, compare_results
    from lab.experiment.progress import make_progress
    from lab.experiment.store import counting, open_store
    from lab.experiment.table import print_comparison

    described = describe(settings, plan)
    progress = make_progress(quiet=settings.quiet)
    try:
        with open_store(
            settings.out, kind="compare", settings=described, command=command, costs=costs, force=settings.force
        ) as kept:
            environment = kept.environment
            store, ended = counting(kept)
            try:
                results = run_plan(
                    plan,
                    execute=execute,
                    open_engine=open_engine,
                    address=settings.engine,
                    costs=costs,
                    store=store,
                    progress=progress,
                )
            except BaseException:
                progress.close()
                _tell_what_is_kept(settings, len(ended), sum(len(plan.runs(mode)) for mode in plan.modes))
                raise
    finally:
        progress.close()
    samples = [Sample(result.spec.name, result, repeat) for result, repeat in results]
    comparison = compare_results(samples, first=plan.names[0], base=plan.base)
    # Standard output is for the object when it goes there.
    print_comparison(comparison, sys.stderr if settings.json == "-" else sys.stdout)
    if settings.json:
        document = {
            "settings": described,
            "command": command,
            "environment": environment,
            "costs": costs,
            "tests": comparison.tests,
            "notes": comparison.notes(),
            "comparison": [row.as_dict() for row in comparison.rows],
            "virtual_against_live": [distance.as_dict() for distance in comparison.distances],
        }
        write_json(document, settings.json, force=settings.force)
    return _exit_code(comparison)


def describe(settings: CompareSettings, plan: Plan) -> dict[str, Any]:
    """What was compared, as plain JSON values: what decides about the results, and nothing else."""
    return {
        "policies": list(plan.names),
        "base": plan.base,
        "workloads": list(plan.workloads),
        "modes": list(plan.modes),
        "repeat": settings.repeat,
        "runs": [spec.as_dict() for spec in plan.specs],
    }


def _tell_what_is_kept(settings: CompareSettings, ended: int, total: int) -> None:
    """What a comparison that stops early leaves."""
    if settings.quiet or sys.stderr is None:
        return
    if settings.out:
        text = f"{settings.out}: {ended} of {total} runs are kept; the same command goes on with the others"
    else:
        text = f"nothing was kept of {ended} of {total} runs; --out FOLDER keeps them"
    sys.stderr.write(f"{text}\n")


def _exit_code(comparison: Comparison) -> int:
    """0, or the error that ends with 4."""
    bad = [
        f"{row.name} on {row.workload}, {row.mode}"
        for row in comparison.rows
        if any(row.figures["violations"].summary.values)
    ]
    if bad:
        raise InvariantViolation(f"runs found violations: {'; '.join(bad)}")
    return EXIT_OK
