"""``report``: names, tables, sentences and the page of a run directory."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from lab.cli import main
from lab.experiment.comparison import COMPARED, TESTED
from lab.experiment.directory import RunDirectory
from lab.experiment.metrics import METRICS, RunResult
from lab.experiment.spec import Mode, RunSpec
from lab.report.findings import findings, headline, what_was_run
from lab.report.front import fronts
from lab.report.load import Experiment, format_ns, load_experiment, name_results, setting_text
from lab.report.page import render_page
from lab.report.tables import comparison_tables, markdown, runs_csv, summary_csv
from lab.report.write import PAGE, write_report
from tests.lab.experiments import made_result, toy

HOSTILE = "boundary:<script>alert('1')</script>|$x_1$&amp;\"`*"


def compared(folder: Path, *policies: str, modes: tuple[Mode, ...] = ("live", "virtual"), label: str = "") -> str:
    """The directory of a comparison, five rounds of the toy."""
    names = [label if label and policy == policies[0] else policy for policy in policies]
    settings = {"policies": names, "base": "off", "workloads": ["memhog", "churn"], "modes": list(modes), "repeat": 5}
    command = ["python", "-m", "lab", "compare", "--policies", ",".join(names)]
    with RunDirectory.open(
        str(folder), kind="compare", settings=settings, costs={"fault_ns": 9}, command=command
    ) as kept:
        for mode in modes:
            for repeat in range(5):
                for workload in ("memhog", "churn"):
                    for policy, name in zip(policies, names, strict=True):
                        spec = RunSpec(mode=mode, policy=policy, workload=workload, seed=1 + repeat)
                        spec = spec.but(label=name if name != policy else "")
                        kept.append(RunResult.from_dict(toy({"spec": spec.as_dict()})), repeat)
    return str(folder)


def swept(folder: Path, *, job: bool = False) -> str:
    """The directory of a sweep: two policies, three orders, two delays, two seeds."""
    with RunDirectory.open(str(folder), kind="sweep", settings={"grid": {}}, costs={}, command=["sweep"]) as kept:
        grid = itertools.product(("rotate", "boundary"), (9, 0, 4), (2_000_000_000, 50_000_000), (2, 1))
        for policy, order, delay_ns, seed in (*grid, ("off", 9, 0, 1), ("off", 9, 0, 2)):
            spec = RunSpec(policy=policy, min_order=order, delay_ns=delay_ns, seed=seed, work_pages=1000 if job else 0)
            result = RunResult.from_dict(toy({"spec": spec.as_dict()}))
            result.metrics["gib_min"] = (result.metrics["gib_min"] or 0) * (1 - 0.03 * (9 - order))
            if job:
                result.metrics["job_s"] = 1e9 / (result.metrics["page_ops_per_s"] or 1)
            kept.append(result, 0)
    return str(folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("compared") / "x"
    return load_experiment(compared(folder, "boundary", "hint", "off"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return load_experiment(swept(tmp_path_factory.mktemp("swept") / "x"))


class Page(html.parser.HTMLParser):
    """What is in a page: tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Keep it."""
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        """Keep it."""
        self.text += data


def by_hand(experiment: Experiment, mode: str, workload: str, name: str, metric: str) -> float:
    values = [
        sample.result.metrics[metric]
        for sample in experiment.samples
        if (sample.result.spec.mode, sample.result.spec.workload, sample.name) == (mode, workload, name)
    ]
    assert len(values) == 5
    return statistics.median(value for value in values if value is not None)


def test_names_have_the_settings_that_vary_within_a_name() -> None:
    specs = [
        RunSpec(policy="boundary", min_order=9, delay_ns=250_000_000, seed=1),
        RunSpec(policy="boundary", min_order=0, delay_ns=None, seed=2),
        RunSpec(policy="off", seed=3),
        RunSpec(policy="off", seed=4, mode="live", workload="churn"),
        RunSpec(policy="rotate", label="rotate:delay=2s", delay_ns=2_000_000_000),
    ]
    assert name_results([made_result(spec) for spec in specs]) == [
        "boundary, order 9, delay 250ms",
        "boundary, order 0, delay of the policy",
        "off",
        "off",
        "rotate:delay=2s",
    ]


def test_settings_in_words() -> None:
    assert [format_ns(value) for value in (0, 5, 1500, 2_000_000, 3_000_000_000)] == ["0", "5ns", "1500ns", "2ms", "3s"]
    assert setting_text("shuffle", value=False) == "no shuffle"
    assert setting_text("memory", 1 << 30) == "memory 1GiB"


def test_samples_stand_as_the_settings_have_them(comparison: Experiment) -> None:
    assert [(block[0], block[1], [row.name for row in block[2]]) for block in comparison.comparison.blocks()] == [
        (mode, workload, ["boundary", "hint", "off"])
        for mode in ("live", "virtual")
        for workload in ("memhog", "churn")
    ]


def test_summary_csv_has_every_figure_and_medians_by_hand(comparison: Experiment) -> None:
    rows = list(csv.DictReader(io.StringIO(summary_csv(comparison.comparison))))
    assert {row["figure"] for row in rows} == set(COMPARED)
    assert len(rows) == 2 * 2 * 3 * len(COMPARED)
    for row in rows:
        if row["figure"] in METRICS and row["figure"] != "job_s" and row["policy"] != "off":
            expected = by_hand(comparison, row["mode"], row["workload"], row["policy"], row["figure"])
            assert float(row["median"]) == expected, row
            assert len(row["values"].split(";")) == int(row["n"]) == 5
    tested = {row["figure"] for row in rows if row["p"]}
    assert tested == set(TESTED)


def test_runs_csv_has_a_line_a_run(comparison: Experiment) -> None:
    rows = list(csv.DictReader(io.StringIO(runs_csv(comparison.samples))))
    assert len(rows) == len({row["key"] for row in rows}) == 2 * 2 * 3 * 5
    for row, sample in zip(rows, comparison.samples, strict=True):
        assert row["key"] == sample.result.spec.key()
        assert row["gib_min"] == repr(sample.result.metrics["gib_min"])
        assert int(row["seed"]) == sample.result.spec.seed
    assert {row["t90_s"] for row in rows if row["policy"] == "off"} == {""}


def test_tables_have_the_rows_of_the_list(comparison: Experiment) -> None:
    tables = comparison_tables(comparison.comparison)
    assert [table.title for table in tables][:4] == [
        "memhog, live", "churn, live", "memhog, virtual time", "churn, virtual time",
    ]  # fmt: skip
    for table in tables[:4]:
        titles = [row[0].partition(" [")[0] for row in table.rows]
        assert titles == [COMPARED[name].title for name in TESTED]
        assert table.headers == ("", "boundary", "hint", "off")
    assert len(tables[4].rows) == 2 * 3 * 3
    footprint = next(row for row in tables[0].rows if row[0].startswith("footprint"))
    expected = by_hand(comparison, "live", "memhog", "hint", "gib_min")
    assert footprint[2].startswith(f"{expected:.4f} ± ")


def test_a_sweep_has_a_row_a_configuration(sweep: Experiment) -> None:
    (table,) = comparison_tables(sweep.comparison)
    assert len(table.rows) == 2 * 3 * 2 + 1
    assert [row[0] for row in table.rows][:2] == ["boundary, order 0, delay 50ms", "boundary, order 0, delay 2s"]
    assert table.headers[1] == "throughput against off [%]"
    assert sweep.comparison.tests == 0


def test_markdown_keeps_hostile_text_in_its_cell(tmp_path: Path) -> None:
    experiment = load_experiment(compared(tmp_path / "x", "boundary", "off", modes=("live",), label=HOSTILE))
    text = markdown("title", ["finding"], comparison_tables(experiment.comparison), ["note"])
    header = next(line for line in text.splitlines() if line.startswith("|  | "))
    assert len(re.split(r"(?<!\\)\|", header)) == 5, "an empty end on both sides and three cells"
    assert "<script>" not in re.sub(r"\\.", "", text)


def test_findings_tell_footprint_throughput_and_tests(comparison: Experiment) -> None:
    told = findings(comparison)
    assert told[0].startswith("memhog, live: against off, boundary has ")
    off, hint = (by_hand(comparison, "live", "memhog", name, "gib_min") for name in ("off", "hint"))
    assert f"hint has {100 * (off - hint) / off:.1f} % less footprint" in told[0]
    assert "compared with boundary: hint is worse in throughput against off and footprint" in told[0]
    assert told[-1] == "Virtual time is within 10 % of live in all 18 figures compared."
    assert headline(comparison) == "boundary, hint and off, side by side"
    assert what_was_run(comparison).startswith("60 runs of memhog and churn: 30 with real processes and 30 in virtual")


def test_findings_flag_what_is_far_and_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    settings = {"policies": ["off"], "base": "off", "workloads": ["churn"]}
    with RunDirectory.open(str(folder), kind="compare", settings=settings, costs=None, command=[]) as kept:
        for mode, gib_min in (("live", 2.0), ("virtual", 3.0)):
            spec = RunSpec.from_dict({"mode": mode, "policy": "off", "workload": "churn"})
            kept.append(made_result(spec, gib_min=gib_min, page_ops_per_s=5.0, violations=1.0), 0)
    told = " ".join(findings(load_experiment(str(folder))))
    assert "beyond 10 % of live in 1 of 3 figures: footprint of off on churn (+50 %)" in told
    assert "2 violations in 2 of 2 runs" in told


def test_findings_of_a_sweep_are_ends_and_knee_of_its_front(sweep: Experiment) -> None:
    (told,) = findings(sweep)
    (front,) = fronts([sample.result for sample in sweep.samples])
    assert front.knee is not None
    assert f"The knee is {front.knee.name}" in told
    assert f"The smallest footprint has {front.best[0].name}" in told
    assert "of 13 settings no other beats" in told


def test_the_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    folder = compared(tmp_path / "x", "boundary", "hint", "off", modes=("live",), label=HOSTILE)
    paths = write_report(load_experiment(folder), str(tmp_path / "report"), force=False)
    text = Path(paths[-1]).read_text()
    page = Page(text)
    assert "<script" not in text
    assert HOSTILE in page.text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.search(r"url\(|@import|<link|<iframe|https?://", text)
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object", "embed", "base"}]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert all((image["src"] or "").startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for name in TESTED:
        assert COMPARED[name].title in page.text
    for part in ("compare --policies", '"fault_ns": 9', '"cores_usable"', "results.jsonl", "summary.csv"):
        assert part in page.text
    parts = ["live: against off", "Figures", "Pictures", "How it was run", "Raw data"]
    assert sorted(parts, key=page.text.index) == parts


@pytest.mark.stress
def test_a_report_is_the_same_to_the_byte_each_time(tmp_path: Path) -> None:
    folder = compared(tmp_path / "x", "boundary", "off", modes=("virtual",))
    for name in ("a", "b"):
        write_report(load_experiment(folder), str(tmp_path / name), force=False)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert {"summary.csv", "runs.csv", "tables.md", "pareto-virtual.svg", "footprint-virtual.png", PAGE} <= set(first)
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compared(tmp_path / "x", "boundary", "off", modes=("virtual",))
    assert main(["report", folder]) == 0
    assert capsys.readouterr().out == f"{folder}/report/{PAGE}\n"
    page = Path(folder, "report", PAGE)
    page.write_text("mine")
    Path(folder, "report", "summary.csv").unlink()
    assert main(["report", folder]) == 2
    assert "--force" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert not Path(folder, "report", "summary.csv").exists(), "nothing is written before all is known to be free"
    assert main(["report", folder, "--force"]) == 0
    assert page.read_text() != "mine"
    assert not list(Path(folder, "report").glob("*.part"))


def test_out_names_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = swept(tmp_path / "x", job=True)
    assert main(["report", folder, "--out", str(tmp_path / "deep" / "er")]) == 0
    assert (tmp_path / "deep" / "er" / PAGE).exists()
    assert not (tmp_path / "x" / "report").exists()
    capsys.readouterr()
    assert main(["report", folder, "--out", str(tmp_path / "x" / "run.json")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"policies": ["off"]}
    with RunDirectory.open(str(tmp_path / "x"), kind="compare", settings=settings, costs=None, command=[]):
        pass
    with pytest.raises(UsageError, match="no result yet"):
        load_experiment(str(tmp_path / "x"))


def test_another_kind_of_directory_is_refused(tmp_path: Path) -> None:
    with RunDirectory.open(str(tmp_path / "x"), kind="replay", settings={}, costs=None, command=[]):
        pass
    with pytest.raises(UsageError, match="holds a replay"):
        load_experiment(str(tmp_path / "x"))


def test_the_command_in_the_page_can_be_typed(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    settings = {"policies": ["off"], "base": "off"}
    command = ["python", "-m", "lab", "compare", "--out", "a b"]
    with RunDirectory.open(str(folder), kind="compare", settings=settings, costs=None, command=command) as kept:
        kept.append(made_result(RunSpec(policy="off")), 0)
    paths = write_report(load_experiment(str(folder)), str(tmp_path / "report"), force=False)
    assert "python -m lab compare --out 'a b'" in Page(Path(paths[-1]).read_text()).text
    assert json.loads((folder / "run.json").read_text())["command"] == command


@pytest.mark.parametrize("name", [".", "series", "series/new", "alias"])
def test_a_report_does_not_go_where_the_experiment_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = swept(tmp_path / "s")
    (Path(folder) / "alias").symlink_to(folder)
    before = sorted(Path(folder).rglob("*"))
    assert main(["report", folder, "--force", "--out", os.path.join(folder, name)]) == 2
    assert "is where the experiment is kept; name another folder" in capsys.readouterr().err
    assert sorted(Path(folder).rglob("*")) == before


def test_what_cannot_be_reported_on_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["report", ""], "error: DIR: is empty; name the folder of a sweep or a comparison"),
        (["report", "/dev/null"], "error: /dev/null: is no folder; name the folder of a sweep or a comparison"),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"{said}\n"


def test_columns_of_words_stand_to_the_left_on_the_page_and_in_markdown(comparison: Experiment) -> None:
    """The last table has a workload, a policy and a figure in front, the others a name."""
    tables = comparison_tables(comparison.comparison)
    assert [table.words for table in tables] == [1, 1, 1, 1, 3]
    rules = [line for line in markdown("t", [], tables, []).splitlines() if line.startswith("|---")]
    assert [rule.count("---|") for rule in rules] == [table.words for table in tables]
    shown = Page(render_page(comparison, tables, []))
    heads = [attributes.get("class") == "words" for tag, attributes in shown.tags if tag == "th"]
    assert heads == [at < table.words for table in tables for at in range(len(table.headers))]
