"""How much of the host's attention one sender gets: a token bucket for each guest, and one for the control queue.

A token is one report of a guest that waits for its acknowledgement before it sends the next, as every guest of ours
does (S10). Such a guest cannot meet the default: a report, its way through two queues and back included, takes longer
than ``1 / max_reports_per_s``. What only a broken or hostile guest does costs more, so that a flood of it runs dry
within a second and then gets ``1 / price`` of the rate:

* a message behind which another one waits already: its sender did not wait (``UNAWAITED``, and its blocks);
* bytes that are no message, a message that has no business here, a report that breaks a rule (``REFUSED``).

Whoever is overdrawn is *held off*: its queue is taken out of the selector until the bucket has refilled, and fills up.
Nothing of it is dropped, nobody is asked again and again, and nothing is slept away: the others are served meanwhile.

Rejected: a share of the host's time (a first run of a huge guest needs all of it for seconds, rightly); serving who is
over its rate only when nobody else is ready (a flood would still cost the whole of a processor); dropping what is over
the rate (the guest would wait for its deadline, and an acknowledgement that is lost looks like a host that hangs).
"""

from __future__ import annotations

__all__ = ["REFUSED", "UNAWAITED", "Bucket", "price_of_unawaited"]

UNAWAITED = 40.0
REFUSED = 200.0
_BLOCKS_A_TOKEN = 4
_BURST_S = 1.0


class Bucket:
    """``rate`` tokens a second (more than 0), full at the start, holding those of one second. Times in s, monotonic."""

    __slots__ = ("_burst", "_looked_s", "_rate", "_tokens")

    def __init__(self, rate: float, now_s: float) -> None:
        self._rate = rate
        self._burst = self._tokens = rate * _BURST_S
        self._looked_s = now_s

    def charge(self, price: float, now_s: float) -> bool:
        """Take ``price`` tokens, which may overdraw the bucket; True if it is overdrawn now."""
        self._refill(now_s)
        self._tokens -= price
        return self._tokens < 0

    def ready_s(self, now_s: float) -> float:
        """When the bucket is not overdrawn any more; ``now_s`` if it is not."""
        self._refill(now_s)
        return now_s + max(0.0, -self._tokens / self._rate)

    def _refill(self, now_s: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now_s - self._looked_s) * self._rate)
        self._looked_s = now_s


def price_of_unawaited(blocks: int) -> float:
    """Of a report of ``blocks`` blocks whose sender has sent the next one already."""
    return UNAWAITED + blocks / _BLOCKS_A_TOKEN
