"""How far a comparison is and how long it will still take: a bar on a terminal, a line a run in a pipe, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from lab.experiment.spec import Mode, RunSpec

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["BarProgress", "Estimate", "LineProgress", "Progress", "QuietProgress", "in_words", "make_progress"]


class Progress(Protocol):
    """Where the talk of a comparison goes."""

    def start(self, mode: Mode, specs: list[RunSpec]) -> None:
        """The runs of one mode begin; those of another are over."""

    def done(self, spec: RunSpec) -> None:
        """One of them has ended."""

    def close(self) -> None:
        """Give the terminal back. May be called twice."""


class Estimate:
    """Time left, from the runs that have ended; before the first, from how long their workloads run at least."""

    def __init__(self, specs: list[RunSpec], clock: Callable[[], float]) -> None:
        self.total = len(specs)
        self.ended = 0
        self._clock = clock
        self._began_s = clock()
        # Virtual time and jobs say nothing of real time.
        timed = bool(specs) and all(spec.mode == "live" and not spec.work_pages for spec in specs)
        self._least_s = sum(spec.duration_ns for spec in specs) / 1e9 if timed else None

    def step(self) -> None:
        """One more run has ended."""
        self.ended += 1

    def left_s(self) -> float | None:
        """Seconds; None when nothing is known yet."""
        if not self.ended:
            return self._least_s
        return (self._clock() - self._began_s) / self.ended * (self.total - self.ended)


def in_words(seconds: float | None) -> str:
    """``3 min 20 s left``."""
    if seconds is None:
        return "time left unknown yet"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s left"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s left"
    return f"{whole // 3600} h {whole % 3600 // 60} min left"


def _title(mode: Mode, count: int) -> str:
    runs = "run" if count == 1 else "runs"
    if mode == "virtual":
        return f"{runs} in virtual time"
    return f"live {runs}, one at a time" if count > 1 else "live run"


class QuietProgress:
    """--quiet."""

    def start(self, mode: Mode, specs: list[RunSpec]) -> None:
        """Nothing."""

    def done(self, spec: RunSpec) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LineProgress:
    """A line a run, without decoration: for pipes and logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._estimate = Estimate([], clock)

    def start(self, mode: Mode, specs: list[RunSpec]) -> None:
        """See ``Progress``."""
        self._estimate = Estimate(specs, self._clock)
        self._say(f"{len(specs)} {_title(mode, len(specs))}: {in_words(self._estimate.left_s())}")

    def done(self, spec: RunSpec) -> None:
        """See ``Progress``."""
        self._estimate.step()
        counted = f"{self._estimate.ended} of {self._estimate.total}"
        left = in_words(self._estimate.left_s())
        self._say(f"{spec.mode} {counted}: {spec.workload}, {spec.name}, seed {spec.seed}; {left}")

    def close(self) -> None:
        """Nothing to give back."""

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress:
    """A bar that is redrawn in place. Vanishes at the end: the tables take its place."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._clock = clock
        self._estimate = Estimate([], clock)
        self._task: TaskID | None = None
        self._bar: RichProgress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[last]}", markup=False, style="dim"),
            console=Console(file=stream),
            transient=True,
        )
        self._bar.start()

    def start(self, mode: Mode, specs: list[RunSpec]) -> None:
        """See ``Progress``."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._estimate = Estimate(specs, self._clock)
        left = in_words(self._estimate.left_s())
        self._task = self._bar.add_task(_title(mode, len(specs)), total=len(specs), left=left, last="")

    def done(self, spec: RunSpec) -> None:
        """See ``Progress``."""
        if self._task is None:
            return
        self._estimate.step()
        left = in_words(self._estimate.left_s())
        self._bar.update(self._task, advance=1, left=left, last=f"{spec.workload}, {spec.name}")

    def close(self) -> None:
        """See ``Progress``."""
        self._bar.stop()


def make_progress(*, quiet: bool, stream: TextIO | None = None) -> Progress:
    """The progress that fits ``stream`` (default standard error): a bar on a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    if quiet or stream is None:  # None: closed by whoever started us
        return QuietProgress()
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return LineProgress(stream)
    return BarProgress(stream)
