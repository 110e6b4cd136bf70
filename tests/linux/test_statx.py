"""What is known of a file, against os.stat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuksm.linux import statx


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/exe", "/", "/dev/shm"])
def test_it_is_what_stat_says(path: str) -> None:
    found, other = statx.known(path), os.stat(path)
    assert (found.mode, found.inode) == (other.st_mode, other.st_ino)
    assert found.device == (os.major(other.st_rdev), os.minor(other.st_rdev))
    assert found.on == (os.major(other.st_dev), os.minor(other.st_dev))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="statx"):
        statx.known(str(tmp_path / "missing"))
