"""Explorations one after the other, for the command and the tests: what they came to, as plain data."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from common.errors import UsageError
from common.geometry import PAGEBLOCK_ORDER
from lab.explore.bugs import BUGS, plant
from lab.explore.explorer import ROOTS, Exploration, explore
from lab.explore.plain import keep_views
from lab.explore.scenario import Scenario, scenario_of
from lab.explore.trace import as_test, step_text

__all__ = ["as_data", "explore_bugs", "explore_policies"]

_NO_END = 1 << 30


def as_data(result: Exploration, *, bug: str = "") -> dict[str, Any]:
    """An exploration as it is written: with the trace of what was found, as steps and as a test."""
    found = result.violation
    scenario = {key: value for key, value in asdict(result.scenario).items() if value != _default(key)}
    steps = () if found is None else found.steps
    breaches = () if found is None else found.breaches
    name = f"{result.scenario.policy}_{bug or 'violation'}".replace("-", "_")
    return {
        "policy": result.scenario.policy,
        "bug": bug,
        "pages": result.scenario.pages,
        "pageblock_order": PAGEBLOCK_ORDER,
        "scenario": scenario,
        "states": result.states,
        "transitions": result.transitions,
        "depth": result.depth,
        "levels": result.levels,
        "seconds": result.seconds,
        "why": result.why,
        "breaches": list(breaches),
        "trace": [step_text(step) for step in steps],
        "test": as_test(name, scenario, steps, breaches) if breaches else "",
    }


def _default(key: str) -> Any:
    return getattr(Scenario, key, None)  # a dataclass keeps the defaults of its fields


def explore_policies(
    policies: tuple[str, ...],
    overrides: dict[str, Any],
    *,
    seconds: float,
    depth: int | None = None,
    memory_bytes: int = 4 << 30,
    roots: tuple[str, ...] = ROOTS,
    quiet: bool = True,
) -> dict[str, Any]:
    """Explore each policy for so long. ``overrides``: settings of the scenario.

    Raises:
        UsageError: as ``Scenario.check``.
    """
    keep_views()
    found = []
    for policy in policies:
        scenario = scenario_of(policy, **overrides)
        result = explore(
            scenario,
            seconds=seconds,
            depth=depth or _NO_END,
            memory_bytes=memory_bytes,
            roots=roots,
            progress=None if quiet else _tell,
        )
        found.append(as_data(result))
    return {"explorations": found}


def _tell(result: Exploration) -> None:
    sys.stderr.write(
        f"{result.scenario.policy}: depth {result.depth}, {result.states} states, {result.transitions} steps checked, "
        f"{result.seconds:.0f} s\n"
    )


def explore_bugs(name: str, *, depth: int | None = None, quiet: bool = True) -> dict[str, Any]:
    """Plant a bug in this process and find it; ``all``: each in turn, in a process of its own.

    Raises:
        UsageError: as ``plant``.
    """
    if name != "all":
        bug = plant(name)
        keep_views()
        result = explore(
            scenario_of(bug.policy, **bug.scenario),
            depth=depth or _NO_END,
            roots=bug.roots,
            progress=None if quiet else _tell,
        )
        return {"explorations": [as_data(result, bug=name)]}
    return {"explorations": [_in_child(one, depth) for one in BUGS]}


def _in_child(name: str, depth: int | None) -> dict[str, Any]:
    """A fork has everything imported already, and takes its bug with it as it ends."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            _answer(write, name, depth)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.wait()
    answer: dict[str, Any] = json.loads(text or "{}")
    if "bug" not in answer:
        raise UsageError(answer.get("error", f"bug {name}: the process that was to find it failed"))
    return answer


def _answer(descriptor: int, name: str, depth: int | None) -> None:
    """What the child says: its exploration, or why there is none."""
    answer: dict[str, Any]
    try:
        answer = explore_bugs(name, depth=depth)["explorations"][0]
    except UsageError as error:
        answer = {"error": str(error)}
    with os.fdopen(descriptor, "w") as stream:
        json.dump(answer, stream)
