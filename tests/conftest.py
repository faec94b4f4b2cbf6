"""Fixtures for all tests: a lab of one's own that must be left clean, and the profiles of Hypothesis."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from common.queues import Queue
from tests.support import leftovers, remove_leftovers

# No deadline per example: the machine may be busy, and the first call of a kernel compiles it.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("default"), max_examples=20, stateful_step_count=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Tests whose processes need the machine, and each of which brings as many as there are processors: one at a time.
_ONE_AT_A_TIME = ("tests/live/", "tests/stress/")
_FIRST = ("tests/kill/", *_ONE_AT_A_TIME, "tests/lab/")  # what takes longest, and waits most
_MOST_WORKERS = 8  # the queues of all labs that run at once count towards one RLIMIT_MSGQUEUE


def pytest_configure(config: pytest.Config) -> None:
    """In a worker of pytest-xdist, which ignores SIGINT as processes that it starts would: handle it as usual."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: several workers then end at about the same time."""
    items.sort(key=lambda item: [item.nodeid.startswith(folder) for folder in _FIRST], reverse=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: one more than there are processors, since many tests wait for processes."""
    return min(len(os.sched_getaffinity(0)) + 1, _MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``--dist loadscope``: a file's tests go to one worker, which then compiles or makes once what they share."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # it is untyped
        """Units of work are files, but for those that take turns."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "one at a time" if file.startswith(_ONE_AT_A_TIME) else file

    return ByFile(config, log)


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
