"""What a batch in flight is made of, as the host will find it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from common.layout import RESIDENT, RETURNED, W_N_PAGES
from common.native import kernel, view_i64
from guest.memory import resident_map
from guest.reporting.cycle import Batch

__all__ = ["Survey", "survey_batch"]


class Survey(NamedTuple):
    """Of one batch: runs of neighbouring blocks, pages that are resident, blocks all of whose pages are returned."""

    ranges: int
    resident_pages: int
    duplicates: int


@kernel
def survey_blocks(address, starts, ends):  # type: ignore[no-untyped-def]
    """(ranges, resident pages, duplicates) of blocks given as pfns, int64[n] each, ascending, ends exclusive. No lock.

    A duplicate has been given back as a whole, and not been used since.
    """
    residence = resident_map(address, view_i64(address, W_N_PAGES + 1)[W_N_PAGES])
    ranges = np.int64(0)
    resident = np.int64(0)
    duplicates = np.int64(0)
    for index in range(starts.size):
        if index == 0 or starts[index] != ends[index - 1]:
            ranges += 1
        returned = np.int64(0)
        for page in range(starts[index], ends[index]):
            if residence[page] == RESIDENT:
                resident += 1
            elif residence[page] == RETURNED:
                returned += 1
        if returned == ends[index] - starts[index]:
            duplicates += 1
    return ranges, resident, duplicates


def survey_batch(address: int, batch: Batch) -> Survey:
    """Look at a batch of the zone at ``address`` before it is discarded."""
    ascending = np.argsort(batch.pfns, kind="stable")
    starts = batch.pfns[ascending]
    ends = starts + (np.int64(1) << batch.orders[ascending])
    return Survey(*(int(count) for count in survey_blocks(address, starts, ends)))
