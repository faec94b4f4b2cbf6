"""Named places at which a test can kill a process: each lies between two consistent forms of some state.

``FPR_FAULT=NAME`` in the environment kills the process (SIGKILL) as it comes to that place for the first time,
``FPR_FAULT=NAME:N`` for the N-th time. ``later`` only prepares for it, and ``kernels`` prepares the kernels too: a
process forked from such a one says which place with ``arm``. Without the variable there is nothing: a kernel's call
compiles to no instruction, and Python's is one call of an empty function. It is read once, when this module is loaded,
and kernels that can be killed are compiled into a cache of their own (``common.native``).

Kernels call ``common.native.fault_point`` with a number from here, everything else ``reach``.
"""

from __future__ import annotations

import os
import signal

from common.errors import UsageError

__all__ = ["ARMED", "IN_KERNELS", "NUMBERS", "POINTS", "VARIABLE", "arm", "hit", "reach"]

VARIABLE = "FPR_FAULT"

# Name -> what is between two forms there. The order gives each its number.
POINTS: dict[str, str] = {
    # guest/allocator/lists.py
    "link.first": "a node has its own links, and the list does not lead to it",
    "link.forward": "the list leads to a node forward, and not backward",
    "unlink.forward": "a node is off its list forward, and not backward",
    "list.stated": "a page says that it heads a free block, and is on no list",
    "list.linked": "a free block is on its list and not counted",
    "list.unlinked": "a free block is on no list and still says that it is free",
    "list.uncounted": "a free block is interior, and its list still counts it",
    "move.unlinked": "a free block is between two lists",
    "move.stated": "a free block says that it is on a list that it is not on yet",
    # guest/allocator/buddy.py
    "split.taken": "a block is off its list, its halves are not on theirs",
    "split.half": "one half of a split is listed, the rest is nobody's",
    "take.allocated": "a block is allocated and not taken from the count of free pages",
    "take.counted": "a block is allocated and nobody has it",
    "free.counted": "pages are counted as free and are on no list",
    "merge.taken": "the buddy of a block that is being freed is off its list",
    "request.posted": "the reporter is woken and nobody has asked for a run",
    # guest/allocator/percpu.py
    "refill.linked": "a block is on a per-CPU list and says that it is allocated",
    "refill.listed": "a block is on a per-CPU list, which does not count it",
    "hand-out.allocated": "a block is allocated and on a per-CPU list",
    "hand-out.unlinked": "a block is allocated, on no list, and its owner is not written down",
    "hand-out.owned": "a block has its owner, and the per-CPU list still counts it",
    "take-in.claimed": "a block is taken from its owner and on no list",
    "take-in.linked": "a block is on a per-CPU list and says that it is being freed",
    "take-in.listed": "a block is on a per-CPU list, which does not count it yet",
    "drain.interior": "a block is interior and on a per-CPU list",
    "drain.unlinked": "a block is interior and on no list at all",
    "drain.freed": "a block is free, and its per-CPU list still counts it",
    # guest/allocator/locked.py
    "owner.written": "a block has its owner, and is still noted as in the allocator's hands",
    "buddy-free.claimed": "a block is taken from its owner and not freed",
    # guest/allocator/pageblocks.py
    "isolate.typed": "a pageblock is isolated, its free blocks are on the lists of its old type",
    "unisolate.typed": "a pageblock has its old type, its free blocks are on the lists of ISOLATE",
    "steal.typed": "a pageblock was claimed, its free blocks are on the lists of its old type",
    "split-top.listed": "a block of the top order is two, and nothing was done with either",
    "requeue.taken": "a whole free pageblock is off its list, on its way to another",
    # guest/allocator/asks.py
    "install.noted": "a block that a host populated is about to be marked, and what is counted then is noted",
    "install.page": "one page of a block that a host populated is marked as installed, the others not",
    "install.counted": "a block that a host populated is marked and counted, and still asked for",
    # guest/allocator/held.py
    "release.interior": "a block is no longer held, and not free",
    # guest/reporting/
    "begin.active": "a run is active, and its words are those of the run before",
    "pull.taken": "a block in flight is not counted as free any more, nor as in flight",
    "put-back.interior": "a block is no longer in flight, and not free",
    "put-back.freed": "a block is back on its list, and not flagged",
    "put-back.flagged": "a block is flagged, and its flag not counted",
    "hold.held": "a block says that it is held, and is on no list",
    "walk.handed": "blocks are with the host while they are on their lists, under the lock",
    "end.inactive": "a run is over, its lists are not marked",
    "register.begun": "a device is being registered",
    # guest/memory.py
    "touch.noted": "pages are about to be used for the first time",
    "touch.page": "one page of a block has been used, the others not",
    "touch.marked": "all pages of a block are used, and not counted",
    "settle.page": "one page of a block that was given back says so, the others not",
    "settle.marked": "all pages of a block say that they were given back, and are not counted",
    # common/segment.py, common/ramobject.py, guest/allocator/zone.py, guest/machine.py
    "segment.created": "a segment has a name and no size",
    "segment.sized": "a segment has a size and no header",
    "header.filled": "a segment has a header, and no list",
    "header.listed": "a segment is complete and does not say so",
    "ram.created": "a RAM object has a name, and is not locked by its owner",
    "ram.sized": "a RAM object has its size, and no gate page",
    "attach.owned": "a dead guest's RAM object has a new owner, its zone has not",
    "attach.withdrawn": "the reports of a dead guest are withdrawn, its blocks are in flight",
    "attach.put-back": "a dead guest's blocks are back, its slots are not taken over",
    # guest/reporting/link.py
    "queue.acks-made": "a guest has one of its two queues",
    "hello.sent": "a guest has said hello and listens to nobody",
    "report.sent": "a report is out and nobody waits for its answer",
    "ack.taken": "an answer has come, and nothing was done about it",
    # host/
    "host.named": "a host has its lab's name, and no queue",
    "host.opened": "a host has opened a guest's objects and not welcomed it",
    "host.received": "a report is out of its queue, and nothing was done about it",
    "host.gated": "a host is inside the gate, and has discarded nothing",
    "host.punched": "some blocks of a report are discarded, others not",
    "host.discarded": "a report is carried out, and the gate closed",
    "host.ungated": "a report is carried out, and not answered",
    "host.answered": "a report is answered, and not accounted for",
    "host.removing": "some names of a dead guest are removed, others not",
}

