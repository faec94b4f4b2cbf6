"""Bugs to be found: each changes the text of one module, in memory, in a process that runs kernels as Python.

They are what the contract is there to catch. Who adds a check adds a bug that it finds.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from common import native
from common.errors import UsageError

__all__ = ["BUGS", "Bug", "plant"]

_CYCLE = ("begin", "pull", "answer", "put_back", "end")


@dataclass(frozen=True)
class Bug:
    """A bug, where it is looked for, and what finds it.

    Attributes:
        text, wrong: what stands in the module once, and what stands there instead.
        breaks: identifiers of the contract, one of which is named when it is found.
        scenario: settings of ``scenario_of`` beside the policy: small, so that the search takes a second.
        roots: where the search begins.
    """

    name: str
    what: str
    module: str
    text: str
    wrong: str
    breaks: tuple[str, ...]
    policy: str = "boundary"
    scenario: dict[str, Any] = field(default_factory=dict)
    roots: tuple[str, ...] = ("fresh", "full")


def _steps(*names: str) -> dict[str, Any]:
    return {"steps": (*_CYCLE, *names)}


BUGS = {
    bug.name: bug
    for bug in (
        # The faults of v9.
        Bug(
            "isolate-boundary",
            "v9: the boundaries of ISOLATE are not set when a run begins",
            "guest.reporting.blocks",
            "        for migratetype in range(N_MIGRATETYPES):\n            ctl_of(zone)[W_BOUNDARY",
            "        for migratetype in range(N_MIGRATETYPES - 1):\n            ctl_of(zone)[W_BOUNDARY",
            ("D1", "B5"),
            scenario=_steps("isolate"),
        ),
        Bug(
            "lists-reordered",
            "v9: a pull relies on the shape of a list that compaction has turned",
            "guest.reporting.boundary",
            "    if ctl_of(zone)[W_ROTATED + order] >> migratetype & 1:\n        return walk",
            "    if False:\n        return walk",
            ("D2", "P1"),
            scenario={"pages": 24, "capacity": 1, "min_order": 3, **_steps("rotate")},
        ),
        Bug(
            "failed-flagged",
            "v9: the blocks of a report that failed are flagged",
            "guest.reporting.table",
            "<= ROTATE:\n        returned = blocks.put_back(zone, pfns, orders, count, reported,",
            "<= ROTATE:\n        returned = blocks.put_back(zone, pfns, orders, count, True,",
            ("S8",),
            scenario=_steps("withdraw"),
        ),
        Bug(
            "worker-spins",
            "v9: a run that has nothing more to pull goes on",
            "guest.reporting.boundary",
            "    clear_request(zone)\n    return count, SHORT",
            "    return count, MORE",
            ("P1",),
            scenario=_steps(),
        ),
        Bug(
            "request-kept",
            "v9: a run that failed leaves its request set, so that nobody can ask again",
            "guest.reporting.table",
            "\n        if abandon:\n            blocks.clear_request(zone)\n    elif policy == SCAN",
            "\n    elif policy == SCAN",
            ("B2",),
            scenario=_steps("withdraw", "rearm"),
        ),
        # What the boundary and the acknowledgement are for.
        Bug(
            "boundary-stays",
            "D3: the boundary does not move when its page is taken away",
            "guest.allocator.lists",
            "        ctl_of(zone)[word] = next_node(zone, pfn)",
            "        ctl_of(zone)[word] = pfn",
            ("D1",),
            scenario={"allocs_past": ("3M",), **_steps("alloc_past")},
            roots=("fresh",),
        ),
        Bug(
            "early-flag",
            "a block is flagged as it is pulled, before the acknowledgement",
            "guest.reporting.blocks",
            "    in_flight = IN_FLIGHT | order |",
            "    in_flight = IN_FLIGHT | REPORTED | order |",
            ("S2",),
            scenario=_steps(),
        ),
        Bug(
            "early-put-back",
            "the reporter puts its batch back before the host has acknowledged it",
            "lab.explore.reporter",
            "        hand[X_PHASE] = ENDING\n    return state",
            "        hand[X_PHASE] = ENDING\n"
            "    none = np.zeros(count, dtype=np.bool_)\n"
            "    locked_put_back(address, scenario[K_POLICY], pfns, orders, count, False, none, holds, scratch)\n"
            "    hand[X_PHASE], hand[X_MORE], hand[X_COUNT] = ENDING, 0, 0\n"
            "    return state",
            ("S5",),
            scenario={"capacity": 1, "steps": _CYCLE[:-1]},
            roots=("fresh",),
        ),
        # A counter a bug: three that are forgotten.
        Bug(
            "in-flight-uncounted",
            "blocks that leave flight are not counted down",
            "guest.reporting.blocks",
            "(PUT_BACK_INTERIOR)\n    ctl_of(zone)[W_IN_FLIGHT_BLOCKS] -= 1\n",
            "(PUT_BACK_INTERIOR)\n",
            ("S4",),
            scenario=_steps(),
        ),
        Bug(
            "reported-uncounted",
            "a Reported block that is taken away is not counted down",
            "guest.allocator.lists",
            "        ctl_of(zone)[W_REPORTED + order] -= 1\n    unlink(zone, pfn)\n",
            "    unlink(zone, pfn)\n",
            ("B1",),
            scenario={"allocs_past": ("3M",), **_steps("alloc_past")},
            roots=("fresh",),
        ),
        Bug(
            "isolated-uncounted",
            "what is freed into an isolated pageblock is counted as free",
            "guest.allocator.buddy",
            "    if migratetype == ISOLATE:\n        ctl_of(zone)[W_ISOLATED_PAGES] += pages",
            "    if migratetype == ISOLATE and pages < 0:\n        ctl_of(zone)[W_ISOLATED_PAGES] += pages",
            ("S4",),
            scenario=_steps("isolate"),
        ),
        # One for each promise that no bug above breaks.
        Bug(
            "isolated-pulled",
            "S9: a pull takes from ISOLATE lists",
            "guest.reporting.boundary",
            "            if migratetype == ISOLATE:\n                continue\n            pfn = find_unreported",
            "            pfn = find_unreported",
            ("S9", "S4"),
            scenario=_steps("isolate"),
        ),
        Bug(
            "put-back-notifies",
            "S15: a put-back asks for a run",
            "guest.allocator.buddy",
            "    if not fpi & FPI_SKIP_REPORT_NOTIFY:\n        notify_free",
            "    if True:\n        notify_free",
            ("S15",),
            "rotate",
            {"capacity": 1, **_steps()},
        ),
        Bug(
            "merge-flagged",
            "S7: a block that merged as it went back is flagged",
            "guest.reporting.blocks",
            "        if reported and active != INACTIVE and final_order == order:",
            "        if reported and active != INACTIVE:",
            ("S2", "B1"),
            scenario={"pages": 8, **_steps("free_past")},
        ),
        Bug(
            "mark-missed",
            "B3: a run is asked for one block too late",
            "guest.allocator.buddy",
            "[W_NR_FREE + order] >= ctl_of(zone)[W_REPORTED + order] + ",
            "[W_NR_FREE + order] > ctl_of(zone)[W_REPORTED + order] + ",
            ("P3",),
            scenario={"min_order": 3, "allocs_past": ("3M",), **_steps("alloc_past", "free_past")},
        ),
        Bug(
            "zero-claimed",
            "Z1: blocks that the host did not confirm are marked as zero",
            "guest.reporting.blocks",
            "        if zeroed[index]:\n            state",
            "        if True:\n            state",
            ("Z1",),
            scenario={"pages": 8, **_steps("withdraw", "free_past")},
        ),
        Bug(
            "post-outlives-its-device",
            "P2: a new device is woken for a request that nobody took",
            "guest.allocator.entry",
            "        unqueue_work(zone)  # a post",
            "        # a post",
            ("P2",),
            "hint",
            {"steps": ("command", "stop", "register")},
            ("fresh",),
        ),
        Bug(
            "gate-ignored",
            "M4: a pass begins below the low watermark",
            "guest.reporting.rotate",
            "        if not watermark_ok(zone, ctl_of(zone)[W_LOW_WATERMARK] + (capacity << lowest)):  # M4",
            "        if False:  # M4",
            ("M4",),
            "rotate",
            {"capacity": 1, "min_watermark": -20, "allocs_past": ("3M", "2M"), **_steps("alloc_past")},
        ),
    )
}


def plant(name: str) -> Bug:
    """Make this process one that has the bug. Every name that was imported from the module is the new one.

    Raises:
        UsageError: there is no such bug, its text is not there exactly once, or kernels are compiled here.
    """
    if name not in BUGS:
        raise UsageError(f"bug: {name!r}; allowed are {', '.join(BUGS)}")
    if native.JIT:
        raise UsageError("a bug is planted where kernels are plain Python; set NUMBA_DISABLE_JIT=1")
    bug = BUGS[name]
    module = importlib.import_module(bug.module)
    path = Path(str(module.__file__))
    source = path.read_text()
    if source.count(bug.text) != 1:
        raise UsageError(f"bug {name}: its text stands {source.count(bug.text)} times in {path.name}, not once")
    before = dict(vars(module))
    exec(compile(source.replace(bug.text, bug.wrong), str(path), "exec"), vars(module))  # noqa: S102  our own source
    changed = {
        id(old): vars(module)[key] for key, old in before.items() if callable(old) and vars(module)[key] is not old
    }
    ours = [found for key, found in sys.modules.items() if key.partition(".")[0] in {"common", "guest", "lab"}]
    for other in ours:
        if isinstance(other, ModuleType):
            for key, value in list(vars(other).items()):
                if id(value) in changed:
                    setattr(other, key, changed[id(value)])
    return bug
