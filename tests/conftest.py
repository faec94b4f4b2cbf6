"""Fixtures for all tests: a lab of one's own that must be left clean, and the profiles of Hypothesis."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from common.queues import Queue
from tests.support import leftovers, remove_leftovers

# No deadline per example: the machine may be busy, and the first call of a kernel compiles it.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("default"), max_examples=20, stateful_step_count=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def guest_names() -> list[str]:
    """Guests whose queues ``lab_name`` looks for at the end; a test whose guests live in other processes adds to it."""
    return [f"{prefix}{index}" for prefix in ("g", "guest-") for index in range(8)]


@pytest.fixture
def lab_name(guest_names: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A lab name that nobody else uses. Fails the test that leaves shared memory or queues of it behind."""
    lab = f"t{os.getpid()}-{secrets.token_hex(4)}"
    create = Queue.create.__func__  # type: ignore[attr-defined]  # the function under the classmethod

    def recording(cls: type[Queue], name: str, *, max_messages: int, message_bytes: int) -> Queue:
        parts = name.split(".")
        if parts[1:2] == [lab] and len(parts) > 3:
            guest_names.append(parts[2])
        queue: Queue = create(cls, name, max_messages=max_messages, message_bytes=message_bytes)
        return queue

    monkeypatch.setattr(Queue, "create", classmethod(recording))
    yield lab
    left = leftovers(lab, guest_names)
    remove_leftovers(left)
    assert not left, f"left behind: {left}"
