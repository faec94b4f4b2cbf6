"""One replay from plain values to plain values, in whichever process an engine chooses."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lab.replay import answer as told
from lab.replay.engine import ReplaySettings
from lab.replay.source import read_recording
from lab.trace.snapshot import read_snapshot

__all__ = ["execute"]


def execute(payload: dict[str, Any]) -> dict[str, Any]:
    """Do one replay; the answer without the recording's health. A process reads a recording once.

    Args:
        payload: ``traces``: names; ``start``: name of the snapshot or ""; ``from_ns``, ``to_ns``: int or None;
            ``mode``: zone if not given; ``memory_bytes``, ``min_free_kbytes``: 0 if not given; ``settings``: fields of
            ``ReplaySettings``; ``blocks``: bool.

    Raises:
        UsageError: as ``read_recording``, ``scene_of`` and ``Replay``.
    """
    scene = _scene(
        tuple(payload["traces"]),
        payload.get("start", ""),
        payload.get("from_ns"),
        payload.get("to_ns"),
        payload.get("memory_bytes", 0),
        payload.get("min_free_kbytes", 0),
        payload.get("mode", "zone"),
    )
    done = told.replay(scene, ReplaySettings(**payload["settings"]))
    done.run()
    found = told.answer(done, scene, blocks=payload.get("blocks", False))
    del found["health"]  # the same for every setting
    return found


@lru_cache(maxsize=2)
def _scene(
    traces: tuple[str, ...],
    start: str,
    from_ns: int | None,
    to_ns: int | None,
    memory_bytes: int,
    min_free_kbytes: int,
    mode: str,
) -> told.Scene:
    snapshot = read_snapshot(start) if start else None
    recording = read_recording(list(traces), snapshot, from_ns, to_ns)
    return told.scene_of(recording, snapshot, mode=mode, memory_bytes=memory_bytes, min_free_kbytes=min_free_kbytes)
