"""``python -m lab advise``: the page, and what each half of the recording would have led to."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.advise.advise import Advice, Question, advise, doubts
from lab.advise.choose import Want, choose
from lab.advise.grid import DEFAULT, OFF
from lab.advise.halves import Half, halves, middle_ns, rest
from lab.advise.measure import Drop
from lab.advise.page import page
from lab.advise.picture import pictures
from lab.advise.text import markdown
from lab.advise.wants import parse_target
from lab.advise.words import FRONT, GIVES, sections
from lab.cli import main
from lab.replay.engine import Prices
from lab.report.page import Picture
from lab.report.tables import TableData
from tests.lab.test_advise import GRID, MIB, ORDER_0, ORDER_4, QUICK, ROWS, held, recorded, row
from tests.lab.test_report import HOSTILE, Page

S = 10**9


@pytest.fixture(scope="module")
def drawn() -> dict[str, Picture]:
    return pictures(made())


def made(name: str = "trace.txt", **others: Any) -> Advice:
    """The advice that comes of the figures of ``ROWS``, of which the first half has 40 %, and 10 % of the cost."""
    whole = [
        row(one.setting, one.gib_min, one.host_cpu_s, one.refault_s, resident=held((0, 90), (40, 60), (100, 30)))
        for one in ROWS
    ]
    first = [row(one.setting, one.gib_min * 0.4, one.host_cpu_s * 0.1, passes=2) for one in ROWS]
    want = Want(100.0)
    facts: dict[str, Any] = {
        "question": Question(traces=(name,), start="start.csv"),
        "health": {"verdict": "complete", "notes": [{"level": "note", "text": HOSTILE}]},
        "refusals": [],
        "span_s": 100.0,
        "moves": 1000,
        "used_end_bytes": 20 * MIB,
        "want": want,
        "rows": whole,
        "choice": choose(whole, want),
        "prices": Prices(),
        "halves": halves(whole, first, want, 50 * S, 100 * S),
    }
    return Advice(**{**facts, **others})


def test_the_second_half_is_the_whole_without_the_first() -> None:
    whole = row(DEFAULT, 8, 0.5, 0.25, refaults=9, passes=5, reports=7, resident=held((0, 90), (40, 60), (70, 30)))
    first = row(DEFAULT, 5, 0.2, 0.05, refaults=2, passes=3, reports=4)
    second = rest(whole, first, 50 * S)
    assert (second.gib_min, second.refaults, second.passes, second.reports) == (3, 7, 2, 3)
    assert second.host_cpu_s == pytest.approx(0.3)
    assert second.refault_s == pytest.approx(0.2)
    assert second.resident == held((50, 60), (70, 30)), "it begins with what is held then"
    assert second.end_bytes == whole.end_bytes


def test_each_half_is_chosen_by_its_own_figures() -> None:
    """The whole's knee is order 4; in the first half the quick one costs nothing, so the second half bears its cost."""
    whole = [*ROWS[:4], row(QUICK, 3.9, 4)]
    first = [row(one.setting, one.gib_min / 2, one.host_cpu_s / 2, passes=2) for one in ROWS[:4]]
    first.append(row(QUICK, 0.5, 0.01, passes=2))
    want = Want(100.0)
    early, late = halves(whole, first, want, 50 * S, 100 * S)
    assert choose(whole, want).row.setting == ORDER_4
    assert early.choice is not None
    assert early.choice.row.setting == QUICK
    assert late.choice is not None
    assert late.choice.row.setting == ORDER_4
    found = made(rows=whole, choice=choose(whole, want), halves=(early, late))
    assert "had only the first half been recorded, it would be: rotate, order 9, 0.1 s, 32" in doubts(found)
    assert "By the second half of the trace alone the choice is the same." in markdown(found)
    told = found.as_dict()["halves"]
    assert [one["same"] for one in told] == [False, True]
    assert told[0]["delay_ns"] == QUICK.delay_ns


def test_a_budget_is_that_share_of_each_half() -> None:
    """1 % of 100 s is 1 s, and half a second of each half: order 4 costs 0.9 s of the first."""
    first = [row(one.setting, one.gib_min / 2, one.host_cpu_s * 0.9, passes=2) for one in ROWS]
    early, late = halves(ROWS, first, Want(100.0, budget=0.01), 50 * S, 100 * S)
    assert early.choice is not None
    assert early.choice.row.setting == DEFAULT
    assert late.choice is not None
    assert late.choice.row.setting == ORDER_4


