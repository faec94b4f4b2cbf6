"""What must hold whatever arrives: a scene a side, each played with bytes and checked after every message.

A *play* is bytes: for each message a byte of flags, two bytes of length (little-endian) and so many bytes. The fuzzer
makes plays; ``pack`` makes one from messages.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterable, Iterator
from typing import Protocol

from common.errors import MessageError
from common.geometry import PAGE_BYTES
from common.messages import Ack, Message, decode, encode
from common.names import control_queue
from common.queues import Queue
from host.loop import Host
from tests.fuzz.mutate import one_of_each
from tests.guest.arrange import GUEST, HOUR_NS, N_PAGES, Wire, hello_of
from tests.host.stand_in import StandIn

__all__ = ["SCENES", "ControlFlag", "DecoderScene", "GuestScene", "HostScene", "Scene", "pack", "seeds"]

_MOST_MESSAGES = 16  # of one play
_POPULATED = 1024  # pages of the sender, for its reports to discard


class ControlFlag:
    """Bits of a message's flags."""

    CONTROL = 1  # it goes to the control queue, not to that of the reports
    SAID = 2  # its sender writes it into its own gate page first, as a guest does with its hello


class Scene(Protocol):
    """One side, at the mercy of what it is sent."""

    messages: int

    def play(self, data: bytes) -> None:
        """Let it receive the messages of a play. Raises what it must not raise, or ``AssertionError``."""

    def close(self) -> None:
        """Leave nothing behind."""


def pack(messages: Iterable[tuple[int, bytes]]) -> bytes:
    """A play from (flags, message)."""
    return b"".join(bytes([flags]) + len(data).to_bytes(2, "little") + data for flags, data in messages)


