"""The kernels as plain Python, twice as fast as they come: for explorations that are too short to compile for.

With ``NUMBA_DISABLE_JIT=1`` each access makes an array over raw memory anew. Here the arrays of a zone are made once,
and kept. Nothing that a kernel does changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from common import native
from guest.allocator import view

__all__ = ["keep_views"]

_ACCESSORS = ("ctl_of", "links_of", "pages_of", "blocks_of", "residence_of", "bitmap_of")


def keep_views() -> None:
    """From here on an accessor makes its array once a zone. For processes that explore, and do nothing else."""
    if native.JIT:
        return
    for name in _ACCESSORS:
        accessor = getattr(view, name)
        kept = _kept(accessor)
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType) and getattr(module, name, None) is accessor:
                setattr(module, name, kept)


def _kept(accessor: Callable[[Any], Any]) -> Callable[[Any], Any]:
    arrays: dict[Any, Any] = {}

    def kept(zone: Any) -> Any:
        place = zone[:5]  # of each part, and the number of pages: another zone may come to lie where one was
        found = arrays.get(place)
        if found is None:
            found = arrays[place] = accessor(zone)
        return found

    return kept
