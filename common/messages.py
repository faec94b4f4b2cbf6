"""Messages between guest and host: msgpack arrays ``[WIRE_VERSION, type, *fields]``, checked field by field.

``decode`` accepts whatever bytes a hostile peer may send and raises ``MessageError``, nothing else; its memory is
bounded by the limits below. What only a receiver can judge (is the pid alive, does the block lie in that guest's
memory) is checked by the receiver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, TypeAlias, cast

import msgpack
import numpy as np
import numpy.typing as npt

from common.errors import MessageError, UsageError
from common.geometry import MAX_PAGES, TOP_ORDER
from common.names import check_name

__all__ = [
    "ACK_MSG_BYTES",
    "BLOCK_BYTES",
    "CMD_DONE",
    "CMD_FIRST_RUN",
    "CMD_STOP",
    "CONTROL_MSG_BYTES",
    "MAX_CAPACITY",
    "MAX_COMMAND",
    "MAX_REASON_CHARS",
    "WIRE_VERSION",
    "Ack",
    "Announce",
    "BackendName",
    "Command",
    "Goodbye",
    "Hello",
    "Message",
    "Refuse",
    "Report",
    "RunEnd",
    "Status",
    "Welcome",
    "decode",
    "encode",
    "pack_blocks",
    "pack_zeroed",
    "report_msg_bytes",
    "unpack_blocks",
    "unpack_zeroed",
]

WIRE_VERSION = 2
MAX_CAPACITY = 1024  # blocks a report: 64 + 4 * 1024 bytes stay below the 8192 of /proc/sys/fs/mqueue/msgsize_max
CONTROL_MSG_BYTES = 512
ACK_MSG_BYTES = 256
MAX_REASON_CHARS = 200
MAX_PID = 1 << 22  # PID_MAX_LIMIT of include/linux/threads.h
MAX_I63 = (1 << 63) - 1

# Ids of a command (virtio-balloon's free_page_hint_cmd_id, 32 bits): two orders, and from 2 on the number of a run.
CMD_STOP = 0
CMD_DONE = 1
CMD_FIRST_RUN = 2
MAX_COMMAND = (1 << 32) - 1

_PFN_BITS = 28
_PFN_MASK = (1 << _PFN_BITS) - 1
BLOCK_BYTES = 4  # of a report
_MAX_FIELDS = 11  # version, type and the nine fields of Hello

BackendName: TypeAlias = Literal["shared", "model"]
Int64Array: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


class Status(IntEnum):
    """What the host did with a report."""

    DONE = 0  # every block was discarded, proven
    FAILED = 1  # some discard failed: the guest flags nothing
    WITHDRAWN = 2  # the guest had given the report up: nothing was discarded
    BUSY = 3  # the guest held the gate: nothing was discarded
    REJECTED = 4  # the report broke a rule: nothing was discarded
    INHIBITED = 5  # discarding is switched off at the host, or the guest poisons: acknowledged, nothing was discarded


@dataclass(frozen=True, slots=True)
class Hello:
    """A guest that wants to report. ``epoch`` is random and non-zero, drawn by each guest process at its start.

    ``poison``: the byte that its free pages hold, 0 for none (VIRTIO_BALLOON_F_PAGE_POISON). With any other value they
    must keep it, so the host discards nothing (S12).
    ``commands``: it reports when the host commands a run, and never by itself.
    """

    guest: str
    pid: int
    epoch: int
    n_pages: int
    backend: BackendName
    capacity: int
    min_order: int
    poison: int = 0
    commands: bool = False


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The guest will not report again."""

    guest: str
    pid: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Report:
    """A batch of free blocks. ``seq`` counts from 1 within an epoch; ``last`` marks the short batch that ends a run.

    ``pulled_ns``: CLOCK_MONOTONIC when the guest had pulled the batch. ``blocks``: see ``pack_blocks``.
    """

    epoch: int
    seq: int
    last: bool
    pulled_ns: int
    blocks: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """The host accepted the hello of ``epoch``."""

    host_pid: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Ack:
    """The host is through with report ``seq`` of ``epoch``.

    ``zeroed``: which of its blocks were discarded and read as zeros now, see ``pack_zeroed``. Whoever has the report
    checks the length.
    """

    epoch: int
    seq: int
    status: Status
    freed_bytes: int
    discard_ns: int
    zeroed: bytes = b""


