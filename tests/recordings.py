"""Where recordings of a real guest are: a small one in ``examples``, and a whole folder for those who have one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["SMALL", "recordings"]

SMALL = Path(__file__).resolve().parents[1] / "examples/linux-guest"


def recordings() -> Path:
    """The folder that ``FPR_RECORDINGS`` names, with every phase; skips the test without one."""
    folder = os.environ.get("FPR_RECORDINGS", "")
    if not (Path(folder) / "traces").is_dir():
        pytest.skip("FPR_RECORDINGS names no folder of recordings (with traces/, snapshots/ and runs/)")
    return Path(folder)