NUMBERS = {name: number for number, name in enumerate(POINTS)}
_FIRST_OUTSIDE = NUMBERS["segment.created"]  # from here on no kernel comes by


def _parse(text: str) -> tuple[int, int]:
    """Number of the point and how often it is passed first.

    Raises:
        UsageError: no such point.
    """
    name, _, count = text.partition(":")
    if name not in NUMBERS or not (count or "1").isdecimal() or int(count or "1") < 1:
        raise UsageError(f"{VARIABLE}: {text!r}; allowed is NAME or NAME:N, of {', '.join(POINTS)}")
    return NUMBERS[name], int(count or "1")


_TEXT = os.environ.get(VARIABLE, "")
ARMED = bool(_TEXT)
_armed_number, _left = (-1, 0) if _TEXT in {"", "later", "kernels"} else _parse(_TEXT)
IN_KERNELS = _TEXT == "kernels" or 0 <= _armed_number < _FIRST_OUTSIDE


def arm(text: str) -> None:
    """From now on die at ``text``, NAME or NAME:N. For a process that was started with the variable set.

    Raises:
        UsageError: no such point, or the process was not prepared for it.
    """
    global _armed_number, _left
    number, count = _parse(text)
    if not ARMED:
        raise UsageError(f"{text!r}: set {VARIABLE}=later when the process starts")
    _armed_number, _left = number, count


def hit(number: int) -> None:
    """Place ``number`` was reached: die there if it is the armed one, and it is the time."""
    global _left  # noqa: PLW0603  one countdown a process, for all its threads
    if number == _armed_number:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if ARMED:

    def reach(name: str) -> None:
        """Place ``name`` was reached."""
        hit(NUMBERS[name])

else:

    def reach(name: str) -> None:
        """Place ``name`` was reached; nothing happens."""
