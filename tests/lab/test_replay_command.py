"""``python -m lab replay`` on a recorded guest of our own making: what it reports is found again, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.geometry import Migratetype
from common.layout import FREE, KIND_MASK, REPORTED
from guest.allocator import entry
from guest.reporting.cycle import Cycle, Outcome
from lab.cli import main
from lab.experiment.engines import open_engine
from lab.replay.execute import execute
from lab.replay.timer import Timer
from tests.lab.test_replay import HEAD, new_zone


class Guest:
    """A zone of 16 MiB with order-0 work and passes of mainline, which writes down what a recording would say."""

    def __init__(self) -> None:
        self.zone = new_zone(min_order=4)
        self.cycle = Cycle(self.zone, "rotate", capacity=2)
        self.lines: list[str] = []
        self.t_ns = 5 * 10**9
        self.reported: list[list[tuple[int, int]]] = []

    def tell(self, text: str) -> None:
        self.t_ns += 1000
        self.lines.append(f"{self.t_ns // 10**9}.{self.t_ns % 10**9:09d} [0] 7 {text}\n")

    def take(self, order: int) -> int:
        pfn = self.zone.alloc(order, Migratetype.MOVABLE)
        assert pfn is not None
        self.tell(f"mm_page_alloc_zone_locked: pfn={pfn:#x} order={order} migratetype=1 percpu_refill=0")
        self.tell(f"mm_page_alloc: pfn={pfn:#x} order={order} migratetype=1 gfp=0x0")
        return pfn

    def give(self, pfn: int, order: int) -> None:
        self.zone.free(pfn, order)
        self.tell(f"mm_page_free: pfn={pfn:#x} order={order}")
        self.tell(f"mm_page_pcpu_drain: pfn={pfn:#x} order={order} migratetype=1")

    def report(self) -> None:
        self.tell("process:")
        blocks: list[tuple[int, int]] = []

        def send(batch: Any) -> Outcome:
            entries = list(zip(batch.pfns.tolist(), batch.orders.tolist(), strict=True))
            blocks.extend(entries)
            told = " ".join(f"{pfn:#x}:{order}" for pfn, order in entries)
            self.tell(f"report: nents={len(entries)} {told} bytes={sum(4096 << order for _, order in entries)}")
            self.tell("report_ret: ret=0")
            return Outcome.KEPT

        self.cycle.run(send)
        self.tell("process_ret:")
        self.reported.append(blocks)

    def snapshot(self) -> str:
        states = self.zone.page_states()
        heads = np.flatnonzero(states & KIND_MASK == FREE).tolist()
        return HEAD + "".join(
            f"{pfn},{int(states[pfn] & 0xF)},{int(bool(states[pfn] & REPORTED))},{0 if states[pfn] & REPORTED else 1 << int(states[pfn] & 0xF)}\n"  # noqa: E501  a row of the table
            for pfn in heads
        )


def recorded(folder: Path) -> tuple[Guest, str, str]:
    """A guest, its trace and its snapshot: some work, a pass that its budget stops, another, and what it touches."""
    guest = Guest()
    entry.register_device(guest.zone.address, 1, 0)
    held = {guest.take(0) for _ in range(3000)}
    guest.cycle.run(lambda _batch: Outcome.KEPT)  # and so on until it is idle
    while guest.zone.requested():
        guest.cycle.run(lambda _batch: Outcome.KEPT)
    guest.lines.clear()
    start = folder / "start.blocks.csv"
    start.write_text(guest.snapshot())
    chance = np.random.default_rng(5)
    for round_ in range(4):
        guest.t_ns += 3 * 10**9
        asked_ns = None
        chunks = sorted({pfn >> 5 for pfn in held})
        gone = {chunks[at] for at in chance.permutation(len(chunks))[: 40 + 5 * round_].tolist()}
        for pfn in chance.permutation(sorted(pfn for pfn in held if pfn >> 5 in gone)).tolist():
            guest.give(pfn, 0)
            held.remove(pfn)
            if asked_ns is None and guest.zone.requested():
                asked_ns = guest.t_ns
        guest.t_ns += 10**9
        held |= {guest.take(0) for _ in range(500)}
        while guest.zone.requested():
            guest.t_ns = Timer(2 * 10**9).fires_ns(asked_ns or guest.t_ns) + 1000
            asked_ns = None
            guest.report()
    trace = folder / "trace.txt"
    trace.write_text("".join(guest.lines))
    return guest, str(trace), str(start)


@pytest.fixture
def run_replay(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        out = tmp_path / "answer.json"
        assert main(["replay", *arguments, "--json", str(out), "--force", "--quiet"]) == 0
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


SMALL = ("--memory", "16MiB", "--min-free-kbytes", "32", "--min-order", "4", "--capacity", "2")


def test_a_recorded_guest_is_found_again_block_by_block(
    tmp_path: Path, run_replay: Callable[..., dict[str, Any]]
) -> None:
    """M2, M3, M6: every pass at its time with its very blocks, from the trace's zone events and the snapshot alone."""
    guest, trace, start = recorded(tmp_path)
    found = run_replay(trace, "--start", start, *SMALL, "--blocks")
    expected = [[list(block) for block in blocks] for blocks in guest.reported if blocks]
    assert len(expected) >= 4
    assert found["reported"] == expected
    against = found["against"]
    assert against["passes_within_5_percent"] == 1.0
    assert against["blocks_found"] == 1.0
    assert against["bytes_ratio"] == 1.0
    assert max(abs(row["t_s"] - row["real_t_s"]) for row in against["passes"]) < 0.01
    assert against["resident_off_mean"] < 0.01
    assert not any(found["unknown"].values())