def unpack(play: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of a play, the last one as long as there are bytes."""
    position = 0
    for _message in range(_MOST_MESSAGES):
        if len(play) - position < 3:
            return
        flags, length = play[position], int.from_bytes(play[position + 1 : position + 3], "little")
        yield flags, play[position + 3 : position + 3 + length]
        position += 3 + length


def seeds() -> list[bytes]:
    """Plays to start from: each valid message alone, each way, and all of them after one another."""
    messages = [encode(message) for message in one_of_each(hello_of())]
    alone = [pack([(flags, data)]) for data in messages for flags in (0, ControlFlag.CONTROL)]
    hello = (ControlFlag.CONTROL | ControlFlag.SAID, messages[0])
    return [*alone, pack([hello, *((0, data) for data in messages)]), pack([hello, (ControlFlag.CONTROL, messages[1])])]


class DecoderScene:
    """``decode`` raises ``MessageError`` or returns a message that encodes to bytes which decode to the same."""

    def __init__(self, _lab: str) -> None:
        self.messages = 0

    def play(self, data: bytes) -> None:
        """See ``Scene``; here all of a play is one message, too."""
        for candidate in (data, *(message for _flags, message in unpack(data))):
            self.messages += 1
            try:
                message: Message = decode(candidate)
            except MessageError:
                continue
            assert decode(encode(message)) == message

    def close(self) -> None:
        """Nothing is open."""


class HostScene:
    """A host in this process, a guest that sends what it is told to, and a neighbour that must not notice."""

    def __init__(self, lab: str) -> None:
        self.messages = 0
        self._host = Host(lab, max_reports_per_s=0)  # all of it is read
        self._sender = StandIn(lab, GUEST, epoch=hello_of().epoch)
        self._neighbour = StandIn(lab, "g1", epoch=hello_of().epoch + 1)
        self._control = Queue.open(control_queue(lab), read=False, write=True)
        self._sender.memory[:_POPULATED] = 0xA5
        self._neighbour.touch()
        for guest in (self._sender, self._neighbour):
            guest.hello()
            self._host.turn(0)
            guest.welcomed()
        self._registered = self._host.registry.guests["g1"]
        self._descriptors = self._count_descriptors() + 8  # what a hello that is under way may have open

    def play(self, data: bytes) -> None:
        """See ``Scene``."""
        for flags, message in unpack(data):
            self._send(flags, message)
            self._check()
        if self._registered.objects is None or self.messages % 4096 < _MOST_MESSAGES:
            self._serve_neighbour()

    def _send(self, flags: int, message: bytes) -> None:
        if self._host.registry.guests.get(GUEST) is None or self._host.registry.guests[GUEST].objects is None:
            self._sender.hello()
            self._turn()
        queue = self._control if flags & ControlFlag.CONTROL else self._sender.reports
        if len(message) > queue.message_bytes:
            return
        if flags & ControlFlag.SAID:
            self._sender.ram.say(message)
        resident, freed = self._sender.ram.resident_bytes(), self._freed()
        assert queue.send(message, 0)
        self.messages += 1
        self._turn()
        assert resident - self._sender.ram.resident_bytes() == self._freed() - freed  # what went is accounted for
        if self._sender.ram.resident_bytes() < _POPULATED * PAGE_BYTES // 2:
            self._sender.memory[:_POPULATED] = 0xA5

    def _turn(self) -> None:
        self._host.turn(0)
        while self._sender.acks.receive(0) is not None:
            pass

    def _freed(self) -> int:
        return self._sum("freed_bytes")

    def _sum(self, counter: str) -> int:
        """Over all guests that are there or were; cheaper than a snapshot of everything."""
        registry = self._host.registry
        parts = [registry.departed_counters, *(guest.counters for guest in registry.guests.values() if guest.objects)]
        return sum(getattr(part, counter) for part in parts)

    def _check(self) -> None:
        """Nobody but the sender has noticed anything."""
        registry = self._host.registry
        assert registry.guests["g1"] is self._registered
        assert self._neighbour.ram.resident_bytes() == N_PAGES * PAGE_BYTES
        assert self._neighbour.acks.waiting == 0
        assert set(registry.guests) <= {GUEST, "g1"}
        assert self._sum("failures") == 0

    def _serve_neighbour(self) -> None:
        """Its account is exact, and so is its memory."""
        assert (self._neighbour.memory == 0xA5).all()
        self._neighbour.report((0, 10))
        self._host.turn(0)
        assert self._neighbour.acknowledged(0).freed_bytes == 1024 * PAGE_BYTES
        assert not self._neighbour.memory[:1024].any()
        self._neighbour.touch()
        assert self._count_descriptors() <= self._descriptors

    @staticmethod
    def _count_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def close(self) -> None:
        """See ``Scene``."""
        self._control.close()
        for guest in (self._sender, self._neighbour):
            guest.close()
        self._host.close()


class GuestScene:
    """A guest's end of the wire with a report out, turned by hand: it takes nothing for an answer but the answer."""

    def __init__(self, lab: str) -> None:
        self.messages = 0
        self._wire = Wire(lab, deadline_ns=HOUR_NS)
        self._link = self._wire.link
        self._selector = self._link._selector = selectors.DefaultSelector()
        self._acks = Queue.open(self._link._acks.name, read=False, write=True)
        self._descriptors = len(os.listdir("/proc/self/fd")) + 2  # a host's pidfd, and the listing itself

    def play(self, data: bytes) -> None:
        """See ``Scene``. Its reports are of 16 blocks, and numbered from 1 on again in each play."""
        link = self._link
        link._ack, link._awaited, link._awaited_blocks = None, 1, 16
        for _flags, message in unpack(data):
            if len(message) > self._acks.message_bytes:
                continue
            assert self._acks.send(message, 0)
            self.messages += 1
            link._hear_acks()
            link._hello_due = False
            self._check_answer(link._ack)
        assert link._newest_run == 0  # this guest takes no commands
        if self.messages % 4096 < _MOST_MESSAGES:
            assert len(os.listdir("/proc/self/fd")) <= self._descriptors
            self._wire.refusals.clear()

    def _check_answer(self, ack: Ack | None) -> None:
        if ack is not None:
            assert (ack.epoch, ack.seq) == (hello_of().epoch, 1)
            assert len(ack.zeroed) in (0, 2)
        assert self._link._awaited == (ack is None)  # it waits for one answer

    def close(self) -> None:
        """See ``Scene``."""
        self._acks.close()
        self._wire.close()
        self._selector.close()


SCENES: dict[str, type[DecoderScene | HostScene | GuestScene]] = {
    "decode": DecoderScene,
    "host": HostScene,
    "guest": GuestScene,
}
