"""The oracle: what giving back could do at best, with the future known.

No report touches the allocator. A page that stays free for longer than a refault and its share of a discard cost is
taken to have been given back the moment it was freed, and refaulted when it is used again: its time counts as not
resident, and the refault is charged to the vCPU that uses it. Pages that are never used again count as given back when
they were freed.

The moments of frees and allocations inside a step follow from a journal that the workload's kernels keep, in order, at
the pace of the step's own cost a page and of the refaults before. When processors are short a step lasts longer than
that, so that a page may count as free from a moment before its true one: in the oracle's favour.
"""

from __future__ import annotations

import numpy as np

from common.errors import LabError
from common.geometry import TOP_ORDER
from common.native import kernel
from guest.workloads.engine import JOURNAL_WORDS
from lab.virtual.costs import Costs

__all__ = ["MAX_BUDGET_PAGES", "Oracle"]

MAX_BUDGET_PAGES = JOURNAL_WORDS - 2  # of one step: a page or more each, one block over it, one word for the count

# Words of ``sums``, float64[3].
NOT_RESIDENT_NS, REFAULTS, END = 0, 1, 2


@kernel
def settle_journal(journal, freed_at, sums, start, page_ns, refault_ns, threshold_ns):  # type: ignore[no-untyped-def]
    """Go through a journal and empty it: from time ``start`` on, at ``page_ns`` a page and ``refault_ns`` a refault.

    Args:
        freed_at: float64[n_pages], when each page was freed, -1 while it is in use or was never used.
        sums: float64[3]; page-ns not resident and refaults are added to, the last is set to the time at the end.
    """
    now = start
    for index in range(1, journal[0] + 1):
        entry = journal[index]
        first = entry >> 8
        pages = np.int64(1) << ((entry >> 1) & 0x7F)
        if entry & 1:
            now += pages * page_ns
            for page in range(first, first + pages):
                freed_at[page] = now
        else:
            for page in range(first, first + pages):
                since = freed_at[page]
                if since >= 0 and now - since > threshold_ns:
                    sums[NOT_RESIDENT_NS] += now - since
                    sums[REFAULTS] += 1
                    now += refault_ns
                freed_at[page] = -1.0
                now += page_ns
    journal[0] = 0
    sums[END] = now


class Oracle:
    """The books of pages that are free, for one run."""

    def __init__(self, n_pages: int, costs: Costs) -> None:
        self.peak_pages = 0
        self._journal = np.zeros(JOURNAL_WORDS, dtype=np.int64)
        # SAFETY: the array lives as long as the oracle, and the oracle as long as its vCPUs.
        self.journal_address = int(self._journal.ctypes.data)
        self._freed_at = np.full(n_pages, -1.0)
        self._sums = np.zeros(3)
        self._refault_ns = costs.fault_ns
        # The least that the discard of a page can cost: in the largest block there is.
        self.discard_ns = costs.discard_page_ns + costs.discard_range_ns / (1 << TOP_ORDER)
        self.threshold_ns = self._refault_ns + self.discard_ns

    def settle(self, now: float, work_ns: float, pages: int, allocated: int) -> float:
        """Take in what a step from ``now`` on did; the ns that its refaults cost on top of ``work_ns``.

        Args:
            pages: that the step moved. allocated: that all vCPUs hold after it.

        Raises:
            LabError: the step was longer than the journal.
        """
        self.peak_pages = max(self.peak_pages, allocated)
        if self._journal[0] >= JOURNAL_WORDS:
            raise LabError(f"a step of {pages} pages does not fit the oracle's journal of {JOURNAL_WORDS} words")
        page_ns = work_ns / pages if pages else 0.0
        settle_journal(self._journal, self._freed_at, self._sums, now, page_ns, self._refault_ns, self.threshold_ns)
        return max(0.0, float(self._sums[END]) - now - work_ns) if pages else 0.0

    @property
    def refaults(self) -> int:
        """Pages that came back."""
        return int(self._sums[REFAULTS])

    def finish(self, end: float) -> tuple[int, float]:
        """Pages that are free for good at ``end``, and page-ns not resident over the whole run."""
        free = self._freed_at[self._freed_at >= 0]
        return int(free.size), float(self._sums[NOT_RESIDENT_NS]) + float((end - free).clip(min=0).sum())
