"""``compare``: its flags, the order of its runs, and all of it from flags to table, JSON and run directory."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvariantViolation, UsageError
from common.settings import DemoSettings
from lab.cli import main
from lab.commands import compare, flags
from lab.experiment.compare import LIVE_ENGINE, Plan
from lab.experiment.progress import LineProgress
from lab.experiment.spec import Mode, RunSpec
from tests.lab.experiments import MadeEngine, toy

COSTS = {"fault_ns": 900.0}


@pytest.fixture(autouse=True)
def all_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of policies that the flags take, whatever this version has."""
    monkeypatch.setattr(flags, "POLICIES", ("boundary", "off", "rotate", "hint"))


def parsed(*arguments: str) -> tuple[compare.CompareSettings, Plan]:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.read(parser.parse_args(arguments))


def compared(*arguments: str, engine: MadeEngine | None = None, function: Any = toy) -> int:
    settings, plan = parsed(*arguments)
    engine = engine or MadeEngine()
    command = ["python", "-m", "lab", "compare", *arguments]
    return compare.run_comparison(settings, plan, command, costs=COSTS, execute=function, open_engine=engine.open)


def test_defaults_are_those_of_a_run() -> None:
    _, plan = parsed("--virtual")
    assert plan.specs == (RunSpec(), RunSpec(policy="off"))
    _, plan = parsed()
    assert plan.modes == ("live", "virtual")


def test_virtual_time_beside_live_runs_has_their_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 3, 5})
    for given, cores in (((), 3), (("--virtual",), 2), (("--live",), 2), (("--cores", "4"), 4)):
        _, plan = parsed(*given)
        assert {spec.cores for spec in plan.specs} == {cores}


@pytest.mark.parametrize("name", sorted(flags.RUN_OPTIONS))
def test_what_help_says_of_a_default_is_the_default(name: str) -> None:
    described = flags.RUN_OPTIONS[name]
    if described.is_switch:
        assert described.default_text.startswith("--no-") is not getattr(RunSpec(), name)
    elif getattr(RunSpec(), name) is None:
        assert described.default_text == "that of the policy"
    else:
        seconds = described.parse(described.default_text)
        assert getattr(RunSpec(), name) == (seconds * 1e9 if name == "duration_ns" else seconds)


def test_every_setting_of_a_run_has_a_flag_but_those_of_the_lists_and_modes() -> None:
    without = {"mode", "label", "policy", "workload"}
    assert set(flags.RUN_OPTIONS) == set(RunSpec().as_dict()) - without


def test_flags_reach_the_runs() -> None:
    _, plan = parsed(
        "--memory", "1GiB", "--delay", "250ms", "--duration", "2.5", "--shuffle", "--cores", "4", "--seed", "9"
    )
    expected = RunSpec(memory=1 << 30, delay_ns=250_000_000, duration_ns=2_500_000_000, shuffle=True, cores=4, seed=9)
    assert plan.specs == (expected, expected.but(policy="off"))


