"""How far a trace can be believed: what is missing or contradicts itself in it, and what that does to a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from lab.trace.events import PAGE_EVENTS, Event
from lab.trace.follow import FOLLOWED, Pages
from lab.trace.reader import Batch, Source
from lab.trace.snapshot import Snapshot

__all__ = ["STRICT_SHARE", "Health", "Watch", "lines_of", "refusals_of"]

STRICT_SHARE = 0.001  # of the events of a kind, that --strict lets contradict each other
_BULK_SHARE = 0.05  # the same for frees of free pages: __alloc_pages_bulk() has no event in any kernel
_OTHER_MACHINE_SHARE, _OTHER_MACHINE_LEAST = 0.5, 1000  # fewer may all lie between the snapshot and the trace


@dataclass(frozen=True)
class _Rule:
    """One finding: its count, what it is counted against, what ``--strict`` allows, and what it does to a result."""

    key: str
    what: str
    effect: str
    of: str | None = None
    allowed: float | None = 0.0


_RULES = (
    _Rule(
        "lost_events",
        "events lost by the recorder",
        "pages changed hands unseen there: later counts drift, and reports of those blocks are wrong until "
        "each page is seen again",
    ),
    _Rule(
        "overwritten_events",
        "events overwritten before the buffer was read",
        "the trace begins later on some CPUs than on others: what was freed or taken before is missing; record"
        " with a larger buffer, or read trace_pipe",
    ),
    _Rule(
        "unrecognised_lines",
        "lines that no format explains",
        "they were left out: if they were events, these are missing",
    ),
    _Rule(
        "cut_lines",
        "last line that breaks off",
        "one event is missing at the end",
    ),
    _Rule(
        "out_of_order_events",
        "events behind a later one",
        "put in order by time; two within a microsecond may still be the wrong way round",
        of="events",
        allowed=STRICT_SHARE,
    ),
    _Rule(
        "frees_of_unknown",
        "frees of pages never seen allocated",
        "such a page counts as allocated from before the trace until here; it was resident all the time; a "
        "snapshot at the start would know it",
        of="mm_page_free",
        allowed=None,
    ),
    _Rule(
        "frees_of_free",
        "frees of pages that are free already",
        "an allocation had no event, as those in bulk have none (vmalloc, from Linux 5.14 on), or was missed: the"
        " page's time in use is missing, and one refault may be",
        of="mm_page_free",
        allowed=_BULK_SHARE,
    ),
    _Rule(
        "allocations_of_allocated",
        "allocations of pages thought allocated",
        "a free went unseen: the page counts as in use in between, and too little is reported",
        of="mm_page_alloc",
        allowed=STRICT_SHARE,
    ),
    _Rule(
        "batched_without_free",
        "batched frees without their mm_page_free",
        "taken as the free itself, which the trace does not hold",
        of="mm_page_free_batched",
        allowed=STRICT_SHARE,
    ),
    _Rule(
        "removed_not_on_list",
        "pages taken from the buddy lists that were not on them",
        "a zone replay cannot take them and skips them: its free memory is too small by as much from there on",
        of="mm_page_alloc_zone_locked",
        allowed=STRICT_SHARE,
    ),
    _Rule(
        "added_already_on_list",
        "pages put on the buddy lists that were on them",
        "a zone replay skips them: an allocation of these pages went unseen",
        of="mm_page_pcpu_drain",
        allowed=STRICT_SHARE,
    ),
    _Rule(
        "misaligned",
        "blocks that are not aligned to their order",
        "no kernel of 4 KiB pages has them: the trace is damaged or of another page size",
    ),
    _Rule(
        "unknown_gfp_words",
        "words for gfp flags that are not known",
        "their bits are 0; nothing but a report by flag uses them",
        allowed=None,
    ),
    _Rule(
        "failed_allocations",
        "allocations that failed",
        "left out: no page changed hands",
        allowed=None,
    ),
)


@dataclass(frozen=True)
class Health:
    """The findings.

    Attributes:
        facts: everything, as the JSON has it.
        refusals: what ``--strict`` does not let pass, a sentence each.
    """

    facts: dict[str, Any]
    refusals: list[str]

    def lines(self) -> list[str]:
        """For people to read."""
        return lines_of(self.facts)


def lines_of(facts: dict[str, Any]) -> list[str]:
    """A trace's health for people to read, from the facts as the JSON has them."""
    types = ", ".join(f"{name} {count}" for name, count in facts["by_type"].items() if count)
    cpus = ", ".join(str(cpu) for cpu in facts["cpus"][:16]) + (", …" if len(facts["cpus"]) > 16 else "")
    known = facts["known_share"]
    with_snapshot, batched = known["with_snapshot"], facts["by_type"]["mm_page_free_batched"]
    lines = [
        f"events       {facts['events']}: {types}",
        f"span         {facts['span_s']:.3f} s, from {facts['first_s']:.6f} to {facts['last_s']:.6f}",
        f"CPUs         {cpus}",
        f"frees        {facts['frees']} in all; the {batched} batched ones are among them and counted once",
        f"known pages  {known['from_events']:.1%} of {facts['pages']} by the events"
        + ("" if with_snapshot is None else f", {with_snapshot:.1%} with the snapshot")
        + f"; {known['at_the_event']:.1%} of the page events met a page whose state was known",
    ]
    lines += [f"{note['level']:<12} {note['text']}" for note in facts["notes"]]
    return lines


def refusals_of(facts: dict[str, Any]) -> list[str]:
    """What ``--strict`` does not let pass, a sentence each, from the facts as the JSON has them."""
    return _judged(facts, facts["sources"])[1]


