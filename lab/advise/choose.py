"""Which setting: the knee of footprint against cost, or what a budget or a target asks for. Knows no recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.advise.grid import DEFAULT, OFF
from lab.advise.measure import Drop, Row, worst_after
from lab.advise.wants import Target
from lab.experiment import pareto

__all__ = ["PRICES", "Choice", "Want", "choose", "front", "knee", "sensitivity", "without_rebuild"]

# Name, factor of what a refault costs, factor of what the host's work costs.
PRICES = (
    ("a refault costs double", 2.0, 1.0),
    ("a refault costs half", 0.5, 1.0),
    ("the host's work costs double", 1.0, 2.0),
    ("the host's work costs half", 1.0, 0.5),
)


@dataclass(frozen=True)
class Want:
    """What to choose by. Neither a budget nor a target: the knee.

    Attributes:
        budget: share of one processor. drops: the large frees that the target counts from.
    """

    span_s: float
    budget: float | None = None
    target: Target | None = None
    drops: tuple[Drop, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A setting, whether it does what was wanted, and in words by what rule it was found."""

    row: Row
    met: bool
    why: str


def _rank(row: Row) -> tuple[int, ...]:
    """Of equals the first is taken: no reporting, then what is nearest to the kernel's default."""
    return (int(row.setting.policy != OFF.policy), *row.setting.changes)


def front(rows: Sequence[Row], refault: float = 1.0, host: float = 1.0) -> list[Row]:
    """The rows that no other beats in footprint and cost, from the smallest footprint up.

    Of rows with the same figures one: no reporting if it is among them, else the nearest to the kernel's default.
    """
    points = [(row.gib_min, row.cost_s(refault, host)) for row in rows]
    best = [row for row, on_it in zip(rows, pareto.front(points, (-1, -1)), strict=True) if on_it]
    best.sort(key=lambda row: (row.gib_min, _rank(row)))
    return [row for at, row in enumerate(best) if not at or row.gib_min != best[at - 1].gib_min]


def knee(rows: Sequence[Row], refault: float = 1.0, host: float = 1.0) -> Row | None:
    """The row of the front that is farthest beyond the straight line between its ends; None if none is."""
    best = front(rows, refault, host)
    index = pareto.knee([(row.gib_min, row.cost_s(refault, host)) for row in best], (-1, -1))
    return None if index is None else best[index]


def choose(rows: Sequence[Row], want: Want, refault: float = 1.0, host: float = 1.0) -> Choice:
    """The setting to set, by budget or target if there is one, else the knee. ``rows`` hold off and the default."""
    reporting = [row for row in rows if row.setting.policy != "off"]

    def cost(row: Row) -> float:
        return row.cost_s(refault, host)

    if want.budget is not None or want.target is not None:
        return _wanted(reporting, want, refault, host)
    bend = knee(rows, refault, host)
    if bend is not None and bend.setting.policy != "off":
        return Choice(bend, met=True, why="the knee: beyond it each GiB·min less costs more than on the way to it")
    default = next(row for row in rows if row.setting == DEFAULT)
    if not default.reports:
        return _in_place_of_nothing(reporting, default, cost)
    within = [row for row in reporting if cost(row) <= cost(default)]
    least = min(within, key=lambda row: (row.gib_min, cost(row), _rank(row)))
    return Choice(least, met=True, why="there is no knee: the smallest footprint that costs no more than the default")


def _in_place_of_nothing(rows: Sequence[Row], default: Row, cost: Callable[[Row], float]) -> Choice:
    """There is no knee, and the default reports nothing here: what gives back at least half of what can be had."""
    most = max(default.gib_min - row.gib_min for row in rows)
    if most <= 0:
        return Choice(default, met=False, why="no setting gives anything back in this recording; this is the default")
    enough = [row for row in rows if default.gib_min - row.gib_min >= most / 2]
    least = min(enough, key=lambda row: (cost(row), row.gib_min, _rank(row)))
    return Choice(
        least,
        met=True,
        why="the default reports nothing here, and there is no knee: the cheapest that gives back at least half of "
        "what the most thorough setting does",
    )


def _wanted(rows: Sequence[Row], want: Want, refault: float, host: float) -> Choice:
    """By budget, by target, or by both: the target's cheapest then has to be within the budget."""

    def cost(row: Row) -> float:
        return row.cost_s(refault, host)

    within, words = list(rows), []
    if want.budget is not None:
        limit_s = want.budget * want.span_s
        within = [row for row in within if cost(row) <= limit_s]
        words.append(f"the budget of {want.budget:.3%} of a processor")
        if not within:
            least = min(rows, key=lambda row: (cost(row), row.gib_min, _rank(row)))
            return Choice(least, met=False, why=f"none is within {words[0]}; this is the cheapest")
    if want.target is None:
        least = min(within, key=lambda row: (row.gib_min, cost(row), _rank(row)))
        return Choice(least, met=True, why=f"the smallest footprint within {words[0]}")
    words.insert(0, f"the target of {want.target}")
    drops, target = list(want.drops), want.target
    worst = {row.setting: worst_after(row, drops, target) for row in within}
    fast = [row for row in within if worst[row.setting] <= target.size_bytes]
    both = " and ".join(words)
    if fast:
        least = min(fast, key=lambda row: (cost(row), row.gib_min, _rank(row)))
        return Choice(least, met=True, why=f"the cheapest that meets {both} after each large free")
    least = min(within, key=lambda row: (worst[row.setting], cost(row), _rank(row)))
    if not least.reports:
        return Choice(
            least, met=False, why=f"none meets {both}, nor comes nearer than no reporting; this reports nothing"
        )
    return Choice(least, met=False, why=f"none meets {both}; this comes nearest")


def sensitivity(rows: Sequence[Row], want: Want) -> list[tuple[str, Choice]]:
    """What would be chosen with each price doubled or halved."""
    return [(name, choose(rows, want, refault, host)) for name, refault, host in PRICES]


def without_rebuild(rows: Sequence[Row], want: Want) -> Choice:
    """What would be chosen of what a parameter can set in a mainline kernel: the order alone."""
    return choose([row for row in rows if row.setting == OFF or not any(row.setting.changes[:2])], want)
