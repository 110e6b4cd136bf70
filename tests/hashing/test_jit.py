"""The cache of compiled kernels: used where it is safe, done without where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuksm.hashing._jit import private_folder

# Hashes a zero page with seed 0; the digest is the first known answer.
HASH = """
import numpy as np
from gpuksm.hashing.cpu import digest_pages
digests, _ = digest_pages(np.zeros((1, 4096), np.uint8), 0)
assert int(digests[0]) == 0x93D76FE148C689BA
from gpuksm.hashing._page_kernel import hash_pages
print(sum(hash_pages.stats.cache_hits.values()))
"""
# A home that cannot be a folder stops root too, where modes do not.
NOWHERE = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}


def cache_hits(**environment: str) -> int:
    """Runs HASH in a new process; how often its kernel came from the cache."""
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
    return int(done.stdout)


def test_the_second_process_finds_the_kernel_compiled(tmp_path):
    assert cache_hits(XDG_CACHE_HOME=str(tmp_path)) == 0
    assert list(tmp_path.glob("gpuksm/numba/**/*.nbc"))
    assert cache_hits(XDG_CACHE_HOME=str(tmp_path)) == 1


def test_home_is_used_when_there_is_no_cache_folder_named(tmp_path):
    cache_hits(HOME=str(tmp_path))
    assert list(tmp_path.glob(".cache/gpuksm/numba/**/*.nbc"))


def test_numba_s_own_setting_wins(tmp_path):
    cache_hits(NUMBA_CACHE_DIR=str(tmp_path / "mine"), **NOWHERE)
    assert list(tmp_path.glob("mine/**/*.nbc"))


def test_nothing_is_written_beside_the_source(tmp_path):
    cache_hits(XDG_CACHE_HOME=str(tmp_path))
    package = Path(__file__).parents[2] / "gpuksm" / "hashing"
    assert not [*package.rglob("*.nbi"), *package.rglob("*.nbc")]


def test_works_where_nothing_can_be_written():
    assert cache_hits(**NOWHERE) == 0


@pytest.mark.parametrize("rubbish", [b"", b"rubbish", b"\x80\x05"])
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_broken_cache_files_are_survived(tmp_path, suffix, rubbish):
    cache_hits(XDG_CACHE_HOME=str(tmp_path))
    files = list(tmp_path.rglob(f"*.{suffix}"))
    assert files
    for file in files:
        file.write_bytes(rubbish)
    cache_hits(XDG_CACHE_HOME=str(tmp_path))


def test_the_folder_is_made_for_us_alone(tmp_path):
    folder = private_folder(tmp_path / "new" / "cache")
    assert folder == tmp_path / "new" / "cache" / "gpuksm" / "numba"
    assert folder.stat().st_mode & 0o077 == 0
    assert private_folder(tmp_path / "new" / "cache") == folder


@pytest.mark.parametrize("part", ["", "gpuksm", "gpuksm/numba"])
def test_links_and_files_are_not_trusted(tmp_path, part):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "gpuksm" / "numba").mkdir(parents=True, mode=0o700)
    place = tmp_path / "cache" / part
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.symlink_to(elsewhere)
    assert private_folder(tmp_path / "cache") is None
    place.unlink()
    place.touch()
    assert private_folder(tmp_path / "cache") is None


@pytest.mark.parametrize("part", ["gpuksm", "gpuksm/numba"])
def test_a_folder_that_others_may_write_is_not_trusted(tmp_path, part):
    assert private_folder(tmp_path)
    (tmp_path / part).chmod(0o777)
    assert private_folder(tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
@pytest.mark.parametrize("part", ["", "gpuksm", "gpuksm/numba"])
def test_another_user_s_folder_is_not_trusted(tmp_path, part):
    cache = tmp_path / "cache"
    assert private_folder(cache)
    os.chown(cache / part, 65534, 65534)
    assert private_folder(cache) is None
    assert cache_hits(XDG_CACHE_HOME=str(cache)) == 0
