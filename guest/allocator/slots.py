"""Where a per-CPU slot and its lists lie: the words of a slot, the heads of its lists."""

from __future__ import annotations

from common.geometry import PCP_MIGRATETYPES, Migratetype
from common.layout import (
    CPU_WORDS,
    FREE_HEAD_NODES,
    HEADER_WORDS,
    N_PCP_LISTS,
    PCP_HEAD_NODES,
    PCP_LOW_ORDERS,
    W_N_PAGES,
)
from common.native import kernel
from guest.allocator.view import ctl_of

__all__ = ["cpu_slot", "pcp_list_head", "pcp_list_index"]

MOVABLE = int(Migratetype.MOVABLE)


@kernel
def cpu_slot(cpu):  # type: ignore[no-untyped-def]
    """First word of slot ``cpu`` in ``ctl``."""
    return HEADER_WORDS + cpu * CPU_WORDS


@kernel
def pcp_list_head(zone, cpu, index):  # type: ignore[no-untyped-def]
    """Node number of the head of per-CPU list ``index`` of ``cpu``."""
    return ctl_of(zone)[W_N_PAGES] + FREE_HEAD_NODES + cpu * PCP_HEAD_NODES + index


@kernel
def pcp_list_index(order, migratetype):  # type: ignore[no-untyped-def]
    """order_to_pindex: three types for each low order, then movable and others of pageblock order."""
    if order < PCP_LOW_ORDERS:
        return order * PCP_MIGRATETYPES + migratetype
    return N_PCP_LISTS - 2 + (0 if migratetype == MOVABLE else 1)
