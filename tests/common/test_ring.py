"""A record of a fixed size keeps the newest."""

from __future__ import annotations

import pytest

from common.ring import Ring


@pytest.mark.parametrize(("taken", "kept"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (4, [1, 2, 3]), (8, [5, 6, 7])])
def test_the_newest_rows_are_kept_in_their_order(taken: int, kept: list[int]) -> None:
    ring = Ring(3, 2)
    for number in range(taken):
        ring.append(number, -number)
    assert ring.rows() == [[number, -number] for number in kept]
    assert len(ring) == len(kept)
