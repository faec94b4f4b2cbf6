"""Where recordings of a real guest are, for tests that are skipped without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["recordings"]

_BESIDE = Path(__file__).resolve().parents[2] / "shared/data/linux-guest"


def recordings() -> Path:
    """The folder that ``FPR_RECORDINGS`` names, else the one beside this checkout; skips the test without one."""
    folder = Path(os.environ.get("FPR_RECORDINGS") or _BESIDE)
    if not (folder / "traces").is_dir():
        pytest.skip(f"there are no recordings in {folder}; FPR_RECORDINGS names another folder")
    return folder
