"""Memory, descriptors and threads of processes over time, read in /proc.

Memory is what a process has for itself: ``Pss_Anon`` and ``SwapPss`` of its ``smaps_rollup``, proc(5). Zones and RAM
are shared memory and so not in it; what a guest gives back and takes again is the subject, not a leak.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field

from lab.soak.flat import MIN_LOOKS, MIN_SPAN_S, Trend, judge_count, judge_memory

__all__ = ["Census", "Look", "Track", "look_at"]


@dataclass(frozen=True)
class Look:
    """One process at one moment."""

    anonymous_bytes: int
    descriptors: int
    threads: int


def look_at(pid: int) -> Look | None:
    """A process as it is now; None when it has ended.

    Raises:
        OSError: it is there and may not be looked at.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            parts = [line.partition(":") for line in lines]
        kib = {key: int(rest.split()[0]) for key, _, rest in parts if rest.rstrip().endswith("kB")}
        descriptors, threads = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "Pss_Anon" not in kib:  # a zombie
        return None
    return Look((kib["Pss_Anon"] + kib.get("SwapPss", 0)) << 10, descriptors, threads)


@dataclass
class Track:
    """What was seen of one process, equally long columns."""

    pid: int
    times_s: array[float] = field(default_factory=lambda: array("d"))
    anonymous_bytes: array[int] = field(default_factory=lambda: array("q"))
    descriptors: array[int] = field(default_factory=lambda: array("q"))
    threads: array[int] = field(default_factory=lambda: array("q"))

    def add(self, time_s: float, look: Look) -> None:
        """One look more."""
        self.times_s.append(time_s)
        self.anonymous_bytes.append(look.anonymous_bytes)
        self.descriptors.append(look.descriptors)
        self.threads.append(look.threads)

    def trends(self) -> tuple[Trend, ...]:
        """The three figures; empty for a process that was seen too seldom or too briefly."""
        if len(self.times_s) < MIN_LOOKS or self.times_s[-1] - self.times_s[0] < MIN_SPAN_S:
            return ()
        return (
            judge_memory(self.times_s, self.anonymous_bytes),
            judge_count("descriptors", self.descriptors),
            judge_count("threads", self.threads),
        )


class Census:
    """Processes that live through a run, by name."""

    def __init__(self) -> None:
        self._tracks: dict[str, Track] = {}

    def follow(self, name: str, pid: int) -> None:
        """Look at this process from now on."""
        self._tracks[name] = Track(pid)

    def look(self, time_s: float) -> None:
        """Look at all of them once. One that has ended keeps what was seen."""
        for track in self._tracks.values():
            look = look_at(track.pid)
            if look is not None:
                track.add(time_s, look)

    def trends(self) -> dict[str, tuple[Trend, ...]]:
        """By name, see ``Track.trends``."""
        return {name: track.trends() for name, track in self._tracks.items()}