def test_recorded_times_and_no_check_find_the_same(tmp_path: Path, run_replay: Callable[..., dict[str, Any]]) -> None:
    _, trace, start = recorded(tmp_path)
    found = run_replay(trace, "--start", start, *SMALL, "--times", "recorded", "--no-check")
    assert found["against"]["blocks_found"] == 1.0


@pytest.mark.parametrize("policy", ["boundary", "scan", "skip-walk", "walk-locked", "bitmap", "hold"])
def test_every_policy_can_be_replayed(policy: str, tmp_path: Path, run_replay: Callable[..., dict[str, Any]]) -> None:
    """S1 to S4 hold after each of its passes (the check), and it gives memory back."""
    _, trace, start = recorded(tmp_path)
    found = run_replay(trace, "--start", start, *SMALL, "--policy", policy, "--high-water-mark", "1")
    assert found["reported_bytes"] > 0
    assert min(held for _, held in found["resident"]) < found["resident"][0][1]


def test_a_pass_that_was_asked_for_before_the_beginning_is_made(
    tmp_path: Path, run_replay: Callable[..., dict[str, Any]]
) -> None:
    """M1: a drain behind the last pass, then the beginning: the pass comes at the time that the drain gave it."""
    words = "order=0 migratetype=1"
    text = (
        f"5.000000000 [0] 7 process:\n5.001000000 [0] 7 process_ret:\n"
        f"6.000000000 [0] 7 mm_page_pcpu_drain: pfn=0x40 {words}\n"
        "6.500000000 [0] 7 mark: snap idx=3 t0=6.400000 t1=6.490000 npages=4096 label=x\n"
        f"7.000000000 [0] 7 mm_page_alloc_zone_locked: pfn=0x80 {words}\n"
        f"9.500000000 [0] 7 mm_page_alloc_zone_locked: pfn=0x81 {words}\n"
    )
    trace, start = tmp_path / "trace.txt", tmp_path / "a.snap03_x.csv"
    trace.write_text(text)
    start.write_text(f"{HEAD}64,0,0,1\n128,3,0,8\n2048,10,0,1024\n")
    flags = ("--start", str(start), "--memory", "16MiB", "--min-free-kbytes", "32", "--min-order", "0")
    found = run_replay(str(trace), *flags)
    assert found["begin_s"] == 6.4
    assert [one["t_s"] for one in found["passes"]] == [Timer(2 * 10**9).fires_ns(6 * 10**9) / 1e9]
    assert run_replay(str(trace), *flags, "--from", "5.5")["passes"][0]["t_s"] > 8.0


def test_off_gives_nothing_back(tmp_path: Path, run_replay: Callable[..., dict[str, Any]]) -> None:
    _, trace, start = recorded(tmp_path)
    found = run_replay(trace, "--start", start, *SMALL, "--policy", "off")
    assert found["reported_bytes"] == found["refaults"] == 0
    assert found["passes"] == []


def test_an_imported_file_gives_the_same(tmp_path: Path, run_replay: Callable[..., dict[str, Any]]) -> None:
    _, trace, start = recorded(tmp_path)
    packed = str(tmp_path / "trace.parquet")
    assert main(["import", trace, "--out", packed, "--quiet"]) == 0
    one, other = (run_replay(name, "--start", start, *SMALL) for name in (trace, packed))
    for key in ("passes", "reported_bytes", "resident", "against"):
        assert one[key] == other[key]


