"""Results reach a file whole or not at all, and replace nothing unasked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from common.errors import MachineError, UsageError
from common.output import check_distinct, check_output, write_bytes, write_json


def test_an_object_and_its_text_give_the_same_file(tmp_path: Path) -> None:
    result = {"ok": True, "guests": [{"name": "one"}]}
    write_json(result, str(tmp_path / "object.json"), force=False)
    write_json(json.dumps(result, indent=2), str(tmp_path / "text.json"), force=False)
    assert json.loads((tmp_path / "object.json").read_text()) == result
    assert (tmp_path / "object.json").read_bytes() == (tmp_path / "text.json").read_bytes()


def test_a_hyphen_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"ok": True}, "-", force=False)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ok": True}
    assert captured.err == ""


def test_a_file_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("precious")
    with pytest.raises(UsageError, match=r"result\.json: exists; give --force"):
        write_json({}, str(path), force=False)
    assert path.read_text() == "precious"
    write_json({}, str(path), force=True)
    assert path.read_text() == "{}\n"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_missing_folder_is_refused_with_the_fix_or_made(tmp_path: Path) -> None:
    path = str(tmp_path / "out" / "demo.png")
    with pytest.raises(UsageError, match="mkdir -p"):
        check_output(path, force=True)
    check_output(path, force=False, make_folder=True)
    write_bytes(b"picture", path, force=False)
    assert Path(path).read_bytes() == b"picture"


@pytest.mark.parametrize("kind", ["empty", "folder"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        check_output("" if kind == "empty" else str(tmp_path), force=True)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def interrupted(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json({}, str(path), force=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_link_is_kept_and_a_device_is_written_to(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json({}, str(link), force=True)
    assert link.is_symlink()
    assert target.read_text() == "{}\n"

    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    write_json({}, str(null), force=False)
    assert not os.path.isfile("/dev/null")


def test_a_closed_standard_output_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UsageError, match="standard output is closed"):
        check_output("-", force=False)


def test_a_full_standard_output_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    stream = os.fdopen(descriptor, "w", closefd=False)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(MachineError, match="standard output: No space left on device"):
        write_json({}, "-", force=False)
    monkeypatch.undo()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)  # what the stream still holds goes there
    stream.close()
    os.close(null)
    os.close(descriptor)


def test_a_folder_that_takes_no_file_is_found_before_the_run(tmp_path: Path) -> None:
    # /proc takes no file of anybody, though access(2) tells root that it does; nor does any folder take such a name.
    for path in ("/proc/result.json", str(tmp_path / ("x" * 255))):
        with pytest.raises(UsageError, match="cannot write in"):
            check_output(path, force=False)
    check_output(str(tmp_path / "result.json"), force=False)
    assert os.listdir(tmp_path) == []


def test_two_results_never_share_a_file(tmp_path: Path) -> None:
    path, link = tmp_path / "result.png", tmp_path / "link.png"
    link.symlink_to(path)
    for other in (str(path), str(link), f"{tmp_path}/./result.png"):
        with pytest.raises(UsageError, match=r"^--plot: .* is the file of --json too"):
            check_distinct({"--json": str(path), "--plot": other})
    for one, other in (("-", "-"), ("", ""), (str(path), str(tmp_path / "other.png"))):
        check_distinct({"--json": one, "--plot": other})
