"""Text of every format to columns: all give the same events, and what cannot be read is told in one line."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Self

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from common.native import JIT
from lab.trace.columns import Columns
from lab.trace.events import Event
from lab.trace.reader import read_all
from tests.lab.traces import COMMANDS, FORMS, PACKS, ftrace, perf, read, recording, same, story, trace_cmd

ROWS = story(300)


def written(folder: Path, text: str | bytes, name: str = "a") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path)
    return str(caught.value)


def outcome(path: Path) -> Columns | str:
    """What is read, or the message that it is refused with; any other error is one of the test."""
    try:
        return read(path)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("form", FORMS)
def test_each_format_gives_the_same_events(form: str, tmp_path: Path) -> None:
    name, printed = FORMS[form]
    batches = list(read_all([str(written(tmp_path, printed(ROWS)))]))
    same(Columns.joined([batch.columns for batch in batches]), ROWS)
    source = batches[-1].source
    assert (source.format, source.events, source.noise, source.lost) == (name, len(ROWS), 0, 0)
    assert source.lines == len(printed(ROWS).splitlines())


@pytest.mark.parametrize("pack", PACKS)
def test_each_compression_is_told_by_content(pack: str, tmp_path: Path) -> None:
    data = ftrace(ROWS).encode()
    half = data.index(b"\n", len(data) // 2) + 1
    path = written(tmp_path, PACKS[pack](data[:half]) + PACKS[pack](data[half:]), "trace.html")
    same(read(path), ROWS)


def test_windows_line_ends(tmp_path: Path) -> None:
    same(read(written(tmp_path, recording(ROWS).replace("\n", "\r\n"))), ROWS)


@pytest.mark.parametrize("rest", ["", " order=1", " order=1 migratetype=1"])
def test_a_line_that_breaks_off_at_the_end_is_counted_and_left_out(rest: str, tmp_path: Path) -> None:
    """Though it could be read: an order of 1 may have been 10."""
    path = written(tmp_path, recording(ROWS) + f"99.5 [0] 145 mm_page_free: pfn=0x1{rest}")
    batches = list(read_all([str(path)]))
    same(Columns.joined([batch.columns for batch in batches]), ROWS)
    assert batches[-1].source.cut == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_may_stand_before_the_pid(command: str, tmp_path: Path) -> None:
    line = "[002] ..... 5.000001: mm_page_free: page=0 pfn=0x12345 order=0\n"
    columns = read(written(tmp_path, f"{command}-77 {line}"))
    assert (columns["pid"].tolist(), columns["cpu"].tolist(), columns["pfn"].tolist()) == ([77], [2], [0x12345])


def test_the_lines_of_real_tools(tmp_path: Path) -> None:
    """As Linux 6.18 and perf 6.1 printed them, and trace-cmd where it cannot evaluate the page."""
    text = """\
             cat-15372   [000] ...2. 13569.992229: mm_page_free_batched: page=000000004cf06599 pfn=0x24da65 order=0
          python-15387   [001] d..3. 13570.550328: mm_page_alloc_zone_locked: page=0000000065b4ea2e pfn=0x32dd1c order=0 migratetype=1 percpu_refill=1
##### CPU 1 buffer started ####
            perf 15437/15438 [000] 13572.136114: kmem:mm_page_alloc_zone_locked: page=0x1393b0 pfn=0x1393b0 order=4 migratetype=1 percpu_refill=0
 trace-cmd-22020 [003] 105219.542610: mm_page_alloc:        [FAILED TO PARSE] pfn=0x165cb4 order=0 gfp_flags=29491274 migratetype=1
 <...>-187168 [003] 114540.343835: mm_page_alloc:        page=0x3070e0 pfn=3174624 order=1 migratetype=0 gfp_flags=GFP_KERNEL_ACCOUNT|__GFP_ZERO
