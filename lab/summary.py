"""A run in words: the title of its picture and the text at its end."""

from __future__ import annotations

import signal
from typing import Any

from lab.view import mib

__all__ = ["failure_text", "headline", "subtitle", "summary_text"]

# What a signal says of the machine. A page of shared memory that the kernel has no room for is SIGBUS, not an error.
_SIGNALS = {
    int(signal.SIGBUS): " (SIGBUS): the memory in /dev/shm ran out; enlarge it "
    "(mount -o remount,size=SIZE /dev/shm) or use fewer or smaller guests",
}


def headline(result: dict[str, Any]) -> str:
    """What was seen, in one sentence with numbers."""
    guests = _complete(result)
    if not guests:
        return "No guest ended well enough to tell what happened"
    who = "1 guest" if len(guests) == 1 else f"{len(guests)} guests"
    returned = _total(guests, "returned_bytes")
    peak, final = result["sampled_peak_bytes"], _total(guests, "final_resident_bytes")
    if not returned:
        why = ""
        if guests[0].get("policy") == "off":
            why = "Without reporting "
        elif result["host"].get("inhibited"):
            why = "With discards inhibited "
        return f"{why}{who} gave nothing back: {mib(peak)} resident at the peak, {mib(final)} at the end"
    return f"{who} gave back {mib(returned)}: resident went from {mib(peak)} at the peak to {mib(final)} at the end"


def subtitle(result: dict[str, Any]) -> str:
    """How it was run and what it cost, for the line below the picture's title."""
    guests = _complete(result)
    if not guests:
        return ""
    used = guests[0]
    parts = [
        f"workload {used.get('workload')}",
        f"policy {used.get('policy')}",
        f"blocks of order {used.get('min_order')} and up",
        f"delay {used.get('delay_ns', 0) / 1e6:g} ms",
        f"at most {used.get('capacity')} blocks a report",
        f"{_total(guests, 'refaults')} refaults",
        f"lock held to pull: p99 {_worst(guests, 'pull')}",
    ]
    return "; ".join(parts)


def summary_text(result: dict[str, Any], *, plot: str | None) -> list[str]:
    """Lines for a person: what was given back, what it cost, whether the accounts agree, where the picture is."""
    guests = _complete(result)
    lines = [headline(result)]
    if guests:
        returned, freed = (_total(guests, key) for key in ("returned_bytes", "freed_bytes"))
        share = f"{100 * returned / freed:.1f} % of what the workloads freed" if freed else "nothing was freed"
        lines.append(f"  returned    {mib(returned)}, {share}, in {result['host'].get('reports', 0)} reports")
        lines.append(f"  refaults    {_total(guests, 'refaults')} pages were used again and faulted in")
    if guests and result["host"].get("reports"):
        lines.append(f"  lock held   p99 {_worst(guests, 'pull')} to pull, {_worst(guests, 'put_back')} to put back")
    failed = [check for check in result["checks"] if not check["ok"]]
    if not failed:
        lines.append(f"  accounts    all {len(result['checks'])} checks hold, to the byte")
    lines.extend(f"  FAILED      {check['name']}: {check['detail']}".rstrip(": ") for check in failed)
    if plot is not None:
        lines.append(f"  picture     {plot}")
    return lines


def failure_text(name: str, exit_code: int | None, stderr_tail: str) -> str:
    """How one process failed, with the last that it said."""
    if exit_code is None:
        how = "was never started"
    elif exit_code < 0:
        how = f"was ended by signal {-exit_code}{_SIGNALS.get(-exit_code, '')}"
    else:
        how = f"ended with exit code {exit_code}"
    indented = "\n".join(f"    {line}" for line in stderr_tail.splitlines()[-20:])
    return f"{name} {how}" + (f"; it said last:\n{indented}" if indented else "")


def _complete(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Guests that left an account."""
    return [guest for guest in result["guests"] if guest.get("memory_bytes") is not None]


def _total(guests: list[dict[str, Any]], key: str) -> int:
    return sum(guest[key] for guest in guests)


def _worst(guests: list[dict[str, Any]], step: str) -> str:
    """The highest p99 of any guest."""
    return f"{max(guest['lock_hold_ns'][step]['p99'] for guest in guests) / 1000:.1f} µs"
