"""The advice in words: Markdown that reads well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from common.geometry import PAGE_BYTES, PAGEBLOCK_ORDER
from common.units import format_size
from lab.advise.advise import Advice, doubts
from lab.advise.choose import PRICES, front, knee, sensitivity, without_rebuild
from lab.advise.grid import DEFAULT, MAINLINE, OFF, Setting
from lab.advise.measure import Row, worst_after

__all__ = ["how_to_set", "markdown"]

_PARAMETER = "page_reporting.page_reporting_order"
_SYSFS = "/sys/module/page_reporting/parameters/page_reporting_order"


def markdown(advice: Advice) -> str:
    """All of it."""
    chosen = advice.choice.row
    parts = [
        "# Settings for free page reporting",
        (
            f"{', '.join(advice.question.traces)}: {advice.span_s:.1f} s, {advice.moves} moves of pages, "
            f"{len(advice.rows)} settings replayed."
        ),
        "## The answer",
        f"**{chosen.setting}** (policy, lowest order, delay, most blocks a report): {advice.choice.why}.",
        "\n".join(f"* {line}" for line in how_to_set(chosen.setting, chosen)),
        _plain(advice),
        "## What it gives",
        _table(
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
        "## Footprint against cost",
        _table(_front(advice), advice.span_s),
        (
            "These are the settings that no other beats in both. Cost is the refaults' and the host's processor time. "
            "GiB·min is the memory that the host holds, over time."
        ),
        "## How sure this is",
        "\n".join(f"* {line}" for line in _sure(advice)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def how_to_set(setting: Setting, row: Row) -> list[str]:
    """What to do for a setting, a line each."""
    lines = _other_policy(setting) if setting.policy != MAINLINE else _mainline(setting)
    if setting.min_order < PAGEBLOCK_ORDER:
        lines.append(
            f"Below order {PAGEBLOCK_ORDER} the host gets back parts of its 2 MiB pages: each such part splits the "
            f"huge page that backs it (here {row.split_huge_pages} of them), which the host's khugepaged has to put "
            "together again; until then the guest's TLB misses cost more, which is not in these figures. Memory from "
            "hugetlbfs cannot be given back in such parts at all."
        )
    else:
        lines.append(
            f"From order {PAGEBLOCK_ORDER} on only whole 2 MiB pages go back: the host's huge pages stay whole."
        )
    return lines


def _other_policy(setting: Setting) -> list[str]:
    return [
        (
            f"The policy `{setting.policy}` is not in mainline, which has `{MAINLINE}`: it takes a kernel of your own "
            f"with that series. Order {setting.min_order}, delay {setting.delay_ns / 1e9:g} s and {setting.capacity} "
            "blocks a report are compile-time constants there, the order too."
        )
    ]


def _mainline(setting: Setting) -> list[str]:
    lines = []
    if setting.min_order == DEFAULT.min_order:
        lines.append(
            f"Order {setting.min_order} is the default with pages of 4 KiB: nothing to do where `cat {_SYSFS}` in the "
            f"guest says so (`{_PARAMETER}` on its kernel command line)."
        )
    else:
        lines.append(
            f"Order {setting.min_order}: `{_PARAMETER}={setting.min_order}` on the guest's kernel command line, or at "
            f"run time `echo {setting.min_order} > {_SYSFS}`. Linux 6.1 overwrites the former as the balloon's driver "
            "registers: read it back, and where it is 9 again, set it at run time after that."
        )
    changed = [
        f"PAGE_REPORTING_{name} from {before} to {now}"
        for name, before, now in (
            ("DELAY", "2 * HZ", _delay(setting.delay_ns)),
            ("CAPACITY", str(DEFAULT.capacity), str(setting.capacity)),
        )
        if now != before
    ]
    if changed:
        lines.append(
            "Delay and capacity are compile-time constants in mainline, with no parameter: change "
            f"{' and '.join(changed)} and rebuild the guest's kernel."
            + (
                " The host's reporting queue has to take that many blocks, too."
                if setting.capacity > DEFAULT.capacity
                else ""
            )
        )
    else:
        lines.append("Delay and capacity are those of mainline, where they are compile-time constants: nothing to do.")
    return lines


def _delay(delay_ns: int) -> str:
    """As the kernel's source would have it."""
    if delay_ns and delay_ns % 10**9 == 0:
        return f"{delay_ns // 10**9} * HZ"
    return f"msecs_to_jiffies({delay_ns // 10**6})" if delay_ns >= 10**6 else f"usecs_to_jiffies({delay_ns // 1000})"


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


def _table(rows: Sequence[tuple[str, Row]], span_s: float) -> str:
    """A table with the names in front."""
    names = (
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
    lines = [
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
    ]
    widths = [max(len(line[at]) for line in (names, *lines)) for at in range(len(names))]

    def told(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = [("-" * width) if not at else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join(told(cells) for cells in (names, rule, *lines))


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
        f"{found.gib_min:.4f} GiB·min at {found.cost_s() / advice.span_s:.3%}."
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
        found.append(
            f"{len(silent)} of {len(advice.rows) - 1} settings reported nothing, "
            f"{'the default among them' if any(row.setting == DEFAULT for row in silent) else 'the default not'}: "
            "`rotate` passes over a zone in which fewer than capacity << order pages are free beyond the low watermark."
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


def _sure(advice: Advice) -> list[str]:
    """Health, span and sensitivity, and what speaks against the advice."""
    health, prices = advice.health, advice.prices
    same = [name for name, other in sensitivity(advice.rows, advice.want) if other.row is advice.choice.row]
    found = doubts(advice)
    grade = "Nothing speaks against it" if not found else "One doubt" if len(found) == 1 else f"{len(found)} doubts"
    known = health.get("known_share", {}).get("at_the_event")
    return [
        f"{grade}{':' if found else '.'}",
        *[f"{text[0].upper()}{text[1:]}." for text in found],
        f"Trace health: {health.get('verdict', 'not told')}, {health.get('lost_events', 0)} events lost"
        + ("" if known is None else f", {known:.1%} of the page events met a page whose state was known")
        + f". Span: {advice.span_s:.1f} s.",
        f"The choice is the same in {len(same)} of {len(PRICES)} cases in which a price is doubled or halved.",
        (
            f"Prices, as measured in an emulated guest: {prices.report_ns / 1e3:g} µs a report, "
            f"{prices.range_ns / 1e3:g} µs a block, {prices.page_ns / 1e3:g} µs a page of {PAGE_BYTES >> 10} KiB that "
            f"the host holds, {prices.refault_ns / 1e3:g} µs a refault. Yours differ: that is what the "
            "cases above are for."
        ),
    ]
