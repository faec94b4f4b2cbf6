"""Messages that are wrong: valid ones damaged, cut, spliced, and with fields that they should not have."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np

from common.messages import (
    CMD_FIRST_RUN,
    MAX_CAPACITY,
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
    encode,
    pack_blocks,
)

__all__ = ["Mutator", "one_of_each"]

_STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    (1 << 31) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    -(1 << 63),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "g0",
    "g1",
    "../g1",
    "x" * 300,
    "\ud7ff",
    b"",
    b"\0",
    b"\xff" * 3,
    b"\xff" * 129,
    b"\0" * 5000,
    [],
    {},
    [[[[[[[[]]]]]]]],
    {"a": 1},
    msgpack.ExtType(5, b"\0"),
    msgpack.Timestamp(0),
)


def one_of_each(hello: Hello) -> list[Message]:
    """A valid message of every type, as a guest that said ``hello`` and its host would exchange them."""
    pfns = np.arange(0, 64, 4, dtype=np.int64)
    blocks = pack_blocks(pfns, np.full(pfns.size, 2, dtype=np.int64))
    return [
        hello,
        Goodbye(hello.guest, hello.pid, hello.epoch),
        Report(hello.epoch, 1, True, 0, blocks),
        Report(hello.epoch, 2, False, 1, pack_blocks(np.array([1024]), np.array([10]))),
        Welcome(hello.pid, hello.epoch),
        Ack(hello.epoch, 1, Status.DONE, 0, 0, b"\1"),
        Announce(hello.pid),
        Refuse("no"),
        Command(hello.epoch, CMD_FIRST_RUN),
        RunEnd(hello.epoch, CMD_FIRST_RUN),
    ]


class Mutator:
    """An endless supply from one seed: the same seed, the same messages."""

    def __init__(self, seed: int, hello: Hello) -> None:
        self._chance = random.Random(seed)
        self._hello = hello
        self._valid = [encode(message) for message in one_of_each(hello)]
        self._fields = [list(msgpack.unpackb(data)) for data in self._valid]
        self._ways = (
            self._noise,
            self._cut,
            self._damaged,
            self._damaged,
            self._strange_field,
            self._strange_field,
            self._other_shape,
            self._spliced,
            self._report_of_noise,
            self._report_of_noise,
        )

    def message(self) -> bytes:
        """One that is wrong, or nearly always."""
        return self._chance.choice(self._ways)()

    def _noise(self) -> bytes:
        return self._chance.randbytes(self._chance.randrange(80))

    def _cut(self) -> bytes:
        data = self._chance.choice(self._valid)
        return data[: self._chance.randrange(len(data))]

    def _damaged(self) -> bytes:
        data = bytearray(self._chance.choice(self._valid))
        for _damage in range(self._chance.randint(1, 4)):
            data[self._chance.randrange(len(data))] = self._chance.randrange(256)
        return bytes(data)

    def _strange_field(self) -> bytes:
        fields = list(self._chance.choice(self._fields))
        for _change in range(self._chance.randint(1, 2)):
            fields[self._chance.randrange(len(fields))] = self._chance.choice(_STRANGE)
        return _packed(fields)

    def _other_shape(self) -> bytes:
        fields = list(self._chance.choice(self._fields))
        if self._chance.random() < 0.5:
            del fields[self._chance.randrange(len(fields))]
        else:
            fields.insert(self._chance.randrange(len(fields) + 1), self._chance.choice(_STRANGE))
        return _packed(fields)

    def _spliced(self) -> bytes:
        first, second = self._chance.choice(self._valid), self._chance.choice(self._valid)
        return first[: self._chance.randrange(len(first))] + second[self._chance.randrange(len(second)) :]

    def _report_of_noise(self) -> bytes:
        """Well-formed, of the right epoch, and with blocks from anywhere."""
        count = self._chance.choice((1, 2, 16, 17, MAX_CAPACITY))
        blocks = self._chance.randbytes(4 * count)
        return _packed([WIRE_VERSION, 3, self._hello.epoch, self._chance.getrandbits(48) + 1, True, 0, blocks])


def _packed(fields: list[Any]) -> bytes:
    data = msgpack.packb(fields)
    assert isinstance(data, bytes)
    return data
