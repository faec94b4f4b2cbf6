"""Footprint against cost: every setting, the front, the knee, the kernel's default and the chosen one."""

from __future__ import annotations

from lab.advise.advise import Advice
from lab.advise.choose import front, knee
from lab.advise.grid import DEFAULT
from lab.report.style import bare, figure_bytes, look, new_figure

__all__ = ["picture"]


def picture(advice: Advice) -> bytes:
    """The picture as PNG."""
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    best, bend = front(advice.rows), knee(advice.rows)

    def share(seconds: float) -> float:
        return seconds / advice.span_s * 100

    policies = list(dict.fromkeys(row.setting.policy for row in advice.rows))
    for at, policy in enumerate(policies):
        rows = [row for row in advice.rows if row.setting.policy == policy]
        axes.scatter(
            [row.gib_min for row in rows],
            [share(row.cost_s()) for row in rows],
            s=22,
            marker="osD^v<>P"[at % 8],
            color=look(at, is_off=policy == "off")["color"],
            label=policy,
            zorder=3,
        )
    axes.plot(
        [row.gib_min for row in best],
        [share(row.cost_s()) for row in best],
        color="0.4",
        linewidth=1.0,
        label="front",
        zorder=2,
    )
    marked = [("default", advice.row(DEFAULT), 170, "0.2"), ("chosen", advice.choice.row, 300, "tab:red")]
    if bend is not None:
        marked.insert(0, ("knee", bend, 90, "tab:green"))
    for name, row, size, colour in marked:
        axes.scatter(
            [row.gib_min],
            [share(row.cost_s())],
            s=size,
            facecolors="none",
            edgecolors=colour,
            linewidths=1.6,
            label=f"{name}: {row.setting}",
            zorder=4,
        )
    axes.set_xlabel("footprint: memory that the host holds, GiB·min")
    axes.set_ylabel("cost: refaults and host, % of one processor")
    axes.set_ylim(bottom=0)
    axes.set_title("Policy, lowest order, delay, most blocks a report", fontsize=10)
    bare(axes, "both")
    axes.legend(fontsize=8, frameon=False, labelspacing=1.0)
    return figure_bytes(figure, "png")
