"""Compiled kernels before the first process needs them, and an end for every process that a test starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.processes import ROOT, Lab


@pytest.fixture(scope="session")
def warm() -> None:
    """An empty cache costs half a minute once, not in every process at the same time."""
    subprocess.run([sys.executable, "-m", "guest", "--warm-up"], cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.fixture
def lab(warm: None, lab_name: str, guest_names: list[str], tmp_path: Path) -> Iterator[Lab]:
    """A lab to start processes in. All of them are gone at the end, and so is everything that they made."""
    opened = Lab(lab_name, guest_names, tmp_path)
    yield opened
    opened.close()
