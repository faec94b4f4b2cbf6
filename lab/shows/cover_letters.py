"""The table of the cover letters, v12 to v17, in our terms: what does reporting cost a guest that only faults?

will-it-scale's page_fault1 (huge pages) and page_fault2 (4 KiB) are our page-fault at orders 9 and 0. Rows are theirs:
reporting off; on with discards disabled ("MADV disabled"); on; on with shuffled free lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.shows.base import Context, Presentation, Table, ratio_text, summary

__all__ = ["CoverLetters"]

# will-it-scale, pages a second: baseline, then the rows.
# Columns: page_fault1 with 1 task, page_fault2 with 1, page_fault1 with 16, page_fault2 with 16.
_ROWS = ("off", "on, discards disabled", "on", "on + shuffle")
_LETTERS: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "v12": {
        "baseline": (1256106.33, 482202.67, 8864441.67, 3734692.00),
        "off": (1257096.00, 477436.00, 8864677.33, 3800037.00),
        "on, discards disabled": (1258420.00, 480080.00, 8753840.00, 3782764.00),
        "on": (1267916.33, 472075.67, 8287050.33, 3774500.33),
    },
    "v13": {
        "baseline": (1209281.00, 411314.00, 8804587.33, 3419453.00),
        "off": (1209369.67, 412187.00, 8812606.33, 3435339.33),
        "on, discards disabled": (1209104.67, 413067.67, 8835481.67, 3463485.67),
        "on": (1210367.67, 416962.00, 8433236.00, 3437897.67),
    },
    "v14": {
        "baseline": (1203934.75, 379940.75, 8828217.00, 3178653.00),
        "off": (1207961.25, 380852.25, 8862373.00, 3246397.25),
        "on, discards disabled": (1207758.75, 373079.25, 8870373.75, 3204989.75),
        "on": (1261183.75, 373201.50, 8371359.75, 3233665.50),
        "on + shuffle": (1090201.50, 376967.25, 8108719.75, 3218450.25),
    },
    "v15": {
        "baseline": (1208307.25, 408596.00, 8865204.75, 3344169.00),
        "off": (1206809.00, 412558.25, 8814350.50, 3420102.00),
        "on": (1201386.25, 407903.75, 8880178.00, 3396700.50),
        "on + shuffle": (1173529.00, 409006.50, 8384540.25, 3288289.25),
    },
    "v16 = v17": {
        "baseline": (1012402.50, 361855.25, 8827457.25, 3282347.00),
        "off": (1007897.00, 361887.00, 8784741.75, 3240669.25),
        "on": (1010227.50, 359749.25, 8756219.00, 3226608.75),
        "on + shuffle": (1050982.00, 357966.25, 8672601.25, 3223177.75),
    },
}
_CASES = tuple((order, vcpus) for vcpus in (1, 2) for order in (9, 0))
_POLICIES = ("boundary", "rotate")


class CoverLetters:
    """See the module."""

    name = "cover-letters"
    title = "The table of the cover letters"
    question = "What does reporting cost a guest that does nothing but fault, and which part of it is the discard?"
    live = True
    rounds = 3

    def answer(self, context: Context) -> Presentation:
        """Live runs, interleaved: every row of every column once a round."""
        specs = [
            spec.but(seed=number + 1) for number in range(context.rounds) for case in _CASES for spec in _case(*case)
        ]
        return _present(context.run(specs))


def _case(order: int, vcpus: int) -> list[RunSpec]:
    base = RunSpec(
        mode="live",
        workload="page-fault",
        work_order=order,
        vcpus=vcpus,
        duration_ns=4_000_000_000,
        memory=512 << 20,
        policy="off",
        label="off",
    )
    rows = [base]
    for policy in _POLICIES:
        on = base.but(policy=policy)
        rows += [
            on.but(inhibit_discard=True, label=f"{policy}: on, discards disabled"),
            on.but(label=f"{policy}: on"),
            on.but(shuffle=True, label=f"{policy}: on + shuffle"),
        ]
    return rows


def _column(spec: RunSpec) -> str:
    return f"order {spec.work_order}, {spec.vcpus} vCPU{'s' if spec.vcpus > 1 else ''}"


def _ratios(results: Sequence[RunResult]) -> dict[str, dict[str, list[float]]]:
    """Throughput against off in the same round, by row and column."""
    rates: dict[tuple[str, str, int], float] = {}
    for result in results:
        rate = result.metrics["page_ops_per_s"]
        if rate:
            rates[result.spec.name, _column(result.spec), result.spec.seed] = rate
    ratios: dict[str, dict[str, list[float]]] = {}
    for (row, column, seed), rate in rates.items():
        off = rates.get(("off", column, seed))
        if off:
            ratios.setdefault(row, {}).setdefault(column, []).append(rate / off)
    return ratios


def _present(results: Sequence[RunResult]) -> Presentation:
    ratios = _ratios(results)
    columns = list(dict.fromkeys(_column(result.spec) for result in results))
    ours = Table(
        "Ours: page operations a second against reporting off, median of the rounds ± half the quartiles' distance",
        ("", *columns),
        tuple((row, *(ratio_text(ratios[row].get(column, [])) for column in columns)) for row in ratios),
    )
    letters = Table(
        "The letters: will-it-scale against their baseline, 16 vCPU guest",
        ("", "page_fault1, 1 task", "page_fault2, 1 task", "page_fault1, 16 tasks", "page_fault2, 16 tasks"),
        tuple(
            (
                f"{version}: {row}",
                *(f"{value / base:.3f}" for value, base in zip(rates[row], rates["baseline"], strict=True)),
            )
            for version, rates in _LETTERS.items()
            for row in _ROWS
            if row in rates
        ),
        "Theirs are nested faults of a virtual machine with host huge pages; ours are faults of one process on 4 KiB "
        "pages of shared memory. What compares is the order of the rows, and which of them carries the cost.",
    )
    return Presentation(_finding(ratios, columns), (ours, letters), _figure(ratios, columns), {"ratios": ratios})


def _finding(ratios: dict[str, dict[str, list[float]]], columns: Sequence[str]) -> tuple[str, ...]:
    sentences = []
    for policy in _POLICIES:
        worst = {
            row: min((summary(ratios[f"{policy}: {row}"].get(column, [])) or (1.0, 0.0))[0] for column in columns)
            for row in _ROWS[1:]
            if f"{policy}: {row}" in ratios
        }
        texts = [f"{row} {1 - value:.1%}" for row, value in worst.items()]
        sentences.append(f"{policy}, largest loss over the columns: {'; '.join(texts)}.")
    return tuple(sentences)


def _figure(ratios: dict[str, dict[str, list[float]]], columns: Sequence[str]) -> Figure:
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(_POLICIES), sharey=True)
    colours = ("#0072B2", "#D55E00", "#009E73")
    for panel, policy in zip(axes, _POLICIES, strict=True):
        for index, row in enumerate(_ROWS[1:]):
            found = [summary(ratios.get(f"{policy}: {row}", {}).get(column, [])) or (np.nan, 0.0) for column in columns]
            places = np.arange(len(columns)) + (index - 1) * 0.26
            heights, errors = zip(*found, strict=True)
            panel.bar(places, heights, 0.24, yerr=errors, color=colours[index], label=row, capsize=2)
        panel.axhline(1.0, color="#444444", linewidth=0.8)
        panel.set_xticks(np.arange(len(columns)), [column.replace(", ", "\n") for column in columns])
        panel.set_title(policy)
        panel.set_ylim(0, 1.4)
    axes[0].set_ylabel("throughput against reporting off")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure
