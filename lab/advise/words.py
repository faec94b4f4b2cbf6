"""The advice in words: sections of text, lists and tables, which Markdown and the page share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.geometry import PAGE_BYTES
from common.units import format_size
from lab.advise.advise import Advice, doubts
from lab.advise.choose import PRICES, front, knee, sensitivity, without_rebuild
from lab.advise.grid import DEFAULT, OFF
from lab.advise.halves import Half
from lab.advise.measure import Row, worst_after
from lab.advise.steps import how_to_set, how_to_set_order
from lab.report.tables import TableData

__all__ = ["FRONT", "GIVES", "TITLE", "Part", "Section", "lead", "sections", "table"]

TITLE = "Settings for free page reporting"
GIVES, FRONT = "What it gives", "Footprint against cost"  # the sections that pictures belong to

Part = str | tuple[str, ...] | TableData  # a paragraph, a list, a table


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. Text has `code` and **strong** as Markdown has them, and no other markup."""

    title: str
    parts: tuple[Part, ...]


def lead(advice: Advice) -> str:
    """What was replayed, in one sentence."""
    return (
        f"{', '.join(advice.question.traces)}: {advice.span_s:.1f} s, {advice.moves} moves of pages, "
        f"{len(advice.rows)} settings replayed."
    )


def sections(advice: Advice) -> list[Section]:
    """All of it."""
    chosen = advice.choice.row
    parts: list[tuple[str, list[Part]]] = [
        (
            "The answer",
            [
                f"**{chosen.setting}** (policy, lowest order, delay, most blocks a report): {advice.choice.why}.",
                tuple(how_to_set(chosen.setting, chosen)),
                _plain(advice),
            ],
        ),
        (
            GIVES,
            [
                table(
                    [
                        ("no reporting", advice.row(OFF)),
                        ("the kernel's default", advice.row(DEFAULT)),
                        ("chosen", chosen),
                    ],
                    advice.span_s,
                ),
                _against_default(advice),
                _notes(advice),
                *_target(advice),
            ],
        ),
        (
            FRONT,
            [
                table(_front(advice), advice.span_s),
                (
                    "These are the settings that no other beats in both. Cost is the refaults' and the host's "
                    "processor time. GiB·min is the memory that the host holds, over time."
                ),
            ],
        ),
        ("How sure this is", _sure(advice)),
    ]
    return [Section(title, tuple(part for part in found if part)) for title, found in parts]


def table(rows: Sequence[tuple[str, Row]], span_s: float) -> TableData:
    """Figures of settings, with their names in front."""
    headers = (
        "setting",
        "GiB·min",
        "held at the end",
        "reported",
        "reports",
        "refaults",
        "refault s",
        "host CPU s",
        "cost",
    )
    lines = tuple(
        (
            name,
            f"{row.gib_min:.4f}",
            format_size(row.end_bytes),
            format_size(row.reported_bytes),
            str(row.reports),
            str(row.refaults),
            f"{row.refault_s:.4f}",
            f"{row.host_cpu_s:.4f}",
            f"{row.cost_s() / span_s:.3%}",
        )
        for name, row in rows
    )
    return TableData("", headers, lines, tuple(("",) * len(headers) for _ in lines))


def _front(advice: Advice) -> list[tuple[str, Row]]:
    bend = knee(advice.rows)
    found = []
    for row in front(advice.rows):
        marks = [
            mark
            for mark, is_it in (
                ("knee", row is bend),
                ("default", row.setting == DEFAULT),
                ("chosen", row.setting == advice.choice.row.setting),
            )
            if is_it
        ]
        found.append((f"{row.setting} ({', '.join(marks)})" if marks else str(row.setting), row))
    return found


def _against_default(advice: Advice) -> str:
    """The difference that setting it makes."""
    chosen, default = advice.choice.row, advice.row(DEFAULT)
    if chosen.setting == DEFAULT:
        return "The chosen setting is the kernel's default."
    footprint = (chosen.gib_min - default.gib_min) / default.gib_min if default.gib_min else 0.0
    cost = (chosen.cost_s() - default.cost_s()) / advice.span_s * 100
    return (
        f"Against the default: {footprint:+.1%} GiB·min for {cost:+.3f} percentage points of a processor, "
        f"{chosen.reports - default.reports:+d} reports; at the end the host holds "
        f"{format_size(chosen.end_bytes)} in place of {format_size(default.end_bytes)}."
    )


