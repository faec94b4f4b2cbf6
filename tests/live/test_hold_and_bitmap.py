"""The policies hold and bitmap between real processes: what they give back, and that both accounts agree."""

from __future__ import annotations

import pytest

from tests.live.processes import MEMORY_BYTES, PATIENCE_S, Lab
from tests.live.test_reclaim import agree
from tests.support import wait_until

TURNS = ("--workload", "memhog", "--fill", "0.9", "--hold", "20ms", "--idle", "20ms")


@pytest.mark.parametrize("policy", ["hold", "bitmap"])
def test_s4_s6_every_byte_is_accounted_for(lab: Lab, policy: str) -> None:
    host = lab.host()
    guest = lab.guest("g0", "--policy", policy, *TURNS)
    guest.returns(2000)
    wait_until(lambda: guest.look().refaults > 0, PATIENCE_S, what="refaults")
    result = guest.stop()
    agree(host.stop(), result)


def test_s3_pressure_takes_held_blocks_back_and_no_allocation_goes_without(lab: Lab) -> None:
    """The workload wants nine tenths of the memory, most of which is held, and gets them."""
    host = lab.host()
    guest = lab.guest(
        "g0", "--policy", "hold", "--workload", "memhog", "--fill", "0.9", "--hold", "1ms", "--idle", "1s"
    )
    wait_until(lambda: guest.look().held_blocks > 0, PATIENCE_S, what="held blocks")
    wait_until(lambda: guest.look().pressure > 0, PATIENCE_S, what="pressure")
    wait_until(lambda: guest.resident_bytes() > 0.8 * MEMORY_BYTES, PATIENCE_S, what="nine tenths of the memory")
    result = guest.stop()
    agree(host.stop(), result)
    assert result["pressure"] > 0
