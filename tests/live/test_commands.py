"""The commands as their users see them: exit codes, what is on which stream, and nothing left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.live.processes import Lab
from tests.support import leftovers, wait_until

TINY = ("--memory", "16MiB", "--vcpus", "1", "--workload", "churn", "--duration", "0.3")


def test_ctrl_c_ends_both_with_130_and_their_results(lab: Lab) -> None:
    host = lab.host()
    guest = lab.guest("g0", "--workload", "churn")
    guest.returns()
    assert guest.stop(signal.SIGINT, code=130)["ok"]
    assert not lab.names_of("g0")
    assert host.stop(signal.SIGINT, code=130)["ok"]
    assert leftovers(lab.name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_a_host_ends_it_soon(lab: Lab, number: int) -> None:
    guest = lab.guest("g0", "--workload", "churn", "--deadline", "1h", "--delay", "1h")
    guest.works()
    result = guest.stop(number, code=130 if number == signal.SIGINT else 0)
    assert result["ok"]
    assert result["reports"] == 0


def test_s13_a_signal_beside_a_stopped_host_ends_it_soon(lab: Lab) -> None:
    """The deadline is an hour, but whoever stops has given its reports up."""
    host = lab.host()
    guest = lab.guest("g0", "--workload", "churn", "--min-order", "0", "--deadline", "2s")
    guest.returns()
    host.send(signal.SIGSTOP)
    guest.send(signal.SIGTERM)
    assert guest.wait() == 0, guest.err
    assert guest.result()["violations"] == 0
    host.send(signal.SIGCONT)
    assert host.stop()["ok"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts_leaves_nothing(lab: Lab, number: int) -> None:
    """At the first sign of life in shared memory: the guest is still being put together."""
    from tests.live.processes import Guest

    guest = Guest(lab.name, "g0", lab.folder, "--workload", "churn")
    try:
        wait_until(lambda: lab.names_of("g0") or guest.process.poll() is not None, what="a name")
        guest.send(number)
        assert guest.wait() == (130 if number == signal.SIGINT else 0), guest.err
    finally:
        guest.kill()
        guest.close()
    assert lab.names_of("g0") == []


def test_json_on_standard_output_is_one_object_and_lines_are_on_standard_error(lab: Lab) -> None:
    done = lab.command("guest", "--host", lab.name, "--name", "g0", *TINY[:-1], "1.5", "--json", "-")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["ok"], result["name"], result["workload"]) == (True, "g0", "churn")
    lines = done.stderr.splitlines()
    assert lines
    for line in lines:  # piped: plain lines, no escapes, one at a time
        assert "\x1b" not in line
        assert "\r" not in line
        assert "g0" in line
        assert "waiting for a host" in line


def test_quiet_says_nothing(lab: Lab) -> None:
    done = lab.command("guest", "--host", lab.name, "--name", "g0", *TINY, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_is_not_overwritten_unasked(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text("kept")
    flags = ("guest", "--host", lab.name, "--name", "g0", *TINY, "--quiet", "--json", str(path))
    refused = lab.command(*flags)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert path.read_text() == "kept"
    assert lab.command(*flags, "--force").returncode == 0
    assert json.loads(path.read_text())["ok"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--memory", "17MiB"), "memory"),
        (("--vcpus", "0"), "vcpus"),
        (("--workload", "mining"), "workload"),
        (("--policy", "v42"), "policy"),
        (("--min-order", "11"), "min-order"),
        (("--delay", "5"), "delay"),
        (("--name", "A/B"), "name"),
        (("--settings", "/nowhere.toml"), "settings"),
        (("--json", "/nowhere/result.json"), "/nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(lab: Lab, flags: tuple[str, str], said: str) -> None:
    done = lab.command("guest", "--host", lab.name, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_names_in_use_are_refused(lab: Lab) -> None:
    lab.host()
    guest = lab.guest("g0", "--workload", "none")
    for command, flags in (
        ("guest", ("--host", lab.name, "--name", "g0", *TINY)),
        ("host", ("--name", lab.name)),
    ):
        done = lab.command(command, *flags)
        assert done.returncode == 2
        assert "choose another --name" in done.stderr
    assert len(lab.names_of("g0")) == 4
    guest.stop()


def test_more_memory_than_there_is_is_exit_code_3_with_the_fix(lab: Lab) -> None:
    done = lab.command("guest", "--host", lab.name, "--name", "g0", "--memory", "1TiB", "--quiet")
    assert done.returncode == 3
    assert "--memory" in done.stderr
    assert "--backend model" in done.stderr
    assert lab.names_of("g0") == []
