"""Traces as text: what a person reads, what a test replays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from common.errors import InvariantViolation, UsageError
from common.geometry import PAGEBLOCK_ORDER, PAGEBLOCK_ORDER_VARIABLE
from lab.explore.words import STEP_NAMES

__all__ = ["as_test", "parse_step", "replay", "replay_here", "step_text"]

_TWO = ("alloc", "alloc_past", "set_type", "rotate", "answer_ask")
_ONE = ("free", "free_past", "drain", "end_ask", "answer", "isolate", "unisolate", "walk")
SMALL = "2"  # pageblocks of four pages, blocks of eight at most


def step_text(step: int) -> str:
    """A step as text: its name and its arguments."""
    name, first, second = STEP_NAMES[step >> 12], (step >> 6) & 63, step & 63
    if name in _TWO:
        return f"{name} {first} {second}"
    return f"{name} {first}" if name in _ONE else name


def parse_step(text: str) -> int:
    """The step that ``step_text`` wrote.

    Raises:
        UsageError: there is no such step.
    """
    name, *rest = text.split()
    wanted = 2 if name in _TWO else 1 if name in _ONE else 0
    if name not in STEP_NAMES or len(rest) != wanted or not all(word.isdigit() and int(word) < 64 for word in rest):
        raise UsageError(f"step: {text!r}; allowed are {', '.join(STEP_NAMES)}, with their arguments")
    first, second = [*map(int, rest), 0, 0][:2]
    return (STEP_NAMES.index(name) << 12) | (first << 6) | second


def as_test(name: str, scenario: dict[str, Any], steps: Iterable[int], breaches: Iterable[str]) -> str:
    """A module with one test that replays a trace: it fails until what it shows is mended."""
    lines = "".join(f"            {json.dumps(step_text(step))},\n" for step in steps)
    settings = "".join(f"        {key}={value!r},\n" for key, value in scenario.items())
    return (
        f'"""{"; ".join(breaches)}."""\n\n'
        "from lab.explore.trace import replay\n\n\n"
        f"def test_{name}() -> None:\n"
        f"    replay(\n{settings}        trace=[\n{lines}        ],\n    )\n"
    )


def replay(*, trace: list[str], **scenario: Any) -> None:
    """Take the steps of a trace on a fresh zone, check after each. In a process with small pageblocks, if this has not.

    Args:
        scenario: as for ``scenario_of``.

    Raises:
        InvariantViolation: something does not hold. UsageError: the trace or the scenario is not one.
    """
    if int(SMALL) <= PAGEBLOCK_ORDER <= int(SMALL) + 1:
        replay_here(trace=trace, **scenario)
        return
    environment = os.environ | {PAGEBLOCK_ORDER_VARIABLE: SMALL, "NUMBA_DISABLE_JIT": "1"}
    program = "import json, sys\nfrom lab.explore.trace import replay_here\nreplay_here(**json.load(sys.stdin))"
    done = subprocess.run(  # noqa: S603  our own program, on what it wrote
        [sys.executable, "-c", program],
        input=json.dumps({"trace": trace, **scenario}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InvariantViolation(done.stderr.strip().rpartition("\n")[2])


def replay_here(*, trace: list[str], **scenario: Any) -> None:
    """``replay`` in this process, whose pageblocks have to be small."""
    from lab.explore.explorer import walk_steps
    from lab.explore.scenario import World, scenario_of

    named: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in scenario.items()}
    world = World.create(scenario_of(named.pop("policy"), **named))
    walk_steps(world, tuple(parse_step(text) for text in trace))
    world.zone.close()