def test_a_table_of_reports_stands_for_the_real_guest(
    tmp_path: Path, run_replay: Callable[..., dict[str, Any]]
) -> None:
    _, trace, start = recorded(tmp_path)
    real = run_replay(trace, "--start", start, *SMALL)["against"]
    table = tmp_path / "reports.csv"
    rows = [f"{row['real_t_s']},0,1,{row['real_bytes']},4,10,50.0" for row in real["passes"]]
    table.write_text("t_guest,cpu,nents,bytes,order_min,order_max,report_to_ack_us\n" + "\n".join(rows) + "\n")
    found = run_replay(trace, "--start", start, *SMALL, "--against", str(table))["against"]
    assert found["bytes_ratio"] == 1.0
    assert found["blocks_found"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--delay", "2"), "--delay"),
        (("--min-order", "11"), "--min-order"),
        (("--policy", "hint"), "--policy"),
        (("--plot", "picture.pdf"), "--plot"),
        (("--memory", "16MiB", "--start", "{large}"), "names page"),
        (("--from", "900"), "no page event from"),
        (("--against", "{start}"), "report"),
        (("--start", "{large}x"), "large.csvx"),
        (("--start", "{folder}"), "expected a copy of /proc/kpageflags"),
        (("--start", "{beyond}"), "1 TiB"),
        (("-", "--start", "-"), "standard input can be read once"),
        (("{packed}", "--start", "{start}"), "is an imported trace, which stands alone"),
        (("{stray}", "--start", "{start}"), "guest of 1 TiB at most"),
        (("--times", "recorded", "--to", "8.5"), "process"),
        (("--shuffle",), "--mode demand"),
        (("--mode", "page", "--no-merge-likely"), "--mode demand"),
        (("--pcp-batch", "7"), "--mode page or demand"),
    ],
)
def test_bad_input_is_one_line(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line, and nothing is written."""
    _, trace, start = recorded(tmp_path)
    large = tmp_path / "large.csv"
    large.write_text(f"{HEAD}1048576,0,0,0\n")
    (beyond := tmp_path / "beyond.csv").write_text(f"{HEAD}4294967295,0,0,0\n")
    (packed := tmp_path / "packed.parquet").write_bytes(b"PAR1")
    (stray := tmp_path / "stray.txt").write_text("900.0 [0] 7 mm_page_free: pfn=0xfffffff0 order=0\n")
    names = {"large": large, "beyond": beyond, "packed": packed, "stray": stray, "folder": tmp_path}
    given_ = [flag.format(start=start, trace=trace, **names) for flag in flags]
    out = tmp_path / "out.json"
    assert main(["replay", trace, *given_, "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("packed", [False, True])
def test_a_snapshot_of_another_machine_is_refused(
    packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"5.{pfn:09d} [0] 7 mm_page_alloc_zone_locked: pfn={pfn:#x} order=0 migratetype=1 percpu_refill=1\n"
        for pfn in range(1024, 3000)
    ]
    trace = tmp_path / "trace.txt"
    trace.write_text("".join(lines))
    start = tmp_path / "start.csv"
    start.write_text(f"{HEAD}0,9,0,0\n")
    name = str(trace)
    if packed:
        name = str(tmp_path / "trace.parquet")
        assert main(["import", str(trace), "--out", name, "--quiet"]) == 0
        capsys.readouterr()
    assert main(["replay", name, "--start", str(start)]) == 2
    assert "same machine" in capsys.readouterr().err


def test_a_recording_without_zone_events_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("5.000000001 [0] 7 mm_page_alloc: pfn=0x10 order=0 migratetype=1 gfp=0x0\n")
    assert main(["replay", str(trace)]) == 2
    assert "mm_page_pcpu_drain" in capsys.readouterr().err


def without(lines: list[str], *events: str) -> list[str]:
    return [line for line in lines if not any(f" {event}:" in line for event in events)]


def test_allocations_and_frees_alone_find_the_same_blocks(
    tmp_path: Path, run_replay: Callable[..., dict[str, Any]]
) -> None:
    """A page replay of a guest without per-CPU lists is exact, though no event tells what reached the buddy lists."""
    guest, trace, start = recorded(tmp_path)
    Path(trace).write_text("".join(without(guest.lines, "mm_page_alloc_zone_locked", "mm_page_pcpu_drain")))
    requested = guest.t_ns
    found = run_replay(trace, "--start", start, *SMALL, "--mode", "page", "--pcp-batch", "0", "--blocks")
    assert requested > 0
    assert found["reported"] == [[list(block) for block in blocks] for blocks in guest.reported if blocks]
    assert found["settings"]["mode"] == "page"
    assert not any(found["unknown"].values())


def test_a_demand_replay_takes_the_switches_of_its_allocator(
    tmp_path: Path, run_replay: Callable[..., dict[str, Any]]
) -> None:
    """Same demand, same placement, same answer; the switches are told with it, and nothing goes without memory."""
    _, trace, start = recorded(tmp_path)
    flags = (trace, "--start", start, *SMALL, "--mode", "demand", "--pcp-batch", "0", "--blocks")
    plain, again, other = (run_replay(*flags, *more) for more in ((), (), ("--shuffle", "--no-merge-likely")))
    assert plain == again
    assert plain["reported_bytes"] > 0
    assert plain["unknown"]["failed_pages"] == other["unknown"]["failed_pages"] == 0
    assert (plain["settings"]["shuffle"], plain["settings"]["merge_likely"]) == (False, True)
    assert (other["settings"]["shuffle"], other["settings"]["merge_likely"]) == (True, False)


def test_a_recording_without_allocations_is_refused_by_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("5.000000001 [0] 7 mm_page_pcpu_drain: pfn=0x10 order=0 migratetype=1\n")
    assert main(["replay", str(trace), "--mode", "demand"]) == 2
    assert "mm_page_free" in capsys.readouterr().err


def test_strict_refuses_an_imported_file_with_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the import found holds for the replay too, though the text is not read again."""
    guest, _, start = recorded(tmp_path)
    lossy, packed = tmp_path / "lossy.txt", str(tmp_path / "lossy.parquet")
    lossy.write_text("".join(["CPU:0 [LOST 5 EVENTS]\n", *guest.lines]))
    assert main(["import", str(lossy), "--out", packed, "--quiet"]) == 0
    assert main(["replay", packed, "--start", start, *SMALL, "--strict"]) == 2
    assert "lost by the recorder" in capsys.readouterr().err


def test_strict_refuses_a_snapshot_that_is_a_little_stale(
    tmp_path: Path, run_replay: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A dozen pages are free in it that the recording gives back: corrected, and told, but for ``--strict``."""
    guest, trace, start = recorded(tmp_path)
    head, *rows = Path(start).read_text().removeprefix(HEAD).splitlines()
    given = [int(line.split("pfn=")[1].split()[0], 16) for line in guest.lines if "mm_page_free:" in line]
    rows = sorted([head, *rows, *(f"{pfn},0,0,1" for pfn in given[:12])], key=lambda row: int(row.split(",")[0]))
    stale, packed = tmp_path / "stale.blocks.csv", str(tmp_path / "packed.parquet")
    stale.write_text(HEAD + "".join(f"{row}\n" for row in rows))
    assert main(["import", trace, "--out", packed, "--quiet"]) == 0
    for snapshot, *strict in ((start, "--strict"), (str(stale),)):
        assert run_replay(packed, "--start", snapshot, *SMALL, *strict)["reported_bytes"] > 0
    capsys.readouterr()
    assert main(["replay", packed, "--start", str(stale), *SMALL, "--strict"]) == 2
    told = capsys.readouterr().err
    assert f"--strict: {stale}: contradicts" in told
    assert "expected a snapshot taken as the recording begins" in told


def test_a_snapshot_of_another_moment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the recording's end: what it calls free the recording gives back."""
    guest, trace, _ = recorded(tmp_path)
    stale, packed = tmp_path / "stale.blocks.csv", str(tmp_path / "packed.parquet")
    stale.write_text(guest.snapshot())
    assert main(["import", trace, "--out", packed, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["replay", packed, "--start", str(stale), *SMALL]) == 2
    assert "2500 were not as it says" in capsys.readouterr().err
    assert main(["replay", trace, "--start", str(stale), *SMALL, "--strict"]) == 2
    assert "put on the buddy lists that were on them" in capsys.readouterr().err


def test_many_settings_go_over_the_executor_seam(tmp_path: Path) -> None:
    """Orders 4 and 8 of one recording: the lower order gives back as much or more."""
    _, trace, start = recorded(tmp_path)
    payloads = [
        {
            "traces": [trace],
            "start": start,
            "memory_bytes": 16 << 20,
            "min_free_kbytes": 32,
            "settings": {"min_order": order, "capacity": 2},
        }
        for order in (4, 8)
    ]
    with open_engine("inline") as engine:
        found = dict(engine.run(execute, payloads))
    assert found[0]["settings"]["min_order"] == 4
    assert found[0]["reported_bytes"] >= found[1]["reported_bytes"]
    assert found[0]["gib_min"] <= found[1]["gib_min"]