@dataclass(frozen=True, slots=True)
class Announce:
    """A host has started and asks the guest to say hello (again)."""

    host_pid: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The host refused a hello."""

    reason: str


@dataclass(frozen=True, slots=True)
class Command:
    """The host orders a guest of ``epoch`` to start run ``id``, CMD_FIRST_RUN or more.

    Or, of the run in progress: CMD_STOP, to allocate no more and keep what is held; CMD_DONE, to free it.
    """

    epoch: int
    id: int


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The guest has sent the last report of run ``id``, on the queue of the reports (virtio-balloon's cmd_id_stop)."""

    epoch: int
    id: int


Message: TypeAlias = Hello | Goodbye | Report | Welcome | Ack | Announce | Refuse | Command | RunEnd


def _integer(low: int, high: int) -> Callable[[Any], int]:
    """A check: an integer (a bool is none) from ``low`` to ``high`` inclusive."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise MessageError(f"expected an integer from {low} to {high}")
        return value

    return check


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise MessageError("expected a boolean")
    return value


def _guest_name(value: Any) -> str:
    try:
        return check_name("guest", value)
    except UsageError as error:
        raise MessageError(str(error)) from error


def _backend(value: Any) -> BackendName:
    if value == "shared" or value == "model":  # not `in` a set: a hostile value need not be hashable
        return cast("BackendName", value)
    raise MessageError("expected the backend shared or model")


def _reason(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_REASON_CHARS:
        raise MessageError(f"expected a reason of at most {MAX_REASON_CHARS} characters")
    return value


def _blocks(value: Any) -> bytes:
    if type(value) is not bytes or len(value) % BLOCK_BYTES or not 1 <= len(value) // BLOCK_BYTES <= MAX_CAPACITY:
        raise MessageError(f"expected 1 to {MAX_CAPACITY} blocks of {BLOCK_BYTES} bytes")
    return value


def _zeroed(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > MAX_CAPACITY // 8:
        raise MessageError(f"expected the bits of at most {MAX_CAPACITY} blocks")
    return value


_pid = _integer(1, MAX_PID)
_epoch = _integer(1, MAX_I63)
_seq = _integer(1, MAX_I63)
_nanoseconds = _integer(0, MAX_I63)


def _status(value: Any) -> Status:
    return Status(_integer(0, max(Status))(value))


# Type number -> class and the check of each field, in the order of the dataclass.
_TYPES: dict[int, tuple[Callable[..., Message], tuple[Callable[[Any], Any], ...]]] = {
    1: (
        Hello,
        (
            _guest_name,
            _pid,
            _epoch,
            _integer(1, MAX_PAGES),
            _backend,
            _integer(1, MAX_CAPACITY),
            _integer(0, TOP_ORDER),
            _integer(0, 255),
            _boolean,
        ),
    ),
    2: (Goodbye, (_guest_name, _pid, _epoch)),
    3: (Report, (_epoch, _seq, _boolean, _nanoseconds, _blocks)),
    4: (Welcome, (_pid, _epoch)),
    5: (Ack, (_epoch, _seq, _status, _nanoseconds, _nanoseconds, _zeroed)),
    6: (Announce, (_pid,)),
    7: (Refuse, (_reason,)),
    8: (Command, (_epoch, _integer(CMD_STOP, MAX_COMMAND))),
    9: (RunEnd, (_epoch, _integer(CMD_FIRST_RUN, MAX_COMMAND))),
}


def encode(message: Message) -> bytes:
    """The bytes of ``message``. Its fields are the sender's own and are not checked here."""
    match message:
        case Hello(guest, pid, epoch, n_pages, backend, capacity, min_order, poison, commands):
            return _packed(1, guest, pid, epoch, n_pages, backend, capacity, min_order, poison, commands)
        case Goodbye(guest, pid, epoch):
            return _packed(2, guest, pid, epoch)
        case Report(epoch, seq, last, pulled_ns, blocks):
            return _packed(3, epoch, seq, last, pulled_ns, blocks)
        case Welcome(host_pid, epoch):
            return _packed(4, host_pid, epoch)
        case Ack(epoch, seq, status, freed_bytes, discard_ns, zeroed):
            return _packed(5, epoch, seq, int(status), freed_bytes, discard_ns, zeroed)
        case Announce(host_pid):
            return _packed(6, host_pid)
        case Refuse(reason):
            # ASCII, so that characters are bytes and the whole stays below ACK_MSG_BYTES.
            return _packed(7, reason.encode("ascii", "replace").decode()[:MAX_REASON_CHARS])
        case Command(epoch, number):
            return _packed(8, epoch, number)
        case RunEnd(epoch, number):
            return _packed(9, epoch, number)