def test_a_policy_may_carry_its_own_settings() -> None:
    text = "boundary:delay=2s,rotate:delay=250ms:capacity=512:min_order=4,boundary:shuffle=true:merge-likely=false,hint"
    _, plan = parsed("--policies", text, "--delay", "1s")
    assert plan.names == (*text.split(","), "off")
    own, rotate, switches, hint, off = plan.specs
    assert (own.policy, own.delay_ns, own.capacity, own.label) == ("boundary", 2_000_000_000, None, "boundary:delay=2s")
    assert (rotate.policy, rotate.delay_ns, rotate.capacity, rotate.min_order) == ("rotate", 250_000_000, 512, 4)
    assert (switches.shuffle, switches.merge_likely, switches.delay_ns) == (True, False, 1_000_000_000)
    assert (hint.label, hint.name) == ("", "hint")
    assert off == RunSpec(policy="off", delay_ns=1_000_000_000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policies", "boundary,best"), ("'best'", "boundary, hint, off, rotate")),
        (("--policies", "boundary,"), ("''", "boundary, hint, off, rotate")),
        (("--policies", "boundary,boundary"), ("boundary", "given twice")),
        (("--policies", "boundary:memory=1GiB"), ("memory=1GiB", "delay=", "capacity=", "min-order=")),
        (("--policies", "boundary:delay"), ("'delay'", "delay=")),
        (("--policies", "boundary:delay=2"), ("delay", "'2'", "1h")),
        (("--policies", "boundary:delay=1s:delay=2s"), ("delay", "given twice")),
        (("--policies", "boundary:capacity=5000"), ("capacity", "5000", "1 to 1024")),
        (("--policies", "boundary:shuffle=maybe"), ("shuffle", "maybe", "true or false")),
        (("--policies", "oracle"), ("oracle", "--virtual")),
        (("--workload", "memhog,idle"), ("--workload", "memhog,idle", "churn")),
        (("--workload", "memhog,memhog"), ("--workload", "each once")),
        (("--workload", "none"), ("--workload", "memhog")),
        (("--repeat", "0"), ("--repeat", "1 to 1000")),
        (("--repeat", "five"), ("--repeat", "1 to 1000")),
        (("--memory", "17MiB"), ("--memory", "17MiB", "2MiB")),
        (("--cores", "0"), ("--cores", "1 to 256")),
        (("--work-pages", "-1"), ("--work-pages", "-1")),
    ],
)
def test_what_is_wrong_is_said_with_what_is_allowed(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_the_oracle_runs_in_virtual_time() -> None:
    _, plan = parsed("--policies", "oracle", "--virtual")
    assert plan.names == ("oracle", "off")
    assert plan.modes == ("virtual",)


@pytest.mark.parametrize(
    ("arguments", "modes"),
    [((), ("live", "virtual")), (("--live",), ("live",)), (("--virtual",), ("virtual",)),
     (("--live", "--virtual"), ("live", "virtual"))],
)  # fmt: skip
def test_modes(arguments: tuple[str, ...], modes: tuple[str, ...]) -> None:
    assert parsed(*arguments)[1].modes == modes


def test_off_is_added_once_and_only_if_none_of_them_is_off() -> None:
    assert parsed("--policies", "rotate,hint")[1].names == ("rotate", "hint", "off")
    assert parsed("--policies", "off,rotate")[1].names == ("off", "rotate")
    plan = parsed("--policies", "rotate,off:shuffle=true")[1]
    assert plan.names == ("rotate", "off:shuffle=true")
    assert plan.base == "off:shuffle=true"


def test_runs_are_interleaved_and_each_round_begins_with_another_policy() -> None:
    _, plan = parsed("--policies", "boundary,rotate", "--workload", "memhog,churn", "--repeat", "4", "--seed", "7")
    runs = plan.runs("live")
    rounds = [runs[index : index + 6] for index in range(0, 24, 6)]
    for number, runs_of_round in enumerate(rounds):
        each = Counter((run.spec.workload, run.spec.policy) for run in runs_of_round)
        assert set(each.values()) == {1}
        assert len(each) == 6
        assert {run.spec.seed for run in runs_of_round} == {7 + number}
        assert {run.repeat for run in runs_of_round} == {number}
    order = [[run.spec.policy for run in one if run.spec.workload == "churn"] for one in rounds]
    assert order == [
        ["boundary", "rotate", "off"],
        ["rotate", "off", "boundary"],
        ["off", "boundary", "rotate"],
        ["boundary", "rotate", "off"],
    ]


def test_the_virtual_twin_of_a_run_differs_in_its_mode_alone() -> None:
    _, plan = parsed("--policies", "boundary,rotate:delay=2s", "--repeat", "3")
    live, virtual = plan.runs("live"), plan.runs("virtual")
    assert [run.spec.but(mode="virtual") for run in live] == [run.spec for run in virtual]
    assert {run.spec.mode for run in live} == {"live"}


def test_the_largest_seed_is_followed_by_the_smallest() -> None:
    _, plan = parsed("--seed", str((1 << 32) - 1), "--repeat", "2")
    assert [run.spec.seed for run in plan.runs("virtual")] == [(1 << 32) - 1] * 2 + [0] * 2


def test_live_runs_go_one_by_one_and_before_those_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    engine = MadeEngine(backwards=True)
    assert compared("--repeat", "2", "--engine", "processes:3", "--quiet", engine=engine) == 0
    assert engine.addresses == [LIVE_ENGINE, "processes:3"]
    assert [payload["spec"]["mode"] for payload in engine.payloads] == ["live"] * 4 + ["virtual"] * 4
    assert [payload["costs"] for payload in engine.payloads] == [None] * 4 + [COSTS] * 4
    assert capsys.readouterr().err == ""


def test_results_stand_in_the_order_of_the_plan_whatever_order_they_came_in(tmp_path: Path) -> None:
    texts = []
    for backwards in (False, True):
        path = tmp_path / f"{backwards}.json"
        compared("--repeat", "3", "--virtual", "--quiet", "--json", str(path), engine=MadeEngine(backwards=backwards))
        texts.append(json.loads(path.read_text())["comparison"])
    assert texts[0] == texts[1]


def test_json_has_an_object_a_policy_and_workload(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ("--policies", "boundary,hint", "--workload", "memhog,churn", "--repeat", "4", "--json", str(path))
    assert compared(*arguments) == 0
    result = json.loads(path.read_text())
    assert {"settings", "command", "environment", "comparison", "virtual_against_live"} <= set(result)
    assert result["command"][:4] == ["python", "-m", "lab", "compare"]
    assert result["environment"]["packages"]["numpy"]
    assert [(row["mode"], row["workload"], row["policy"]) for row in result["comparison"]] == [
        (mode, workload, policy)
        for mode in ("live", "virtual")
        for workload in ("memhog", "churn")
        for policy in ("boundary", "hint", "off")
    ]
    seeds = range(1, 5)
    expected = [
        toy({"spec": RunSpec(mode="live", policy="hint", workload="churn", seed=seed).as_dict()})["metrics"]["gib_min"]
        for seed in seeds
    ]
    figure = result["comparison"][4]["metrics"]["gib_min"]
    assert figure["values"] == expected
    assert figure["median"] == pytest.approx(sum(sorted(expected)[1:3]) / 2)
    assert figure["p"] == pytest.approx(2 / 70)
    assert result["comparison"][0]["metrics"]["gib_min"]["p"] is None
    assert len(result["virtual_against_live"]) == 3 * 2 * 3


def test_json_on_standard_output_is_all_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    compared("--virtual", "--repeat", "1", "--json", "-")
    out, err = capsys.readouterr()
    assert json.loads(out)["settings"]["repeat"] == 1
    assert "throughput against off" in err


def test_tables_go_to_standard_output_and_progress_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    compared("--virtual", "--repeat", "2")
    out, err = capsys.readouterr()
    assert "memhog, virtual time" in out
    assert "virtual 4 of 4: memhog" in err
    assert "\x1b" not in out + err


class Interrupted(MadeEngine):
    """Ends after five runs."""

    def run(self, function: Any, payloads: Any, **named: Any) -> Any:
        for index, answer in super().run(function, payloads, **named):
            if len(self.payloads) == 6:
                raise KeyboardInterrupt
            yield index, answer


def test_an_interrupt_says_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ("--repeat", "2", "--out", str(tmp_path / "x"))
    for arguments in (kept, kept, ("--repeat", "2"), (*kept, "--quiet", "--force")):
        with pytest.raises(KeyboardInterrupt):
            compared(*arguments, engine=Interrupted() if arguments[-1] != str(tmp_path / "x") else Once())
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if "kept" in line] == [
        f"{tmp_path}/x: 1 of 8 runs are kept; the same command goes on with the others",
        f"{tmp_path}/x: 2 of 8 runs are kept; the same command goes on with the others",
        "nothing was kept of 5 of 8 runs; --out FOLDER keeps them",
    ]


class Once(MadeEngine):
    """Ends after one run."""

    def run(self, function: Any, payloads: Any, **named: Any) -> Any:
        yield next(super().run(function, payloads, **named))
        raise KeyboardInterrupt


def test_an_error_names_the_run_by_its_settings() -> None:
    engine = MadeEngine()
    compared("--repeat", "1", "--quiet", "--policies", "boundary:delay=2s,off", "--live", engine=engine)
    assert engine.names == ["memhog, boundary:delay=2s, seed 1, live", "memhog, off, seed 1, live"]


def test_a_run_directory_has_all_runs_and_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    arguments = ("--repeat", "2", "--quiet", "--out", str(folder))
    with pytest.raises(KeyboardInterrupt):
        compared(*arguments, engine=Interrupted())
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 5
    engine = MadeEngine()
    assert compared(*arguments, engine=engine) == 0
    assert len(engine.payloads) == 8 - 5
    assert engine.addresses == ["processes"], "all live runs were there"
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len({(json.loads(line)["key"], json.loads(line)["repeat"]) for line in lines}) == 8
    assert len(list((folder / "series").iterdir())) == 8
    record = json.loads((folder / "run.json").read_text())
    assert record["kind"] == "compare"
    assert record["settings"]["policies"] == ["boundary", "off"]
    assert record["command"][-1] == str(folder)
    series = next(iter((folder / "series").iterdir())).read_text()
    assert next(csv.reader(io.StringIO(series))) == ["t_s", "resident_bytes", "allocated_bytes", "reported_bytes"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert compared("--virtual", "--repeat", "1", "--quiet", "--out", str(folder)) == 0
    with pytest.raises(UsageError, match="--force"):
        compared("--virtual", "--repeat", "2", "--quiet", "--out", str(folder))
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2
    assert compared("--virtual", "--repeat", "2", "--quiet", "--out", str(folder), "--force") == 0
    assert len((folder / "results.jsonl").read_text().splitlines()) == 4


def test_a_violation_is_told_after_everything_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def racing(payload: dict[str, Any]) -> dict[str, Any]:
        answer = toy(payload)
        answer["metrics"]["violations"] = 2.0 if payload["spec"]["policy"] == "hint" else 0.0
        return answer

    path = tmp_path / "result.json"
    with pytest.raises(InvariantViolation, match="hint on memhog, virtual") as caught:
        compared("--virtual", "--policies", "boundary,hint", "--repeat", "3", "--json", str(path), function=racing)
    assert caught.value.exit_code == 4
    assert "boundary on" not in str(caught.value)
    assert json.loads(path.read_text())["comparison"]
    assert "virtual, memhog, hint: 6 violations in 3 runs" in capsys.readouterr().out


def test_time_left_comes_from_the_runs_that_have_ended() -> None:
    now = [100.0]
    stream = io.StringIO()
    progress = LineProgress(stream, clock=lambda: now[0])
    specs = [RunSpec(mode="live", policy="boundary", seed=seed) for seed in range(12)]
    progress.start("live", specs)
    now[0] += 15.0
    progress.done(specs[0])
    now[0] += 25.0
    progress.done(specs[1])
    progress.start("virtual", [spec.but(mode="virtual") for spec in specs])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "12 live runs, one at a time: 2 min 0 s left", "12 workloads of 10 s, at least"
    assert lines[1].endswith("live 1 of 12: memhog, boundary, seed 0; 2 min 45 s left")
    assert lines[2].endswith("3 min 20 s left"), "20 s a run, 10 runs"
    assert lines[3] == "12 runs in virtual time: time left unknown yet"


def test_settings_that_two_commands_share_are_described_once() -> None:
    shared = set(flags.RUN_OPTIONS) & set(DemoSettings.__dataclass_fields__)
    for name in shared:
        described = DemoSettings.__dataclass_fields__[name].metadata["option"]
        assert flags.RUN_OPTIONS[name].check is described.check
        assert flags.RUN_OPTIONS[name].allowed == described.allowed


@pytest.mark.parametrize("name", ["run.json", "costs.json", "results.jsonl", "series/new.csv"])
def test_json_cannot_replace_what_the_comparison_keeps(tmp_path: Path, name: str) -> None:
    out = tmp_path / "c"
    compared("--virtual", "--repeat", "1", "--quiet", "--out", str(out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"^--json: .* belongs to what --out keeps in .*; name another path"):
        compared("--virtual", "--repeat", "1", "--force", "--out", str(out), "--json", str(out / name))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("mode", "count", "said"),
    [
        ("live", 1, "1 live run: "),
        ("live", 2, "2 live runs, one at a time: "),
        ("virtual", 1, "1 run in virtual time: "),
        ("virtual", 2, "2 runs in virtual time: "),
    ],
)
def test_one_run_is_no_runs(mode: Mode, count: int, said: str) -> None:
    stream = io.StringIO()
    LineProgress(stream).start(mode, [RunSpec(mode=mode)] * count)
    assert stream.getvalue().startswith(said)


def test_a_wrong_engine_is_told_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["compare"], ["show", "boundary"]):
        assert main([*arguments, "--engine", "cloud"]) == 2
        assert capsys.readouterr().err.startswith("error: --engine: 'cloud'; allowed is inline")
