"""``python -m lab import``: the file, the health, the snapshots, and that bad input leaves nothing behind."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from common.native import JIT
from lab.cli import main
from lab.trace.columns import DTYPES
from lab.trace.events import MAX_ORDER, Event
from lab.trace.health import Health, Watch
from lab.trace.reader import Batch, Source, read_all
from lab.trace.snapshot import UNKNOWN_PAGES, Snapshot, read_snapshot
from lab.trace.store import TraceFile, TraceWriter
from tests.lab.traces import FORMS, Row, ftrace, read, recording, run_import, same, story

ROOT = Path(__file__).resolve().parents[2]
ROWS = story(400)
N_PAGES = 1 << 15


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def imported(folder: Path, text: str, *flags: str) -> dict[str, Any]:
    """Import a text; the answer as JSON."""
    trace = write(folder / "trace.txt", text)
    answer = folder / "answer.json"
    assert (
        run_import(trace, "--out", str(folder / "t.parquet"), "--json", str(answer), "--force", "--quiet", *flags) == 0
    )
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def health_of(rows: list[Row], start: Snapshot | None = None) -> Health:
    folder_free = io.BytesIO(recording(rows).encode())
    watch = Watch(start)
    for batch in read_all(["rows"], opener=lambda _name: folder_free):
        watch.see(batch)
    return watch.health()


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_what_the_text_said(form: str, tmp_path: Path) -> None:
    name, printed = FORMS[form]
    answer = imported(tmp_path, printed(ROWS) + ("" if "page" in form else "#\n"))
    trace = TraceFile(str(tmp_path / "t.parquet"))
    columns = read(tmp_path / "trace.txt")
    same(columns, ROWS)
    for column, values in trace.columns().items():
        assert values.dtype == DTYPES[column]
        assert np.array_equal(values, columns[column]), column
    assert len(trace) == len(ROWS) == answer["health"]["events"] == trace.metadata["health"]["events"]
    assert trace.metadata["page_bytes"] == 4096
    assert trace.metadata["sources"][0]["format"] == name
    assert trace.metadata["events"]["mm_page_free"] == Event.mm_page_free
    assert trace.metadata["clock"] == ("monotonic" if form == "recording" else "unknown")


def test_texts_survive(tmp_path: Path) -> None:
    said = "nents=2 0xe400:10 0xcc00:9 bytes=6291456"
    imported(tmp_path, recording(ROWS) + f"99.000000001 [0] 29 report: {said}\n99.1 [1] 7 mark: ümläut  end\n")
    trace = TraceFile(str(tmp_path / "t.parquet"))
    rows, texts = trace.texts()
    assert texts == [said, "ümläut  end"]
    columns = trace.columns("t_ns", "event")
    assert columns["t_ns"][rows].tolist() == [99_000_000_001, 99_100_000_000]
    assert columns["event"][rows].tolist() == [Event.report, Event.mark]


def test_row_groups_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.trace.store._GROUP_ROWS", 64)
    monkeypatch.setattr("lab.trace.reader._TEXT_BYTES", 2048)
    monkeypatch.setattr("lab.trace.reader._PEEK_BYTES", 512)
    monkeypatch.setattr("lab.trace.formats._READ_BYTES", 700)
    imported(tmp_path, ftrace(ROWS))
    trace = TraceFile(str(tmp_path / "t.parquet"))
    groups = list(trace.groups("pfn", "t_ns"))
    assert len(groups) > 3
    assert np.concatenate([group["pfn"] for group in groups]).tolist() == [row.pfn for row in ROWS]


def test_a_file_is_a_tenth_of_its_text_or_less(tmp_path: Path) -> None:
    answer = imported(tmp_path, recording(story(20_000)))
    assert answer["bytes"] * 10 <= answer["text_bytes"]


def test_standard_input_and_the_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(recording(ROWS).encode()))))
    assert run_import("-", "--quiet") == 0
    assert TraceFile("trace.parquet").columns("pfn")["pfn"].tolist() == [row.pfn for row in ROWS]
    write(tmp_path / "boot.txt.gz", recording(ROWS))
    assert run_import("boot.txt.gz", "--quiet") == 0
    assert (tmp_path / "boot.parquet").exists()


def test_health_is_shown_and_json_keeps_standard_output_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write(tmp_path / "a", recording(ROWS))
    assert run_import(trace, "--out", str(tmp_path / "a.parquet"), "--quiet") == 0
    out, err = capsys.readouterr()
    assert "known pages" in out
    assert err == ""
    assert run_import(trace, "--out", str(tmp_path / "b.parquet"), "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["health"]["by_type"]["mm_page_free"] > 0
    assert "known pages" in err


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    trace = write(tmp_path / "a", recording(ROWS))
    out = write(tmp_path / "a.parquet", "precious")
    with pytest.raises(UsageError, match="--force"):
        run_import(trace, "--out", out)
    assert Path(out).read_text() == "precious"
    with pytest.raises(UsageError, match="name another path"):
        run_import(trace, "--out", trace, "--force")


@pytest.mark.parametrize(
    ("tail", "flags"),
    [
        ("99.0 [0] 1 mm_page_free: pfn=0x12\n", ()),
        ("CPU:1 [LOST 5 EVENTS]\n", ("--strict",)),
        ("99.0 [0] 1 mm_page_free: pfn=0x8001 order=0\n", ("--start", "flags")),
    ],
)
def test_bad_input_leaves_nothing_behind(tail: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path / "flags", snapshot_bytes({0: 3}))
    words = tuple(str(tmp_path / word) if word == "flags" else word for word in flags)
    trace = write(tmp_path / "a", recording(ROWS) + tail)
    before = sorted(path.name for path in tmp_path.iterdir())
    out, answer = tmp_path / "a.parquet", tmp_path / "a.json"
    with pytest.raises(UsageError) as caught:
        run_import(trace, "--out", str(out), "--json", str(answer), "--quiet", *words)
    assert caught.value.exit_code == 2
    assert trace in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), TraceWriter(str(tmp_path / "t.parquet")) as writer:
        writer.write(read(write(tmp_path / "a", recording(ROWS))))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more", b"text"])
def test_what_is_no_imported_trace_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="python -m lab import"):
        TraceFile(write(tmp_path / "x.parquet", data))
    with pytest.raises(UsageError, match="python -m lab import"):
        TraceFile(str(tmp_path / "absent"))


def read_whole(path: str) -> None:
    found = TraceFile(path)
    found.columns()
    found.texts()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_a_damaged_file_is_refused(share: float, tmp_path: Path) -> None:
    """Wherever the damage is: pages have checksums."""
    path = tmp_path / "t.parquet"
    with TraceWriter(str(path)) as writer:
        writer.write(read(write(tmp_path / "a", recording(story(2000)))))
        writer.finish({})
    data = bytearray(path.read_bytes())
    at = int(len(data) * share)
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(UsageError, match="import"):
        read_whole(str(path))


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_never_comes_in_the_place_of_a_pipe(force: tuple[str, ...], tmp_path: Path) -> None:
    """Nor of a device: what a rename would do to /dev/null."""
    pipe = tmp_path / "t.parquet"
    os.mkfifo(pipe)
    trace = write(tmp_path / "a", recording(ROWS))
    assert main(["import", trace, "--out", str(pipe), "--quiet", *force]) == 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(UsageError, match="a pipe"):
        TraceWriter(str(pipe))
    assert stat.S_ISFIFO(pipe.stat().st_mode)


# Health


def test_a_sound_trace_has_no_gap() -> None:
    health = health_of(ROWS)
    assert health.refusals == []
    facts = health.facts
    assert facts["verdict"] == "complete"
    frees = sum(row.event == Event.mm_page_free for row in ROWS)
    batched = sum(row.event == Event.mm_page_free_batched for row in ROWS)
    assert (facts["frees"], facts["by_type"]["mm_page_free_batched"]) == (frees, batched)
    assert facts["cpus"] == sorted({row.cpu for row in ROWS})
    assert facts["span_s"] == pytest.approx((ROWS[-1].t_us - ROWS[0].t_us) / 1e6)


def event(t_us: int, kind: Event, pfn: int, order: int = 0) -> Row:
    return Row(t_us, 0, 1, kind, pfn, order)


CONTRADICTIONS = {
    "frees_of_unknown": ([event(1, Event.mm_page_free, 8)], False),
    "frees_of_free": ([event(1, Event.mm_page_free, 8), event(2, Event.mm_page_free, 8)], True),
    "allocations_of_allocated": ([event(1, Event.mm_page_alloc, 8, 1), event(2, Event.mm_page_alloc, 9)], True),
    "batched_without_free": ([event(1, Event.mm_page_alloc, 8), event(2, Event.mm_page_free_batched, 8)], True),
    "removed_not_on_list": ([event(at, Event.mm_page_alloc_zone_locked, 8) for at in (1, 2)], True),
    "added_already_on_list": ([event(at, Event.mm_page_pcpu_drain, 8) for at in (1, 2)], True),
    "misaligned": ([event(1, Event.mm_page_alloc, 9, 3)], True),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_each_contradiction_is_found_and_explained(what: str) -> None:
    rows, refused = CONTRADICTIONS[what]
    health = health_of(rows)
    assert health.facts[what] == 1
    others = set(CONTRADICTIONS) - {what, "frees_of_unknown"}
    assert not any(health.facts[other] for other in others)
    assert bool(health.refusals) == refused
    note = next(note for note in health.facts["notes"] if note["key"] == what)
    assert note["text"].startswith("1 ")
    assert ": " in note["text"]
    assert any(note["text"] in line for line in health.lines())


def test_a_free_and_its_batched_event_are_one() -> None:
    rows = [event(1, Event.mm_page_alloc, 8), event(2, Event.mm_page_free, 8), event(3, Event.mm_page_free_batched, 8)]
    facts = health_of(rows).facts
    assert (facts["frees"], facts["batched_without_free"], facts["frees_of_free"]) == (1, 0, 0)


@pytest.mark.parametrize(
    "cause", ["CPU:1 [LOST 5 EVENTS]\n", "# entries-in-buffer/entries-written: 1/9   #P:1\n", "noise\n"]
)
def test_strict_refuses_what_is_lost(cause: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--strict: .* none allowed"):
        imported(tmp_path, cause + recording(ROWS), "--strict")
    assert imported(tmp_path, cause + recording(ROWS))["health"]["verdict"] == "with gaps"
    assert imported(tmp_path, recording(ROWS), "--strict")["health"]["verdict"] == "complete"


def test_the_first_line_that_is_not_recognised_is_shown(tmp_path: Path) -> None:
    health = imported(tmp_path, recording(ROWS[:5]) + "what is this?\n" + recording(ROWS[5:]))["health"]
    assert health["sources"][0]["first_unrecognised"] == "line 6: 'what is this?'"
    assert any("line 6: 'what is this?'" in note["text"] for note in health["notes"])


# Snapshots


def snapshot_bytes(blocks: dict[int, int], reported: tuple[int, ...] = (), n_pages: int = N_PAGES) -> bytes:
    """/proc/kpageflags of a machine with these free blocks (pfn: order); the rest is anonymous memory."""
    flags = np.full(n_pages, 1 << 12 | 1 << 5, np.uint64)
    for pfn, order in blocks.items():
        flags[pfn : pfn + (1 << order)] = 1 << 10
        if pfn in reported:
            flags[pfn] |= np.uint64(1 << 3)
    return flags.astype("<u8").tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_both_forms_of_a_snapshot_agree(packed: bool, tmp_path: Path) -> None:
    blocks, reported = {4: 2, 8: 0, 1024: 10, 2048: 10, 3584: 9}, (1024, 3584)
    table = "pfn,order,reported,host_allocated_pages\n"
    table += "".join(f"{pfn},{order},{int(pfn in reported)},{1 << order}\n" for pfn, order in blocks.items())
    flags = snapshot_bytes(blocks, reported)
    data = [gzip.compress(each) if packed else each for each in (flags, table.encode())]
    one, other = (read_snapshot(write(tmp_path / str(number), each)) for number, each in enumerate(data))
    for snapshot in (one, other):
        assert snapshot.pfn.tolist() == sorted(blocks)
        assert snapshot.order.tolist() == [blocks[pfn] for pfn in sorted(blocks)]
        assert snapshot.reported.tolist() == [pfn in reported for pfn in sorted(blocks)]
        assert snapshot.free_pages == sum(1 << order for order in blocks.values())
    assert set(one.host_allocated_pages.tolist()) == {UNKNOWN_PAGES}
    assert other.host_allocated_pages.tolist() == [1 << blocks[pfn] for pfn in sorted(blocks)]
    assert (one.n_pages, other.n_pages) == (N_PAGES, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5000))
def test_free_pages_become_merged_blocks(seed: int, n_pages: int) -> None:
    """Each free page is in one aligned block, and no two blocks are buddies that should have merged."""
    from lab.trace.snapshot import free_heads

    chance = np.random.default_rng(seed)
    free = np.repeat(chance.random(n_pages) < 0.7, chance.integers(1, 300, n_pages))[:n_pages]
    heads, orders = free_heads(free)
    covered = np.zeros(n_pages, np.int64)
    blocks = list(zip(heads.tolist(), orders.tolist(), strict=True))
    for pfn, order in blocks:
        assert pfn % (1 << order) == 0
        covered[pfn : pfn + (1 << order)] += 1
    assert np.array_equal(covered, free.astype(np.int64))
    assert not {(pfn ^ (1 << order), order) for pfn, order in blocks if order < MAX_ORDER} & set(blocks)


BAD_SNAPSHOTS = {
    "cut in an entry": (snapshot_bytes({0: 3})[:-3], "no multiple of 8"),
    "no free page": (snapshot_bytes({}), "no free page"),
    "noise": (bytes(range(256)) * 8, "which no kernel has"),
    "a page beyond 1 TiB": (b"pfn,order\n4294967295,0\n", "1 TiB"),
    "a table without order": (b"pfn,pages\n1,2\n", "line 1"),
    "words": (b"pfn,order,reported,host_allocated_pages\n8,0,0,0\n8,x,0,0\n", "line 3"),
    "an order beyond all": (b"pfn,order\n8,11\n", "orders 0 to 10"),
    "misaligned": (b"pfn,order\n9,1\n", "not aligned"),
    "overlapping": (b"pfn,order\n0,4\n8,2\n", "overlap"),
    "more than a block": (b"pfn,order,reported,host_allocated_pages\n8,0,0,2\n", "line 2"),
    "a cut table": (b"pfn,order,reported,host_allocated_pages\n8,0,0,1", "breaks off"),
    "no row": (b"pfn,order\n", "no free block"),
    "empty": (b"", "is empty"),
    "a cut archive": (gzip.compress(snapshot_bytes({0: 3}))[:-9], "ends in the middle"),
}


@pytest.mark.parametrize("what", BAD_SNAPSHOTS)
def test_a_wrong_snapshot_is_refused(what: str, tmp_path: Path) -> None:
    data, wanted = BAD_SNAPSHOTS[what]
    path = write(tmp_path / "snapshot", data)
    with pytest.raises(UsageError, match=wanted) as caught:
        read_snapshot(path)
    assert str(caught.value).startswith(path)
    assert "expected" in str(caught.value)


def test_a_table_may_stop_at_the_order(tmp_path: Path) -> None:
    snapshot = read_snapshot(write(tmp_path / "s", "pfn,order\n16,4\n0,2\n"))
    assert (snapshot.pfn.tolist(), snapshot.reported.tolist()) == ([0, 16], [False, False])
    snapshot = read_snapshot(write(tmp_path / "s", "pfn,order,reported\n16,4,1\n0,2,0\n"))
    assert (snapshot.pfn.tolist(), snapshot.reported.tolist()) == ([0, 16], [False, True])


def test_a_snapshot_makes_every_page_known(tmp_path: Path) -> None:
    start = read_snapshot(write(tmp_path / "s", snapshot_bytes({0: 10})))
    rows = [
        event(1, Event.mm_page_alloc_zone_locked, 8),
        event(2, Event.mm_page_alloc, 8),
        event(3, Event.mm_page_free, 2000),
    ]
    with_it, without = health_of(rows, start).facts, health_of(rows).facts
    assert with_it["known_share"] == {"from_events": 2 / N_PAGES, "with_snapshot": 1.0, "at_the_event": 1.0}
    assert (with_it["frees_of_unknown"], without["frees_of_unknown"]) == (0, 1)
    assert without["known_share"]["with_snapshot"] is None


def test_another_machines_snapshot_is_refused(tmp_path: Path) -> None:
    start = read_snapshot(write(tmp_path / "s", snapshot_bytes({0: 10})))
    rows = [event(at, Event.mm_page_alloc_zone_locked, 2000 + at) for at in range(1500)]
    with pytest.raises(UsageError, match="same machine, taken when the trace begins"):
        health_of(rows, start)
    watch = Watch(start)
    with pytest.raises(UsageError, match=r"far: line 1: pfn 0x8000 is beyond the 32768 pages"):
        watch.see(
            Batch(
                next(
                    read_all(
                        ["x"], opener=lambda _n: io.BytesIO(recording([event(1, Event.mm_page_free, N_PAGES)]).encode())
                    )
                ).columns,
                Source("far"),
            )
        )


@pytest.mark.stress
@pytest.mark.skipif(not JIT, reason="plain Python reads too slowly for a large trace")
def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    """Sixteen times the text, some hundred MiB, and hardly more memory at the peak."""
    program = (
        "import resource, sys\n"
        "from tests.lab.traces import run_import\n"
        "run_import('-', '--out', sys.argv[1], '--quiet')\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (150_000, 2_400_000):
        command = [sys.executable, "-c", program, str(tmp_path / f"{count}.parquet")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            for first in range(0, count, 10_000):
                lines = (
                    f"{10 + number // 10000}.{number % 10000:04d}00000 [0] 7 mm_page_free: "
                    f"pfn={number & 0xFFFF:#x} order=0\n"
                    for number in range(first, first + 10_000)
                )
                child.stdin.write("".join(lines).encode())
            child.stdin.close()
            out = child.stdout.read().decode()
        assert child.returncode == 0
        peaks.append(int(out.split()[-1]) << 10)
    assert peaks[1] - peaks[0] < 192 << 20, peaks


def test_an_import_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from lab.trace.columns import Columns\n"
        "from lab.trace.store import TraceWriter\n"
        "with TraceWriter(sys.argv[1]) as writer:\n"
        "    writer.write(Columns.empty(1 << 20))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "trace.parquet")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []
