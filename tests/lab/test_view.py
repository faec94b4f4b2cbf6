"""The three views: a table on a terminal, lines in a pipe, nothing when quiet."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from lab.view import GuestRow, LiveView, PlainView, RateMeter, SilentView, make_view, mib
from tests.lab.test_samples import ZERO

MIB = 1 << 20
SEEN = replace(
    ZERO, resident_bytes=300 * MIB, allocated_bytes=200 * MIB, free_bytes=312 * MIB, returned_bytes=100 * MIB
)
ROWS = [
    GuestRow("guest-1", 512 * MIB, SEEN, 12.0, 345.0, ended=False),
    GuestRow("guest-2", 512 * MIB, None, 0.0, 0.0, ended=False),
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_plain_view_prints_a_line_a_guest_once_a_second() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    for time_s in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25):
        view.show(time_s, ROWS)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 * 3
    assert "allocated 200 MiB, free 312 MiB, reported 0 MiB, resident 300 MiB" in lines[0]
    assert "12 blocks reported/s, 345 refaults/s" in lines[0]
    assert lines[1].endswith("guest-2: starting")
    assert "all: resident 300 MiB, given back so far 100 MiB" in lines[2]
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_live_view_shows_the_same_figures(width: int) -> None:
    stream = Terminal()
    view = LiveView(Console(file=stream, force_terminal=True, width=width))
    view.show(1.0, ROWS)
    view.say("[a line with brackets]")
    view.close()
    view.close()
    text = stream.getvalue()
    for part in (
        "guest-1",
        "allocated",
        "200",
        "312",
        "300",
        "345",
        "refaults/s",
        "starting",
        "[a line with brackets]",
    ):
        assert part in text


def test_the_view_fits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_view(quiet=True, stream=Terminal()), SilentView)
    assert isinstance(make_view(quiet=False, stream=io.StringIO()), PlainView)
    live = make_view(quiet=False, stream=Terminal())
    assert isinstance(live, LiveView)
    live.close()
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(quiet=False, stream=Terminal()), PlainView)


def test_a_closed_standard_error_gets_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(make_view(quiet=False), SilentView)


def test_rates_are_of_about_the_last_second() -> None:
    meter = RateMeter()
    assert meter.rates(0.0, 0, 0) == (0.0, 0.0)
    assert meter.rates(0.5, 50, 5) == (100.0, 10.0)
    assert meter.rates(0.5, 50, 5) == (100.0, 10.0), "the same reading twice changes nothing"
    for tenth in range(6, 30):
        meter.rates(tenth / 10, 50, 5)
    assert meter.rates(3.0, 50, 5) == (0.0, 0.0)


def test_mib() -> None:
    assert [mib(value * MIB) for value in (0, 0.5, 9.9, 10, 1234.5)] == [
        "0 MiB",
        "0.5 MiB",
        "9.9 MiB",
        "10 MiB",
        "1234 MiB",
    ]
