"""Pictures: what is drawn where, fronts and knees, and nothing that overlaps or changes from one time to the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from lab.experiment.comparison import Sample, compare_results
from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.report.front import fronts
from lab.report.plots import footprint_figure, latency_figure, pareto_figure, returned_figure
from lab.report.style import figure_bytes, look, looks
from tests.lab.experiments import GIB, made_result, toy

POLICIES = ("boundary", "rotate", "hint", "off")
KINDS = ("footprint", "returned", "latency", "pareto")
LONG = "boundary:delay=250ms:capacity=512:high-water-mark=64:shuffle=true $x_1$ {}\\"


def toy_samples(
    repeat: int = 3, policies: Sequence[str] = POLICIES, workloads: Sequence[str] = ("memhog", "churn")
) -> list[Sample]:
    specs = [
        RunSpec(policy=policy, workload=workload, seed=seed)
        for workload in workloads
        for policy in policies
        for seed in range(repeat)
    ]
    results = [RunResult.from_dict(toy({"spec": spec.as_dict()})) for spec in specs]
    return [Sample(result.spec.name, result, result.spec.seed) for result in results]


def point(policy: str, gib_min: float, speed: float, order: int = 9, *, job: bool = False) -> RunResult:
    spec = RunSpec(policy=policy, min_order=order, work_pages=1000 if job else 0, delay_ns=round(1e9 * gib_min))
    if job:
        return made_result(spec, gib_min=gib_min, job_s=speed, page_ops_per_s=1.0)
    return made_result(spec, gib_min=gib_min, page_ops_per_s=speed)


def texts_overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of one figure whose boxes share some area."""
    figure.canvas.draw()
    texts: list[Text | Legend] = [*figure.legends]
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        texts += [child for child in axes.get_children() if isinstance(child, Text)]  # titles
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            inside = (tick for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits))
            texts += [tick.label1 for tick in inside]
    boxes = {
        id(text): (str(text), text.get_window_extent().padded(-1.0))
        for text in texts
        if isinstance(text, Legend) or text.get_text().strip()
    }
    return [(one[0], other[0]) for one, other in itertools.combinations(boxes.values(), 2) if one[1].overlaps(other[1])]


def line_of(axes: Axes, colour: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in axes.get_lines() if line.get_color() == colour]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_footprint_is_the_median_of_the_runs_and_a_band_over_them() -> None:
    results = []
    for seed, gib in enumerate((1.0, 2.0, 9.0)):
        result = made_result(RunSpec(seed=seed))
        result.series["resident_bytes"][:] = gib * GIB
        results.append(Sample("boundary", result, seed))
    figure = footprint_figure(results, title="t")
    (axes,) = figure.axes
    times, resident = line_of(axes, look(0)["color"])
    assert times[0] == 0.0
    assert times[-1] == 10.0
    assert set(resident) == {2.0}
    (band,) = axes.collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 9.0)
    assert axes.get_ylabel() == "resident [GiB]"
    assert axes.get_xlabel().endswith("[s]")


def test_a_run_that_ends_earlier_does_not_move_the_median_by_leaving_it() -> None:
    short, long = (
        made_result(RunSpec(duration_ns=2_000_000_000)),
        made_result(RunSpec(duration_ns=4_000_000_000, seed=2)),
    )
    short.series["resident_bytes"][:] = 1 * GIB
    long.series["resident_bytes"][:] = 3 * GIB
    figure = footprint_figure([Sample("x", short, 0), Sample("x", long, 1)], title="t")
    times, resident = line_of(figure.axes[0], look(0)["color"])
    assert times[-1] == 2.0
    assert set(resident) == {2.0}


