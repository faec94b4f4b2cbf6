"""A file appears whole or not at all, and a writer that is killed leaves nothing for good."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.parts import Part, part_name

KILLED = """
import os, signal, sys
from common import parts
if sys.argv[2] == "named":
    parts.os.O_TMPFILE = os.O_RDWR  # what a file system that knows no nameless files says to it: EISDIR
part = parts.Part(sys.argv[1])
part.stream.write(b"half")
part.stream.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def write(path: Path, data: bytes) -> int:
    with Part(str(path)) as part:
        part.stream.write(data)
        return part.finish()


def killed_while_writing(path: Path, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


@pytest.fixture
def nameless_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without O_TMPFILE."""
    real = os.open

    def refusing(path: Any, flags: int, *mode: int, **others: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *mode, **others)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("existing", [None, b"old and longer"])
def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path, existing: bytes | None) -> None:
    path = tmp_path / "result"
    if existing is not None:
        path.write_bytes(existing)
    with Part(str(path)) as part:
        part.stream.write(b"whole")
        part.stream.flush()
        assert path.exists() == (existing is not None)
        assert part.finish() == 5
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["result"]


def test_without_nameless_files_it_is_the_same(tmp_path: Path, nameless_unknown: None) -> None:
    path = tmp_path / "result"
    with Part(str(path)) as part:
        part.stream.write(b"whole")
        (sibling,) = os.listdir(tmp_path)
        assert sibling.startswith(f"result.{os.getpid()}-")
        part.finish()
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["result"]


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    write(tmp_path / "part", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "part").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_not_finished_was_never_there(tmp_path: Path, nameless_unknown: None) -> None:
    with Part(str(tmp_path / "result")) as part:
        part.stream.write(b"half")
    assert os.listdir(tmp_path) == []


def test_a_writer_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "result", "nameless")
    assert os.listdir(tmp_path) == []


def test_where_it_must_leave_something_the_next_write_removes_it(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "result", "named")
    assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / "another", b"")
    assert len(os.listdir(tmp_path)) == 2, "it belongs to another file"
    write(tmp_path / "result", b"whole")
    assert sorted(os.listdir(tmp_path)) == ["another", "result"]


def test_a_writer_that_lives_keeps_its_part(tmp_path: Path, nameless_unknown: None) -> None:
    path = tmp_path / "result"
    with Part(str(path)) as slow:
        slow.stream.write(b"slow")
        write(path, b"quick")
        slow.finish()
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["result"]


def test_what_only_looks_like_a_part_stays(tmp_path: Path) -> None:
    for name in ("result.part", "result.1-abc.part", "other.1-00000000.part"):
        (tmp_path / name).touch()
    os.mkfifo(part_name(str(tmp_path / "result")))
    write(tmp_path / "result", b"")
    assert len(os.listdir(tmp_path)) == 5


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "result")
    write(tmp_path / "link", b"whole")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "result").read_bytes() == b"whole"