def _packed(kind: int, *fields: Any) -> bytes:
    return cast("bytes", msgpack.packb((WIRE_VERSION, kind, *fields)))


def decode(data: bytes) -> Message:
    """The message in ``data``, every field in bounds.

    Raises:
        MessageError: whatever is wrong with it.
    """
    try:
        fields = msgpack.unpackb(
            data,
            use_list=False,
            max_array_len=_MAX_FIELDS,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=MAX_REASON_CHARS,
            max_bin_len=BLOCK_BYTES * MAX_CAPACITY,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise MessageError(f"not a message: {error}") from error
    if not isinstance(fields, tuple) or len(fields) < 2 or any(type(field) is not int for field in fields[:2]):
        raise MessageError("not a message: expected an array that opens with a version and a type")
    if fields[0] != WIRE_VERSION:
        raise MessageError(f"wire version {fields[0]}; this program speaks {WIRE_VERSION}")
    if fields[1] not in _TYPES:
        raise MessageError(f"unknown message type {fields[1]}")
    build, checks = _TYPES[fields[1]]
    if len(fields) != 2 + len(checks):
        raise MessageError(f"message type {fields[1]} has {len(checks)} fields, not {len(fields) - 2}")
    return build(*[check(field) for check, field in zip(checks, fields[2:], strict=True)])


def report_msg_bytes(capacity: int) -> int:
    """Size of a report queue's messages for batches of ``capacity`` blocks: the envelope takes at most 33 bytes."""
    return 64 + BLOCK_BYTES * capacity


def pack_blocks(pfns: Int64Array, orders: Int64Array) -> bytes:
    """``pfns`` and ``orders`` (int64[n]) as little-endian u32 each: pfn in the low 28 bits, order in the top 4.

    Raises:
        ValueError: a pfn or an order does not fit.
    """
    if ((pfns >> _PFN_BITS) | (orders >> 4)).any():  # an arithmetic shift: negative values show as well
        raise ValueError("pfn or order does not fit its bits")
    return ((orders << _PFN_BITS) | pfns).astype("<u4").tobytes()


def unpack_blocks(blocks: bytes) -> tuple[Int64Array, Int64Array]:
    """What ``pack_blocks`` packed: pfns and orders, int64[n] each. ``blocks``: a whole number of words."""
    words = np.frombuffer(blocks, dtype="<u4").astype(np.int64)
    return words & _PFN_MASK, words >> _PFN_BITS


def pack_zeroed(zeroed: BoolArray) -> bytes:
    """``zeroed`` (bool[n]: one a block, in the report's order) as bits, the first in the lowest; empty if none is set.

    The spare bits of the last byte are 0.
    """
    return np.packbits(zeroed, bitorder="little").tobytes() if zeroed.any() else b""


def unpack_zeroed(packed: bytes, count: int) -> BoolArray:
    """What ``pack_zeroed`` packed for a report of ``count`` blocks: bool[count].

    Raises:
        MessageError: it is not as long as that, or a spare bit is set.
    """
    if not packed:
        return np.zeros(count, dtype=np.bool_)
    if len(packed) != (count + 7) // 8:
        raise MessageError(f"{len(packed)} bytes confirm the blocks of a report of {count}")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little").astype(np.bool_)
    if bits[count:].any():
        raise MessageError(f"a block beyond the {count} of the report is confirmed")
    return bits[:count]
