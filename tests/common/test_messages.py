"""Messages: what is sent arrives, and nothing that is not a message gets past ``decode``."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import MessageError
from common.geometry import MAX_PAGES, TOP_ORDER
from common.messages import (
    ACK_MSG_BYTES,
    CMD_FIRST_RUN,
    CONTROL_MSG_BYTES,
    MAX_CAPACITY,
    MAX_COMMAND,
    MAX_I63,
    MAX_PID,
    MAX_REASON_CHARS,
    WIRE_VERSION,
    Ack,
    Announce,
    Command,
    Goodbye,
    Hello,
    Message,
    Refuse,
    Report,
    RunEnd,
    Status,
    Welcome,
    decode,
    encode,
    pack_blocks,
    pack_zeroed,
    report_msg_bytes,
    unpack_blocks,
    unpack_zeroed,
)

LONGEST_NAME = "a" * 32
_names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)
_pids = st.integers(1, MAX_PID)
_positive = st.integers(1, MAX_I63)
_natural = st.integers(0, MAX_I63)
_blocks = st.integers(1, 64).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n))
_bits = st.binary(max_size=MAX_CAPACITY // 8)
_reasons = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=MAX_REASON_CHARS)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        _names,
        _pids,
        _positive,
        st.integers(1, MAX_PAGES),
        st.sampled_from(["shared", "model"]),
        st.integers(1, MAX_CAPACITY),
        st.integers(0, TOP_ORDER),
        st.integers(0, 255),
        st.booleans(),
    ),
    st.builds(Goodbye, _names, _pids, _positive),
    st.builds(Report, _positive, _positive, st.booleans(), _natural, _blocks),
    st.builds(Welcome, _pids, _positive),
    st.builds(Ack, _positive, _positive, st.sampled_from(Status), _natural, _natural, _bits),
    st.builds(Announce, _pids),
    st.builds(Refuse, _reasons),
    st.builds(Command, _positive, st.integers(0, MAX_COMMAND)),
    st.builds(RunEnd, _positive, st.integers(CMD_FIRST_RUN, MAX_COMMAND)),
)

LARGEST: list[tuple[Message, int]] = [
    (Hello(LONGEST_NAME, MAX_PID, MAX_I63, MAX_PAGES, "shared", MAX_CAPACITY, TOP_ORDER, 255, True), CONTROL_MSG_BYTES),
    (Goodbye(LONGEST_NAME, MAX_PID, MAX_I63), CONTROL_MSG_BYTES),
    (Report(MAX_I63, MAX_I63, True, MAX_I63, bytes(4 * MAX_CAPACITY)), report_msg_bytes(MAX_CAPACITY)),
    (Report(MAX_I63, MAX_I63, True, MAX_I63, bytes(4)), report_msg_bytes(1)),
    (Welcome(MAX_PID, MAX_I63), ACK_MSG_BYTES),
    (Ack(MAX_I63, MAX_I63, Status.INHIBITED, MAX_I63, MAX_I63, bytes(MAX_CAPACITY // 8)), ACK_MSG_BYTES),
    (Announce(MAX_PID), ACK_MSG_BYTES),
    (Refuse("x" * MAX_REASON_CHARS), ACK_MSG_BYTES),
    (Command(MAX_I63, MAX_COMMAND), ACK_MSG_BYTES),
    (RunEnd(MAX_I63, MAX_COMMAND), report_msg_bytes(1)),
]


@given(messages)
def test_what_is_sent_arrives(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(("message", "limit"), LARGEST)
def test_the_largest_message_fits_its_queue(message: Message, limit: int) -> None:
    assert len(encode(message)) <= limit
    assert decode(encode(message)) == message


def test_a_reason_is_cut_and_made_ascii_by_its_sender() -> None:
    assert decode(encode(Refuse("é" * 300))) == Refuse("?" * MAX_REASON_CHARS)


@given(st.binary(max_size=300))
def test_random_bytes_raise_message_errors_only(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


@given(messages, st.data())
def test_a_damaged_message_decodes_or_raises_message_errors_only(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for _damage in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for attempt in (bytes(damaged), cut):
        try:
            decoded = decode(attempt)
        except MessageError:
            continue
        assert decode(encode(decoded)) == decoded


_junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@given(st.integers(0, 10), st.lists(_junk, max_size=9))
def test_well_formed_msgpack_of_wrong_values_raises_message_errors_only(kind: int, fields: list[Any]) -> None:
    try:
        decoded = decode(msgpack.packb([WIRE_VERSION, kind, *fields]))
    except MessageError:
        return
    assert [*dataclasses.astuple(decoded)] == fields


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb(None),
        msgpack.packb([]),
        msgpack.packb([WIRE_VERSION]),
        msgpack.packb([WIRE_VERSION, 10]),
        msgpack.packb([WIRE_VERSION, 0]),
        msgpack.packb([WIRE_VERSION, -1]),
        msgpack.packb([WIRE_VERSION + 1, 6, 1]),
        msgpack.packb([True, 6, 1]),
        msgpack.packb([float(WIRE_VERSION), 6, 1]),
        msgpack.packb([WIRE_VERSION, "6", 1]),
        msgpack.packb([WIRE_VERSION, [6], 1]),
        msgpack.packb([WIRE_VERSION, 6]),
        msgpack.packb([WIRE_VERSION, 6, 1, 1]),
        msgpack.packb({WIRE_VERSION: 6}),
        msgpack.packb([WIRE_VERSION, 6, 1]) + b"\0",
        msgpack.packb([WIRE_VERSION, 7, "x" * (MAX_REASON_CHARS + 1)]),
        msgpack.packb([WIRE_VERSION, 7, b"bytes"]),
        msgpack.packb([WIRE_VERSION, 7, msgpack.ExtType(1, b"x")]),
        msgpack.packb([WIRE_VERSION, 7, msgpack.Timestamp(1)]),
        b"\x93\x02\x07\xa2\xff\xfe",  # not UTF-8
        b"\x91" * 2000,  # nested deeper than any message
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items
        b"\x93\x02\x07\xdb\xff\xff\xff\xff",  # a text of 4 GiB
        b"\x93\x02\x03\xc6\xff\xff\xff\xff",  # a binary field of 4 GiB
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


_HELLO: dict[str, Any] = dataclasses.asdict(Hello("g0", 1, 1, 4096, "shared", 16, 9))
_REPORT: dict[str, Any] = dataclasses.asdict(Report(1, 1, False, 0, bytes(4)))
_COMMAND: dict[str, Any] = dataclasses.asdict(Command(1, 2))
_ACK: dict[str, Any] = dataclasses.asdict(Ack(1, 1, Status.DONE, 0, 0))
_NOT_INTEGERS = [True, None, 1.0, float("nan"), float("inf"), "1", b"1", [1], -1, 1 << 63]


@pytest.mark.parametrize(
    ("kind", "fields", "field", "value"),
    [
        *((1, _HELLO, "guest", value) for value in ["", "A", "a/b", "..", "-a", "a-", "a" * 33, "a\n", b"a", 1, None]),
        *((1, _HELLO, "pid", value) for value in [*_NOT_INTEGERS, 0, MAX_PID + 1]),
        *((1, _HELLO, "epoch", value) for value in [*_NOT_INTEGERS, 0]),
        *((1, _HELLO, "n_pages", value) for value in [*_NOT_INTEGERS, 0, MAX_PAGES + 1]),
        *((1, _HELLO, "backend", value) for value in ["", "uffd", b"shared", None, 0, ["shared"], {"shared": 1}]),
        *((1, _HELLO, "capacity", value) for value in [*_NOT_INTEGERS, 0, MAX_CAPACITY + 1]),
        *((1, _HELLO, "min_order", value) for value in [*_NOT_INTEGERS, TOP_ORDER + 1]),
        *((1, _HELLO, "poison", value) for value in [*_NOT_INTEGERS, 256]),
        *((1, _HELLO, "commands", value) for value in [0, 1, None, "True"]),
        *((8, _COMMAND, "epoch", value) for value in [*_NOT_INTEGERS, 0]),
        *((8, _COMMAND, "id", value) for value in [*_NOT_INTEGERS, MAX_COMMAND + 1]),
        *((9, _COMMAND, "id", value) for value in [*_NOT_INTEGERS, CMD_FIRST_RUN - 1, MAX_COMMAND + 1]),
        *((3, _REPORT, "seq", value) for value in [*_NOT_INTEGERS, 0]),
        *((3, _REPORT, "last", value) for value in [0, 1, None, "True"]),
        *((3, _REPORT, "pulled_ns", value) for value in _NOT_INTEGERS),
        *((3, _REPORT, "blocks", value) for value in [b"", b"abc", bytes(5), "abcd", None, [1]]),
        (3, _REPORT, "blocks", bytes(4 * MAX_CAPACITY + 4)),
        *((5, _ACK, "status", value) for value in [*_NOT_INTEGERS, max(Status) + 1]),
        *((5, _ACK, "freed_bytes", value) for value in _NOT_INTEGERS),
        *((5, _ACK, "zeroed", value) for value in ["", None, 0, [1], bytes(MAX_CAPACITY // 8 + 1)]),
    ],
)
def test_a_field_out_of_bounds_is_refused(kind: int, fields: dict[str, Any], field: str, value: Any) -> None:
    decode(msgpack.packb([WIRE_VERSION, kind, *fields.values()]))
    with pytest.raises(MessageError):
        decode(msgpack.packb([WIRE_VERSION, kind, *{**fields, field: value}.values()]))


@given(st.lists(st.tuples(st.integers(0, MAX_PAGES - 1), st.integers(0, 15)), max_size=64))
def test_packed_blocks_unpack_to_the_same(blocks: list[tuple[int, int]]) -> None:
    pfns = np.array([pfn for pfn, _order in blocks], dtype=np.int64)
    orders = np.array([order for _pfn, order in blocks], dtype=np.int64)
    packed = pack_blocks(pfns, orders)
    assert len(packed) == 4 * len(blocks)
    again = unpack_blocks(packed)
    np.testing.assert_array_equal(again[0], pfns)
    np.testing.assert_array_equal(again[1], orders)


def test_packed_blocks_are_little_endian_words() -> None:
    assert pack_blocks(np.array([0x0123456]), np.array([9])) == b"\x56\x34\x12\x90"


@pytest.mark.parametrize(("pfn", "order"), [(MAX_PAGES, 0), (-1, 0), (0, 16), (0, -1)])
def test_what_does_not_fit_is_not_packed(pfn: int, order: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack_blocks(np.array([pfn], dtype=np.int64), np.array([order], dtype=np.int64))


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_z1_confirmed_blocks_unpack_to_the_same(zeroed: list[bool]) -> None:
    packed = pack_zeroed(np.array(zeroed))
    assert len(packed) == (-(-len(zeroed) // 8) if any(zeroed) else 0)
    assert unpack_zeroed(packed, len(zeroed)).tolist() == zeroed


def test_z1_the_first_block_is_the_lowest_bit() -> None:
    assert pack_zeroed(np.array([True] + [False] * 8 + [True])) == b"\x01\x02"


@pytest.mark.parametrize(("packed", "count"), [(b"\1", 9), (b"\1\0", 8), (b"\x10", 4), (b"\0\2", 9), (bytes(3), 9)])
def test_z1_bits_that_are_not_one_a_block_are_refused(packed: bytes, count: int) -> None:
    with pytest.raises(MessageError):
        unpack_zeroed(packed, count)
