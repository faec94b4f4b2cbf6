"""Names of objects and queues: nothing that a peer sends can point outside the namespace (S11)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import names
from common.errors import UsageError


@pytest.mark.parametrize("name", ["a", "7", "lab", "guest-12345", "a-b-c", "x" * 32])
def test_a_plain_name_is_returned_as_it_is(name: str) -> None:
    assert names.check_name("name", name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-", "-a", "a-", "A", "a_b", "a.b", "a/b", "../a", "a b", "a\n", "a\0", "é", "٣", "x" * 33, None, 7, b"lab"],
)
def test_any_other_name_is_refused_with_kind_value_and_what_is_allowed(name: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        names.check_name("guest", name)
    message = str(refusal.value)
    assert message.startswith(f"guest: {name!r}")
    assert "a-z, 0-9" in message


@given(st.text(max_size=40))
def test_s11_no_accepted_name_can_leave_the_namespace(name: str) -> None:
    try:
        names.check_name("guest", name)
    except UsageError:
        return
    for made in (names.report_queue("lab", name), names.ack_queue("lab", name), names.ram_object("lab", name)):
        assert made.startswith("/fpr.lab.")
        assert made.count("/") == 1
        assert made.count(".") == 3


def test_every_object_of_a_guest_has_a_name_of_its_own() -> None:
    made = [
        names.control_queue("lab"),
        names.report_queue("lab", "one"),
        names.ack_queue("lab", "one"),
        names.zone_object("lab", "one"),
        names.ram_object("lab", "one"),
        names.ram_object("lab", "two"),
        names.ram_object("other", "one"),
    ]
    assert len(set(made)) == len(made)


def test_guests_are_found_by_their_ram_objects_of_this_lab_alone() -> None:
    listing = [
        "fpr.lab.two.ram",
        "fpr.lab.one.ram",
        "fpr.lab.one.zone",
        "fpr.lab.host",
        "fpr.lab2.three.ram",
        "fpr.l.b.four.ram",
        "fpr.lab.UPPER.ram",
        "fpr.lab.five.ram.part",
        "sem.fpr.lab.six.ram",
    ]
    assert names.guests_in_shm("lab", listing) == ["one", "two"]


def test_the_longest_names_fit_what_the_system_allows() -> None:
    longest = "x" * 32
    assert len(names.report_queue(longest, longest)) <= 255  # NAME_MAX