def test_a_panel_a_workload_and_a_line_a_policy() -> None:
    figure = footprint_figure(toy_samples(), title="t")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["memhog", "churn"]
    assert all(len(axes.get_lines()) == 4 for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(POLICIES)


def test_front_has_what_nothing_beats() -> None:
    given = [
        point("boundary", 1, 10),
        point("rotate", 2, 20),
        point("hint", 2, 15),
        point("off", 3, 20),
        point("off", 4, 30),
    ]
    (front,) = fronts(given)
    assert [(one.spec.policy, one.x, one.y) for one in front.best] == [
        ("boundary", 1.0, 10.0), ("rotate", 2.0, 20.0), ("off", 4.0, 30.0),
    ]  # fmt: skip
    assert front.knee is not None
    assert front.knee.spec.policy == "rotate", "(2, 20) is above the line from (1, 10) to (4, 30)"


def test_the_front_of_jobs_is_lower_left() -> None:
    given = [point("boundary", 1, 50, job=True), point("rotate", 2, 41, job=True), point("off", 3, 40, job=True),
             point("hint", 3, 50, job=True)]  # fmt: skip
    (front,) = fronts(given)
    assert front.is_job
    assert [one.spec.policy for one in front.best] == ["boundary", "rotate", "off"]
    assert front.knee is not None
    assert front.knee.spec.policy == "rotate"
    (axes,) = pareto_figure(given, title="t").axes
    assert "less is better" in axes.get_ylabel()
    assert "[s]" in axes.get_ylabel()


@pytest.mark.parametrize(
    "given",
    [
        [("boundary", 1, 10), ("off", 4, 30)],
        [("boundary", 1, 10), ("rotate", 3, 11), ("off", 4, 30)],
        [("boundary", 1, 10), ("rotate", 2, 20), ("off", 3, 30)],
    ],
)
def test_two_points_or_a_hollow_front_have_no_knee(given: list[tuple[str, float, float]]) -> None:
    (front,) = fronts([point(*one) for one in given])
    assert len(front.best) == len(given)
    assert front.knee is None


def test_a_point_is_the_median_over_seeds() -> None:
    given = [made_result(RunSpec(seed=seed), gib_min=gib, page_ops_per_s=5.0) for seed, gib in enumerate((1, 2, 9))]
    (front,) = fronts(given)
    assert [(one.x, one.footprint.n) for one in front.points] == [(2.0, 3)]


def test_runs_without_both_figures_are_left_out() -> None:
    (front,) = fronts([made_result(RunSpec(), gib_min=None)])
    assert front.points == front.best == ()
    assert pareto_figure([], title="t").axes == []


def test_pareto_says_which_way_is_better_and_tells_its_front() -> None:
    given = [point("boundary", 1, 10, 0), point("rotate", 2, 20), point("hint", 2, 15), point("off", 4, 30)]
    figure = pareto_figure(given, title="t")
    (axes,) = figure.axes
    assert "more is better" in axes.get_ylabel()
    assert "less is better: footprint [GiB·min]" in axes.get_xlabel()
    assert "1  boundary: 1 GiB·min, 10 operations/s" in axes.get_xlabel()
    assert "2  rotate: 2 GiB·min, 20 operations/s  (knee, ringed)" in axes.get_xlabel()
    assert "hint" not in axes.get_xlabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["boundary", "rotate", "hint", "off", "order 0", "order 9"]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    (ring,) = [line for line in axes.get_lines() if line.get_fillstyle() == "none"]
    assert np.asarray(ring.get_xydata()).tolist() == [[2.0, 20.0]]


def test_orders_differ_by_shape_and_policies_by_colour() -> None:
    figure = pareto_figure([point("boundary", 1, 10, order) for order in range(11)], title="t")
    markers = [line.get_marker() for line in figure.legends[0].get_lines()]
    assert len(set(markers)) == 11
    names = [(f"policy {index}", False) for index in range(11)]
    assert len({(style["color"], str(style["linestyle"])) for style in looks(names).values()}) == 11


def rows_of(samples: list[Sample]) -> list:  # type: ignore[type-arg]
    return list(compare_results(samples, first="boundary", base="off").rows)


def test_bars_are_medians_and_off_is_not_reached() -> None:
    samples = toy_samples(workloads=("memhog",))
    rows = rows_of(samples)
    (axes,) = returned_figure(rows, title="t").axes
    heights = [round(patch.get_height(), 9) for patch in axes.patches]  # type: ignore[attr-defined]
    expected = [round(row.figures[name].summary.median, 9) for row in rows[:3] for name in ("t50_s", "t90_s", "t99_s")]
    assert heights == expected
    assert [text.get_text() for text in axes.texts] == ["not reached"] * 3
    assert axes.get_ylabel().endswith("[s]")


def test_latencies_are_on_a_log_axis_with_units() -> None:
    rows = rows_of(toy_samples(workloads=("memhog",)))
    left, right = latency_figure(rows, title="t").axes
    assert left.get_xscale() == right.get_xscale() == "log"
    assert [label.get_text() for label in left.get_yticklabels()] == ["boundary", "rotate", "hint"], "off holds no lock"
    points = {float(line.get_xdata()[0]) for line in left.get_lines() if line.get_marker() == "^"}  # type: ignore[index,arg-type]
    assert points == {row.figures["hold_max_ns"].summary.median for row in rows[:3]}
    left.figure.canvas.draw()
    assert "1 µs" in [label.get_text() for label in left.get_xticklabels()]


def test_nothing_measured_is_said() -> None:
    rows = rows_of(toy_samples(policies=("off",), workloads=("memhog",)))
    for axes in latency_figure(rows, title="t").axes:
        assert [text.get_text() for text in axes.texts] == ["nothing was measured"]
    (axes,) = returned_figure(rows, title="t").axes
    assert len(axes.texts) == 3


def draw(kind: str, label: str = "") -> Figure:
    """A picture of the toy; ``label`` instead of the first policy's name."""
    samples = toy_samples()
    for index, one in enumerate(samples):
        if label and one.name == "boundary":
            result = RunResult(one.result.spec.but(label=label), one.result.metrics, one.result.series)
            samples[index] = Sample(label, result, one.repeat)
    if kind == "footprint":
        return footprint_figure(samples, title="t")
    if kind == "pareto":
        return pareto_figure([one.result for one in samples], title="t")
    return {"returned": returned_figure, "latency": latency_figure}[kind](rows_of(samples), title="t")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["", LONG])
def test_labels_do_not_overlap(kind: str, label: str) -> None:
    assert texts_overlap(draw(kind, label)) == []


def test_overlapping_labels_would_be_found() -> None:
    figure = draw("returned")
    figure.axes[0].annotate("somewhere else", (0, 0))
    figure.axes[0].annotate("in the way", (0, 0))
    assert texts_overlap(figure)


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_the_same_each_time(kind: str) -> None:
    svg = figure_bytes(draw(kind, LONG), "svg")
    assert svg == figure_bytes(draw(kind, LONG), "svg")
    assert b"<dc:date>" not in svg
    assert b"<script" not in svg
