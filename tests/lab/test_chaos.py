"""A run of kills in small; and it sees a page that is lost, a name that is left, a zone where nobody works."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.names import SHM_DIR
from common.ramobject import RamObject
from guest.allocator.zone import Zone, ZoneSettings
from lab.chaos import run as chaos
from lab.chaos.run import Plan, run_chaos
from lab.chaos.seats import Stage, ZoneWatch
from lab.nursery import Nursery

MIB = 1 << 20
GUEST = "g0"


def test_s3_s4_s5_s14_nothing_is_lost_whoever_is_killed() -> None:
    kills: list[int] = []
    result = run_chaos(Plan(kills=25, seed=3), lambda now: kills.append(now.kills))
    assert result.ok, result.complaints
    assert result.kills >= 25
    assert set(result.killed) == {"host", "guest", "joined"}
    assert sum(result.killed.values()) == result.kills
    assert kills == sorted(kills)
    assert result.restarts >= result.kills
    assert result.page_operations > 0
    assert result.longest_stop_s > 0


@pytest.fixture
def watch(lab_name: str) -> Iterator[ZoneWatch]:
    """A guest's zone and memory, of which nobody uses anything."""
    ram = RamObject.create(lab_name, GUEST, ram_bytes=16 * MIB)
    zone = Zone.create(lab_name, GUEST, settings=ZoneSettings(16 * MIB, ram_bytes=16 * MIB))
    yield ZoneWatch(GUEST, zone, ram)
    zone.unlink()
    zone.close()
    ram.unlink()
    ram.close()


@pytest.fixture
def run(lab_name: str, watch: ZoneWatch, tmp_path: Path) -> Iterator[chaos._Run]:
    with Nursery(tmp_path, compiled=False) as nursery:
        stage = Stage(lab_name, nursery, random.Random(1), guests=0, joined=0)
        stage.watches.append(watch)
        yield chaos._Run(Plan(kills=1, seed=1), stage)


def test_what_is_in_order_is_called_so(run: chaos._Run, watch: ZoneWatch) -> None:
    run._check_what_is_left(watch)
    assert run.result.ok, run.result.complaints


def test_s4_a_page_that_nobody_has_is_lost(run: chaos._Run, watch: ZoneWatch) -> None:
    pfn = watch.zone.alloc(3)
    assert pfn is not None
    run._check_what_is_left(watch)
    assert (run.result.lost_pages, run.result.ok) == (8, False)
    watch.zone.free(pfn, 3)


def test_a_page_that_is_there_and_was_never_used_is_a_breach(run: chaos._Run, watch: ZoneWatch) -> None:
    np.frombuffer(watch.ram.map(), dtype=np.uint8)[5 * 4096] = 1
    run._check_what_is_left(watch)
    assert run.result.breaches == 1
    assert "wrong about 1 pages" in run.result.complaints[0]


def test_a_zone_where_nobody_works_is_hung(run: chaos._Run, watch: ZoneWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "PATIENCE_S", 0.05)
    run._wait_for_progress(watch, watch.progress(), moment=0.0)
    assert run.result.hung == 1


def test_a_name_that_is_left_is_counted(run: chaos._Run, lab_name: str) -> None:
    before = {path.name for path in Path(SHM_DIR).iterdir() if path.name.startswith(f"fpr.{lab_name}.")}
    run.count_names(lab_name)
    assert run.result.names_left == len(before) == 2
