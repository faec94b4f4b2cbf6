"""Run directories: what is appended is there, what is torn is not, what is foreign stays, what is damaged is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import MachineError, UsageError
from lab.experiment.directory import RunDirectory
from lab.experiment.environment import environment, project_version
from lab.experiment.metrics import SERIES, RunResult
from lab.experiment.spec import RunSpec
from tests.lab.work import make_result

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {"grid": {"min_order": [0, 9]}, "fixed": {"memory": 64 << 20}, "mode": "virtual"}
COSTS = {"fault_ns": 500.0, "discard_ns": 900.0}


def opened(path: Path, **changes: Any) -> RunDirectory:
    """The directory for writing, with settings that can be changed one by one."""
    arguments: dict[str, Any] = {"kind": "sweep", "settings": SETTINGS, "costs": COSTS, **changes}
    return RunDirectory.open(str(path), **arguments)


def result_of(seed: int) -> RunResult:
    return make_result(RunSpec(seed=seed))


def filled(path: Path, count: int = 3) -> Path:
    """A directory with results of seeds 0 and up."""
    with opened(path) as directory:
        for seed in range(count):
            directory.append(result_of(seed))
    return path


def seeds(path: Path) -> list[int]:
    return [kept.result.spec.seed for kept in RunDirectory.read(str(path)).results()]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: contents by relative path, None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s"
    with opened(path) as directory:
        directory.append(result_of(4))
        directory.append(result_of(4), repeat=2)
        assert directory.done() == {(RunSpec(seed=4).key(), 1), (RunSpec(seed=4).key(), 2)}
    reader = RunDirectory.read(str(path))
    assert (reader.kind, reader.settings, reader.costs) == ("sweep", SETTINGS, COSTS)
    kept = reader.results(series=True)
    assert [item.repeat for item in kept] == [1, 2]
    for item in kept:
        assert item.result.as_dict() == result_of(4).as_dict()
    assert [len(item.result.series["t_s"]) for item in reader.results()] == [0, 0]
    assert sorted(os.listdir(path / "series")) == [f"{RunSpec(seed=4).key()}-{repeat}.csv" for repeat in (1, 2)]
    assert os.listdir(tmp_path / "deep") == ["s"]


def test_an_empty_series_and_a_bare_costs_file_are_read_back(tmp_path: Path) -> None:
    spec = RunSpec(mode="live")
    nothing = RunResult(
        spec=spec, metrics=make_result(spec).metrics, series={name: np.empty(0) for name in SERIES}, facts={}
    )
    with opened(tmp_path / "s", costs=None) as directory:
        directory.append(nothing)
    reader = RunDirectory.read(str(tmp_path / "s"))
    assert reader.costs is None
    assert [len(item.result.series["t_s"]) for item in reader.results(series=True)] == [0]


def test_the_record_says_where_and_with_what_it_ran(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as directory:
        record = directory.record
    assert json.loads((tmp_path / "s" / "run.json").read_text()) == record
    assert record["command"] == list(sys.orig_argv)
    assert record["version"] == project_version() == "0.1.0"
    assert record["created"].endswith("+00:00")
    machine = record["environment"]
    assert set(machine) == set(environment())
    assert machine["kernel"] == f"Linux {os.uname().release}"
    assert machine["cores"] == os.cpu_count()
    assert machine["memory_bytes"] > 1 << 27
    assert len(machine["load_average"]) == 3
    assert machine["packages"]["numpy"] == np.__version__


# Going on


def test_the_same_experiment_goes_on(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", 2)
    before = (path / "run.json").read_bytes()
    with opened(path, settings=dict(reversed(SETTINGS.items()))) as directory:
        assert len(directory.done()) == 2
        directory.append(result_of(7))
        with pytest.raises(ValueError, match="kept already"):
            directory.append(result_of(1))
    assert seeds(path) == [0, 1, 7]
    assert (path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "compare"}, "a sweep"),
        ({"settings": {**SETTINGS, "fixed": {"memory": 32 << 20}}}, "memory: 67108864 there, 33554432 here"),
        ({"settings": {**SETTINGS, "mode": "live"}}, 'mode: "virtual" there, "live" here'),
        ({"costs": {**COSTS, "fault_ns": 501.0}}, "other costs"),
        ({"costs": None}, "other costs"),
    ],
)
def test_another_experiment_is_refused_and_nothing_changes(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = filled(tmp_path / "s")
    before = tree(path)
    with pytest.raises(UsageError, match="--force") as caught:
        opened(path, **changes)
    assert named in str(caught.value)
    assert tree(path) == before


@pytest.mark.parametrize("place", ["results.jsonl", "series"])
def test_a_torn_last_line_is_ignored_and_overwritten_wherever_it_was_torn(tmp_path: Path, place: str) -> None:
    path = filled(tmp_path / "s", 3)
    whole = (path / "results.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    cuts = [*range(last, len(whole), 41), len(whole) - 1] if place == "results.jsonl" else [last]
    for cut in cuts:
        (path / "results.jsonl").write_bytes(whole[:cut])
        if place == "series":  # killed between the series and the line
            (path / "series" / f"{RunSpec(seed=2).key()}-1.csv").write_text("t_s")
        assert seeds(path) == [0, 1]
        with opened(path) as directory:
            assert len(directory.done()) == 2
            directory.append(result_of(2))
        assert (path / "results.jsonl").read_bytes() == whole
    assert len(RunDirectory.read(str(path)).results(series=True)) == 3


def test_a_second_writer_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = (
        "import json, sys\n"
        "from lab.experiment.directory import RunDirectory\n"
        "path, arguments = sys.argv[1], json.loads(sys.argv[2])\n"
        "RunDirectory.open(path, kind='sweep', **arguments)\n"
    )
    with opened(path) as directory:
        for force in (False, True):
            arguments = json.dumps({"settings": SETTINGS, "costs": COSTS, "force": force})
            done = subprocess.run(
                [sys.executable, "-c", program, str(path), arguments],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert "another process is writing to it" in done.stderr
        directory.append(result_of(1))
        assert seeds(path) == [1]  # readers need no lock
    with opened(path) as directory:
        assert len(directory.done()) == 1


# Force


def test_force_replaces_our_files_and_keeps_what_somebody_else_put_there(tmp_path: Path) -> None:
    path = filled(tmp_path / "s")
    (path / "notes.txt").write_text("mine")
    (path / "series" / "notes.csv").write_text("mine too")
    settings = {**SETTINGS, "mode": "live"}
    with opened(path, settings=settings, costs=None, force=True) as directory:
        assert directory.done() == frozenset()
        directory.append(result_of(9))
    reader = RunDirectory.read(str(path))
    assert (reader.settings, reader.costs, seeds(path)) == (settings, None, [9])
    assert set(tree(path)) == {
        "run.json",
        "costs.json",
        "results.jsonl",
        "series",
        f"series/{RunSpec(seed=9).key()}-1.csv",
        "series/notes.csv",
        "notes.txt",
    }


def test_force_does_not_follow_a_link_out_of_the_folder(tmp_path: Path) -> None:
    path, outside = filled(tmp_path / "s"), filled(tmp_path / "other")
    shutil.rmtree(path / "series")
    (path / "series").symlink_to(outside / "series")
    before = tree(outside)
    opened(path, force=True).close()
    assert tree(outside) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", ["foreign", "file", "damaged", "foreign run.json"])
def test_what_is_not_ours_is_refused_and_stays(tmp_path: Path, content: str, force: bool) -> None:
    path = tmp_path / "s"
    if content == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "results.jsonl").write_text("mine")
        if content != "foreign":
            (path / "run.json").write_text("{" if content == "damaged" else '{"kind": "marathon"}')
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        opened(path, force=force)
    assert tree(tmp_path) == before


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert seeds(filled(tmp_path / "s", 1)) == [0]


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="name another path"):
        opened(tmp_path / "file" / "s")


# Damage


def damage(path: Path, name: str, text: str) -> None:
    (path / name).write_text(text)


def line_with(path: Path, **changes: Any) -> str:
    """The first line of the results with some values changed, and the others as they are."""
    first, *others = (path / "results.jsonl").read_text().splitlines()
    return "\n".join([json.dumps({**json.loads(first), **changes}), *others, ""])


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "0" * 16},
        {"repeat": "1"},
        {"repeat": -1},
        {"repeat": True},
        {"metrics": {"gib_min": "much"}},
        {"metrics": {"speed": 1.0}},
        {"metrics": []},
        {"facts": None},
        {"spec": {"policy": "boundary", "colour": "blue"}},
        {"spec": 7},
    ],
)
def test_a_damaged_line_is_named_and_never_skipped(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = filled(tmp_path / "s")
    damage(path, "results.jsonl", line_with(path, **changes))
    with pytest.raises(UsageError, match=r"results\.jsonl, line 1: is damaged"):
        RunDirectory.read(str(path)).results()
    with pytest.raises(UsageError, match=r"results\.jsonl, line 1: is damaged"):
        opened(path)


@pytest.mark.parametrize("line", ["", "{", "[]", "null", "\xff", "[" * 100_000])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = filled(tmp_path / "s", 1)
    (path / "results.jsonl").write_bytes((path / "results.jsonl").read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match=r"results\.jsonl, line 2: is damaged"):
        RunDirectory.read(str(path)).results()


def test_the_same_run_twice_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", 2)
    text = (path / "results.jsonl").read_text()
    damage(path, "results.jsonl", text + text.splitlines(keepends=True)[0])
    with pytest.raises(UsageError, match=r"line 3: is the run of line 1 once more"):
        RunDirectory.read(str(path)).results()


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("run.json", "{", "is no JSON"),
        ("run.json", "[]", "is no JSON object"),
        ("run.json", "{}", "format is missing"),
        ("run.json", "[" * 100_000, "is no JSON"),
        ("costs.json", "7", "is no JSON object"),
    ],
)
def test_a_damaged_record_is_one_clear_line(tmp_path: Path, name: str, text: str, named: str) -> None:
    path = filled(tmp_path / "s")
    damage(path, name, text)
    with pytest.raises(UsageError, match=named) as caught:
        RunDirectory.read(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["format", "kind", "settings", "command", "version", "created", "environment"])
def test_each_part_of_the_record_is_needed(tmp_path: Path, key: str) -> None:
    path = filled(tmp_path / "s")
    record = json.loads((path / "run.json").read_text())
    for text in (json.dumps({**record, key: None}), json.dumps({**record, key: True})):
        damage(path, "run.json", text)
        with pytest.raises(UsageError, match=key):
            RunDirectory.read(str(path))


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "s")
    damage(path, "run.json", json.dumps({**json.loads((path / "run.json").read_text()), "format": 2}))
    with pytest.raises(UsageError, match="format 2, allowed is 1; use the version"):
        RunDirectory.read(str(path))


@pytest.mark.parametrize("text", ["", "t_s\n1\n", "t_s,resident_bytes,allocated_bytes,reported_bytes\n1,2,3,x\n", None])
def test_a_damaged_series_is_named(tmp_path: Path, text: str | None) -> None:
    path = filled(tmp_path / "s", 1)
    name = f"{RunSpec(seed=0).key()}-1.csv"
    if text is None:
        (path / "series" / name).unlink()
    else:
        damage(path, f"series/{name}", text)
    with pytest.raises(UsageError, match=name):
        RunDirectory.read(str(path)).results(series=True)
    assert len(RunDirectory.read(str(path)).results()) == 1


@pytest.mark.parametrize("content", [None, "empty", "foreign"])
def test_reading_what_is_no_run_directory_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "s"
    if content:
        path.mkdir()
    if content == "foreign":
        (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"name the folder of"):
        RunDirectory.read(str(path))


def test_a_result_that_is_no_number_is_not_kept(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as directory:
        with pytest.raises(ValueError, match="JSON"):
            directory.append(make_result(RunSpec(), gib_min=float("nan")))
        directory.append(make_result(RunSpec()))
    assert seeds(tmp_path / "s") == [1]


@pytest.mark.parametrize("name", ["run.json", "costs.json", "results.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    path = filled(tmp_path / "s")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UsageError, match=rf"{name}: cannot be read: is no regular file; put back"):
        RunDirectory.read(str(path)).results()
    with pytest.raises(UsageError, match=rf"{name}: cannot be read: is no regular file; "):
        opened(path)


def test_a_run_whose_series_was_lost_is_told_and_done_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "s")
    lost = path / "series" / f"{RunSpec(seed=1).key()}-1.csv"
    lost.unlink()
    with pytest.raises(
        UsageError, match=rf"{lost.name}: cannot be read: No such file or directory; start the same sweep"
    ):
        RunDirectory.read(str(path)).results(series=True)
    with opened(path) as directory:
        assert directory.done() == {(RunSpec(seed=seed).key(), 1) for seed in (0, 2)}
        directory.append(result_of(1))
    assert seeds(path) == [0, 2, 1]
    assert len(RunDirectory.read(str(path)).results(series=True)) == 3


def test_a_torn_line_after_a_lost_series_is_cut_off_too(tmp_path: Path) -> None:
    path = filled(tmp_path / "s")
    (path / "series" / f"{RunSpec(seed=0).key()}-1.csv").unlink()
    with (path / "results.jsonl").open("ab") as stream:
        stream.write(b'{"repeat": 1, "torn')
    with opened(path):
        assert seeds(path) == [1, 2]
    assert (path / "results.jsonl").read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ([{"duration_ns": 3, "seed": 0}], [{"duration_ns": 2, "seed": 0}], "runs[0].duration_ns: 3 there, 2 here"),
        ([{"a": [0, 9]}, {"a": [0, 9]}], [{"a": [0, 9]}, {"a": [0, 8]}], "runs[1].a[1]: 9 there, 8 here"),
        ([1], [1, 2], "runs: [1] there, [1, 2] here"),
        (list(range(99)), list(range(98)), "runs: 99 entries there, 98 here"),
        ([{"a": 1}], [{"b": 1}], "runs[0].a: 1 there, null here"),
    ],
)
def test_the_first_difference_is_named_wherever_it_is(tmp_path: Path, there: Any, here: Any, said: str) -> None:
    opened(tmp_path / "s", settings={"runs": there}).close()
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "s", settings={"runs": here})
    assert f"holds another experiment ({said}); " in str(caught.value)


@pytest.mark.parametrize("damage", [True, False])
def test_a_folder_that_is_none_of_ours_is_named_once_with_what_to_do(tmp_path: Path, damage: bool) -> None:
    path = tmp_path / "s"
    path.mkdir()
    (path / ("run.json" if damage else "mine.txt")).write_text("?")
    with pytest.raises(UsageError) as caught:
        opened(path)
    said = str(caught.value)
    assert said.count(str(path)) == 1
    assert ("run.json: is no JSON" if damage else "is no run directory, it has no run.json") in said
    assert said.endswith("; nothing was removed; name another path with --out, or remove the folder yourself")
