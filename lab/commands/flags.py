"""Flags for the settings of a run. Their bounds are those of ``common.settings``; here is only which of them apply."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from common.errors import UsageError
from common.options import Option, Settings, add_flag, option, option_of
from common.settings import POLICIES, DemoSettings, GuestSettings
from lab.experiment.compare import Rival
from lab.experiment.spec import ORACLE, RunSpec

__all__ = [
    "COSTS_HELP",
    "RUN_OPTIONS",
    "VIRTUAL_ONLY",
    "add_run_flags",
    "as_elsewhere",
    "comma_list",
    "read_rivals",
    "read_run",
    "text",
    "whole_number",
]

VIRTUAL_ONLY = (ORACLE,)  # it knows the future, which no process does
COSTS_HELP = "costs of virtual time, as calibrate wrote them; this machine's, measured if they never were"


def as_elsewhere(name: str) -> Any:
    """A field with the description that the demo has for it."""
    described = next(setting for setting in fields(DemoSettings) if setting.name == name)
    return field(default=described.default, metadata=described.metadata)


def text(flag: str, default: str, help: str, allowed: str) -> Any:  # noqa: A002  argparse's word
    """A field that takes any text without a NUL: paths, addresses."""
    return option(flag, default, help=help, allowed=allowed, parse=str, check=lambda value: "\0" not in value)


def whole_number(low: int, high: int) -> dict[str, Any]:
    """Parse, check and words of a whole number, for ``option``."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise ValueError(text)
        return int(text)

    return {"parse": parse, "check": lambda value: low <= value <= high, "allowed": f"{low} to {high}"}


@dataclass(frozen=True, kw_only=True)
class _OnlyHere(Settings):
    """Settings of a run that a guest alone does not have."""

    cores: int = option(
        "cores",
        "2",
        help="processors of virtual time; a live run has the machine's, and where both are compared so has this",
        **whole_number(1, 256),
    )


def _run_options() -> dict[str, Option]:
    """Options by field of ``RunSpec``, with the defaults of ``RunSpec`` where those differ from a guest's."""
    known = {
        setting.name: option_of(setting) for cls in (GuestSettings, DemoSettings, _OnlyHere) for setting in fields(cls)
    }
    known["duration_ns"] = known["duration_s"]
    for name, text in (("vcpus", "1"), ("duration_ns", "10s")):
        known[name] = replace(known[name], default_text=text)
    known["capacity"] = replace(known["capacity"], default_text="that of the policy")
    return {
        setting.name: known[setting.name]
        for setting in fields(RunSpec)
        if setting.name in known and setting.name not in {"policy", "workload"}
    }


RUN_OPTIONS = _run_options()

# What a policy may carry after a colon: it changes the reporting or the allocator, never the work.
_OF_A_POLICY = {
    RUN_OPTIONS[name].key: name
    for name in (
        "min_order",
        "delay_ns",
        "capacity",
        "high_water_mark",
        "shuffle",
        "merge_likely",
        "host_zeroed",
        "inhibit_discard",
        "pcp_batch",
        "pcp_high",
    )
}


def comma_list(allowed: tuple[str, ...]) -> dict[str, Any]:
    """Parse, check and words of a comma list of ``allowed`` names, each at most once, for ``option``."""

    def check(names: tuple[str, ...]) -> bool:
        return bool(names) and len(set(names)) == len(names) and set(names) <= set(allowed)

    parse: Callable[[str], tuple[str, ...]] = lambda text: tuple(part.strip() for part in text.split(","))  # noqa: E731
    return {"parse": parse, "check": check, "allowed": f"a comma list, each once, of {', '.join(allowed)}"}


def add_run_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for each setting of a run but policy and workload."""
    for name, described in RUN_OPTIONS.items():
        add_flag(parser, name, described)


def read_run(namespace: argparse.Namespace) -> RunSpec:
    """The settings that all runs share.

    Raises:
        UsageError: a wrong value; names flag, value and what is allowed.
    """
    given = {name: getattr(namespace, name) for name in RUN_OPTIONS}
    return RunSpec(
        **{name: _value(name, raw, f"--{RUN_OPTIONS[name].flag}") for name, raw in given.items() if raw is not None}
    )


def read_rivals(text: str, *, virtual_only: bool) -> tuple[Rival, ...]:
    """The entries of ``--policies``, as they were given.

    Args:
        text: policies with commas between; settings of one follow it, each after a colon, as key=value.
        virtual_only: whether policies are allowed that exist in virtual time alone.

    Raises:
        UsageError: an unknown policy or key, a wrong value, or an entry given twice; names what is allowed.
    """
    rivals: list[Rival] = []
    for entry in (part.strip() for part in text.split(",")):
        rival = _rival(entry, virtual_only=virtual_only)
        if rival.name in {other.name for other in rivals}:
            raise UsageError(f"--policies: {entry!r} is given twice; allowed is once")
        rivals.append(rival)
    return tuple(rivals)


def _rival(entry: str, *, virtual_only: bool) -> Rival:
    policy, *parts = (part.strip() for part in entry.split(":"))
    if policy in VIRTUAL_ONLY and not virtual_only:
        raise UsageError(f"--policies: {policy!r} exists in virtual time only; add --virtual")
    allowed = (*POLICIES, *(VIRTUAL_ONLY if virtual_only else ()))
    if policy not in allowed:
        raise UsageError(f"--policies: {policy!r}; allowed are {', '.join(sorted(set(allowed)))}")
    changes: dict[str, Any] = {}
    for part in parts:
        key, equals, raw = part.partition("=")
        name = _OF_A_POLICY.get(key.strip().replace("-", "_"))
        if name is None or not equals:
            keys = ", ".join(f"{RUN_OPTIONS[known].flag}=…" for known in _OF_A_POLICY.values())
            raise UsageError(f"--policies: {part!r} of {entry!r}; allowed after a colon are {keys}")
        if name in changes:
            raise UsageError(f"--policies: {key} is given twice in {entry!r}; allowed is once")
        changes[name] = _value(name, raw.strip(), f"--policies: {key} of {entry!r}")
    return Rival(entry, policy, changes)


def _value(name: str, raw: Any, where: str) -> Any:
    described = RUN_OPTIONS[name]
    if described.is_switch and isinstance(raw, str):
        raw = {"true": True, "false": False}.get(raw, raw)
    value = described.read(raw, where)
    return round(value * 1e9) if name == "duration_ns" else value  # the one that is described in seconds
