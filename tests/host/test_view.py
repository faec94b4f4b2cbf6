"""What a host shows."""

from __future__ import annotations

import io

import pytest

from host.accounting import Counters, GuestStatistics, HostStatistics
from host.view import LineView, SilentView, TableView, make_view


def snapshot(reports: int = 3, failures: int = 0, rejected: int = 0) -> HostStatistics:
    counted = Counters(reports=reports, asked_bytes=4 << 20, freed_bytes=2 << 20, failures=failures, rejected=rejected)
    guests = (
        GuestStatistics("gone", "lost", "shared", 1 << 30, 0, 0, Counters()),
        GuestStatistics("g0", "live", "shared", 1 << 30, 1 << 29, 1 << 28, counted),
    )
    return HostStatistics(1.0, "cachestat", 2, 1, 0, counted, guests)


def test_a_line_has_the_sums_and_the_live_guests() -> None:
    stream = io.StringIO()
    with LineView("lab", stream) as view:
        view.show(snapshot())
    line = stream.getvalue()
    assert line.startswith("host lab: 1 guests, 3 reports, asked 4MiB, freed 2MiB; g0: resident 256MiB, ")
    assert line.endswith(" reports/s\n")
    assert "gone" not in line
    assert "\x1b" not in line


def test_a_line_mentions_failures_and_refusals_when_there_are_any() -> None:
    stream = io.StringIO()
    with LineView("lab", stream) as view:
        view.show(snapshot(failures=2, rejected=1))
    assert "failures 2; rejected 1" in stream.getvalue()


def test_a_line_is_not_repeated() -> None:
    stream = io.StringIO()
    with LineView("lab", stream) as view:
        for _look in range(3):
            view.show(snapshot(reports=0))
    assert stream.getvalue().count("\n") == 1


def test_a_table_has_a_row_for_each_guest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    with TableView("lab") as view:
        view.show(snapshot())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "gone (lost)" in captured.err
    assert "256MiB" in captured.err


def test_the_view_fits_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_view("lab", quiet=True), SilentView)
    assert isinstance(make_view("lab", quiet=False), LineView)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(make_view("lab", quiet=False), TableView)
    assert isinstance(make_view("lab", quiet=True), SilentView)
