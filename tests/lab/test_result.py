"""The result object: its fields, its cross checks, its exit code; every check has a case in which it must fail."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lab.outcome import ProcessEnd, RunOutcome
from lab.result import GUEST_FIELDS, HOST_FIELDS, build_result, exit_code
from lab.summary import failure_text, headline, subtitle, summary_text
from tests.lab.build import MIB, agreeing_outcome, guest_account, host_account


def failed_checks(result: dict[str, Any]) -> list[str]:
    """Names of the checks that do not hold."""
    return [check["name"] for check in result["checks"] if not check["ok"]]


def with_guest(**changes: Any) -> RunOutcome:
    """The agreeing outcome with the account of guest-2 changed."""
    outcome = agreeing_outcome()
    account = {**guest_account("guest-2"), **changes}
    return replace(outcome, guests=(outcome.guests[0], replace(outcome.guests[1], account=account)))


def with_host(**changes: Any) -> RunOutcome:
    """The agreeing outcome with the host's counters changed."""
    account = host_account(["guest-1", "guest-2"])
    account["host"].update(changes)
    return agreeing_outcome(host=ProcessEnd("host", 0, "", account))


def test_agreeing_accounts_are_ok_and_carry_every_field() -> None:
    outcome = agreeing_outcome()
    result = build_result(outcome)
    assert failed_checks(result) == []
    assert result["ok"] is True
    assert exit_code(outcome, result) == 0
    assert result["duration_s"] == 10.0
    assert set(HOST_FIELDS) <= set(result["host"])
    assert [guest["name"] for guest in result["guests"]] == ["guest-1", "guest-2"]
    for guest in result["guests"]:
        assert set(GUEST_FIELDS) <= set(guest)
        assert set(guest["lock_hold_ns"]) == {"pull", "put_back"}
        assert "reports_timeline" not in guest
    assert result["sampled_peak_bytes"] == 2 * 60 * MIB
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("outcome", "check"),
    [
        (with_guest(returned_bytes=55 * MIB), "guest-2: host and guest agree on what was returned"),
        (with_guest(returned_bytes=55 * MIB), "all that the host freed is what the guests were told was returned"),
        (with_guest(returned_bytes=61 * MIB), "guest-2: no more was returned than was freed"),
        (with_guest(final_resident_bytes=4 * MIB + 4096), "guest-2: the machine holds what the guest says"),
        (with_guest(final_resident_bytes=61 * MIB), "guest-2: final, peak and memory ascend"),
        (with_guest(peak_resident_bytes=65 * MIB), "guest-2: final, peak and memory ascend"),
        (with_guest(violations=1), "guest-2: no violations"),
        (with_host(freed_bytes=112 * MIB - 4096), "all that the host freed is what the guests were told was returned"),
        (with_guest(blocks=27), "every block that was reported was heard of: blocks"),
        (with_guest(reported_bytes=0), "every block that was reported was heard of: asked_bytes"),
        (with_host(failures=1), "host: no failures"),
        (with_host(rejected=1), "host: no rejected"),
        (with_host(malformed=1), "host: no malformed"),
        (agreeing_outcome(problem="guest-1 failed"), "ran to its end"),
        (agreeing_outcome(interrupted=True), "not interrupted"),
        (agreeing_outcome(observations={}), "guest-1: was seen from outside"),
        (agreeing_outcome(host=ProcessEnd("host", 0, "", None)), "host left an account"),
        (agreeing_outcome(host=ProcessEnd("host", 1, "", host_account(["guest-1", "guest-2"]))), "host ended well"),
        (agreeing_outcome(host=ProcessEnd("host", 0, "", host_account(["guest-1"]))), "guest-2: known to the host"),
    ],
)
def test_accounts_that_disagree_are_not_ok(outcome: RunOutcome, check: str) -> None:
    result = build_result(outcome)
    assert check in failed_checks(result)
    assert result["ok"] is False
    assert exit_code(outcome, result) != 0


