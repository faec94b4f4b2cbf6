"""Settings from flags and from TOML, described once: a field of a frozen dataclass carries its flag, help and bounds.

Flags win over the file, the file over the defaults. Reading goes through text in both cases, so that ``--delay 100ms``
and ``delay = "100ms"`` cannot differ. Which settings exist stands in ``common.settings``; nothing here knows one.
Import-light on purpose: ``--help`` runs through this module.
"""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from common.errors import UsageError

__all__ = [
    "TABLES",
    "Option",
    "Settings",
    "add_flag",
    "add_flags",
    "load",
    "option",
    "option_of",
    "short_repr",
    "switch",
]

TABLES = ("demo", "guest", "host", "shared-host")  # of a settings file; each command reads its own
_METADATA = "option"
_FILE_FIELD = "settings"  # the field that names the file itself cannot stand in the file
# A wrong value as a message shows it. A file can nest tables deeper than repr can follow.
_MOST_BITS = 256  # far beyond every bound; Python refuses to write out a number of many thousand digits


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        return f"a number of {x.bit_length()} bits" if x.bit_length() > _MOST_BITS else super().repr_int(x, level)


_SHORT = _Short()


def short_repr(value: Any) -> str:
    """``repr`` of any value that a settings file can hold, in about one line."""
    return _SHORT.repr(value)


@dataclass(frozen=True)
class Option:
    """How one setting is read, checked and explained.

    ``parse`` takes text and raises ``UsageError`` or ``ValueError``; ``check`` takes a value that is not None.
    ``default_text`` is what ``--help`` shows.
    """

    flag: str
    help: str
    allowed: str
    parse: Callable[[str], Any]
    check: Callable[[Any], bool]
    default_text: str
    may_be_none: bool = False
    is_switch: bool = False

    @property
    def key(self) -> str:
        """The key in a settings file: the flag's name with underscores."""
        return self.flag.replace("-", "_")

    def require(self, value: Any, where: str | None = None, shown: Any = None) -> Any:
        """``value`` itself when it is within bounds.

        Args:
            where: key and place for the message, the key alone if None.
            shown: the value as the user wrote it, if that differs.

        Raises:
            UsageError: it is not; names key, value and what is allowed.
        """
        if (value is None and self.may_be_none) or (value is not None and self.check(value)):
            return value
        raise self.refusal(where or self.key, value if shown is None else shown)

    def read(self, raw: Any, where: str) -> Any:
        """The value of ``raw``: text of a flag, or a TOML value.

        Raises:
            UsageError: wrong form or out of bounds; names ``where``, the value and what is allowed.
        """
        if isinstance(raw, bool) or self.is_switch:
            if isinstance(raw, bool) and self.is_switch:
                return raw
            raise self.refusal(where, raw)
        if not isinstance(raw, str | int | float) or (isinstance(raw, int) and raw.bit_length() > _MOST_BITS):
            raise self.refusal(where, raw)
        try:
            value = self.parse(str(raw))
        except (UsageError, ValueError):
            raise self.refusal(where, raw) from None
        return self.require(value, where, raw)

    def refusal(self, where: str, value: Any) -> UsageError:
        """The error for ``value``; the caller raises it."""
        return UsageError(f"{where}: {short_repr(value)}; allowed is {self.allowed}")


