"""An attached process: one vCPU on somebody else's zone and RAM, until its standard input ends.

``python -m tests.stress.worker LAB GUEST WORKLOAD SEED``. Prints ``ready``; at the end its complaint, or ``sound``.
"""

from __future__ import annotations

import sys

import numpy as np

from common.errors import LabError
from common.ramobject import RamObject
from guest.allocator.zone import Zone
from guest.workloads.vcpu import VCpu, WorkloadSettings

__all__ = ["TARGET_PAGES"]

TARGET_PAGES = 1024


def _main(lab: str, guest: str, workload: str, seed: int) -> None:
    zone = Zone.attach(lab, guest)
    ram = RamObject.open(lab, guest, ram_bytes=zone.ram_bytes)
    memory = np.frombuffer(ram.map(), dtype=np.uint8)
    errors: list[BaseException] = []
    settings = WorkloadSettings(workload, TARGET_PAGES, 4, 0, 0, seed)
    vcpu = VCpu(zone, int(memory.ctypes.data), settings, on_error=errors.append)
    vcpu.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    vcpu.stop()
    vcpu.join()
    if errors:
        raise LabError(str(errors[0]))
    sys.stdout.write(f"{vcpu.complaint() or 'sound'}\n")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
