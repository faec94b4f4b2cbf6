"""Random placement, one bit a decision, from a store of bits of each CPU (patches 1/8 and 2/8, mm/shuffle.c)."""

from __future__ import annotations

import numpy as np

from common.native import kernel

__all__ = ["RANDOM_BITS", "RANDOM_STATE", "RANDOM_WORD", "next_random", "random_bit"]

# Offsets within a store: the generator's state, the word being used up, and how many of its bits are left. A per-CPU
# slot and the zone header (for callers without a CPU) both hold these three words in this order.
RANDOM_STATE, RANDOM_WORD, RANDOM_BITS = 0, 1, 2
_BITS_A_WORD = 62  # of an int64, the sign and one more left out so that every step is exact in plain Python too


@kernel
def next_random(state):  # type: ignore[no-untyped-def]
    """Next state of a 62-bit xorshift generator (never 0 from a non-zero state); also its output."""
    mask = (1 << _BITS_A_WORD) - 1
    state = np.int64(state)
    # Left shifts are masked before they can leave 62 bits, so int64 never overflows.
    state ^= (state & (mask >> 13)) << 13
    state ^= state >> 7
    state ^= (state & (mask >> 17)) << 17
    return state & mask


@kernel
def random_bit(ctl, store):  # type: ignore[no-untyped-def]
    """One random bit from the store at word ``store`` of ``ctl``; the caller alone uses that store."""
    if ctl[store + RANDOM_BITS] == 0:
        ctl[store + RANDOM_STATE] = next_random(ctl[store + RANDOM_STATE])
        ctl[store + RANDOM_WORD] = ctl[store + RANDOM_STATE]
        ctl[store + RANDOM_BITS] = _BITS_A_WORD
    bit = ctl[store + RANDOM_WORD] & 1
    ctl[store + RANDOM_WORD] >>= 1
    ctl[store + RANDOM_BITS] -= 1
    return bit
