"""Real processes for the benchmarks: a host, and guests that run for a while and say what they did."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import LabError
from common.names import SHM_DIR, control_queue

__all__ = ["LiveHost", "live_host", "run_guest"]

_START_S = 30.0


class LiveHost:
    """A running host; ``lab`` is its name."""

    def __init__(self, lab: str, process: subprocess.Popen[bytes]) -> None:
        self.lab = lab
        self.process = process


@contextlib.contextmanager
def live_host(*flags: str) -> Iterator[LiveHost]:
    """A host process of a lab of its own, stopped at the end of the block.

    Raises:
        LabError: it does not start.
    """
    lab = f"bench-{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "host", "--name", lab, "--quiet", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  our own module, fixed flags
    try:
        _wait_for_host(lab, process)
        yield LiveHost(lab, process)
    finally:
        process.terminate()
        process.wait()


def _wait_for_host(lab: str, process: subprocess.Popen[bytes]) -> None:
    from common.errors import PeerError
    from common.queues import Queue

    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(PeerError):
            Queue.open(control_queue(lab), read=False, write=True).close()
            return
        time.sleep(0.01)
    raise LabError(f"the host did not start; is {SHM_DIR} writable, and are message queues to be had?")


def run_guest(host: LiveHost, *flags: str) -> dict[str, Any]:
    """One guest's result, from start to end.

    Raises:
        LabError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.json"
        command = [sys.executable, "-m", "guest", "--host", host.lab, "--quiet", "--json", str(path), *flags]
        done = subprocess.run(command, check=False, capture_output=True)  # noqa: S603  our own module
        if done.returncode:
            raise LabError(f"a guest failed with {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
        result: dict[str, Any] = json.loads(path.read_text())
        return result
