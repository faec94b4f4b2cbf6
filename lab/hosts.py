"""Which host a policy needs, and how often that host acts: one place for live runs, virtual time and the demo.

``RunSpec.delay_ns`` (``--delay`` of the demo) is the wait from a guest's request to its run. Two policies have no such
wait in the guest; there it is the host's own period, in every mode:

* ``hint``, whose runs the host starts: from the start of one run to that of the next (``python -m host --hint-every``),
  by default that flag's own 2 s; 0: one run only. Its row's delay is 0: a command is followed at once.
* ``shared``, whose runs the host makes: from a guest's request to the claims (``python -m lab shared-host --every``),
  by default that flag's own 100 ms, and 1 ms at least, the least that it takes.

Names only, so that a command line can be made without compiled code; a test holds them to the table of policies.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UsageError
from common.settings import HostSettings, SharedHostSettings
from lab.flags import flags_of
from lab.orchestrate import ProcessPlan

__all__ = ["HOST_DRIVEN", "HOST_STARTED", "check_host", "host_period_ns", "host_process"]

HOST_STARTED = ("hint",)
HOST_DRIVEN = ("shared",)
_LEAST_EVERY_NS = 1_000_000


def host_period_ns(policy: str, delay_ns: int | None) -> int | None:
    """How often the host of ``policy`` acts when ``delay_ns`` is set, or not (None); None: the guest's delay counts."""
    if policy in HOST_STARTED:
        return HostSettings().hint_every_ns if delay_ns is None else delay_ns
    if policy in HOST_DRIVEN:
        return max(_LEAST_EVERY_NS, SharedHostSettings().every_ns if delay_ns is None else delay_ns)
    return None


def check_host(policy: str, *, inhibit_discard: bool) -> None:
    """Raises ``UsageError`` if there is no host that does this with that policy."""
    if inhibit_discard and policy in HOST_DRIVEN:
        raise UsageError(f"inhibit_discard: True; a host of the policy {policy!r} always discards, leave it off")


def host_process(
    policy: str, lab: str, account: Path, *, delay_ns: int | None, inhibit_discard: bool, name: str = "host"
) -> ProcessPlan:
    """The host process of a lab whose guests have ``policy``. Raises ``UsageError`` as ``check_host``."""
    check_host(policy, inhibit_discard=inhibit_discard)
    period_ns = host_period_ns(policy, delay_ns)
    values = {"name": lab, "json": str(account), "quiet": True}
    if policy in HOST_DRIVEN:
        flags = flags_of(SharedHostSettings, values | {"every_ns": period_ns})
        return ProcessPlan(name, ("-m", "lab.shared_host", *flags), account)
    flags = flags_of(HostSettings, values | {"hint_every_ns": period_ns, "inhibit_discard": inhibit_discard})
    return ProcessPlan(name, ("-m", "host", *flags), account)
