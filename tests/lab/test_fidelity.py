"""M1 to M6 against a real guest: what it reported is found again, pass by pass and block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.replay.fidelity import phases_of
from tests.recordings import SMALL, recordings

GUEST = "o9_1g_traced"


def check(row: dict[str, Any]) -> None:
    """Within what docs/fidelity.md promises."""
    who = f"{row['recording']} {row['phase']}"
    assert row["within_5_percent"] >= 0.90, who
    assert row["bytes_ratio"] == pytest.approx(1.0, abs=0.02), who
    assert row["blocks_found"] >= 0.95, who
    assert row["resident_off_mean"] <= 0.02, who


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for _label, _answer, row in phases_of(folder, name)]


def test_the_recording_of_the_examples_is_found_again() -> None:
    """Three phases of a guest with huge pages: all passes, all blocks, from the snapshot before each."""
    rows = rows_of(SMALL, GUEST)
    assert [row["phase"] for row in rows] == ["thp128", "thp256", "thp512"]
    for row in rows:
        check(row)


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [GUEST, "o0_1g_traced"])
def test_every_recording_is_found_again(name: str) -> None:
    rows = rows_of(recordings(), name)
    assert rows
    for row in rows:
        check(row)
