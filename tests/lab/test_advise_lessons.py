"""``python -m lab.advise.lessons``: what recordings of a real guest teach, and that replays of one find it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.advise import lessons
from lab.advise.recorded import Left, Work, read_run
from tests.recordings import recordings

FREE = ",".join(f"free_o{order}" for order in range(11))
TABLES = {
    "cycles.csv": (
        "t_guest_begin,t_guest_end,duration_us,reports,entries,bytes,wait_ack_us,gap_from_previous_s\n"
        "1.0,1.1,9,7,200,838860800,8,\n"
        "12.0,12.1,9,2,40,1048576,8,11.0\n"
        "14.0,14.1,9,0,0,0,0,2.0\n"
        "16.0,16.1,9,1,3,524288,8,2.0\n"
        "18.5,18.6,9,5,160,2097152,8,2.5\n"
    ),
    "marks.csv": (
        "t_guest,t_host,text\n"
        '10.0,11.0,"partial.begin"\n'
        '11.5,12.5,"hog.freed_partial"\n'
        '18.0,19.0,"hog.freeing mib=256"\n'
        '18.2,19.2,"hog.freed mib=256"\n'
        '20.0,21.0,"partial.end"\n'
        '21.0,22.0,"many.begin"\n'
    ),
    "episodes.csv": (
        "phase,mark,t_first_report_s\nboot,boot.idle_begin,1.5\npartial,hog.freed mib=256,1.75\nmany,many.begin,\n"
    ),
    "snapshots.csv": f"idx,label,free_and_host_allocated_MiB,{FREE}\n0,many,136.35,4,2,0,0,0,0,0,0,1,9,30\n",
}


def written(folder: Path, **changes: str) -> Path:
    for name, text in {**TABLES, **{f"{name}.csv": text for name, text in changes.items()}}.items():
        (folder / name).write_text(text)
    return folder


def test_what_a_recorded_run_says(tmp_path: Path) -> None:
    """Passes count for the phase whose marks they lie between; one that found nothing is none."""
    run = read_run(written(tmp_path))
    assert run.phases == {"partial": Work(3, 8, 203, 3.5)}, "a phase that does not end is none"
    assert run.whole == Work(4, 15, 403, 803.5)
    assert run.left == {"many": Left(136.35, (4 + 2 * 2 + 256) * 4096 / 2**20)}
    assert run.first_report_s == {"partial": 1.75}
    assert run.partial == ((0.5, 40, 1.0), (4.5, 3, 0.5))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("cycles", "a,b\n1,2\n", "no column t_guest_begin"), ("marks", "t_guest\n1\n", "no column text")],
)
def test_another_table_is_refused(name: str, text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "traces").mkdir()
    run = tmp_path / "runs/o9_1g"
    run.mkdir(parents=True)
    written(run, **{name: text})
    assert lessons.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(run / f"{name}.csv") in error
    assert error.count("\n") == 1
    (run / f"{name}.csv").unlink()
    assert lessons.main([str(tmp_path)]) == 2
    assert f"{name}.csv" in capsys.readouterr().err
    assert lessons.main([str(run)]) == 2
    assert "expected a folder of recordings" in capsys.readouterr().err


def test_replays_find_again_what_the_recordings_teach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Order 9 leaves memory behind, order 0 none; the budget throttles partial frees; the delay is a floor."""
    answer = tmp_path / "lessons.json"
    assert lessons.main([str(recordings()), "--json", str(answer)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(answer.read_text())
    assert all(f"### {title}\n" in shown for title in found)
    left, work, budget, floor = found.values()

    held = {row["guest"]: row for row in left}
    assert held["real, run without a trace, order 9"]["held"] == pytest.approx(136.35)
    assert held["real, run without a trace, order 0"]["held"] == 0
    real, ours = held["real, the traced guest, order 9"], held["ours, its trace at order 9"]
    assert ours["held"] == pytest.approx(real["held"], rel=0.01)
    assert ours["small"] == pytest.approx(real["small"], rel=0.01)
    for row in left:
        if row["order"] == 9:  # what is left is what order 9 cannot reach, and the DMA zone behind its gate
            assert row["small"] < row["held"] < row["small"] + 16
    assert held["ours, its trace at order 0"]["held"] < 0.5

    times = {
        (row["phases"], row["guest"]): {key: row["order_0"][key] / row["order_9"][key] for key in row["order_9"]}
        for row in work
    }
    assert times["nothp", "ours"]["reports"] == pytest.approx(times["nothp", "real"]["reports"], rel=0.1)
    for phases in ("partial", "many"):
        for guest in ("real", "ours"):
            assert times[phases, guest]["reports"] > 10
            assert times[phases, guest]["mib"] < 3, "many more reports, of little each"
    assert times["the whole run", "real"]["reports"] == pytest.approx(565 / 74)

    throttled = {row["guest"]: row["passes"] for row in budget}
    for guest in ("real, 32", "ours, 32"):
        blocks = [count for _, count, _ in throttled[guest]]
        assert len(blocks) >= 4, "pass after pass"
        assert min(blocks[1:]) > 0.95 * max(blocks[1:]), "as many blocks as the budget has"
    returned = {guest: sum(mib for _, _, mib in passes) for guest, passes in throttled.items()}
    assert returned["ours, 512"] > 1.5 * returned["ours, 32"]

    for row in floor:
        for first_s in row["first_s"]:
            assert -0.02 <= first_s - row["delay_s"] <= 0.1
