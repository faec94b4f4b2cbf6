"""Compiled kernels before the first process needs them, and an end for every process that a test starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.nursery import Nursery
from tests.live.processes import Lab, Process


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every process of these tests is forked from one that has its kernels, compiled if need be."""
    with Nursery(tmp_path_factory.mktemp("live")) as started:
        Process.nursery = started
        yield
        Process.nursery = None


@pytest.fixture(scope="session")
def warm(nursery: None) -> None:
    """For processes that are not forked: the kernels are compiled."""


@pytest.fixture
def lab(nursery: None, lab_name: str, guest_names: list[str], tmp_path: Path) -> Iterator[Lab]:
    """A lab to start processes in. All of them are gone at the end, and so is everything that they made."""
    opened = Lab(lab_name, guest_names, tmp_path)
    yield opened
    opened.close()
