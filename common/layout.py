"""The zone segment as flat NumPy dtypes, and the word offsets that kernels use.

``[header | per-CPU slots | links u32x2 a page | page state u16 | resident map u8 | pageblock types u8 |
reporting bitmap]``

The dtypes are the truth; every ``W_*`` constant is derived from them. A byte copy of the segment is a complete
snapshot of the allocator. Metadata per page: 8 + 2 + 1 bytes and a bit, plus header, slots and list heads.

Layout of a page's state (u16):

======  ===========================================================================
bits    meaning
======  ===========================================================================
0-3     order of the block that this page is the head of
4-6     kind: 0 interior, 1 free, 2 allocated, 3 in flight, 4 on a per-CPU list, 5 held: reported, and kept out
7       Reported: on a free list and already given back (PG_reported)
8-10    migratetype of the list it is on, or that it was allocated for
11      claimed: allocated, and taken from its owner by a free that is under way
12      zeroed: the host proved it zero, and nobody has used it since (PG_zeroed of 2026)
13      handed: free, on its list, and with the host all the same (walk-locked: the zone lock is held meanwhile)
======  ===========================================================================

Links are pairs (next, prev) of node numbers: a pfn, or a list head. Those of the head of an allocated block say whose
it is instead (``OWNED``). Head of free list (order, migratetype) is node
``n_pages + migratetype * N_ORDERS + order``; the head of the list of held blocks and those of the per-CPU lists follow.

Why one u32 pair a page and the state apart: a free must look at its buddy's *state* only, and 32 states share a
cache line, so a lone free touches one link line; packing both links into one u64 costs a read-modify-write each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from common.geometry import N_MIGRATETYPES, N_ORDERS, PAGEBLOCK_ORDER, PCP_MIGRATETYPES

__all__ = [
    "ACTIVE_BOUNDARY",
    "ACTIVE_PLAIN",
    "ACTIVE_RELEASE",
    "ALLOCATED",
    "ANSWERED",
    "ASKED",
    "ASK_FREE",
    "ASK_WORDS",
    "A_INSTALLED",
    "A_INSTALLS",
    "A_ORDER",
    "A_OWNER",
    "A_PFN",
    "A_REINSTALLED",
    "A_SEMAPHORE",
    "A_SEQUENCE",
    "A_STATE",
    "BLOCK_MT_MASK",
    "BLOCK_SAVED_SHIFT",
    "CLAIMED",
    "COUNTED",
    "CPU_DTYPE",
    "CPU_WORDS",
    "C_ALLOCATED_BYTES",
    "C_ALLOCATIONS",
    "C_COUNT",
    "C_DRAINS",
    "C_FIRST_TOUCHES",
    "C_FREED_BYTES",
    "C_FREES",
    "C_IN_HAND",
    "C_LOCK",
    "C_OF_GUEST",
    "C_OWNER_PID",
    "C_RANDOM_BITS",
    "C_RANDOM_STATE",
    "C_RANDOM_WORD",
    "C_REFAULTS",
    "C_REFILLS",
    "C_TOUCHED_AGAIN",
    "C_TOUCHED_FIRST",
    "C_TOUCHING",
    "C_VIOLATIONS",
    "C_ZEROING_SKIPPED",
    "FREE",
    "FREE_HEAD_NODES",
    "HANDED",
    "HANDED_OUT",
    "HEADER_DTYPE",
    "HEADER_WORDS",
    "HEAD_MASK",
    "HELD",
    "HELD_LIST",
    "INACTIVE",
    "INSTALLED",
    "INTERIOR",
    "IN_FLIGHT",
    "KIND_MASK",
    "KIND_SHIFT",
    "LAYOUT_VERSION",
    "MAGIC",
    "MARKING",
    "MAX_CPUS",
    "MT_MASK",
    "MT_SHIFT",
    "NEVER_TOUCHED",
    "N_ASKS",
    "N_FREE_LISTS",
    "N_PCP_LISTS",
    "N_POLICY_WORDS",
    "ON_PCP",
    "ORDER_MASK",
    "OWNED",
    "PCP_HEAD_NODES",
    "PCP_LOW_ORDERS",
    "REFUSED",
    "REPORTED",
    "RESIDENT",
    "RETURNED",
    "TAKEN_IN",
    "TRIGGER_ANY_FREE",
    "TRIGGER_BITMAP",
    "TRIGGER_HIGH_WATER_MARK",
    "TRIGGER_OFF",
    "W_ACTIVE",
    "W_ALLOCATIONS",
    "W_ASKING",
    "W_ASKS",
    "W_ASKS_WITHDRAWN",
    "W_ASKS_WORK",
    "W_ASK_SEQUENCE",
    "W_BITMAP_OFFSET",
    "W_BLOCK_OFFSET",
    "W_BOUNDARY",
    "W_CLAIMED_PAGEBLOCKS",
    "W_CREATED_NS",
    "W_DEVICE_PID",
    "W_EPOCH",
    "W_FAILED_ALLOCATIONS",
    "W_FREES",
    "W_FREE_PAGES",
    "W_HELD_BLOCKS",
    "W_HELD_PAGES",
    "W_HIGH_WATERMARK",
    "W_HIGH_WATER_MARK",
    "W_INSTALLED_PAGES",
    "W_INSTALLS",
    "W_INSTALL_WAIT_NS",
    "W_IN_FLIGHT_BLOCKS",
    "W_IN_FLIGHT_MAX_BLOCKS",
    "W_IN_FLIGHT_PAGES",
    "W_IN_HAND",
    "W_IN_HAND_BEFORE",
    "W_IN_HAND_HEAD",
    "W_ISOLATED_PAGES",
    "W_LAYOUT_VERSION",
    "W_LINK_OFFSET",
    "W_LOW_WATERMARK",
    "W_MAGIC",
    "W_MERGE_LIKELY",
    "W_MIN_ORDER",
    "W_MIN_WATERMARK",
    "W_NODES_HOLD_MAX",
    "W_NODES_VISITED",
    "W_NR_FREE",
    "W_N_CPUS",
    "W_N_PAGES",
    "W_OPEN_TO_HOST",
    "W_OWNER_PID",
    "W_PAGE_OFFSET",
    "W_PCP_BATCH",
    "W_PCP_HIGH",
    "W_POISON",
    "W_POLICY_WORDS",
    "W_PRESSURE",
    "W_PULLED_BLOCKS",
    "W_RAM_BYTES",
    "W_RANDOM_BITS",
    "W_RANDOM_STATE",
    "W_RANDOM_WORD",
    "W_READY",
    "W_REFCNT",
    "W_REINSTALLED_PAGES",
    "W_REPAIRS",
    "W_REPORTED",
    "W_REPORTING_ENABLED",
    "W_REQUESTED",
    "W_REQUESTS",
    "W_RESIDENT_OFFSET",
    "W_RETURNED_PAGES",
    "W_ROTATED",
    "W_RUNS",
    "W_SEED",
    "W_SETTLED_PAGES",
    "W_SETTLING",
    "W_SHUFFLE_ORDER",
    "W_STEALS",
    "W_TOTAL_BYTES",
    "W_TRIGGER",
    "W_WORK",
    "W_ZERO_TRACKING",
    "W_ZONE_LOCK",
    "ZEROED",
    "SegmentOffsets",
    "segment_offsets",
]

MAGIC = int.from_bytes(b"FPRZONE\0", "little")
LAYOUT_VERSION = 7
LINE_WORDS = 8  # a 64-byte cache line in int64 words

N_FREE_LISTS = N_ORDERS * N_MIGRATETYPES
PCP_LOW_ORDERS = min(4, PAGEBLOCK_ORDER)  # orders 0..PAGE_ALLOC_COSTLY_ORDER have per-CPU lists, below a pageblock
N_PCP_LISTS = PCP_LOW_ORDERS * PCP_MIGRATETYPES + 2  # NR_PCP_LISTS: and two of pageblock order, movable and not
# Nodes set aside for list heads, eight to a cache line, so that no two CPUs' heads share one.
FREE_HEAD_NODES = -(-(N_FREE_LISTS + 1) // 8) * 8  # and that of the held blocks
PCP_HEAD_NODES = -(-N_PCP_LISTS // 8) * 8

N_POLICY_WORDS = 16

# Blocks asked for at one time, at most, and the words of an ask; each holds the sem_t of its answer in A_SEMAPHORE.
N_ASKS = 16
ASK_WORDS = 2 * LINE_WORDS
A_SEMAPHORE = 0
A_PFN, A_ORDER, A_STATE, A_SEQUENCE, A_OWNER = range(4, 9)
A_INSTALLS, A_INSTALLED, A_REINSTALLED = range(9, 12)  # what the header's counts are once its pages are marked
ASK_FREE = 0
ASKED = 1
ANSWERED = 2  # it is there
REFUSED = 3  # it is not, and will not be
MARKING = 4  # it is there, and its pages are being marked: should the asker die, repair does the rest
COUNTED = 5  # its pages are marked and counted

_line = (LINE_WORDS,)


def _whole_lines(fields: list[Any]) -> np.dtype[Any]:
    """The fields in this order, packed, with padding up to a cache line: what lies behind starts on one."""
    words = np.dtype(fields).itemsize // 8
    padding = -words % LINE_WORDS
    return np.dtype([*fields, ("padding", "<i8", (padding,))] if padding else fields)


HEADER_DTYPE = _whole_lines(
    [
        # Written once at creation.
        ("magic", "<i8"),
        ("layout_version", "<i8"),
        ("total_bytes", "<i8"),
        ("n_pages", "<i8"),
        ("n_cpus", "<i8"),
        ("link_offset", "<i8"),
        ("page_offset", "<i8"),
        ("resident_offset", "<i8"),
        ("block_offset", "<i8"),
        ("ram_bytes", "<i8"),
        ("owner_pid", "<i8"),
        ("epoch", "<i8"),
        ("created_ns", "<i8"),
        ("seed", "<i8"),
        ("ready", "<i8"),
        ("bitmap_offset", "<i8"),
        # Its own line: contenders spin on it.
        ("zone_lock", "<i8", _line),
        # Under the zone lock from here on.
        ("free_pages", "<i8"),
        ("isolated_pages", "<i8"),
        ("in_flight_pages", "<i8"),
        ("in_flight_blocks", "<i8"),
        ("min_watermark", "<i8"),
        ("low_watermark", "<i8"),
        ("high_watermark", "<i8"),
        ("pcp_batch", "<i8"),
        ("nr_free", "<i8", (N_ORDERS,)),
        ("reported", "<i8", (N_ORDERS,)),
        ("reporting_enabled", "<i8"),
        ("requested", "<i8"),
        ("active", "<i8"),
        ("refcnt", "<i8"),
        ("trigger", "<i8"),
        ("min_order", "<i8"),
        ("high_water_mark", "<i8"),
        ("device_pid", "<i8"),
        ("shuffle_order", "<i8"),
        ("merge_likely", "<i8"),
        ("pcp_high", "<i8"),
        ("random_state", "<i8"),
        ("random_word", "<i8"),
        ("random_bits", "<i8"),
        ("boundary", "<i8", (N_FREE_LISTS,)),
        ("rotated", "<i8", (N_ORDERS,)),
        # Blocks that a policy keeps out of the allocator after their report.
        ("held_pages", "<i8"),
        ("held_blocks", "<i8"),
        ("pressure", "<i8"),
        ("zero_tracking", "<i8"),
        ("poison", "<i8"),
        ("asking", "<i8"),  # 1: what is not there is asked for before it is handed out (a host answers)
        # What the registered policy keeps from one step to the next; each names its own words.
        ("policy_words", "<i8", (N_POLICY_WORDS,)),
        # Statistics, under the zone lock too.
        ("allocations", "<i8"),
        ("frees", "<i8"),
        ("requests", "<i8"),
        ("runs", "<i8"),
        ("nodes_visited", "<i8"),
        ("pulled_blocks", "<i8"),
        ("in_flight_max_blocks", "<i8"),
        ("returned_pages", "<i8"),  # by the reporter alone, without the lock
        ("steals", "<i8"),
        ("claimed_pageblocks", "<i8"),
        ("repairs", "<i8"),
        ("failed_allocations", "<i8"),
        ("nodes_hold_max", "<i8"),  # list nodes looked at under one hold of the lock, at most
        # A zone whose host claims free blocks itself.
        ("open_to_host", "<i8"),  # 1: the guest trusts a host with this segment
        ("installs", "<i8"),  # blocks that a host populated before they were handed out
        ("installed_pages", "<i8"),  # their pages that were not there before
        ("install_wait_ns", "<i8"),  # how long allocations waited for it, in all
        ("asks_withdrawn", "<i8"),  # blocks asked for in vain: no host, or one that did not answer
        ("ask_sequence", "<i8"),
        # sem_t of the reporter's work queue.
        ("work", "<i8", _line),
        # sem_t that a block asked for posts, and the asks themselves.
        ("asks_work", "<i8", _line),
        ("asks", "<i8", (N_ASKS, ASK_WORDS)),
        ("reinstalled_pages", "<i8"),  # of the installed pages those that had been given back
        # Journal of one record, under the zone lock: the block that its owner has in its hands.
        ("in_hand", "<i8"),  # its pfn + 1; 0: none
        ("in_hand_before", "<i8"),  # node of a per-CPU list that leads to it, or -1
        ("in_hand_head", "<i8"),  # head of that list
        # Journal of one record, by the reporter alone: the block whose pages are being marked as returned.
        ("settling", "<i8"),  # its pfn + 1; 0: none
        ("settled_pages", "<i8"),  # what returned_pages is when it is done
    ]
)

CPU_DTYPE = np.dtype(
    [
        ("lock", "<i8", _line),
        ("count", "<i8"),
        ("owner_pid", "<i8"),
        ("random_state", "<i8"),
        ("random_word", "<i8"),
        ("random_bits", "<i8"),
        ("allocations", "<i8"),
        ("frees", "<i8"),
        ("refills", "<i8"),
        ("drains", "<i8"),
        # Written by the slot's own thread alone, outside any lock.
        ("refaults", "<i8"),
        ("first_touches", "<i8"),
        ("allocated_bytes", "<i8"),
        ("freed_bytes", "<i8"),
        ("violations", "<i8"),
        ("zeroing_skipped_pages", "<i8"),
        # Journals of one record each. Under the slot lock: the block on its way out of a list or onto one.
        ("in_hand", "<i8"),  # pfn << 1 | HANDED_OUT or TAKEN_IN, + 1; 0: none
        # By the slot's own thread: the block whose pages are being used for the first time.
        ("touching", "<i8"),  # pfn << 4 | order, + 1; 0: none
        ("touched_first", "<i8"),  # what first_touches and refaults are when it is done
        ("touched_again", "<i8"),
        # Under the zone lock: 1 if the slot is the guest's own, and goes to its successor should it be killed.
        ("of_guest", "<i8"),
        ("spare", "<i8", (4,)),
    ],
    align=False,
)


def _word(dtype: np.dtype[Any], field: str) -> int:
    fields = dtype.fields
    assert fields is not None
    offset = int(fields[field][1])
    assert offset % 8 == 0, field
    return offset // 8


# Word offsets in the header: ctl[W_FREE_PAGES] is header.free_pages.
W_MAGIC = _word(HEADER_DTYPE, "magic")
W_LAYOUT_VERSION = _word(HEADER_DTYPE, "layout_version")
W_TOTAL_BYTES = _word(HEADER_DTYPE, "total_bytes")
W_N_PAGES = _word(HEADER_DTYPE, "n_pages")
W_N_CPUS = _word(HEADER_DTYPE, "n_cpus")
W_LINK_OFFSET = _word(HEADER_DTYPE, "link_offset")
W_PAGE_OFFSET = _word(HEADER_DTYPE, "page_offset")
W_RESIDENT_OFFSET = _word(HEADER_DTYPE, "resident_offset")
W_BLOCK_OFFSET = _word(HEADER_DTYPE, "block_offset")
W_RAM_BYTES = _word(HEADER_DTYPE, "ram_bytes")
W_OWNER_PID = _word(HEADER_DTYPE, "owner_pid")
W_EPOCH = _word(HEADER_DTYPE, "epoch")
W_CREATED_NS = _word(HEADER_DTYPE, "created_ns")
W_SEED = _word(HEADER_DTYPE, "seed")
W_READY = _word(HEADER_DTYPE, "ready")
W_BITMAP_OFFSET = _word(HEADER_DTYPE, "bitmap_offset")
W_ZONE_LOCK = _word(HEADER_DTYPE, "zone_lock")
W_FREE_PAGES = _word(HEADER_DTYPE, "free_pages")
W_ISOLATED_PAGES = _word(HEADER_DTYPE, "isolated_pages")
W_IN_FLIGHT_PAGES = _word(HEADER_DTYPE, "in_flight_pages")
W_IN_FLIGHT_BLOCKS = _word(HEADER_DTYPE, "in_flight_blocks")
W_MIN_WATERMARK = _word(HEADER_DTYPE, "min_watermark")
W_LOW_WATERMARK = _word(HEADER_DTYPE, "low_watermark")
W_HIGH_WATERMARK = _word(HEADER_DTYPE, "high_watermark")
W_PCP_BATCH = _word(HEADER_DTYPE, "pcp_batch")
W_NR_FREE = _word(HEADER_DTYPE, "nr_free")
W_REPORTED = _word(HEADER_DTYPE, "reported")
W_REPORTING_ENABLED = _word(HEADER_DTYPE, "reporting_enabled")
W_REQUESTED = _word(HEADER_DTYPE, "requested")
W_ACTIVE = _word(HEADER_DTYPE, "active")
W_REFCNT = _word(HEADER_DTYPE, "refcnt")
W_TRIGGER = _word(HEADER_DTYPE, "trigger")
W_MIN_ORDER = _word(HEADER_DTYPE, "min_order")
W_HIGH_WATER_MARK = _word(HEADER_DTYPE, "high_water_mark")
W_DEVICE_PID = _word(HEADER_DTYPE, "device_pid")
W_SHUFFLE_ORDER = _word(HEADER_DTYPE, "shuffle_order")
W_MERGE_LIKELY = _word(HEADER_DTYPE, "merge_likely")
W_PCP_HIGH = _word(HEADER_DTYPE, "pcp_high")
W_RANDOM_STATE = _word(HEADER_DTYPE, "random_state")
W_RANDOM_WORD = _word(HEADER_DTYPE, "random_word")
W_RANDOM_BITS = _word(HEADER_DTYPE, "random_bits")
W_BOUNDARY = _word(HEADER_DTYPE, "boundary")
W_ROTATED = _word(HEADER_DTYPE, "rotated")
W_HELD_PAGES = _word(HEADER_DTYPE, "held_pages")
W_HELD_BLOCKS = _word(HEADER_DTYPE, "held_blocks")
W_PRESSURE = _word(HEADER_DTYPE, "pressure")
W_ZERO_TRACKING = _word(HEADER_DTYPE, "zero_tracking")
W_POISON = _word(HEADER_DTYPE, "poison")
W_POLICY_WORDS = _word(HEADER_DTYPE, "policy_words")
W_ALLOCATIONS = _word(HEADER_DTYPE, "allocations")
W_FREES = _word(HEADER_DTYPE, "frees")
W_REQUESTS = _word(HEADER_DTYPE, "requests")
W_RUNS = _word(HEADER_DTYPE, "runs")
W_NODES_VISITED = _word(HEADER_DTYPE, "nodes_visited")
W_PULLED_BLOCKS = _word(HEADER_DTYPE, "pulled_blocks")
W_IN_FLIGHT_MAX_BLOCKS = _word(HEADER_DTYPE, "in_flight_max_blocks")
W_RETURNED_PAGES = _word(HEADER_DTYPE, "returned_pages")
W_STEALS = _word(HEADER_DTYPE, "steals")
W_CLAIMED_PAGEBLOCKS = _word(HEADER_DTYPE, "claimed_pageblocks")
W_REPAIRS = _word(HEADER_DTYPE, "repairs")
W_FAILED_ALLOCATIONS = _word(HEADER_DTYPE, "failed_allocations")
W_NODES_HOLD_MAX = _word(HEADER_DTYPE, "nodes_hold_max")
W_WORK = _word(HEADER_DTYPE, "work")
W_ASKING = _word(HEADER_DTYPE, "asking")
W_OPEN_TO_HOST = _word(HEADER_DTYPE, "open_to_host")
W_INSTALLS = _word(HEADER_DTYPE, "installs")
W_INSTALLED_PAGES = _word(HEADER_DTYPE, "installed_pages")
W_REINSTALLED_PAGES = _word(HEADER_DTYPE, "reinstalled_pages")
W_INSTALL_WAIT_NS = _word(HEADER_DTYPE, "install_wait_ns")
W_ASKS_WITHDRAWN = _word(HEADER_DTYPE, "asks_withdrawn")
W_ASK_SEQUENCE = _word(HEADER_DTYPE, "ask_sequence")
W_ASKS_WORK = _word(HEADER_DTYPE, "asks_work")
W_ASKS = _word(HEADER_DTYPE, "asks")
W_IN_HAND = _word(HEADER_DTYPE, "in_hand")
W_IN_HAND_BEFORE = _word(HEADER_DTYPE, "in_hand_before")
W_IN_HAND_HEAD = _word(HEADER_DTYPE, "in_hand_head")
W_SETTLING = _word(HEADER_DTYPE, "settling")
W_SETTLED_PAGES = _word(HEADER_DTYPE, "settled_pages")

# Word offsets in a per-CPU slot: ctl[slot + C_COUNT].
C_LOCK = _word(CPU_DTYPE, "lock")
C_COUNT = _word(CPU_DTYPE, "count")
C_OWNER_PID = _word(CPU_DTYPE, "owner_pid")
C_RANDOM_STATE = _word(CPU_DTYPE, "random_state")
C_RANDOM_WORD = _word(CPU_DTYPE, "random_word")
C_RANDOM_BITS = _word(CPU_DTYPE, "random_bits")
C_ALLOCATIONS = _word(CPU_DTYPE, "allocations")
C_FREES = _word(CPU_DTYPE, "frees")
C_REFILLS = _word(CPU_DTYPE, "refills")
C_DRAINS = _word(CPU_DTYPE, "drains")
C_REFAULTS = _word(CPU_DTYPE, "refaults")
C_FIRST_TOUCHES = _word(CPU_DTYPE, "first_touches")
C_ALLOCATED_BYTES = _word(CPU_DTYPE, "allocated_bytes")
C_FREED_BYTES = _word(CPU_DTYPE, "freed_bytes")
C_VIOLATIONS = _word(CPU_DTYPE, "violations")
C_ZEROING_SKIPPED = _word(CPU_DTYPE, "zeroing_skipped_pages")
C_IN_HAND = _word(CPU_DTYPE, "in_hand")
C_OF_GUEST = _word(CPU_DTYPE, "of_guest")
C_TOUCHING = _word(CPU_DTYPE, "touching")
C_TOUCHED_FIRST = _word(CPU_DTYPE, "touched_first")
C_TOUCHED_AGAIN = _word(CPU_DTYPE, "touched_again")
HANDED_OUT = 0  # what C_IN_HAND says of its block
TAKEN_IN = 1

assert HEADER_DTYPE.itemsize % 64 == 0
assert CPU_DTYPE.itemsize % 64 == 0
HEADER_WORDS = HEADER_DTYPE.itemsize // 8
CPU_WORDS = CPU_DTYPE.itemsize // 8
MAX_CPUS = 1024

# A page's state.
ORDER_MASK = 0xF
KIND_SHIFT = 4
KIND_MASK = 0x7 << KIND_SHIFT
HEAD_MASK = ORDER_MASK | KIND_MASK
INTERIOR = 0
FREE = 1 << KIND_SHIFT
ALLOCATED = 2 << KIND_SHIFT
IN_FLIGHT = 3 << KIND_SHIFT
ON_PCP = 4 << KIND_SHIFT
HELD = 5 << KIND_SHIFT
REPORTED = 1 << 7
MT_SHIFT = 8
MT_MASK = 0x7 << MT_SHIFT
CLAIMED = 1 << 11
ZEROED = 1 << 12
HANDED = 1 << 13

# The links of the head of an allocated block, which is on no list: OWNED | slot + 1 (0: nobody's) in the place of next,
# and in that of prev a word of the owner's own (page_private), 0 when it is handed out. No node has the top bit.
OWNED = 1 << 31

# The resident map, beside the page records.
NEVER_TOUCHED = 0
RESIDENT = 1
RETURNED = 2
INSTALLED = 3  # there, all zeros, and not used since: a host populated it before it was handed out

# Pageblock byte: its migratetype, and above it the one it had before isolation.
BLOCK_MT_MASK = 0x7
BLOCK_SAVED_SHIFT = 4

# What asks for a reporting run in the free path.
TRIGGER_OFF = 0
TRIGGER_HIGH_WATER_MARK = 1  # v9 to v13
TRIGGER_ANY_FREE = 2  # mainline
TRIGGER_BITMAP = 3  # so many bits set

# What a run that is active does to the lists (W_ACTIVE).
INACTIVE = 0
ACTIVE_BOUNDARY = 1  # v9: boundaries hold, and a moved block goes behind that of its new list
ACTIVE_PLAIN = 2  # no boundaries: tails are tails
ACTIVE_RELEASE = 3  # v10: boundaries hold, and a moved block goes to the head

# Held blocks are on a list of their own, whose head is this many nodes behind that of the first free list.
HELD_LIST = N_FREE_LISTS


class SegmentOffsets(NamedTuple):
    """Byte offsets of the parts of a zone segment, and its size."""

    link: int
    page: int
    resident: int
    block: int
    bitmap: int
    total: int


def segment_offsets(n_pages: int, n_cpus: int) -> SegmentOffsets:
    """Where each part lies in a segment for ``n_pages`` pages and ``n_cpus`` per-CPU slots, each 64-byte aligned."""

    def aligned(offset: int) -> int:
        return -(-offset // 64) * 64

    link = aligned(HEADER_DTYPE.itemsize + n_cpus * CPU_DTYPE.itemsize)
    page = aligned(link + 8 * (n_pages + FREE_HEAD_NODES + n_cpus * PCP_HEAD_NODES))
    resident = aligned(page + 2 * n_pages)
    block = aligned(resident + n_pages)
    bitmap = aligned(block + (n_pages >> PAGEBLOCK_ORDER))
    return SegmentOffsets(link, page, resident, block, bitmap, aligned(bitmap + n_pages // 8))
