"""S5, S13, S14: guests and hosts that die between two of their steps, and what the next process of that name finds."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import names
from common.errors import LabError
from common.layout import W_FREE_PAGES
from common.queues import Queue
from common.settings import GuestSettings
from guest.allocator.owners import find_owned
from guest.allocator.zone import Zone
from guest.machine import Machine
from guest.workloads import engine
from lab.nursery import Nursery, Nursling
from tests.support import leftovers, wait_until

PATIENCE_S = 60.0
GUEST = "g0"
KILLED = -signal.SIGKILL
EAGER = ("--memory", "32MiB", "--vcpus", "1", "--delay", "0", "--high-water-mark", "0", "--min-order", "4")
WORK = ("--workload", "churn", "--fill", "0.4", "--idle", "5ms", "--quiet", "--deadline", "100ms")

# Where a guest dies as it starts: a new one replaces what is left.
STARTING = (
    "ram.created",
    "ram.sized",
    "segment.created",
    "segment.sized",
    "header.filled",
    "header.listed",
    "queue.acks-made",
    "hello.sent",
)
# And where it dies at work: one that attaches goes on.
WORKING = ("report.sent:3", "ack.taken:3")
ATTACHING = ("attach.owned", "attach.withdrawn", "attach.put-back")
SERVING = (
    "host.opened",
    "host.received:3",
    "host.gated:3",
    "host.punched:3",
    "host.discarded:3",
    "host.ungated:3",
    "host.answered:3",
)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("processes"), fault="later") as started:
        yield started


class Scene:
    """The processes of one lab."""

    def __init__(self, nursery: Nursery, lab: str, folder: Path) -> None:
        self.lab = lab
        self._nursery = nursery
        self._folder = folder
        self._all: list[Nursling] = []

    def host(self, fault: str = "") -> Nursling:
        host = self._start("host", "host.cli:main", ["--name", self.lab, "--quiet"], fault)
        if not fault.startswith("host.named"):
            wait_until(self._listens, PATIENCE_S, what="host")
        return host

    def _listens(self) -> bool:
        try:
            Queue.open(names.control_queue(self.lab), read=False, write=True).close()
        except LabError:
            return False
        return True

    def guest(self, *flags: str, fault: str = "") -> Nursling:
        arguments = ["--host", self.lab, "--name", GUEST, *EAGER, *WORK, "--json", str(self.result_path), "--force"]
        return self._start(GUEST, "guest.cli:main", [*arguments, *flags], fault)

    def join(self) -> Nursling:
        arguments = ["--host", self.lab, "--name", GUEST, "--join", "--vcpus", "1", *WORK, "--fill", "0.1"]
        return self._start("joined", "guest.cli:main", arguments, "")

    @property
    def result_path(self) -> Path:
        return self._folder / "guest.json"

    def _start(self, name: str, target: str, arguments: list[str], fault: str) -> Nursling:
        child = self._nursery.start(name, target, arguments, fault=fault)
        self._all.append(child)
        return child

    def dies(self, child: Nursling) -> None:
        """At the place that was named, by itself."""
        assert child.ended_within(PATIENCE_S), "it did not come to that place"
        assert child.reap() == KILLED, child.err.read_text()

    def kill(self, child: Nursling) -> None:
        child.send(signal.SIGKILL)
        self.dies(child)

    def ends(self, child: Nursling) -> None:
        """In order."""
        child.send(signal.SIGTERM)
        assert child.ended_within(PATIENCE_S), "it does not end"
        assert child.reap() == 0, child.err.read_text()

    def sees(self, owner: Nursling, grows: Callable[[Zone], int], by: int) -> None:
        """Wait until ``owner`` has the zone and a count of it has grown."""

        def owned() -> bool:
            assert owner.running(), owner.err.read_text()
            try:
                self.zone = Zone.attach(self.lab, GUEST, read_only=True)
            except LabError:
                return False
            if self.zone.owner() == owner.pid:
                return True
            self.zone.close()
            return False

        wait_until(owned, PATIENCE_S, what="its zone")
        goal = grows(self.zone) + by
        wait_until(lambda: grows(self.zone) >= goal or not owner.running(), PATIENCE_S, what="growth")
        assert owner.running(), owner.err.read_text()
        self.zone.close()

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.result_path.read_text())
        return found

    def close(self) -> None:
        for child in self._all:
            child.send(signal.SIGKILL)
            child.close()


@pytest.fixture
def scene(nursery: Nursery, lab_name: str, tmp_path: Path) -> Iterator[Scene]:
    opened = Scene(nursery, lab_name, tmp_path)
    yield opened
    opened.close()


def returned(zone: Zone) -> int:
    return zone.statistics().returned_pages


def allocations(zone: Zone) -> int:
    return zone.statistics().allocations


def in_use(zone: Zone) -> int:
    return zone.statistics().allocated_pages


def finish(scene: Scene, guest: Nursling, host: Nursling) -> None:
    """Both in order; the accounts are sound and no name is left."""
    scene.ends(guest)
    scene.ends(host)
    result = scene.result()
    assert result["ok"], result["complaints"]
    assert result["violations"] == 0
    assert leftovers(scene.lab, [GUEST]) == []


@pytest.mark.parametrize("point", STARTING)
def test_s14_a_guest_that_died_as_it_started_is_replaced(scene: Scene, point: str) -> None:
    host = scene.host()
    scene.dies(scene.guest(fault=point))
    guest = scene.guest()
    scene.sees(guest, returned, 64)
    finish(scene, guest, host)


@pytest.mark.parametrize("point", WORKING)
def test_s5_a_guest_that_died_with_a_report_out_is_followed_by_another(scene: Scene, point: str) -> None:
    """Its blocks in flight come back unflagged, and what was allocated is still in use, stamps and all."""
    host = scene.host()
    scene.dies(scene.guest("--keep", fault=point))
    zone = Zone.attach(scene.lab, GUEST)
    zone.validate()
    before = zone.statistics()
    zone.close()
    assert before.in_flight_blocks > 0
    guest = scene.guest("--attach")
    scene.sees(guest, returned, 64)
    finish(scene, guest, host)


@pytest.mark.parametrize("point", ATTACHING)
def test_a_guest_that_died_as_it_attached_is_followed_by_another(scene: Scene, point: str) -> None:
    host = scene.host()
    first = scene.guest("--keep")
    scene.sees(first, returned, 64)
    scene.kill(first)
    scene.dies(scene.guest("--attach", fault=point))
    third = scene.guest("--attach")
    scene.sees(third, returned, 64)
    finish(scene, third, host)


def test_a_guest_that_begins_anew_says_what_was_there(scene: Scene) -> None:
    """Somebody asked to keep it, and now it is gone."""
    host = scene.host()
    first = scene.guest("--keep")
    scene.sees(first, returned, 64)
    scene.kill(first)
    second = scene.guest("--no-quiet")
    scene.sees(second, returned, 64)
    finish(scene, second, host)
    assert second.err.read_text().startswith(f"guest {GUEST}: begun anew; --attach")


def test_a_damaged_zone_is_refused_with_the_way_out(scene: Scene) -> None:
    host = scene.host()
    first = scene.guest("--keep")
    scene.sees(first, returned, 64)
    scene.kill(first)
    zone = Zone.attach(scene.lab, GUEST)
    zone.validate()
    zone._control[W_FREE_PAGES] += 1
    zone.close()
    second = scene.guest("--attach")
    assert second.ended_within(PATIENCE_S)
    (line,) = second.err.read_text().splitlines()
    assert "free_pages" in line
    assert line.endswith("; without --attach a new one begins")
    third = scene.guest()
    scene.sees(third, returned, 64)
    finish(scene, third, host)


@pytest.mark.parametrize("point", SERVING)
def test_s5_a_host_that_died_at_work_is_followed_by_another(scene: Scene, point: str) -> None:
    host = scene.host(fault=point)
    guest = scene.guest()
    scene.dies(host)
    host = scene.host()
    scene.sees(guest, returned, 64)
    finish(scene, guest, host)


def test_a_host_that_died_as_it_started_is_followed_by_another(scene: Scene) -> None:
    scene.dies(scene.host(fault="host.named"))
    host = scene.host()
    guest = scene.guest()
    scene.sees(guest, returned, 64)
    finish(scene, guest, host)


def test_a_host_that_died_as_it_removed_a_dead_guests_names_leaves_them_to_the_next(scene: Scene) -> None:
    host = scene.host(fault="host.removing")
    guest = scene.guest()
    scene.sees(guest, returned, 64)
    scene.kill(guest)
    scene.dies(host)
    assert leftovers(scene.lab, [GUEST])
    host = scene.host()
    wait_until(lambda: not [name for name in leftovers(scene.lab, [GUEST]) if f".{GUEST}." in name], PATIENCE_S)
    scene.ends(host)


def test_a_killed_guest_that_does_not_keep_its_names_loses_them(scene: Scene) -> None:
    host = scene.host()
    guest = scene.guest()
    scene.sees(guest, returned, 64)
    scene.kill(guest)
    wait_until(lambda: not [name for name in leftovers(scene.lab, [GUEST]) if f".{GUEST}." in name], PATIENCE_S)
    again = scene.guest("--attach")
    assert again.ended_within(PATIENCE_S)
    assert again.reap() == 1
    assert "is its guest running?" in again.err.read_text()
    scene.ends(host)


def test_a_joined_process_goes_on_without_its_guest_and_ends_with_the_next(scene: Scene) -> None:
    """The guest is killed beside it and followed by another; what a second one that joined had is freed."""
    host = scene.host()
    guest = scene.guest("--keep")
    scene.sees(guest, returned, 64)
    joined, doomed = scene.join(), scene.join()
    scene.sees(guest, allocations, 2000)
    scene.kill(guest)
    zone = Zone.attach(scene.lab, GUEST)
    goal = allocations(zone) + 500
    wait_until(lambda: allocations(zone) >= goal, PATIENCE_S, what="work without a guest")
    zone.close()
    scene.kill(doomed)
    guest = scene.guest("--attach")
    scene.sees(guest, returned, 64)
    finish(scene, guest, host)
    assert joined.ended_within(PATIENCE_S), "it did not notice that its guest had ended"
    assert joined.reap() == 0, joined.err.read_text()


def test_s4_s6_what_was_allocated_is_still_allocated(scene: Scene) -> None:
    """Every block that was in use is in the hands of a vCPU of the next guest, which finds its stamps as they were.

    Without a host: with all of so small a zone in flight, a hog finds nothing and rests.
    """
    first = scene.guest("--keep", "--workload", "memhog", "--work-order", "0", "--hold", "1h")
    scene.sees(first, allocations, 0)
    zone = Zone.attach(scene.lab, GUEST)
    wait_until(lambda: in_use(zone) >= int(zone.n_pages * 0.3), PATIENCE_S, what="a full hog")
    scene.kill(first)
    zone.validate()
    before = zone.statistics()
    rows = np.zeros((zone.n_pages, 3), dtype=np.int64)
    count, _ = find_owned(zone.address, 0, 0, rows)
    blocks = {(pfn, order) for pfn, order, word in rows[:count].tolist() if word}
    assert sum(1 << order for _pfn, order in blocks) >= int(zone.n_pages * 0.3)
    with Machine(
        GuestSettings(host=scene.lab, name=GUEST, attach=True, vcpus=1, workload="memhog", fill=0.1)
    ) as machine:
        (vcpu,) = machine.vcpus
        held = vcpu.held[: int(vcpu.state[engine.S_HELD])]
        assert {(pfn, order) for pfn, order, _tag in held.tolist()} >= blocks
        machine.stop_work()
        machine.check()
        after = machine.zone.statistics()
        assert after.allocated_pages == after.violations == 0
        assert 0 <= after.first_touches - before.first_touches <= 1  # the page at which it died
    zone.close()


@pytest.mark.parametrize(("flags", "code", "says"), [(("--vcpus", "9"), 2, "--spare-slots"), ((), 3, "ulimit -q")])
def test_an_attach_that_is_refused_leaves_everything_to_the_next(
    scene: Scene, flags: tuple[str, ...], code: int, says: str
) -> None:
    """S4: before anything was touched, and when all was taken over but the queues could not be made."""
    host = scene.host()
    first = scene.guest("--keep")
    scene.sees(first, returned, 64)
    scene.kill(first)
    if flags:
        refused = scene.guest("--attach", *flags)
    else:
        arguments = ["--host", scene.lab, "--name", GUEST, "--attach", *WORK]
        refused = scene._start("starved", "tests.kill.starved:main", arguments, "")
    assert refused.ended_within(PATIENCE_S)
    assert refused.reap() == code
    assert says in refused.err.read_text()
    assert [name for name in leftovers(scene.lab, [GUEST]) if f".{GUEST}.zone" in name or f".{GUEST}.ram" in name]
    guest = scene.guest("--attach")
    scene.sees(guest, returned, 64)
    finish(scene, guest, host)


def test_two_guests_that_attach_to_the_same_dead_one(scene: Scene) -> None:
    """S14: one has it, the other is told."""
    host = scene.host()
    first = scene.guest("--keep")
    scene.sees(first, returned, 64)
    scene.kill(first)
    guest = scene.guest("--attach")
    scene.sees(guest, returned, 64)
    other = scene.guest("--attach")
    assert other.ended_within(PATIENCE_S)
    assert other.reap() == 2
    assert "lives" in other.err.read_text()
    finish(scene, guest, host)
