"""Files that a user names: read whole, or refused at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.files import MOST_BYTES, read_regular


def test_a_file_is_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345678")
    assert read_regular(path, 8) == read_regular(path, None) == b"12345678"
    assert read_regular("/proc/self/status").startswith(b"Name:")  # has a size of 0


def test_a_larger_file_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(OSError, match="is too large, more than 16 MiB"):
        read_regular(path)
    os.truncate(path, MOST_BYTES)
    assert len(read_regular(path)) == MOST_BYTES


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for limit in (MOST_BYTES, None):
            with pytest.raises(OSError, match="is no regular file"):
                read_regular(path, limit)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
