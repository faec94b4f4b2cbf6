"""How fast a trace is imported, and how small it becomes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, median, spread
from lab.trace.health import Watch
from lab.trace.reader import read_all
from lab.trace.store import TraceWriter

__all__ = ["run"]

_STEPS = 60_000  # each an allocation or a free, with all events that a kernel prints for it
_TARGET_EVENTS_S, _TARGET_RATIO = 1e6, 10.0


def _recording(t_ns: int, pid: int, name: str, fields: str) -> str:
    return f"{t_ns // 10**9}.{t_ns % 10**9:09d} [{pid & 1}] {pid} {name}: {fields.replace('gfp_flags', 'gfp')}\n"


def _ftrace(t_ns: int, pid: int, name: str, fields: str) -> str:
    seconds, us = t_ns // 10**9, t_ns // 1000 % 10**6
    return f"         python3-{pid:<7} [{pid & 1:03d}] ...1. {seconds}.{us:06d}: {name}: page={pid:016x} {fields}\n"


def _perf(t_ns: int, pid: int, name: str, fields: str) -> str:
    seconds, nested = divmod(t_ns, 10**9)
    name = f"kmem:{name}"
    return f"         python3 {pid:5d} [{pid & 1:03d}] {seconds}.{nested:09d}: {name:>30}: page={pid:#x} {fields}\n"


_FORMS: dict[str, Callable[[int, int, str, str], str]] = {"recording": _recording, "ftrace": _ftrace, "perf": _perf}


def _write(path: str, line: Callable[[int, int, str, str], str]) -> None:
    """Processes that take pages by fault and give them back at exit: per-CPU refills and drains by 63."""
    chance = np.random.default_rng(1)
    steps = chance.integers(400, 30_000, 6 * _STEPS)
    t_ns, at, free = 10 * 10**9, 0, [int(pfn) for pfn in chance.permutation(1 << 18)]
    held: list[int] = []
    with open(path, "w", encoding="ascii") as stream:

        def put(pid: int, name: str, fields: str) -> None:
            nonlocal t_ns, at
            t_ns += int(steps[at % len(steps)])
            at += 1
            stream.write(line(t_ns, pid, name, fields))

        done = 0
        while done < _STEPS:
            pid, count = 200 + done % 97, int(chance.integers(500, 4000))
            for first in range(0, count, 63):
                batch = [free.pop() for _ in range(min(63, count - first))]
                for pfn in batch:
                    put(pid, "mm_page_alloc_zone_locked", f"pfn={pfn:#x} order=0 migratetype=1 percpu_refill=1")
                for pfn in batch:
                    put(pid, "mm_page_alloc", f"pfn={pfn:#x} order=0 migratetype=1 gfp_flags=0x140dca")
                held += batch
            for first in range(0, len(held), 63):
                for name in ("mm_page_free", "mm_page_free_batched"):
                    for pfn in held[first : first + 63]:
                        put(pid, name, f"pfn={pfn:#x} order=0")
                for pfn in held[first : first + 63]:
                    put(pid, "mm_page_pcpu_drain", f"pfn={pfn:#x} order=0 migratetype=1")
            free += held
            held = []
            done += 2 * count


def _import(trace: str, out: str) -> tuple[int, float, float]:
    """Events, seconds, and bytes of text for each byte of the file."""
    begun = time.perf_counter()
    watch = Watch(None)
    with TraceWriter(out) as writer:
        for batch in read_all([trace]):
            watch.see(batch)
            writer.write(batch.columns)
        facts = watch.health().facts
        size = writer.finish({"health": facts})
    return int(facts["events"]), time.perf_counter() - begun, os.stat(trace).st_size / size


def _plain_python(trace: str) -> float:
    """Events a second of the least that a script would do with a recording: split each line, read its numbers."""
    begun = time.perf_counter()
    events = 0
    with open(trace, encoding="ascii") as stream:
        for line in stream:
            words = line.split()
            _ = float(words[0]), int(words[2]), [word.partition("=")[2] for word in words[4:]]
            events += 1
    return events / (time.perf_counter() - begun)


def _wc(trace: str) -> float:
    """Lines a second of ``wc -l``: what reading the text costs alone."""
    begun = time.perf_counter()
    told = subprocess.run(["wc", "-l", trace], check=True, capture_output=True, text=True)  # noqa: S603, S607  coreutils
    return int(told.stdout.split()[0]) / (time.perf_counter() - begun)


def run(rounds: int) -> Iterator[Row]:
    """Rows of speed and of size, for a trace in each of three forms; pages in random order, the worst for size."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found: dict[str, list[tuple[int, float, float]]] = {form: [] for form in _FORMS}
        for form, line in _FORMS.items():
            _write(str(folder / form), line)
        plain: list[float] = []
        lines: list[float] = []
        for number in range(rounds + 1):
            plain.append(_plain_python(str(folder / "recording")))
            lines.append(_wc(str(folder / "recording")))
            for form, samples in found.items():
                sample = _import(str(folder / form), str(folder / "out.parquet"))
                if number:  # the first compiles
                    samples.append(sample)
        for form, samples in found.items():
            speeds = [events / seconds for events, seconds, _ in samples]
            yield Row(
                name=f"import of a trace, {form}",
                unit="events/s",
                value=median(speeds),
                spread=spread(speeds),
                against=(
                    f"{samples[0][0]} events of plain text, health and file included; a loop in Python that splits and "
                    f"keeps nothing {median(plain):.3g}/s, wc -l {median(lines):.3g}/s"
                ),
                ratio=median(speeds) / median(plain),
                target=f"value >= {_TARGET_EVENTS_S:.0f}",
                ok=median(speeds) >= _TARGET_EVENTS_S,
            )
            ratios = [ratio for _, _, ratio in samples]
            yield Row(
                name=f"text for each byte of the file, {form}",
                unit="bytes",
                value=median(ratios),
                spread=spread(ratios),
                against="the plain text",
                ratio=None,
                target=f"value >= {_TARGET_RATIO:.0f}",
                ok=median(ratios) >= _TARGET_RATIO,
            )