def test_a_resident_map_that_disagrees_with_the_machine_is_not_ok() -> None:
    outcome = agreeing_outcome()
    seen = outcome.observations["guest-1"]
    assert seen.last_map is not None
    assert seen.last is not None
    map_off = replace(seen, last_map=replace(seen.last_map, resident_bytes=8 * MIB))
    counters_off = replace(seen, last=replace(seen.last, counted_bytes=8 * MIB))
    for changed, check in (
        (map_off, "guest-1: the machine holds what the resident map says"),
        (counters_off, "guest-1: first touches and refaults less what was returned is resident"),
    ):
        altered = replace(outcome, observations={**outcome.observations, "guest-1": changed})
        assert failed_checks(build_result(altered)) == [check]


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"state": "lost"}, "guest-2: said goodbye"),
        ({"final_resident_bytes": 0}, "guest-2: host and guest agree on what is resident at the end"),
    ],
)
def test_a_host_that_saw_another_end_is_not_ok(changes: dict[str, Any], check: str) -> None:
    account = host_account(["guest-1", "guest-2"])
    account["guests"][1].update(changes)
    assert failed_checks(build_result(agreeing_outcome(host=ProcessEnd("host", 0, "", account)))) == [check]


def test_blocks_of_withdrawn_reports_are_no_disagreement() -> None:
    assert build_result(with_guest(blocks=27, withdrawn=1))["ok"] is True


def test_a_model_host_may_claim_what_was_never_touched_but_no_less_than_was_returned() -> None:
    def model(freed_bytes: int) -> RunOutcome:
        account = host_account(["guest-1"])
        account["host"].update(freed_bytes=freed_bytes, blocks=28, asked_bytes=56 * MIB)
        guest = ProcessEnd("guest-1", 0, "", {**guest_account("guest-1"), "backend": "model"})
        return agreeing_outcome(host=ProcessEnd("host", 0, "", account), guests=(guest,))

    assert failed_checks(build_result(model(64 * MIB))) == []
    assert failed_checks(build_result(model(55 * MIB))) == ["the host freed at least what was returned"]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (with_guest(violations=2), 4),
        (with_guest(returned_bytes=1), 4),
        (agreeing_outcome(interrupted=True), 130),
        (agreeing_outcome(problem="late"), 1),
        (agreeing_outcome(host=ProcessEnd("host", 2, "name in use", None), problem="the host ended"), 2),
        (agreeing_outcome(host=ProcessEnd("host", 3, "mount /dev/shm", None), problem="the host ended"), 3),
        (agreeing_outcome(host=ProcessEnd("host", -9, "", None)), 1),
        (agreeing_outcome(host=ProcessEnd("host", None, "", None), problem="no kernels"), 1),
    ],
)
def test_exit_codes(outcome: RunOutcome, code: int) -> None:
    assert exit_code(outcome, build_result(outcome)) == code


def test_a_process_without_account_still_gives_a_result() -> None:
    outcome = agreeing_outcome(
        guests=(ProcessEnd("guest-1", 4, "stamp 1 is 2", None), ProcessEnd("guest-2", None, "", None)), observations={}
    )
    result = build_result(outcome)
    assert exit_code(outcome, result) == 4
    assert result["guests"] == [{"name": "guest-1"}, {"name": "guest-2"}]
    assert "No guest" in headline(result)
    assert any("FAILED" in line for line in summary_text(result, plot=None))


def test_summary_has_the_numbers() -> None:
    result = build_result(agreeing_outcome())
    assert (
        headline(result) == "2 guests gave back 112 MiB: resident went from 120 MiB at the peak to 8.0 MiB at the end"
    )
    text = "\n".join(summary_text(result, plot="demo.png"))
    for part in ("93.3 %", "4 reports", "3.0 µs", "demo.png", "0 pages"):
        assert part in text


def test_subtitle_tells_how_it_was_run() -> None:
    text = subtitle(build_result(agreeing_outcome()))
    for part in ("memhog", "boundary", "order 9", "100 ms", "at most 16", "3.0 µs"):
        assert part in text


def test_failure_text_shows_how_it_ended_and_the_last_lines() -> None:
    assert failure_text("host", -9, "") == "host was ended by signal 9"
    out_of_memory = failure_text("guest-1", -7, "")
    for part in ("signal 7 (SIGBUS)", "shm ran out", "enlarge", "smaller guests"):
        assert part in out_of_memory
    text = failure_text("guest-1", 3, "\n".join(f"line {index}" for index in range(100)))
    assert text.startswith("guest-1 ended with exit code 3")
    assert "line 99" in text
    assert "line 1\n" not in text
