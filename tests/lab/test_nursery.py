"""A child of the nursery is told what it is told, from its first instruction on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lab.nursery import Nursery

PATIENCE_S = 60.0


def wait_for_ever(_arguments: list[str]) -> int:
    while True:
        signal.pause()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_right_after_the_fork_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    with Nursery(tmp_path, compiled=False) as nursery:
        for _ in range(40):
            child = nursery.start("idle", "tests.lab.test_nursery:wait_for_ever", [])
            child.send(number)
            assert child.ended_within(PATIENCE_S), "it was never told"
            assert child.reap() == -number
            child.close()


def test_what_is_meant_for_the_terminal_does_not_end_the_nursery(tmp_path: Path) -> None:
    with Nursery(tmp_path, compiled=False) as nursery:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            nursery._process.send_signal(number)
        child = nursery.start("idle", "tests.lab.test_nursery:wait_for_ever", [])
        assert child.running()
        child.send(signal.SIGKILL)
        assert child.ended_within(PATIENCE_S)
        child.close()
