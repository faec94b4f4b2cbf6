"""Which host a policy gets: the same period in every mode, and a demo of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from common.settings import DemoSettings, GuestSettings, HostSettings, SharedHostSettings
from guest.reporting.table import POLICIES
from lab.demo import make_plan, run_demo
from lab.experiment.spec import RunSpec
from lab.hosts import HOST_DRIVEN, HOST_STARTED, host_period_ns
from lab.live.run import host_and_guest, run_live
from lab.virtual.costs import Costs
from lab.virtual.machine import VirtualMachine
from tests.lab.test_demo import settings_of

MS = 1_000_000


def test_the_names_are_those_of_the_table() -> None:
    assert list(HOST_STARTED) == [name for name, policy in POLICIES.items() if policy.host_started]
    assert list(HOST_DRIVEN) == [name for name, policy in POLICIES.items() if policy.host_driven]


def test_the_default_of_shared_is_its_rows() -> None:
    assert host_period_ns("shared", None) == POLICIES["shared"].delay_ns == SharedHostSettings().every_ns
    assert host_period_ns("shared", 0) == MS


@pytest.mark.parametrize("delay_ns", [None, 50 * MS])
@pytest.mark.parametrize("policy", ["boundary", "hint", "shared"])
def test_live_virtual_and_demo_agree_on_the_delay(policy: str, delay_ns: int | None, tmp_path: Path) -> None:
    spec = RunSpec(policy=policy, delay_ns=delay_ns, memory=16 << 20)
    machine = VirtualMachine(spec, Costs.example())
    machine.close()
    plans = [
        host_and_guest(spec.but(mode="live"), "lab-1", tmp_path),
        make_plan(DemoSettings(policy=policy, delay_ns=delay_ns, guests=1), tmp_path),
    ]
    for plan in plans:
        guest = settings_of(GuestSettings, plan.guests[0])
        if policy == "shared":
            assert plan.host.arguments[1] == "lab.shared_host"
            host: Any = settings_of(SharedHostSettings, plan.host)
            assert (host.name, host.every_ns, guest.delay_ns) == (plan.lab, machine.delay_ns, None)
        elif policy == "hint":
            host = settings_of(HostSettings, plan.host)
            assert (host.name, host.hint_every_ns, guest.delay_ns) == (plan.lab, machine.delay_ns, None)
        else:
            assert plan.host.arguments[1] == "host"
            assert guest.delay_ns == delay_ns


def test_a_host_that_there_is_not_is_told_before_anything_runs(tmp_path: Path) -> None:
    spec = RunSpec(mode="live", policy="shared", inhibit_discard=True)
    with pytest.raises(UsageError, match="always discards"):
        host_and_guest(spec, "lab-1", tmp_path)
    with pytest.raises(UsageError, match="always discards"):
        run_demo(DemoSettings(policy="shared", inhibit_discard=True, plot=""))


def test_no_process_knows_the_future() -> None:
    with pytest.raises(UsageError, match="virtual time only"):
        run_live(RunSpec(mode="live", policy="oracle"))
