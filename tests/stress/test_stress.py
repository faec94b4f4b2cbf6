"""S1, S3 to S6, S10, B1: all at once, then everything is looked at. Short ones always, long ones with ``-m stress``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stress.nursery import HELD_BLOCKS, MAX_ORDER
from tests.stress.stage import GUEST, PATIENCE_S, ROOT, Stage
from tests.support import wait_until

SCENES: list[dict[str, Any]] = [
    {"mood": "fast", "min_order": 9, "capacity": 16, "workload": "burst", "idle_ns": 1_000_000},
    {"mood": "fast", "min_order": 0, "capacity": 1},
    {"mood": "jittery", "min_order": 0, "capacity": 32, "shuffle": True},
    {"mood": "jittery", "min_order": 9, "capacity": 4, "workload": "page-fault", "work_order": 9},
    {"mood": "stopped", "min_order": 0, "capacity": 32},
    {"mood": "stopped", "min_order": 3, "capacity": 8, "pcp_batch": 0},
]
LOST_A_KILL = HELD_BLOCKS << MAX_ORDER  # pages


def scene_name(scene: dict[str, Any]) -> str:
    return "-".join(str(scene[key]) for key in ("mood", "min_order", "capacity"))


def play(stage: Stage, *, allocations: int, returned_pages: int) -> None:
    """Two threads and two processes on one zone."""
    stage.attach("churn", seed=101)
    stage.attach("burst", seed=102)
    stage.work_until(allocations=allocations, returned_pages=returned_pages)
    if stage.mood == "stopped":
        wait_until(lambda: stage.machine.link.statistics().withdrawn > 0, PATIENCE_S, what="a withdrawal")
    stage.check(stage.finish())
    statistics = stage.machine.zone.statistics()
    assert statistics.in_flight_max_blocks <= stage.machine.cycle.capacity  # S10
    assert statistics.refaults > 0


# A patient host and an impatient guest here; all of them, and for longer, in the long test below.
@pytest.mark.parametrize("scene", SCENES[3::2], ids=scene_name)
def test_everybody_at_once(lab_name: str, tmp_path: Path, scene: dict[str, Any]) -> None:
    with Stage(lab_name, tmp_path, **scene) as stage:
        play(stage, allocations=30_000, returned_pages=500)


@pytest.mark.stress
@pytest.mark.timeout(400)
@pytest.mark.parametrize("scene", SCENES, ids=scene_name)
def test_everybody_at_once_for_long(lab_name: str, tmp_path: Path, scene: dict[str, Any]) -> None:
    with Stage(lab_name, tmp_path, **scene) as stage:
        for round_number in range(6):
            stage.attach("churn", seed=200 + round_number)
            stage.attach("burst", seed=300 + round_number)
            stage.work_until(allocations=100_000, returned_pages=2000)
            stage.end_workers()
            stage.machine.zone.validate()  # in the midst of it
        play(stage, allocations=100_000, returned_pages=2000)


def kill_children(lab: str, kills: int, seed: int, way: str) -> int:
    """Let that many processes die at work; how many of them held a lock."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.nursery", lab, GUEST, str(kills), str(seed), way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("way", ["buddy", "pcp"])
def test_processes_that_are_killed_at_work(lab_name: str, tmp_path: Path, way: str) -> None:
    """Whoever survives goes on; after the next lock the zone is whole. What a dead one held stays allocated."""
    kills = 60
    with Stage(lab_name, tmp_path, mood="fast", min_order=0, vcpus=1) as stage:
        kill_children(lab_name, kills, seed=5, way=way)
        stage.work_until(allocations=5000, returned_pages=100)
        stage.check(stage.finish(), lost_pages=kills * LOST_A_KILL + stage.machine.zone.n_cpus * 1024)


@pytest.mark.stress
@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["buddy", "pcp"])
def test_many_processes_that_are_killed_at_work(lab_name: str, tmp_path: Path, way: str) -> None:
    kills = 2000
    with Stage(lab_name, tmp_path, mood="jittery", min_order=0, vcpus=1, memory=1 << 30, fill=0.1) as stage:
        held_the_lock = kill_children(lab_name, kills, seed=6, way=way)
        assert way == "pcp" or held_the_lock > 0
        stage.work_until(allocations=5000, returned_pages=100)
        stage.check(stage.finish(), lost_pages=kills * LOST_A_KILL + stage.machine.zone.n_cpus * 1024)


def test_a_worker_that_is_killed_is_looked_after_and_nobody_hangs(lab_name: str, tmp_path: Path) -> None:
    """A process that uses its memory: the guest frees what it had, and the map is right about every page of it (S4)."""
    with Stage(lab_name, tmp_path, mood="fast", min_order=0) as stage:
        doomed = stage.attach("churn", seed=7)
        stage.attach("burst", seed=8)
        stage.work_until(allocations=5000, returned_pages=100)
        doomed.kill()
        doomed.wait(PATIENCE_S)
        stage.workers.remove(doomed)
        stage.machine.zone.validate()
        stage.work_until(allocations=20_000, returned_pages=100)
        stage.check(stage.finish())
        for stream in (doomed.stdin, doomed.stdout):
            assert stream is not None
            stream.close()
