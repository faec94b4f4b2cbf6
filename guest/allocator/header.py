"""What a zone is created with, and the header that says so."""

from __future__ import annotations

import math
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any

from common import layout
from common.errors import UsageError
from common.geometry import N_ORDERS, PAGE_BYTES, TOP_ORDER

__all__ = ["TRIGGERS", "ZoneSettings", "check_settings", "fill_header", "new_epoch", "read_settings"]


@dataclass(frozen=True)
class ZoneSettings:
    """What a zone is created with. Watermarks and ``pcp_high`` of 0 are derived as the kernel does.

    Attributes:
        memory_bytes: 16 MiB to 1 TiB, whole pageblocks.
        cpus: per-CPU slots, for all processes together.
        pcp_batch: order-0 blocks moved between a per-CPU list and the zone at once; 0 turns the lists off.
        pcp_high: pages on a slot's lists from which a free drains a batch.
        ram_bytes: size of the RAM object (0 with the model backend); for those who attach.
        host_zeroed: remember which blocks the host proved zero; never together with ``poison`` (Z4).
        poison: byte that free pages are filled with, 0 to 255; 0: none (PAGE_POISON).
    """

    memory_bytes: int
    cpus: int = 8
    pcp_batch: int = 63  # zone_batchsize() of a zone above some 688 MiB, its upper end
    pcp_high: int = 0
    shuffle: bool = False
    merge_likely: bool = True
    seed: int = 1
    min_order: int = 9
    high_water_mark: int = 32
    trigger: str = "hwm"
    min_watermark: int = 0
    low_watermark: int = 0
    high_watermark: int = 0
    ram_bytes: int = 0
    host_zeroed: bool = False
    poison: int = 0


TRIGGERS = {
    "off": layout.TRIGGER_OFF,
    "hwm": layout.TRIGGER_HIGH_WATER_MARK,
    "any": layout.TRIGGER_ANY_FREE,
    "bitmap": layout.TRIGGER_BITMAP,
}


def _derived_watermarks(n_pages: int) -> tuple[int, int, int]:
    """min, low, high in pages: init_per_zone_wmark_min and __setup_per_zone_wmarks with a scale factor of 10."""
    kilobytes = n_pages * PAGE_BYTES >> 10
    min_free_kilobytes = min(max(math.isqrt(kilobytes * 16), 128), 262144)
    lowest = (min_free_kilobytes << 10) // PAGE_BYTES
    step = max(lowest // 4, n_pages * 10 // 10000)
    return lowest, lowest + step, lowest + 2 * step


def read_settings(header: Any) -> ZoneSettings:
    """What a zone was created with, as far as its header (record of ``layout.HEADER_DTYPE``) tells it."""
    return ZoneSettings(
        memory_bytes=int(header["n_pages"]) * PAGE_BYTES,
        cpus=int(header["n_cpus"]),
        pcp_batch=int(header["pcp_batch"]),
        pcp_high=int(header["pcp_high"]),
        shuffle=int(header["shuffle_order"]) < N_ORDERS,
        merge_likely=bool(header["merge_likely"]),
        seed=int(header["seed"]),
        min_order=int(header["min_order"]),
        high_water_mark=int(header["high_water_mark"]),
        trigger=next((name for name, number in TRIGGERS.items() if number == int(header["trigger"])), "off"),
        min_watermark=int(header["min_watermark"]),
        low_watermark=int(header["low_watermark"]),
        high_watermark=int(header["high_watermark"]),
        ram_bytes=int(header["ram_bytes"]),
        host_zeroed=bool(header["zero_tracking"]),
        poison=int(header["poison"]),
    )


def new_epoch() -> int:
    """A number that no other life of a guest has: random, not 0."""
    return secrets.randbits(62) + 1


def check_settings(settings: ZoneSettings) -> None:
    """Raises ``UsageError`` for a setting out of its bounds; memory is checked elsewhere."""
    limits = {
        "cpus": (1, 1024),
        "pcp_batch": (0, 4096),
        "pcp_high": (0, 1 << 28),
        "min_order": (0, TOP_ORDER),
        "high_water_mark": (0, 1 << 20),
        "poison": (0, 255),
    }
    for key, (lowest, highest) in limits.items():
        value = getattr(settings, key)
        if not lowest <= value <= highest:
            raise UsageError(f"{key}: {value}; allowed is {lowest} to {highest}")
    if settings.trigger not in TRIGGERS:
        raise UsageError(f"trigger: {settings.trigger!r}; allowed are {', '.join(TRIGGERS)}")


def fill_header(header: Any, settings: ZoneSettings, n_pages: int, offsets: layout.SegmentOffsets) -> None:
    """Write a new zone's header (record of ``layout.HEADER_DTYPE``, zeroed) but for ``ready``."""
    lowest, low, high = _derived_watermarks(n_pages)
    lowest = settings.min_watermark or lowest
    low = max(settings.low_watermark or low, lowest)  # the allocator looks at low first, and at min only below it
    values = {
        "magic": layout.MAGIC,
        "layout_version": layout.LAYOUT_VERSION,
        "total_bytes": offsets.total,
        "n_pages": n_pages,
        "n_cpus": settings.cpus,
        "link_offset": offsets.link,
        "page_offset": offsets.page,
        "resident_offset": offsets.resident,
        "block_offset": offsets.block,
        "bitmap_offset": offsets.bitmap,
        "ram_bytes": settings.ram_bytes,
        "owner_pid": os.getpid(),
        "epoch": new_epoch(),
        "created_ns": time.monotonic_ns(),
        "seed": settings.seed & 0xFFFF_FFFF,
        "min_watermark": lowest,
        "low_watermark": low,
        "high_watermark": max(settings.high_watermark or high, low),
        "pcp_batch": settings.pcp_batch,
        # zone_highsize(): the low watermark shared out over the CPUs, at least four batches.
        "pcp_high": settings.pcp_high or max(low // settings.cpus, 4 * settings.pcp_batch),
        "min_order": settings.min_order,
        "high_water_mark": settings.high_water_mark,
        "trigger": TRIGGERS[settings.trigger],
        "shuffle_order": TOP_ORDER if settings.shuffle else N_ORDERS,
        "merge_likely": int(settings.merge_likely),
        "zero_tracking": int(settings.host_zeroed and settings.poison == 0),
        "poison": settings.poison,
    }
    for key, value in values.items():
        header[key] = value
