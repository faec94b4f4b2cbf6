"""Settings: flags win over the file, the file over defaults; a wrong one names key, value and what is allowed."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UsageError
from common.options import Settings, option_of
from common.settings import (
    BACKENDS,
    DEFAULT_PLOT,
    POLICIES,
    WORKLOADS,
    DemoSettings,
    GuestSettings,
    HostSettings,
    add_flags,
    format_size,
    load,
    parse_duration_ns,
    parse_size,
)

ALL = (GuestSettings, HostSettings, DemoSettings)


def parse(cls: type[Settings], *arguments: str) -> Any:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, cls)
    return load(cls, parser.parse_args(arguments))


@pytest.fixture
def write_settings(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "lab.toml"
        path.write_text(text)
        return str(path)

    return write


# Units


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KiB", 1 << 10),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        (" 1 GiB ", 1 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1GB", "1G", "-1MiB", "1e3", "0.3B", "1_0", "٣MiB", "nan", "9" * 20, "1,5GiB"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"allowed are .* such as 512MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [
        ("0", 0),
        ("0s", 0),
        ("7ns", 7),
        ("250us", 250_000),
        ("100ms", 100_000_000),
        ("0.1ms", 100_000),
        ("2s", 2_000_000_000),
        ("1m", 60_000_000_000),
        ("1h", 3_600_000_000_000),
    ],
)
def test_durations(text: str, duration_ns: int) -> None:
    assert parse_duration_ns(text) == duration_ns


@pytest.mark.parametrize("text", ["", "100", "1.5", "s", "-1s", "1sec", "0.5ns", "inf", "1 2s", "9" * 20 + "h"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"allowed is .* such as 100ms"):
        parse_duration_ns(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (512 << 20, "512MiB"),
        (3 << 29, "1.5GiB"),
        ((1 << 30) - 1, "1GiB"),
        (1 << 40, "1TiB"),
        (5 << 50, "5120TiB"),
        (-(1 << 20), "-1MiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_size_for_people_is_right_to_a_tenth_of_its_unit(size_bytes: int) -> None:
    text = format_size(size_bytes)
    unit = parse_size("1" + text.lstrip("0123456789."))
    number = float(text[: -len(text.lstrip("0123456789."))])
    assert abs(number * unit - size_bytes) <= 0.051 * unit


# Defaults


def test_defaults_of_a_guest_are_those_of_v9() -> None:
    settings = parse(GuestSettings)
    assert settings == GuestSettings()
    assert (settings.host, settings.name, settings.memory, settings.vcpus) == ("lab", "", 512 << 20, 2)
    assert (settings.policy, settings.min_order) == ("boundary", 9)
    assert settings.delay_ns is settings.capacity is settings.high_water_mark is None, "the policy decides"
    assert settings.duration_s is None, "until stopped"
    assert settings.deadline_ns == 10**9


def test_defaults_of_the_demo() -> None:
    settings = parse(DemoSettings)
    assert (settings.guests, settings.duration_s, settings.plot, settings.json) == (2, 12.0, DEFAULT_PLOT, "")


def test_defaults_of_a_host() -> None:
    settings = parse(HostSettings)
    assert (settings.name, settings.slow_ns, settings.slow_where, settings.inhibit_discard) == (
        "lab",
        0,
        "before",
        False,
    )


@pytest.mark.parametrize("cls", ALL)
def test_settings_are_frozen(cls: type[Settings]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().quiet = True  # type: ignore[attr-defined]


def test_what_guest_and_demo_share_is_described_once() -> None:
    demo = {setting.name: option_of(setting) for setting in dataclasses.fields(DemoSettings)}
    own = {setting.name: option_of(setting) for setting in dataclasses.fields(GuestSettings)}
    shared = (demo.keys() & own.keys()) - {"duration_s"}  # its default differs
    assert len(shared) > 20
    assert all(demo[name] is own[name] for name in shared)


# Flags


def test_flags_are_read_in_their_units() -> None:
    settings = parse(
        GuestSettings,
        *("--memory", "1GiB", "--delay", "2s", "--deadline", "250ms", "--hold", "0", "--duration", "1m"),
        *("--work-order", "0", "--fill", "0.25", "--shuffle", "--no-merge-likely", "--json", "-", "--seed", "7"),
    )
    assert (settings.memory, settings.delay_ns, settings.deadline_ns, settings.hold_ns) == (
        1 << 30,
        2 * 10**9,
        250_000_000,
        0,
    )
    assert (settings.duration_s, settings.work_order, settings.fill, settings.seed) == (60.0, 0, 0.25, 7)
    assert (settings.shuffle, settings.merge_likely, settings.json) == (True, False, "-")


@pytest.mark.parametrize(
    ("text", "seconds"), [("20", 20.0), ("0.5", 0.5), ("20s", 20.0), ("100ms", 0.1), ("2m", 120.0)]
)
def test_a_duration_may_leave_its_seconds_unsaid(text: str, seconds: float) -> None:
    assert parse(HostSettings, "--duration", text).duration_s == seconds


@pytest.mark.parametrize(
    ("cls", "flag", "value", "allowed"),
    [
        (GuestSettings, "--memory", "8MiB", "16MiB to 1TiB"),
        (GuestSettings, "--memory", "17MiB", "a multiple of 2MiB"),
        (GuestSettings, "--memory", "lots", "such as 512MiB"),
        (GuestSettings, "--vcpus", "0", "1 to 64"),
        (GuestSettings, "--vcpus", "65", "1 to 64"),
        (GuestSettings, "--vcpus", "two", "1 to 64"),
        (GuestSettings, "--vcpus", "1_0", "1 to 64"),
        (GuestSettings, "--workload", "memhogs", "memhog, page-fault, churn, burst, build, none"),
        (GuestSettings, "--policy", "on", ", ".join(POLICIES)),
        (GuestSettings, "--backend", "uffd", "shared, model"),
        (GuestSettings, "--min-order", "11", "0 to 10"),
        (GuestSettings, "--work-order", "-1", "0 to 10"),
        (GuestSettings, "--delay", "100", "with a unit, such as 100ms"),
        (GuestSettings, "--delay", "2h", "0 to 1h"),
        (GuestSettings, "--deadline", "0", "1ms to 1h"),
        (GuestSettings, "--capacity", "1025", "1 to 1024"),
        (GuestSettings, "--high-water-mark", "1048577", "0 to 1048576"),
        (GuestSettings, "--fill", "nan", "0.01 to 0.95"),
        (GuestSettings, "--fill", "0.96", "0.01 to 0.95"),
        (GuestSettings, "--host", "../x", "a-z, 0-9"),
        (GuestSettings, "--host", "", "a-z, 0-9"),
        (GuestSettings, "--name", "Bob", "a-z, 0-9"),
        (GuestSettings, "--seed", "-1", "0 to 4294967295"),
        (HostSettings, "--duration", "0", "more than 0 seconds"),
        (HostSettings, "--duration", "inf", "more than 0 seconds"),
        (HostSettings, "--duration", "-3", "more than 0 seconds"),
        (HostSettings, "--slow-where", "after", "before, inside"),
        (DemoSettings, "--guests", "65", "1 to 64"),
    ],
)
def test_a_wrong_flag_names_itself_its_value_and_what_is_allowed(
    cls: type[Settings], flag: str, value: str, allowed: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(cls, f"{flag}={value}")
    message = str(refusal.value)
    assert message.startswith(f"{flag}: {value!r}; allowed is ")
    assert allowed in message
    assert refusal.value.exit_code == 2


def test_a_wrong_value_is_refused_without_a_command_line_too() -> None:
    with pytest.raises(UsageError, match=r"^vcpus: 99; allowed is 1 to 64$"):
        GuestSettings(vcpus=99)
    with pytest.raises(UsageError, match=r"^min_order: 11; allowed is 0 to 10$"):
        dataclasses.replace(DemoSettings(), min_order=11)


@pytest.mark.parametrize("cls", [GuestSettings, DemoSettings])
def test_poison_is_refused_with_a_host_that_never_hears_of_it(cls: type[GuestSettings | DemoSettings]) -> None:
    """Z4: a host that claims blocks itself discards what should keep its poison."""
    with pytest.raises(UsageError, match=r"^poison: 170; the host of the policy 'shared' .* allowed is 0 with it$"):
        cls(policy="shared", poison=170)
    cls(policy="shared", poison=0)
    cls(policy="boundary", poison=170)


@pytest.mark.parametrize("cls", ALL)
def test_help_explains_every_flag(cls: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(cls, "--help")
    text = capsys.readouterr().out
    for setting in dataclasses.fields(cls):
        assert f"--{option_of(setting).flag}" in text


# Files


def test_a_file_is_read_and_flags_win_over_it(write_settings: Callable[[str], str]) -> None:
    path = write_settings(
        """
        [guest]
        memory = "1GiB"
        delay = "2s"
        vcpus = 4
        fill = 0.5
        duration = 20
        shuffle = true
        merge_likely = false
        high-water-mark = 8
        [host]
        slow = "5ms"
        """
    )
    settings = parse(GuestSettings, "--settings", path, "--vcpus", "1", "--no-shuffle")
    assert (settings.memory, settings.delay_ns, settings.vcpus, settings.fill) == (1 << 30, 2 * 10**9, 1, 0.5)
    assert (settings.shuffle, settings.merge_likely, settings.high_water_mark) == (False, False, 8)
    assert (settings.duration_s, settings.settings) == (20.0, path)
    assert parse(HostSettings, "--settings", path).slow_ns == 5_000_000


def test_a_file_without_the_table_of_this_command_changes_nothing(write_settings: Callable[[str], str]) -> None:
    path = write_settings("[host]\nname = 'other'\n")
    assert dataclasses.replace(parse(DemoSettings, "--settings", path), settings="") == DemoSettings()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("minorder = 9", r"^minorder: unknown key in \[guest\] of .*lab\.toml; the nearest allowed key is min_order$"),
        ("plot = 'x.png'", r"^plot: unknown key in \[guest\] of .*; the nearest allowed key is "),
        ("settings = 'x.toml'", r"^settings: unknown key"),
        ("vcpus = 99", r"^vcpus in \[guest\] of .*lab\.toml: 99; allowed is 1 to 64$"),
        ("vcpus = true", r"^vcpus in .*: True; allowed is 1 to 64$"),
        ("vcpus = 2.0", r"^vcpus in .*: 2\.0; allowed is 1 to 64$"),
        ("vcpus = [2]", r"^vcpus in .*: \[2\]; allowed is 1 to 64$"),
        ("shuffle = 'yes'", r"^shuffle in .*: 'yes'; allowed is true or false$"),
        ("shuffle = 1", r"^shuffle in .*: 1; allowed is true or false$"),
        ("delay = 100", r"^delay in .*: 100; allowed is 0 to 1h with a unit"),
        ("delay = 2026-01-01", r"^delay in .*allowed is 0 to 1h"),
        ("fill = nan", r"^fill in .*: nan; allowed is 0\.01 to 0\.95$"),
        ("min_order = 9\nmin-order = 8", r"^min-order: given twice in \[guest\] of "),
        ("vcpus = ", r"^--settings: .*lab\.toml'; is not TOML: "),
        ("[gest]", r"^gest: no table of .*lab\.toml; allowed are \[demo\], \[guest\], \[host\], \[shared-host\]$"),
    ],
)
def test_a_wrong_file_names_key_file_value_and_what_is_allowed(
    line: str, message: str, write_settings: Callable[[str], str]
) -> None:
    with pytest.raises(UsageError, match=message):
        parse(GuestSettings, "--settings", write_settings(f"[guest]\n{line}\n"))


def test_a_setting_outside_every_table_is_refused(write_settings: Callable[[str], str]) -> None:
    with pytest.raises(UsageError, match=r"^vcpus: no table of "):
        parse(GuestSettings, "--settings", write_settings("vcpus = 2\n"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--settings: .*cannot be read: No such file"):
        parse(GuestSettings, "--settings", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"^--settings: .*cannot be read: is no regular file; name a TOML file"):
        parse(GuestSettings, "--settings", "/dev/zero")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        parse(GuestSettings, "--settings", str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    "line",
    ["memory = " + "[\n" * 3000 + "]\n" * 3000, f"memory.{'.'.join('a' * 3000)} = 1", f"memory = '{'x' * 9999}'"],
)
def test_a_value_of_any_depth_or_length_is_refused_in_a_short_line(
    line: str, write_settings: Callable[[str], str]
) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(GuestSettings, "--settings", write_settings(f"[guest]\n{line}\n"))
    assert len(str(refusal.value)) < 600
    assert "allowed" in str(refusal.value)


# What --help costs, and what it may promise


def test_settings_load_nothing_heavy() -> None:
    program = (
        "import sys, common.settings, common.cli, common.output;"
        "print(*{'numpy', 'numba', 'rich', 'matplotlib', 'msgpack'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == ""


def test_the_names_that_help_lists_are_those_of_the_tables() -> None:
    from guest.reporting import table
    from guest.workloads import vcpu

    assert set(POLICIES) == set(table.POLICIES)
    assert set(WORKLOADS) == {*vcpu.WORKLOADS, "none"}
    assert len(set(BACKENDS)) == len(BACKENDS)


def test_not_waiting_for_the_host_is_for_hint_alone() -> None:
    """It corrupts a guest on purpose, which a reader of --help has to be told."""
    assert GuestSettings(policy="hint", wait_for_ack=False).wait_for_ack is False
    with pytest.raises(UsageError, match=r"wait_for_ack: False.*'boundary'.*hint"):
        GuestSettings(wait_for_ack=False)
    parser = argparse.ArgumentParser()
    add_flags(parser, GuestSettings)
    assert "CORRUPTS" in parser.format_help()
