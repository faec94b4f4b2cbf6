"""What a replay found, in words."""

from __future__ import annotations

from typing import Any, TextIO

from common.units import format_size
from lab.trace.health import lines_of

__all__ = ["tell"]

_MUCH_CONTRADICTED = 0.001

# What is not known, or not as it should be, and what was done about it.
_NOTES = {
    "taken_not_free_pages": "pages taken that were not free here: a free was missed, or the start differs",
    "freed_not_used_pages": "pages freed that were free here: skipped",
    "failed_pages": "pages for which our allocator had no room",
    "taken_while_reported_blocks": "blocks that the guest took while they were reported here: the report lost them",
    "frees_without_event": "frees past the per-CPU lists without an event, found by what came after",
    "takes_without_event": "pages or blocks taken without an event, found as they were freed",
    "start_corrected_pages": "pages of the snapshot changed: their first event says otherwise",
}


def tell(talk: TextIO, found: dict[str, Any]) -> None:
    """The figures for people."""
    settings, unknown = found["settings"], found["unknown"]
    if found["health"]:
        talk.write("".join(f"  {line}\n" for line in lines_of(found["health"])))
    talk.write(
        f"{settings['mode']} replay: {settings['policy']}, order {settings['min_order']}, "
        f"delay {settings['delay_ns'] / 1e9:g} s, {settings['capacity']} blocks a report; "
        f"{found['begin_s']:.3f} to {found['end_s']:.3f} s, {found['moves']} moves\n"
    )
    against = found.get("against")
    for one in found["passes"] if against is None else against["passes"]:
        if against is None:
            size = format_size(one["bytes"])
            talk.write(f"  {one['t_s']:10.3f} s  {one['reports']} reports, {one['blocks']} blocks, {size}\n")
            continue
        ours, real = (f"{one[key]:10.3f} s" if one[key] is not None else "      none" for key in ("t_s", "real_t_s"))
        shared = f", {one['blocks_shared']} of {one['real_blocks']} blocks" if "real_blocks" in one else ""
        talk.write(f"  ours {ours} {format_size(one['bytes'])}, real {real} {format_size(one['real_bytes'])}{shared}\n")
    talk.write(
        f"reported {format_size(found['reported_bytes'])}, {found['gib_min']:.3f} GiB·min, "
        f"{found['refaults']} refaults ({found['refault_s']:.3f} s), host {found['host_cpu_s']:.3f} s\n"
    )
    talk.write("".join(f"  note: {unknown[key]} {text}\n" for key, text in _NOTES.items() if unknown[key]))
    if unknown["start_contradicted_share"] > _MUCH_CONTRADICTED:
        talk.write(
            f"  note: what is done first to {unknown['start_contradicted_share']:.1%} of the pages contradicts the "
            "snapshot: was it taken in this guest, as the recording began?\n"
        )
    if against is not None:
        blocks, ratio = against["blocks_found"], against["bytes_ratio"]
        talk.write(
            f"against the real guest: {against['passes_within_5_percent']:.0%} of passes within 5 %"
            + ("" if ratio is None else f", bytes {ratio:.4f}")
            + ("" if blocks is None else f", blocks {blocks:.2%}")
            + (f", memory off by {against['resident_off_mean']:.3%}" if "resident_off_mean" in against else "")
            + "\n"
        )
