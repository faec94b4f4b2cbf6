"""Tables of a comparison: numbers as people read them, on a terminal and in a pipe."""

from __future__ import annotations

import io
import re

import pytest

from lab.experiment.comparison import COMPARED, TESTED, Comparison, Figure, Sample, compare_results
from lab.experiment.metrics import METRICS, RunResult
from lab.experiment.spec import Mode, RunSpec
from lab.experiment.statistics import Summary, summarize
from lab.experiment.table import figure_text, mark, number, p_text, plus_minus, print_comparison, row_scale, row_title
from tests.lab.experiments import made_result, toy


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def toy_comparison(
    policies: tuple[str, ...] = ("boundary", "rotate", "hint", "off"),
    modes: tuple[Mode, ...] = ("live",),
    repeat: int = 5,
) -> Comparison:
    specs = [
        RunSpec(mode=mode, policy=policy, seed=seed) for mode in modes for policy in policies for seed in range(repeat)
    ]
    results = [RunResult.from_dict(toy({"spec": spec.as_dict()})) for spec in specs]
    given = [Sample(result.spec.name, result, result.spec.seed) for result in results]
    return compare_results(given, first=policies[0], base="off")


def printed(comparison: Comparison, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    print_comparison(comparison, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567.0, "1,234,567"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.0, "1"),
        (0.01234, "0.0123"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("median", "spread", "text"),
    [
        (97.04, 0.62, "97.0 ± 0.6"),
        (0.04551, 0.00007, "0.0455 ± 0.0001"),
        (1.0, 0.002, "1.00 ± 0.00"),
        (32.0, 0.0, "32 ± 0"),
        (121563.0, 183.4, "121,563 ± 183"),
        (2.5, None, "2.5 ± ?"),
        (0.0, 0.5, "0 ± 0.5"),
    ],
)
def test_a_spread_has_the_decimals_of_its_median(median: float, spread: float | None, text: str) -> None:
    assert plus_minus(median, spread) == text


@pytest.mark.parametrize(
    ("name", "medians", "scale"),
    [
        ("hold_p99_ns", [900.0, 1100.0], ("µs", 1e3)),
        ("hold_p99_ns", [900.0, None], ("ns", 1.0)),
        ("hold_max_ns", [3e9], ("s", 1e9)),
        ("t90_s", [0.6, 2.0], ("s", 1.0)),
        ("t90_s", [0.6], ("ms", 1e-3)),
        ("stayed_bytes", [5.0 * (1 << 30)], ("GiB", float(1 << 30))),
        ("refaults", [5.0], ("pages", 1.0)),
        ("reports", [None], ("", 1.0)),
        ("hold_max_ns", [None, 0.0], ("ns", 1.0)),
    ],
)
def test_a_row_has_one_unit(name: str, medians: list[float | None], scale: tuple[str, float]) -> None:
    assert row_scale(METRICS[name], medians) == scale


def test_what_was_not_reached_is_said() -> None:
    metric, scale = METRICS["t90_s"], ("s", 1.0)
    texts = [
        figure_text(Figure(summarize(values, censored=True), None), metric, scale)
        for values in ([1.0, 2.0, 3.0], [None, None], [1.0, None, None], [1.0, 1.5, None])
    ]
    assert texts == ["2.00 ± 0.50", "not in 2 runs", "not in most", "1.5 ± ? (2 of 3)"]
    assert figure_text(Figure(summarize([None]), None), METRICS["hold_p50_ns"], ("ns", 1.0)) == "-"


def test_marks_tell_which_way() -> None:
    def figure(median: float | None, p: float | None = 0.01) -> Figure:
        return Figure(Summary(median, 0.0, (median,)), p)

    less, more = METRICS["gib_min"], METRICS["stayed_bytes"]
    assert mark(figure(1.0), figure(2.0), less) == "+"
    assert mark(figure(3.0), figure(2.0), less) == "-"
    assert mark(figure(3.0), figure(2.0), more) == "+"
    assert mark(figure(1.0, p=0.05), figure(2.0), less) == ""
    assert mark(figure(1.0, p=None), figure(2.0), less) == ""
    assert mark(figure(None), figure(2.0), METRICS["t90_s"]) == "-", "never is later"
    assert mark(figure(1.0), figure(2.0), METRICS["first_touches"]) == "~"
    assert (p_text(0.0005), p_text(0.00794), p_text(1.0)) == ("p < 0.001", "p 0.0079", "p 1")


def test_a_pipe_gets_plain_columns_with_every_row_of_the_list() -> None:
    comparison = toy_comparison()
    text = printed(comparison)
    assert "\x1b" not in text
    assert not re.search("[─│┃━]", text)
    lines = {line.split("  ")[0].rpartition(" [")[0] or line.split("  ")[0]: line for line in text.splitlines()}
    for name in TESTED:
        assert COMPARED[name].title in lines, name
    footprints = [row.figures["gib_min"].summary for row in comparison.rows]
    for summary in footprints:
        assert summary.median is not None
        assert plus_minus(summary.median, summary.spread) in lines["footprint"]
    assert lines["footprint"].count("(p 0.0079") == 3
    assert f"{comparison.tests} tests were made" in text


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_a_table_as_wide_as_it_is(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(toy_comparison(), Terminal()))
    assert "─" in text
    assert max(len(line) for line in text.splitlines()) <= columns
    assert "p 0.0079" in text
    assert "not in 5 runs" in " ".join(text.split())


def test_both_modes_and_their_distance_are_shown() -> None:
    text = printed(toy_comparison(modes=("live", "virtual")))
    assert "memhog, live\n" in text
    assert "memhog, virtual time\n" in text
    assert "Virtual time against live" in text
    assert "of 12 figures are beyond 10 % of the live one" in text


def test_a_figure_that_is_far_is_flagged() -> None:
    specs = [RunSpec(mode=mode, policy="off", seed=seed) for mode in ("live", "virtual") for seed in (1, 2)]
    results = [made_result(spec, gib_min=2.0 if spec.mode == "live" else 2.5) for spec in specs]
    text = printed(compare_results([Sample("off", one, one.spec.seed) for one in results], first="off", base="off"))
    line = next(line for line in text.splitlines() if "+25.0 %" in line)
    assert line.rstrip().endswith("!")
    assert "1 of 3 figures are beyond" in text


def test_a_label_is_no_markup() -> None:
    result = made_result(RunSpec(label="[bold]x[/bold]"), gib_min=1.0)
    assert "[bold]x[/bold]" in printed(compare_results([Sample(result.spec.name, result, 0)], first="x", base="off"))


def test_a_closed_stream_gets_nothing() -> None:
    print_comparison(toy_comparison(repeat=1), None)


def test_titles_have_their_unit() -> None:
    assert row_title(METRICS["gib_min"], ("GiB·min", 1.0)) == "footprint [GiB·min]"
    assert row_title(METRICS["reports"], ("", 1.0)) == "reports"
