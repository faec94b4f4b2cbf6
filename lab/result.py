"""The one result object of a run, with the accounts of all parties held against each other.

Host, guests and sampler count independently: the host what it proved freed, a guest what it was told and what it
touched, the sampler what the machine holds. When all is quiet the three must agree to the byte; ``ok`` says that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lab.hosts import HOST_DRIVEN
from lab.outcome import Account, ProcessEnd, RunOutcome
from lab.samples import total_peak

__all__ = ["GUEST_FIELDS", "HOST_FIELDS", "Check", "account_checks", "build_result", "exit_code"]

HOST_FIELDS = ("reports", "blocks", "asked_bytes", "freed_bytes", "failures", "rejected")
GUEST_FIELDS = (
    "name",
    "memory_bytes",
    "peak_resident_bytes",
    "final_resident_bytes",
    "freed_bytes",
    "returned_bytes",
    "refaults",
    "allocations",
    "frees",
    "violations",
    "in_flight_max_blocks",
    "lock_hold_ns",
    "alloc_ns",
)
_RECORDS = ("reports_timeline", "per_vcpu", "series")
_INTERRUPTED = 130
_VIOLATION = 4


@dataclass(frozen=True)
class Check:
    """One thing that must hold of a finished run, and the figures it was decided on."""

    name: str
    ok: bool
    detail: str


def build_result(outcome: RunOutcome) -> dict[str, Any]:
    """Plain data for JSON: ``ok``, ``duration_s``, ``host``, ``guests``; beyond those ``checks`` and how all ended."""
    checks = [*_endings(outcome), *account_checks(outcome)]
    host = _counters(outcome.host.account)
    series = [outcome.observations[end.name].series for end in outcome.guests if end.name in outcome.observations]
    return {
        "ok": all(check.ok for check in checks),
        "duration_s": round(outcome.duration_s, 3),
        "host": host,
        "guests": [_guest(end) for end in outcome.guests],
        "lab": outcome.lab,
        "interrupted": outcome.interrupted,
        "sampled_peak_bytes": total_peak(series),
        "processes": [{"name": end.name, "exit_code": end.exit_code} for end in outcome.processes],
        "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks],
    }


def exit_code(outcome: RunOutcome, result: dict[str, Any]) -> int:
    """What the demo ends with: 130 interrupted, else 4 for a violation, else a failed process's own code, else 0 or 1.

    Accounts that disagree after every process ended well are a violation too: a byte is not where it must be.
    """
    if outcome.interrupted:
        return _INTERRUPTED
    codes = [end.exit_code for end in outcome.processes]
    if _VIOLATION in codes or any(guest.get("violations") for guest in result["guests"]):
        return _VIOLATION
    failed = [code for code in codes if code != 0]
    if failed:
        # Of several failures the most telling: what the user or the machine can mend, before a plain 1 or a signal.
        return max((code for code in failed if code is not None and 1 <= code < _INTERRUPTED), default=1)
    if outcome.problem is not None:
        return 1
    return 0 if result["ok"] else _VIOLATION


def _counters(account: Account | None) -> dict[str, Any]:
    """The host's counters, those of the contract first; empty if it left no account."""
    counters: dict[str, Any] = {} if account is None else dict(account.get("host", {}))
    return {**{field: counters.get(field) for field in HOST_FIELDS}, **counters} if counters else {}


def _guest(end: ProcessEnd) -> dict[str, Any]:
    """One guest's account, fields of the contract first, without what was recorded over time: that is for pictures."""
    if end.account is None:
        return {"name": end.name}
    ordered = {field: end.account.get(field) for field in GUEST_FIELDS}
    return {**ordered, **{key: value for key, value in end.account.items() if key not in _RECORDS}}


def _endings(outcome: RunOutcome) -> Iterator[Check]:
    yield Check("not interrupted", not outcome.interrupted, "Ctrl-C or a signal" if outcome.interrupted else "")
    yield Check("ran to its end", outcome.problem is None, outcome.problem or "")
    for end in outcome.processes:
        if end.exit_code is None:
            yield Check(f"{end.name} was started", False, "")
            continue
        yield Check(f"{end.name} ended well", end.exit_code == 0, f"exit code {end.exit_code}")
        yield Check(f"{end.name} left an account", end.account is not None, "")