class Watch:
    """Looks at every batch on its way."""

    def __init__(self, start: Snapshot | None) -> None:
        self._start = start
        self._pages = Pages(start)
        self._types: npt.NDArray[np.int64] = np.zeros(len(Event), np.int64)
        self._cpus: npt.NDArray[np.bool_] = np.zeros(1 << 15, np.bool_)
        self._sources: list[Source] = []

    def see(self, batch: Batch) -> None:
        """Count a batch in.

        Raises:
            UsageError: the snapshot is of a smaller machine than the trace.
        """
        rows = batch.columns
        if batch.source not in self._sources:
            self._sources.append(batch.source)
        if self._start is not None and self._start.n_pages:
            ends = rows["pfn"].astype(np.int64) + (np.int64(1) << rows["order"].astype(np.int64))
            beyond = np.flatnonzero((ends > self._start.n_pages) & (rows["event"] <= Event.mm_page_alloc_extfrag))
            if beyond.size:
                row = int(beyond[0])
                raise UsageError(
                    f"{batch.source.name}: line {int(rows['line'][row])}: pfn {int(rows['pfn'][row]):#x} is beyond the "
                    f"{self._start.n_pages} pages of {self._start.name}; expected a snapshot of the same machine"
                )
        self._types += np.bincount(rows["event"], minlength=len(Event))
        self._cpus[rows["cpu"]] = True
        self._pages.apply(rows)

    def health(self) -> Health:
        """What was found, once all batches were seen.

        Raises:
            UsageError: the snapshot contradicts the trace throughout.
        """
        followed = dict(zip(FOLLOWED, self._pages.counts.tolist(), strict=True))
        by_type = {event.name: int(self._types[event]) for event in Event}
        sources = [source.as_dict() for source in self._sources]
        keys: tuple[str, ...] = ("lost_events", "lost_places", "overwritten_events", "unrecognised_lines", "cut_lines")
        keys += ("out_of_order_events", "unknown_gfp_words", "failed_allocations", "other_events")
        facts: dict[str, Any] = {
            "events": int(self._types.sum()),
            "by_type": by_type,
            "frees": by_type["mm_page_free"] + followed["batched_without_free"],
            "first_s": min(source.first_ns for source in self._sources) / 1e9,
            "last_s": max(source.last_ns for source in self._sources) / 1e9,
            "cpus": np.flatnonzero(self._cpus).tolist(),
            "pages": self._pages.n_pages,
        }
        facts["span_s"] = facts["last_s"] - facts["first_s"]
        facts |= {key: sum(int(source[key]) for source in sources) for key in keys}
        facts |= {key: count for key, count in followed.items() if key != "known_before"}
        self._refuse_other_machine(facts)
        paged = sum(by_type[event.name] for event in PAGE_EVENTS if event != Event.mm_page_alloc_extfrag)
        from_events, altogether = self._pages.known_pages()
        pages = max(1, facts["pages"])
        facts["known_share"] = {
            "from_events": from_events / pages,
            "with_snapshot": None if self._start is None else altogether / pages,
            "at_the_event": followed["known_before"] / paged if paged else 0.0,
        }
        facts["notes"], refusals = _judged(facts, sources)
        facts["verdict"] = "complete" if not refusals else "with gaps"
        facts["start"] = None if self._start is None else self._start.as_dict()
        facts["sources"] = sources
        return Health(facts, refusals)

    def _refuse_other_machine(self, facts: dict[str, Any]) -> None:
        asked, wrong = facts["seeded_removals"], facts["seeded_removals_wrong"]
        lossless = not (facts["lost_events"] or facts["overwritten_events"])
        if self._start and lossless and asked >= _OTHER_MACHINE_LEAST and wrong > asked * _OTHER_MACHINE_SHARE:
            raise UsageError(
                f"{self._start.name}: {wrong} of the first {asked} blocks that the trace takes from the free lists are "
                "not free in it; expected a snapshot of the same machine, taken when the trace begins"
            )


def _judged(facts: dict[str, Any], sources: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Notes for people, and what ``--strict`` refuses."""
    notes: list[dict[str, Any]] = []
    refusals: list[str] = []
    for rule in _RULES:
        count = facts[rule.key]
        if not count:
            continue
        whole = facts["events"] if rule.of == "events" else facts["by_type"].get(rule.of)
        share = f" ({count / whole:.2%} of {whole})" if whole else ""
        refused = rule.allowed is not None and count > rule.allowed * (whole or 0)
        text = f"{count} {rule.what}{share}: {rule.effect}"
        if rule.key == "unrecognised_lines":
            text += f" (the first is {next(s['first_unrecognised'] for s in sources if s['first_unrecognised'])})"
        notes.append({"key": rule.key, "count": count, "level": "gap" if refused else "note", "text": text})
        if refused:
            bound = f"at most {rule.allowed:.1%}" if rule.allowed else "none"
            refusals.append(f"{count} {rule.what}{share}, {bound} allowed")
    by_type = facts["by_type"]
    if not (by_type["mm_page_alloc_zone_locked"] and by_type["mm_page_pcpu_drain"]):
        text = (
            "there are not both zone events (mm_page_alloc_zone_locked, mm_page_pcpu_drain): the free lists can only "
            "be guessed through per-CPU lists of our own"
        )
        notes.append({"key": "no_zone_events", "count": 0, "level": "note", "text": text})
    if not notes:
        notes.append({"key": "complete", "count": 0, "level": "note", "text": "nothing is missing that can be noticed"})
    return notes, refusals
