"""Memory of the machine and of the control group: a page of /dev/shm counts against both."""

from __future__ import annotations

from common.units import format_size
from lab.doctor.limit import Limit, Plan, Verdict, at_least
from lab.doctor.machine import Machine
from lab.doctor.shared_memory import object_bytes

__all__ = ["memory_limits"]

_PROCESS_BYTES = 200 << 20  # of a guest beside its memory, as it stands in VmRSS: interpreter, compiler, kernels
_NO_LIMIT = 1 << 60  # what version 1 says for "none" is a little less than 2**63
_SHMEM = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


def memory_limits(machine: Machine, plan: Plan) -> list[Limit]:
    """All of them."""
    needed = plan.guests * (sum(object_bytes(plan)) + _PROCESS_BYTES) + _PROCESS_BYTES
    return [_memory(machine, needed), _group(machine, needed), _huge_pages(machine)]


def _memory(machine: Machine, needed: int) -> Limit:
    available = machine.kib("/proc/meminfo", "MemAvailable")
    swap = machine.kib("/proc/meminfo", "SwapFree") or 0
    verdict = at_least(None if available is None else available + swap, needed)
    value = "unknown" if available is None else f"{format_size(available)} and {format_size(swap)} of swap"
    fix = "end other programs, or use fewer or smaller guests (--guests, --memory)" if verdict is Verdict.SHORT else ""
    return Limit("memory available", value, format_size(needed), verdict, fix=fix)


def _group(machine: Machine, needed: int) -> Limit:
    """The tightest ``memory.max`` from this group up to the root (version 2), or ``limit_in_bytes`` (version 1)."""
    name, tightest, where = "memory of the control group", None, ""
    for folder, limit, usage in _groups(machine):
        most = machine.number(f"{folder}/{limit}")
        if most is None or most < 0 or most >= _NO_LIMIT:
            continue
        left = max(0, most - (machine.number(f"{folder}/{usage}") or 0))
        if tightest is None or left < tightest:
            tightest, where = left, f"{folder}/{limit}"
    if tightest is None:
        return Limit(name, "without limit", format_size(needed), Verdict.OK)
    verdict = at_least(tightest, needed)
    more = (machine.number(where) or 0) - tightest + needed
    return Limit(
        name,
        f"{format_size(tightest)} left",
        format_size(needed),
        verdict,
        fix=f"echo {more} | sudo tee {where}" if verdict is Verdict.SHORT else "",
        note="beyond it the kernel kills processes (OOM); in a container: docker run --memory"
        if verdict is Verdict.SHORT
        else "",
    )


def _groups(machine: Machine) -> list[tuple[str, str, str]]:
    """Folder, limit and usage file of each control group that this process is in, and of those above it."""
    found = []
    for line in (machine.text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        found += [("/".join([base, *parts[:depth]]), limit, usage) for depth in range(len(parts), -1, -1)]
    return found


def _huge_pages(machine: Machine) -> Limit:
    """Advice only: what is needed runs with small pages too."""
    setting = machine.text(_SHMEM)
    if setting is None:
        return Limit("huge pages in shared memory", "unknown", "", Verdict.UNKNOWN)
    chosen = setting.partition("[")[2].partition("]")[0] or setting
    helps = chosen in {"never", "deny"}
    return Limit(
        "huge pages in shared memory",
        chosen,
        "",
        Verdict.OK,
        fix=f"echo advise | sudo tee {_SHMEM}" if helps else "",
        note="advice: with it the allocator's records take fewer TLB entries" if helps else "",
    )