def option(
    flag: str,
    default: str | None,
    *,
    help: str,  # noqa: A002  argparse's word for it
    allowed: str,
    parse: Callable[[str], Any],
    check: Callable[[Any], bool] = lambda _value: True,
    unset: str = "",
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: as text; None for "not set", which ``unset`` then explains.
    """
    value = None if default is None else parse(default)
    description = Option(flag, help, allowed, parse, check, default or unset, may_be_none=default is None)
    return field(default=value, metadata={_METADATA: description})


def switch(flag: str, *, default: bool, help: str) -> Any:  # noqa: A002  argparse's word for it
    """A dataclass field that is on or off: ``--flag`` and ``--no-flag``, ``true`` and ``false`` in a file."""
    text = f"--{flag}" if default else f"--no-{flag}"
    description = Option(flag, help, "true or false", bool, lambda _value: True, text, is_switch=True)
    return field(default=default, metadata={_METADATA: description})


def option_of(setting: Field[Any]) -> Option:
    """The description that a field of a ``Settings`` class carries."""
    description: Option = setting.metadata[_METADATA]
    return description


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the settings of one command. However an instance is made, its values are within bounds.

    Raises:
        UsageError: a value is not.
    """

    table: ClassVar[str]

    def __post_init__(self) -> None:
        for setting in fields(self):
            option_of(setting).require(getattr(self, setting.name))


AnySettings = TypeVar("AnySettings", bound=Settings)


def add_flags(parser: argparse.ArgumentParser, cls: type[Settings]) -> None:
    """Add one flag per setting of ``cls``. Values stay text here: ``load`` reads, checks and reports them."""
    for setting in fields(cls):
        add_flag(parser, setting.name, option_of(setting))


def add_flag(parser: argparse._ActionsContainer, destination: str, described: Option) -> None:
    """Add the flag of one setting; its text goes to ``destination`` of the namespace, None when it is not given."""
    bounds = described.default_text if described.is_switch else described.allowed
    default = "" if described.is_switch or not described.default_text else f"; default: {described.default_text}"
    text = f"{described.help} ({'default: ' if described.is_switch else ''}{bounds}{default})".replace("%", "%%")
    if described.is_switch:
        parser.add_argument(
            f"--{described.flag}", dest=destination, help=text, action=argparse.BooleanOptionalAction, default=None
        )
    else:
        metavar = described.flag.rpartition("-")[2].upper()
        parser.add_argument(f"--{described.flag}", dest=destination, help=text, metavar=metavar, default=None)


def load(cls: type[AnySettings], namespace: argparse.Namespace) -> AnySettings:
    """The settings of a command: flags of ``namespace`` over the file that ``--settings`` names over the defaults.

    Raises:
        UsageError: a wrong value or an unknown key (names key, value or file, and what is allowed), or a file that
            cannot be read.
    """
    path = getattr(namespace, _FILE_FIELD, None)
    values = _read_file(cls, path) if path else {}
    for setting in fields(cls):
        raw = getattr(namespace, setting.name, None)
        if raw is not None:
            described = option_of(setting)
            values[setting.name] = described.read(raw, f"--{described.flag}")
    return cls(**values)


def _read_file(cls: type[Settings], path: str) -> dict[str, Any]:
    """Values by field name from table ``cls.table`` of the TOML file ``path``."""
    import tomllib  # a command without --settings need not pay for it

    from common.files import read_regular

    try:
        document = tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise UsageError(f"--settings: {path!r}; cannot be read: {error.strerror}; name a TOML file") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"--settings: {path!r}; is not TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"--settings: {path!r}; is nested too deeply; allowed are plain values in tables") from None
    for name, table in document.items():
        if name not in TABLES or not isinstance(table, dict):
            raise UsageError(f"{name}: no table of {path}; allowed are {', '.join(f'[{known}]' for known in TABLES)}")
    by_key = {option_of(setting).key: setting for setting in fields(cls) if setting.name != _FILE_FIELD}
    values: dict[str, Any] = {}
    for key, raw in document.get(cls.table, {}).items():
        setting = by_key.get(key.replace("-", "_"))
        if setting is None:
            nearest = _nearest(key, list(by_key))
            raise UsageError(f"{key}: unknown key in [{cls.table}] of {path}; the nearest allowed key is {nearest}")
        if setting.name in values:
            raise UsageError(f"{key}: given twice in [{cls.table}] of {path}; allowed is once")
        values[setting.name] = option_of(setting).read(raw, f"{key} in [{cls.table}] of {path}")
    return values


def _nearest(key: str, allowed: list[str]) -> str:
    import difflib  # only on the way to an error

    return difflib.get_close_matches(key, allowed, n=1, cutoff=0.0)[0]
