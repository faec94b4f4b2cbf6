"""Errors by cause. Each class carries the exit code that a command line ends with.

0 is fine, 1 failed, 2 wrong usage or settings, 3 this machine cannot (the message names the fix),
4 an invariant was violated, 130 interrupted.
"""

from __future__ import annotations

__all__ = [
    "AllocatorError",
    "DoubleFreeError",
    "InvariantViolation",
    "LabError",
    "MachineError",
    "MessageError",
    "NameInUseError",
    "OutOfRangeError",
    "PeerError",
    "SegmentError",
    "UsageError",
    "WrongOrderError",
]


class LabError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1


class UsageError(LabError):
    """The caller gave a wrong flag, setting or argument; the message names key, value and what is allowed."""

    exit_code = 2


class NameInUseError(UsageError):
    """A live process already holds the name of this lab or guest."""


class MachineError(LabError):
    """This machine cannot do it (limits, permissions, space); the message names the fix."""

    exit_code = 3


class InvariantViolation(LabError):
    """Something that must always hold did not: we have a bug, or the memory was corrupted."""

    exit_code = 4


class PeerError(LabError):
    """The process at the other end broke the protocol, refused, or went away."""


class MessageError(PeerError):
    """A message that is malformed, of another version, or out of bounds."""


class SegmentError(LabError):
    """A shared segment that is missing, of another layout, or damaged."""


class AllocatorError(LabError):
    """A request that the allocator refused; the zone is unchanged."""


class DoubleFreeError(AllocatorError):
    """The page is not allocated: it is free, in flight, or inside another block."""


class WrongOrderError(AllocatorError):
    """The block was allocated with another order."""


class OutOfRangeError(AllocatorError):
    """The pfn or order lies outside the zone, or the pfn is not aligned to the order."""
