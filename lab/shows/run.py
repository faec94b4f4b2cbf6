"""Runs one show: its runs go through an engine into a run directory, its answer into files beside them."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

from common.errors import InvariantViolation
from common.output import write_bytes, write_json
from lab.experiment.compare import LIVE_ENGINE, describe_runs
from lab.experiment.directory import RunDirectory
from lab.experiment.engines import open_engine
from lab.experiment.execute import execute
from lab.experiment.metrics import RunResult
from lab.experiment.progress import Progress, make_progress
from lab.experiment.spec import RunSpec
from lab.report.style import figure_bytes
from lab.shows.base import Context, Presentation, Show

__all__ = ["DATA", "PICTURE", "TABLE", "load_show", "run_show"]

TABLE, PICTURE, DATA = "answer.md", "picture.png", "data.json"
_REPEAT = 1  # rounds differ by their seed


def load_show(module: str, name: str) -> Show:
    """The show of that name; loads Matplotlib."""
    return cast("Show", getattr(importlib.import_module(module), name)())


def run_show(
    module: str,
    name: str,
    *,
    out: str,
    rounds: int,
    engine: str,
    costs_path: str,
    force: bool,
    quiet: bool,
    command: list[str],
) -> str:
    """Measure and write answer, picture and figures into ``out``; the answer as text.

    Runs that an interrupted show left in ``out`` are not done again; measurements that are no runs are.

    Raises:
        UsageError: ``out`` holds something else. LabError: a run failed. InvariantViolation: a run found violations.
    """
    show = load_show(module, name)
    rounds = rounds or show.rounds
    costs = None
    if not show.live:
        from lab.experiment.execute import load_costs

        costs = load_costs(costs_path)
    settings = {"show": show.name, "rounds": rounds}
    os.makedirs(os.path.dirname(os.path.realpath(out)), exist_ok=True)
    progress = make_progress(quiet=quiet)
    try:
        with RunDirectory.open(
            out, kind="show", settings=settings, costs=costs, force=force, command=command
        ) as directory:
            runner = _Runner(directory, progress, LIVE_ENGINE if show.live else engine, costs)
            answer = show.answer(Context(runner.run, _silent if quiet else _say, rounds))
    finally:
        progress.close()
    text = _text(show, answer, command)
    # All of it follows from what was measured just now, so it may replace what an earlier part of the show drew.
    write_bytes(text.encode(), os.path.join(out, TABLE), force=True)
    write_bytes(figure_bytes(answer.figure, "png"), os.path.join(out, PICTURE), force=True)
    write_bytes(figure_bytes(answer.figure, "svg"), os.path.join(out, PICTURE.replace(".png", ".svg")), force=True)
    write_json(_finite(answer.data), os.path.join(out, DATA), force=True)
    if runner.violations:
        raise InvariantViolation(f"runs found violations: {'; '.join(runner.violations[:3])}; see {out}")
    return text


class _Runner:
    """Does the runs of a show that are not kept yet."""

    def __init__(self, directory: RunDirectory, progress: Progress, address: str, costs: dict[str, Any] | None) -> None:
        self._directory = directory
        self._progress = progress
        self._address = address
        self._costs = costs
        self.violations: list[str] = []

    def run(self, specs: Sequence[RunSpec]) -> list[RunResult]:
        """Results in the order of ``specs``; live runs one at a time, in that order."""
        found = {kept.result.spec.key(): kept.result for kept in self._directory.results()}
        missing = [spec for spec in specs if spec.key() not in found]
        if missing:
            self._progress.start(missing[0].mode, missing)
            payloads = [{"spec": spec.as_dict(), "costs": self._costs} for spec in missing]
            with open_engine(self._address) as engine:
                for index, answer in engine.run(execute, payloads, describe=describe_runs(missing)):
                    result = RunResult.from_dict(answer)
                    self._directory.append(result, _REPEAT)
                    found[missing[index].key()] = result
                    self._progress.done(missing[index])
        results = [found[spec.key()] for spec in specs]
        self.violations = [f"{one.spec.name}, seed {one.spec.seed}" for one in results if one.metrics["violations"]]
        return results


def _text(show: Show, answer: Presentation, command: list[str]) -> str:
    """The answer as Markdown: question, finding, tables, command."""
    parts = [f"# {show.title}", f"*{show.question}*", "\n".join(f"- {sentence}" for sentence in answer.finding)]
    parts += [table.markdown().rstrip("\n") for table in answer.tables]
    parts.append(f"Made by `{' '.join(command)}`.")
    return "\n\n".join(parts) + "\n"


def _finite(value: Any) -> Any:
    """Plain JSON: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(_text: str) -> None:
    pass