def account_checks(outcome: RunOutcome) -> Iterator[Check]:
    """Checks over the accounts that there are; a missing one was noted by ``_endings``."""
    host = _counters(outcome.host.account)
    for field in ("failures", "rejected", "malformed", "invalid_blocks"):
        if host.get(field) is not None:
            yield Check(f"host: no {field}", host[field] == 0, f"{host[field]}")
    accounts = {end.name: end.account for end in outcome.guests if end.account is not None}
    for name, account in accounts.items():
        found = "; ".join([f"{account['violations']}", *account.get("complaints", ())])
        yield Check(f"{name}: no violations", account["violations"] == 0, found)
        yield from _residency(outcome, name, account)
    if not host or len(accounts) < len(outcome.guests):
        return
    yield from _totals(host, list(accounts.values()))
    host_views = {entry["name"]: entry for entry in (outcome.host.account or {}).get("guests", [])}
    for name, account in accounts.items():
        entry = host_views.get(name)
        # A host that claims looks for guests now and then: one that ended before it looked gave nothing back.
        unmet = account.get("policy") in HOST_DRIVEN and account["returned_bytes"] == 0
        yield Check(f"{name}: known to the host", entry is not None or unmet, "")
        if entry is None:
            continue
        yield Check(f"{name}: said goodbye", entry["state"] == "left", entry["state"])
        if account["backend"] == "shared":
            yield _equal(
                f"{name}: host and guest agree on what was returned",
                ("host freed_bytes", entry["freed_bytes"]),
                ("returned_bytes", account["returned_bytes"]),
            )
            yield _equal(
                f"{name}: host and guest agree on what is resident at the end",
                ("host final_resident_bytes", entry["final_resident_bytes"]),
                ("final_resident_bytes", account["final_resident_bytes"]),
            )


def _totals(host: Account, accounts: list[Account]) -> Iterator[Check]:
    """The host's sums against those of all guests."""
    returned = ("guests' returned_bytes", sum(account["returned_bytes"] for account in accounts))
    freed = ("host freed_bytes", host["freed_bytes"])
    if all(account["backend"] == "shared" for account in accounts):
        yield _equal("all that the host freed is what the guests were told was returned", freed, returned)
    else:
        # Without RAM the host cannot see what was never touched, so it claims the first report of that as freed too.
        detail = f"{returned[0]} {returned[1]} <= {freed[0]} {freed[1]}"
        yield Check("the host freed at least what was returned", returned[1] <= freed[1], detail)
    if any(account[trouble] for account in accounts for trouble in ("withdrawn", "failed", "stale_acks")):
        return  # the host heard of blocks whose report the guest gave up
    if any(account.get("policy") in HOST_DRIVEN for account in accounts):
        return  # those report nothing: the host claims
    for theirs, ours in (("blocks", "blocks"), ("asked_bytes", "reported_bytes")):
        yield _equal(
            f"every block that was reported was heard of: {theirs}",
            (f"host {theirs}", host[theirs]),
            (f"guests' {ours}", sum(account[ours] for account in accounts)),
        )


def _residency(outcome: RunOutcome, name: str, account: Account) -> Iterator[Check]:
    final, peak, memory = (account[f] for f in ("final_resident_bytes", "peak_resident_bytes", "memory_bytes"))
    yield Check(
        f"{name}: final, peak and memory ascend", 0 <= final <= peak <= memory, f"{final} <= {peak} <= {memory}"
    )
    # A host that is asked for a block populates all of it, and may claim again what nobody ever used.
    freed = account["freed_bytes"] + account.get("installed_bytes", 0)
    yield Check(
        f"{name}: no more was returned than was freed",
        account["returned_bytes"] <= freed,
        f"{account['returned_bytes']} <= {freed}",
    )
    if not outcome.watched:
        return
    seen = outcome.observations.get(name)
    if seen is None or seen.last is None:
        yield Check(f"{name}: was seen from outside", False, "the sampler never reached it")
        return
    yield _equal(
        f"{name}: the machine holds what the guest says",
        ("resident in the machine", seen.last.resident_bytes),
        ("final_resident_bytes", final),
    )
    if seen.last_map is not None:
        yield _equal(
            f"{name}: the machine holds what the resident map says",
            ("resident in the machine", seen.last.resident_bytes),
            ("resident map", seen.last_map.resident_bytes),
        )
    yield _equal(
        f"{name}: first touches and refaults less what was returned is resident",
        ("resident in the machine", seen.last.resident_bytes),
        ("touched less returned", seen.last.counted_bytes),
    )


def _equal(name: str, one: tuple[str, int], two: tuple[str, int]) -> Check:
    return Check(name, one[1] == two[1], f"{one[0]} {one[1]}, {two[0]} {two[1]}")
