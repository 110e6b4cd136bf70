"""Machine code kept between processes: used where it is safe, done without where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpuksm.hashing.compiled import library
from gpuksm.hashing.kernel_cache import private_folder

# Hashes a zero page with seed 0; the digest is the first known answer.
HASH = """
import sys
import numpy as np
from gpuksm.hashing.cpu import digest_pages
digests, _ = digest_pages(np.zeros((1, 4096), np.uint8), 0)
assert int(digests[0]) == 0x93D76FE148C689BA
print('numba' in sys.modules)
"""
# A home that cannot be a folder stops root too, where modes do not.
NOWHERE = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}


def compiles(**environment: str) -> bool:
    """Runs HASH in a new process; whether it had to compile its kernel."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    }
    done = subprocess.run(
        [sys.executable, "-c", HASH],
        env=clean | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


def test_the_second_process_needs_no_compiler(tmp_path):
    assert compiles(XDG_CACHE_HOME=str(tmp_path))
    assert list(tmp_path.glob("gpuksm/kernels/page_kernel-*"))
    assert not compiles(XDG_CACHE_HOME=str(tmp_path))


def test_home_is_used_when_there_is_no_cache_folder_named(tmp_path):
    compiles(HOME=str(tmp_path))
    assert list(tmp_path.glob(".cache/gpuksm/kernels/page_kernel-*"))


def test_numba_s_own_setting_wins(tmp_path):
    compiles(NUMBA_CACHE_DIR=str(tmp_path / "mine"), **NOWHERE)
    assert list(tmp_path.glob("mine/page_kernel-*"))


def test_works_where_nothing_can_be_written():
    assert compiles(**NOWHERE)


@pytest.mark.parametrize("broken", [lambda old: b"", lambda old: old[:-1], lambda old: old[:-1] + b"?"])
def test_broken_files_are_made_anew(tmp_path, broken):
    compiles(XDG_CACHE_HOME=str(tmp_path))
    (file,) = tmp_path.rglob("page_kernel-*")
    whole = file.read_bytes()
    file.write_bytes(broken(whole))
    assert compiles(XDG_CACHE_HOME=str(tmp_path))
    assert file.read_bytes()[:17] == whole[:17]
    assert not compiles(XDG_CACHE_HOME=str(tmp_path))


def test_arguments_are_checked_before_machine_code_runs():
    histogram = library("gpuksm.hashing._sort_kernels").histogram
    keys, counts = np.arange(8, dtype=np.uint64), np.zeros(4, np.uint32)
    histogram(keys, 0, counts)
    assert counts.tolist() == [2, 2, 2, 2]
    frozen = counts.copy()
    frozen.flags.writeable = False
    for wrong in ((keys, 0), (keys.astype(np.int64), 0, counts), (keys[::2], 0, counts), (keys, 0, frozen)):
        with pytest.raises(TypeError):
            histogram(*wrong)


def test_the_folder_is_made_for_us_alone(tmp_path):
    folder = private_folder(tmp_path / "new" / "cache")
    assert folder == tmp_path / "new" / "cache" / "gpuksm" / "kernels"
    assert folder.stat().st_mode & 0o077 == 0
    assert private_folder(tmp_path / "new" / "cache") == folder


@pytest.mark.parametrize("part", ["", "gpuksm", "gpuksm/kernels"])
def test_links_and_files_are_not_trusted(tmp_path, part):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "gpuksm" / "kernels").mkdir(parents=True, mode=0o700)
    place = tmp_path / "cache" / part
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.symlink_to(elsewhere)
    assert private_folder(tmp_path / "cache") is None
    place.unlink()
    place.touch()
    assert private_folder(tmp_path / "cache") is None


@pytest.mark.parametrize("part", ["gpuksm", "gpuksm/kernels"])
def test_a_folder_that_others_may_write_is_not_trusted(tmp_path, part):
    assert private_folder(tmp_path)
    (tmp_path / part).chmod(0o777)
    assert private_folder(tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
@pytest.mark.parametrize("part", ["", "gpuksm", "gpuksm/kernels"])
def test_another_user_s_folder_is_not_trusted(tmp_path, part):
    cache = tmp_path / "cache"
    assert private_folder(cache)
    os.chown(cache / part, 65534, 65534)
    assert private_folder(cache) is None
    assert compiles(XDG_CACHE_HOME=str(cache))
