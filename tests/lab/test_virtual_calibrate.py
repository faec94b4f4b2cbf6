"""``python -m lab calibrate`` against a real host process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.cli import CommandParser
from common.errors import UsageError
from common.names import SHM_DIR
from lab.commands import calibrate
from lab.virtual.costs import Costs


def command(*arguments: str) -> int:
    parser = CommandParser(prog="calibrate", description=None)
    calibrate.add_arguments(parser)
    return calibrate.run(parser.parse_args(arguments))


def test_what_is_measured_can_be_loaded_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path, other = tmp_path / "costs.json", tmp_path / "copy.json"
    before = set(os.listdir(SHM_DIR))
    assert command("--out", str(path), "--json", str(other), "--rounds", "1") == 0
    costs = Costs.load(path)
    assert min(costs.touch_ns, costs.fault_ns, costs.discard_page_ns, costs.message_host_ns, costs.lock_ns) > 0
    content = json.loads(path.read_text())
    assert set(content["spreads"]) == set(costs.as_dict())
    assert content["machine"]["processors"] >= 1
    assert json.loads(other.read_text()) == content
    left = {name for name in set(os.listdir(SHM_DIR)) - before if "calibrate-" in name}
    assert not left
    with pytest.raises(UsageError, match="--force"):
        command("--out", str(path))


def test_rounds_have_bounds(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rounds"):
        command("--out", str(tmp_path / "costs.json"), "--rounds", "0")
