"""Machine code kept between processes: used where it is safe, done without where it is not."""

from __future__ import annotations

import importlib
import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpuksm.hashing import compiled, object_file, sort, xxh3
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


def test_a_kept_kernel_needs_nothing_of_llvm(tmp_path):
    assert compiles(XDG_CACHE_HOME=str(tmp_path))
    code = HASH.replace("'numba' in sys.modules", "'llvmlite' in sys.modules")
    clean = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    clean.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=clean, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    x86 = platform.machine() == "x86_64"
    assert done.stdout.strip() == str(not x86)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines leave it to LLVM")
@pytest.mark.parametrize("name", ["_page_kernel", "_sort_kernels"])
def test_object_files_are_placed_as_llvm_places_them(name):
    built = compiled.build(importlib.import_module(f"gpuksm.hashing.{name}"))
    for code, symbol in object_files(built):
        assert object_file.place(code, symbol)
    ours = compiled.link(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_file, "place", lambda code, symbol: None)
        theirs = compiled.link(built)
    random = np.random.default_rng(1)
    if name == "_page_kernel":
        words = random.integers(0, 1 << 63, 8 * 512, np.uint64)
        words[512:1024], words[1024:1536] = 0, 7
        found = []
        for kernels in (ours, theirs):
            digests, kinds = np.empty(8, np.uint64), np.empty(8, np.uint8)
            kernels.hash_pages(words, np.ones(8, np.bool_), xxh3.page_keys(3), digests, kinds)
            found.append((digests.tolist(), kinds.tolist()))
    else:
        keys = random.integers(0, 1 << 63, 20_000, np.uint64)
        keys[5000:15_000] = keys[0]  # enough of one part for memset and the second sort
        found = []
        for kernels in (ours, theirs):
            mine, order = keys.copy(), np.arange(20_000, dtype=np.uint32)
            bounds, counts = np.array([0, 20_000], np.uint32), np.empty(sort.SCRATCH_COUNTS, np.uint32)
            kernels.sort_buckets(mine, order, np.empty_like(mine), np.empty_like(order), bounds, 64, counts)
            found.append((mine.tolist(), order.tolist(), kernels.varying_bits(keys)))
        assert found[0][0] == sorted(keys.tolist())
    assert found[0] == found[1]


def object_files(built):
    (size,) = struct.unpack_from("<I", built)
    at = 4 + size
    for facts in json.loads(built[4:at]).values():
        yield built[at : at + facts["code"]], facts["symbol"]
        at += facts["code"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines leave it to LLVM")
def test_what_is_not_known_of_an_object_file_is_left_to_llvm():
    built = compiled.build(importlib.import_module("gpuksm.hashing._page_kernel"))
    code, symbol = next(object_files(built))
    assert object_file.place(code, "no such function") is None
    assert object_file.place(b"something else", symbol) is None
    other = bytearray(code)
    struct.pack_into("<H", other, 18, 183)  # aarch64
    assert object_file.place(bytes(other), symbol) is None
    # Every relocation of another type; R_X86_64_64 is 1.
    (at,) = struct.unpack_from("<Q", code, 40)
    (count,) = struct.unpack_from("<H", code, 60)
    other = bytearray(code)
    for number in range(count):
        (kind,) = struct.unpack_from("<I", code, at + 64 * number + 4)
        begin, size = struct.unpack_from("<QQ", code, at + 64 * number + 24)
        if kind == 4:
            for entry in range(begin, begin + size, 24):
                struct.pack_into("<I", other, entry + 8, 2)
    assert object_file.place(bytes(other), symbol) is None


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