def _plain(advice: Advice) -> str:
    """What to take where the kernel stays as it is."""
    plain, chosen = without_rebuild(advice.rows, advice.want), advice.choice.row
    if plain.row is chosen:
        return ""
    found = plain.row
    return (
        f"With the kernel as it is, by the parameter alone: **order {found.setting.min_order}** ({plain.why}), "
        f"{found.gib_min:.4f} GiB·min at {found.cost_s() / advice.span_s:.3%}. "
        f"{how_to_set_order(found.setting.min_order)}"
    )


def _notes(advice: Advice) -> str:
    """What would surprise in the table."""
    found = [
        (
            f"At the end the guest itself uses {format_size(advice.used_end_bytes)}; what the host holds beyond that "
            "is free memory left behind."
        )
    ]
    refaults = advice.row(OFF).refaults
    if refaults:
        found.append(f"{refaults} refaults are of pages that had been given back before the recording: all have them.")
    silent = [row for row in advice.rows if row.setting.policy != "off" and not row.passes]
    if silent:
        gated = sum(row.setting.policy == DEFAULT.policy for row in silent)
        reasons = [
            f"{gated} of `{DEFAULT.policy}`, which passes over a zone in which fewer than capacity << order pages are "
            "free beyond the low watermark" if gated else "",
            f"{len(silent) - gated} of other policies, for which too few blocks of the order, or of one above, were "
            "free at a time" if len(silent) > gated else "",
        ]  # fmt: skip
        found.append(
            f"{len(silent)} of {len(advice.rows) - 1} settings reported nothing, "
            f"{'the default among them' if any(row.setting == DEFAULT for row in silent) else 'the default not'}: "
            f"{' and '.join(reason for reason in reasons if reason)}."
        )
    return " ".join(found)


def _target(advice: Advice) -> list[str]:
    target = advice.question.target
    if target is None:
        return []
    drops = list(advice.want.drops)
    chosen, default = (format_size(worst_after(row, drops, target)) for row in (advice.choice.row, advice.row(DEFAULT)))
    lines = [
        (
            f"Large frees (at least half of the largest fall of memory in use within a second): {len(drops)}. "
            f"{target.within_ns / 1e9:g} s after each the host is down to {chosen} or less under the chosen setting, "
            f"to {default} under the default."
        )
    ]
    above = [drop for drop in drops if drop.used_bytes > target.size_bytes]
    if above:
        lines.append(
            f"After {len(above)} of them the guest itself still uses up to "
            f"{format_size(max(drop.used_bytes for drop in above))}: no setting can go below that."
        )
    return [" ".join(lines)]


def _sure(advice: Advice) -> list[Part]:
    """Health, span and sensitivity, and what speaks against the advice."""
    health, prices = advice.health, advice.prices
    same = [name for name, other in sensitivity(advice.rows, advice.want) if other.row is advice.choice.row]
    found = doubts(advice)
    grade = "Nothing speaks against it" if not found else "One doubt" if len(found) == 1 else f"{len(found)} doubts"
    known = health.get("known_share", {}).get("at_the_event")
    facts = (
        f"Trace health: {health.get('verdict', 'not told')}, {health.get('lost_events', 0)} events lost"
        + ("" if known is None else f", {known:.1%} of the page events met a page whose state was known")
        + f". Span: {advice.span_s:.1f} s.",
        f"The choice is the same in {len(same)} of {len(PRICES)} cases in which a price is doubled or halved.",
        " ".join(_half(advice, half) for half in advice.halves),
        (
            f"Prices, as measured in an emulated guest: {prices.report_ns / 1e3:g} µs a report, "
            f"{prices.range_ns / 1e3:g} µs a block, {prices.page_ns / 1e3:g} µs a page of {PAGE_BYTES >> 10} KiB that "
            f"the host holds, {prices.refault_ns / 1e3:g} µs a refault. Yours differ: that is what the "
            "cases above are for."
        ),
    )
    return [f"{grade}{':' if found else '.'}", tuple(f"{text[0].upper()}{text[1:]}." for text in found), facts]


def _half(advice: Advice, half: Half) -> str:
    """What one half of the recording would have led to, and what the choice costs there against that."""
    chosen = advice.choice.row.setting
    if half.choice is None:
        return f"By the {half.name} half of the trace nothing can be chosen: {half.why_not}."
    other = half.choice.row
    if other.setting == chosen:
        return f"By the {half.name} half of the trace alone the choice is the same."
    ours = next(row for row in half.rows if row.setting == chosen)
    more = (ours.gib_min - other.gib_min) / other.gib_min if other.gib_min else 0.0
    cost = (ours.cost_s() - other.cost_s()) / (advice.span_s / 2) * 100
    return (
        f"By the {half.name} half alone it would be {other.setting}; against that the choice has {more:+.1%} GiB·min "
        f"for {cost:+.3f} percentage points of a processor there."
    )