def test_a_half_in_which_nothing_can_be_chosen_says_why() -> None:
    rows = [replace(one, resident=held((0, 90), (50, 60))) for one in ROWS]
    quiet = [row(one.setting, one.gib_min, one.host_cpu_s, passes=0) for one in ROWS]
    drops = (Drop(10 * S, MIB, 0),)
    for first, want, whys in (
        ([], Want(100.0), ("no page reaches or leaves the buddy lists", "the other half")),
        (quiet, Want(100.0), ("no setting reports anything", "")),
        (rows, Want(100.0, target=parse_target("1MiB in 2s"), drops=drops), ("", "no large free")),
    ):
        for half, why in zip(halves(rows, first, want, 50 * S, 100 * S), whys, strict=True):
            assert why in half.why_not
            assert (half.choice is None) == bool(why)
    assert "nothing can be chosen: it is too quiet" in markdown(
        made(halves=(Half("first", why_not="it is too quiet"),))
    )


def test_the_first_half_is_what_a_recording_of_it_alone_gives(tmp_path: Path) -> None:
    """Cut where the whole's middle is, on the same machine: the same figures to the byte."""
    words = recorded(tmp_path)
    trace, start = Path(words[0]), words[2]
    settings: dict[str, Any] = {"policies": ("rotate",), "orders": (0, 9), "delays_ns": (S,), "capacities": (2,)}
    machine: dict[str, Any] = {"memory_bytes": 16 * MIB, "min_free_kbytes": 32, "engine": "inline"}
    whole = advise(Question(traces=(str(trace),), start=start, **settings, **machine))
    cut_ns = middle_ns(9 * S, 30 * S)
    lines = [line for line in trace.read_text().splitlines(keepends=True) if float(line.split()[0]) * S <= cut_ns]
    early = tmp_path / "early.txt"
    # An event that moves nothing, so that it ends where the first half does.
    early.write_text("".join(lines) + f"{cut_ns / S:.9f} [0] 7 mm_page_alloc: pfn=0x5 order=0 migratetype=1 gfp=0x0\n")
    alone = advise(Question(traces=(str(early),), start=start, **settings, **machine))
    first, second = whole.halves
    assert [one.as_dict() for one in first.rows] == [one.as_dict() for one in alone.rows]
    assert any(one.reports for one in first.rows)
    assert first.choice is not None
    assert first.choice.row.setting == alone.choice.row.setting
    for one in second.rows:
        times, pages = np.array(one.resident).T
        area = float(((pages[1:] + pages[:-1]) / 2 * np.diff(times)).sum()) / 60 / 2**30
        assert one.gib_min == pytest.approx(area, rel=1e-6), "what is left is what the host held from there on"


def test_the_page_is_self_contained_and_escapes_what_it_shows(drawn: dict[str, Picture]) -> None:
    found = made(name=f"{HOSTILE}`a`**b**.txt")
    text = page(found, drawn, ["python", "-m", "lab", "advise", f"{HOSTILE} x"])
    shown = Page(text)
    assert "<script" not in text
    assert HOSTILE in shown.text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.search(r"url\(|@import|<link|<iframe|https?://", text)
    assert not [tag for tag, _ in shown.tags if tag in {"script", "link", "iframe", "object", "embed", "base"}]
    images = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert len(images) == 2
    assert all((image["src"] or "").startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)
    assert "<memballoon model='virtio'" in shown.text, "a flag that looks like an element is shown as it is typed"
    assert ("code", {}) in shown.tags
    assert ("strong", {}) in shown.tags


def test_page_and_markdown_say_the_same(drawn: dict[str, Picture]) -> None:
    """Every paragraph, line and cell of the sections stands in both."""
    found = made()
    text, shown = markdown(found), Page(page(found, drawn, ["advise"])).text
    assert [section.title for section in sections(found)] == ["The answer", GIVES, FRONT, "How sure this is"]
    bare = shown.replace("\n", " ")
    for section in sections(found):
        for part in section.parts:
            lines = part.rows if isinstance(part, TableData) else [(part,) if isinstance(part, str) else part]
            for cell in (cell for line in lines for cell in line):
                assert cell in text
                assert cell.replace("`", "").replace("**", "") in bare
    for one in found.rows:
        assert str(one.setting) in shown, "every setting that was tried, not the front alone"


def test_pictures_are_the_same_to_the_byte_each_time(drawn: dict[str, Picture]) -> None:
    assert [one.name for one in drawn.values()] == ["memory", "picture"]
    again = pictures(made())
    assert [(one.png, one.svg) for one in again.values()] == [(one.png, one.svg) for one in drawn.values()]


def test_the_command_and_both_halves_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["advise", *recorded(tmp_path), *GRID, "--orders", "0,9", "--out", str(out), "--quiet"]
    assert main(command) == 0
    told = json.loads((out / "data.json").read_text())
    assert [one["half"] for one in told["halves"]] == ["first", "second"]
    assert set(told["resident"]) == {"off", "default", "chosen"}
    shown = Page((out / "index.html").read_text()).text
    assert "python -m lab advise " in shown
    assert f"--out {out}" in shown
    assert {one["policy"] for one in told["rows"]} == {OFF.policy, ORDER_0.policy}