"""  # noqa: E501  as printed
    columns = read(written(tmp_path, text))
    assert columns["pfn"].tolist() == [0x24DA65, 0x32DD1C, 0x1393B0, 0x165CB4, 3174624]
    assert columns["pid"].tolist() == [15372, 15387, 15438, 22020, 187168]
    assert columns["order"].tolist() == [0, 0, 4, 0, 1]
    assert columns["flags"].tolist() == [0, 1, 0, 0, 0]
    assert columns["gfp"].tolist() == [0, 0, 0, 29491274, 0x400DC0]


def test_text_events_are_kept_word_for_word(tmp_path: Path) -> None:
    """Marks, the blocks of a report, and the fields of an extfrag that have no column."""
    said = [
        ("mark", "hog.start mib=256 mode=nothp  how=exit"),
        ("process", ""),
        ("report", "nents=2 0xe400:10 0xcc00:9 bytes=6291456"),
        ("report_ret", "ret=0"),
        ("notify", ""),
        ("mm_page_alloc_extfrag", "pfn=0xcc00 alloc_order=3 fallback_order=10 alloc_migratetype=0 change_ownership=1"),
    ]
    text = "".join(f"1.00000{at} [1] 7 {name}: {words}".rstrip() + "\n" for at, (name, words) in enumerate(said))
    columns = read(written(tmp_path, text))
    assert [Event(number).name for number in columns["event"]] == [name for name, _ in said]
    assert [columns.text(row) for row in range(len(columns))] == [words for _, words in said]
    assert (columns["pfn"][-1], columns["order"][-1], columns["migratetype"][-1]) == (0xCC00, 3, 0)


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("CPU:1 [LOST 123 EVENTS]", 123),
        ("CPU:0 [77 EVENTS DROPPED]", 77),
        ("CPU:2 [EVENTS DROPPED]", 1),
        ("            perf 15459/15459 [001] 13574.392137: PERF_RECORD_LOST lost 4321", 4321),
    ],
)
def test_lost_events_are_counted(line: str, lost: int, tmp_path: Path) -> None:
    head, tail = recording(ROWS[:100]), recording(ROWS[100:])
    batches = list(read_all([str(written(tmp_path, f"{head}{line}\n{tail}"))]))
    same(Columns.joined([batch.columns for batch in batches]), ROWS)
    assert (batches[-1].source.lost, batches[-1].source.lost_places) == (lost, 1)
    assert batches[-1].source.noise == 0


def test_what_the_ring_buffer_overwrote_and_allocations_that_failed(tmp_path: Path) -> None:
    text = ftrace(ROWS).replace("7/7", "28111/69071")
    text += " a-1 [000] ..... 99.0: mm_page_alloc: page=0000000000000000 pfn=0x0 order=9 migratetype=1 gfp_flags=none\n"
    text += " a-1 [000] ..... 99.0: mm_page_alloc: page=(nil) pfn=0 order=9 migratetype=1 gfp_flags=none\n"
    for no_pfn in ("0xffffffffffffffff", "18446744073709551615", "-1"):  # as raw fields are printed
        text += (
            f" a-1 [000] ..... 99.0: mm_page_alloc: [FAILED TO PARSE] pfn={no_pfn} order=9 migratetype=1 gfp_flags=0\n"
        )
    batches = list(read_all([str(written(tmp_path, text))]))
    same(Columns.joined([batch.columns for batch in batches]), ROWS)
    told = batches[-1].source.as_dict()
    assert (told["overwritten_events"], told["failed_allocations"]) == (69071 - 28111, 5)


def test_small_disorder_is_put_right_and_counted(tmp_path: Path) -> None:
    swapped = list(ROWS)
    swapped[50:60] = reversed(swapped[50:60])
    batches = list(read_all([str(written(tmp_path, perf(swapped)))]))
    columns = Columns.joined([batch.columns for batch in batches])
    times = columns["t_ns"].tolist()
    assert times == sorted(row.t_us * 1000 for row in ROWS)
    assert batches[-1].source.out_of_order > 0
    assert sorted(columns["pfn"].tolist()) == sorted(row.pfn for row in ROWS)


def test_several_files_follow_the_time_of_their_first_events(tmp_path: Path) -> None:
    parts = [ROWS[:90], ROWS[90:201], ROWS[201:]]
    texts = [recording(parts[0]), trace_cmd(parts[1]), ftrace(parts[2])]
    paths = [written(tmp_path, text, str(number)) for number, text in enumerate(texts)]
    for order in itertools.permutations(paths):
        same(read(*order), ROWS)


def test_files_that_overlap_in_time_are_refused(tmp_path: Path) -> None:
    far = [ROWS[0], ROWS[-1].__class__(ROWS[-1].t_us + 10_000_000, 0, 1, Event.mm_page_free, 5)]
    one, other = written(tmp_path, recording(far), "one"), written(tmp_path, recording(ROWS[1:]), "other")
    with pytest.raises(UsageError, match=r"other: line 1: begins at 12\.\d+ s, before .*one ends"):
        read(one, other)


GOOD = recording(ROWS[:3])
BAD_LINES = {
    "no order": ("9.0 [0] 1 mm_page_free: pfn=0x12", "pfn=, order="),
    "no pfn": ("99.0 [0] 1 mm_page_alloc: order=0", "pfn=, order="),
    "no number": ("99.0 [0] 1 mm_page_alloc: pfn=0xfoo order=0", "pfn=, order="),
    "pages of 64 KiB": ("99.0 [0] 1 mm_page_free: pfn=0x2000 order=13", "pages of 4096 bytes"),
    "pageblocks of 64 KiB pages": (
        "99.0 [0] 1 mm_page_alloc_extfrag: pfn=0x2000 alloc_order=1 pageblock_order=13 alloc_migratetype=0",
        "pages of 4096 bytes",
    ),
    "a fallback beyond all orders": (
        "99.0 [0] 1 mm_page_alloc_extfrag: pfn=0x2000 alloc_order=1 fallback_order=30 alloc_migratetype=0",
        "pages of 4096 bytes",
    ),
    "a free of no page": ("99.0 [0] 1 mm_page_free: pfn=0xffffffffffffffff order=0", "pfn=, order="),
    "beyond 16 TiB": ("99.0 [0] 1 mm_page_free: pfn=0x100000000 order=0", "16 TiB"),
    "backwards": ("3.0 [0] 1 mm_page_free: pfn=0x12 order=0", "order of time"),
    "a counter for a clock": (" sh-1 [000] ..... 123456: mm_page_free: pfn=0x12 order=0", "clock mono"),
    "a CPU beyond all": ("99.0 [99999] 1 mm_page_free: pfn=0x12 order=0", "expected"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_wrong_line_is_named_with_what_was_expected(what: str, tmp_path: Path) -> None:
    line, wanted = BAD_LINES[what]
    path = written(tmp_path, f"{GOOD}{line}\n{recording(ROWS[-1:])}")
    message = refused(path)
    assert message.startswith(f"{path}: line 4: ")
    assert wanted in message
    assert "\n" not in message


def test_a_refused_line_is_shown_with_the_field_at_fault(tmp_path: Path) -> None:
    """Which stands behind a long head; what is cut off says so."""
    line = f"{'':30}python3-145   [000] ...1. 99.992124: mm_page_free: page=0xffffea0000001000 pfn=0x40 order=13"
    assert refused(written(tmp_path, f"{GOOD}{line}\n")).count("pfn=0x40 order=13'; expected") == 1
    assert "…'; expected" in refused(written(tmp_path, f"{GOOD}{line}{' x=1' * 99}\n"))


FOREIGN = {
    "empty": (b"", "is empty"),
    "empty gzip": (PACKS["gzip"](b""), "is empty"),
    "a log": (b"Nov 23 07:09:06 vm kernel: Linux version 6.1\n" * 2000, "is no line of a trace"),
    "a short log": (b"hello\nworld\n", "no event up to the end"),
    "other events": (b" sh-1 [000] ..... 1.5: sched_switch: prev_comm=sh\n" * 9, "no page event up to the end"),
    "trace.dat": (b"\x17\x08\x44tracing6\0\0", "trace-cmd report"),
    "perf.data": (b"PERFILE2" + bytes(100), "perf script"),
    "zeros": (bytes(100), "is binary"),
    "a zip": (b"PK\x03\x04 and more and more", "is a zip"),
    "UTF-16": (GOOD.encode("utf-16"), "line 1"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_another_tools_file_is_refused(what: str, tmp_path: Path) -> None:
    data, wanted = FOREIGN[what]
    message = refused(written(tmp_path, data))
    assert wanted in message
    assert re.search(r": line \d+: ", message)


@pytest.mark.parametrize("pack", [name for name in PACKS if name != "plain"])
def test_a_truncated_archive_is_refused(pack: str, tmp_path: Path) -> None:
    data = PACKS[pack](recording(story(3000)).encode())
    message = refused(written(tmp_path, data[: len(data) // 2]))
    assert re.search(rf"a: line \d+: the {pack} archive (ends in the middle|is damaged)", message)
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0xFF
    with pytest.raises(UsageError):
        read(written(tmp_path, bytes(broken)))


class Endless:
    """A stream without an end that counts what is taken from it."""

    def __init__(self, block: bytes) -> None:
        self.block = block
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        self.taken += len(self.block)
        assert self.taken < 256 << 20, "reads on and on"
        return self.block[:size] if size > 0 else self.block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "block", [b"x" * 65536, b"noise and nothing else\n" * 2000, b"# a comment\n" * 500, b"\n" * 65536]
)
def test_endless_noise_is_left_early(block: bytes) -> None:
    stream = Endless(block)
    with pytest.raises(UsageError, match=r"line \d+: "):
        list(read_all(["noise"], opener=lambda _name: stream))  # type: ignore[arg-type,return-value]
    assert stream.taken <= 64 << 20


def test_endless_noise_behind_events_is_left_early() -> None:
    good = recording(story(300)).encode()

    class Turning(Endless):
        def read(self, size: int = -1) -> bytes:
            return good if not self.taken and super().read(size) else super().read(size)

    stream = Turning(b"what is this\n" * 5000)
    with pytest.raises(UsageError, match=r"noise: line \d+: 'what is this' is no line of a trace"):
        list(read_all(["noise"], opener=lambda _name: stream))  # type: ignore[arg-type,return-value]


@pytest.mark.skipif(not JIT, reason="plain Python reads too slowly for a large trace")
def test_batches_stay_small_however_large_the_trace() -> None:
    line = "cat-1 [000] ..... {:.6f}: mm_page_free: page=00000000127720e1 pfn=0x1a3c3d order=0\n"

    class Long:
        def __init__(self) -> None:
            self.left, self.now = 60, 0

        def read(self, _size: int = -1) -> bytes:
            if not self.left:
                return b""
            self.left -= 1
            block = "".join(line.format((self.now + number) / 1e4) for number in range(10_000))
            self.now += 10_000
            return block.encode()

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    sizes = [len(batch.columns) for batch in read_all(["long"], opener=lambda _name: Long())]  # type: ignore[arg-type,return-value]
    assert sum(sizes) == 600_000
    assert max(sizes) < 120_000


LINES = st.sampled_from(
    [*recording(ROWS[:4]).splitlines(), *perf(ROWS[:2]).splitlines(), *ftrace(ROWS[:2]).splitlines()]
)
PIECES = st.one_of(
    LINES.map(str.encode), st.binary(max_size=60), st.sampled_from([b"[", b"]", b"=", b": ", b"0x", b"[000] "])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PIECES, max_size=4).map(b"".join), max_size=8).map(b"\n".join))
@example(b"1.5 [0] 1 mm_page_free: pfn= order=0\n")
@example(b"[0] 1.5: mark:\n")
@example(b"x-1 [000] 1.5: mm_page_alloc: pfn=1 order=0 gfp_flags=\xff|\xfe\n")
@example(b"9999999999.5 [0] 1 mark: x\n")
def test_no_text_does_more_than_to_be_refused(tmp_path: Path, text: bytes) -> None:
    path = written(tmp_path, text)
    found = outcome(path)
    if isinstance(found, str):
        assert str(path) in found
        assert "\n" not in found
    else:
        assert len(found)
        times = found["t_ns"].tolist()
        assert times == sorted(times)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(PACKS)), st.integers(0, 10**6), st.integers(0, 255))
def test_no_damage_does_more_than_to_be_refused(tmp_path: Path, form: str, pack: str, at: int, byte: int) -> None:
    data = bytearray(PACKS[pack](FORMS[form][1](ROWS[:40]).encode()))
    data[at % len(data)] = byte
    found = outcome(written(tmp_path, bytes(data)))
    assert len(found) > 0
    assert not isinstance(found, str) or "\n" not in found
