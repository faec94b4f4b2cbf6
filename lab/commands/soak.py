"""``python -m lab soak``: everything at once for as long as wanted, every process and every account looked at."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

from common.options import Settings, add_flags, load, option
from common.output import STDOUT, check_output, write_json
from common.units import parse_seconds
from lab.commands.flags import as_elsewhere, whole_number
from lab.soak.cast import MOST_RESIDENTS

__all__ = ["SoakSettings", "add_arguments", "run"]

_LONGEST_S = 30 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class SoakSettings(Settings):
    """What runs, for how long, and where the figures go."""

    for_s: float = option(
        "for",
        "1h",
        help="how long to run",
        allowed="2 seconds to 30 days, such as 10m",
        parse=parse_seconds,
        check=lambda value: 2 <= value <= _LONGEST_S,
    )
    seed: int = option("seed", "1", help="seed of everything random", **whole_number(0, (1 << 32) - 1))
    guests: int = option(
        "guests",
        str(MOST_RESIDENTS),
        help="guests that stay, each of another policy",
        **whole_number(1, MOST_RESIDENTS),
    )
    visitors: int = option("visitors", "1", help="guests that come and go, so many at a time", **whole_number(0, 8))
    json: str = as_elsewhere("json")
    force: bool = as_elsewhere("force")
    quiet: bool = as_elsewhere("quiet")

    @property
    def every_s(self) -> float:
        """From one line of progress to the next: sixty of them, a second apart at least and a minute at most."""
        return min(60.0, max(1.0, self.for_s / 60))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_flags(parser, SoakSettings)


def run(namespace: argparse.Namespace) -> int:
    """Soak, and print what came of it; 4 if anything did not hold.

    Raises:
        UsageError: settings. LabError: it could not begin.
    """
    settings = load(SoakSettings, namespace)
    if settings.json:
        check_output(settings.json, force=settings.force)
    from lab.soak.soak import SoakPlan, run_soak
    from lab.soak.verdict import exit_code, summary, summary_text

    def say(text: str) -> None:
        if not settings.quiet and sys.stderr is not None:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    plan = SoakPlan(settings.for_s, settings.seed, settings.guests, settings.visitors, settings.every_s)
    found = run_soak(plan, say)
    described: dict[str, Any] = {key: value for key, value in asdict(plan).items() if key != "every_s"}
    result = summary(found, described | {"command": namespace.command_line})
    if settings.json:
        write_json(result, settings.json, force=settings.force)
    code = exit_code(found, result)
    if not settings.quiet or code:
        stream = sys.stderr if settings.json == STDOUT or code else sys.stdout
        if stream is not None:
            stream.write("\n".join(summary_text(result)) + "\n")
    return code
