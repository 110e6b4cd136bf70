"""Every kernel, from the shipped source, against independent oracles, on every executor."""

from __future__ import annotations

import numpy as np
import pytest

from gpuksm.hashing import kernels
from tests import nvrtc
from tests.kernels import oracles
from tests.kernels.executors import Executor, make

EXECUTORS = ("ptx75", "ptx120", "ptx75-reverse", "pocl")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@pytest.fixture(params=EXECUTORS)
def run(request: pytest.FixtureRequest) -> Executor:
    return make(request.param, kernels.source())


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_nvrtc_compiles_ptx_and_machine_code(number: int) -> None:
    ptx = nvrtc.compile_source(kernels.source(), f"compute_{number}")
    for name in ("hash_pages", "sort_scatter", "gather_marked"):
        assert f".entry {name}(" in ptx
    assert nvrtc.compile_binary(kernels.source(), f"sm_{number}").startswith(b"\x7fELF")


def test_compiler_messages_name_the_file_that_was_written() -> None:
    broken = kernels.source().replace("u64 acc = INIT[lane]", "u64 acc = INIT[lame]")
    with pytest.raises(nvrtc.CompileError, match=r"pages\.cu\(\d+\)"):
        nvrtc.compile_source(broken, "compute_75")


@pytest.mark.parametrize("seed", oracles.SEEDS)
def test_pages_with_several_seeds(run: Executor, seed: int) -> None:
    oracles.check_pages(run, oracles.mixed_pages(100, seed & 0xFF), seed)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 33, 127])
def test_pages_with_tails(run: Executor, count: int) -> None:
    oracles.check_pages(run, oracles.mixed_pages(count), 12345)


@pytest.mark.parametrize("groups", [1, 3, 7, 50])
def test_pages_with_odd_grids(run: Executor, groups: int) -> None:
    oracles.check_pages(run, oracles.mixed_pages(201), 99, groups)


@pytest.mark.parametrize("kind", ["ptx90", "pocl"])
def test_a_full_batch(kind: str) -> None:
    run = make(kind, kernels.source())
    oracles.check_pages(run, oracles.mixed_pages(65536), 0xF00D, 4096 if kind == "ptx90" else 777)


@pytest.mark.parametrize("count", [1, 127, 2048, 2049, 5000])
def test_sort_of_the_low_bits(run: Executor, count: int) -> None:
    oracles.check_sort(run, oracles.clumped_keys(count), bits=8)


def test_sort_of_whole_keys(run: Executor) -> None:
    oracles.check_sort(run, oracles.clumped_keys(2100))


def test_sort_of_a_full_batch() -> None:
    oracles.check_sort(make("pocl", kernels.source()), oracles.clumped_keys(65536 + 77))


@pytest.mark.parametrize("count", [1, 16, 2047, 2048, 2049, 4500])
def test_scan(run: Executor, count: int) -> None:
    oracles.check_scan(run, count)


@pytest.mark.parametrize("size", [0, 1, 2, 100, 255])
def test_match(run: Executor, size: int) -> None:
    table = np.sort(oracles.clumped_keys(size + 1)[:size])
    others = np.random.default_rng(9).integers(0, 1 << 64, 200, dtype=np.uint64)
    ends = np.array([0, (1 << 64) - 1], np.uint64)
    oracles.check_match(run, np.concatenate([table, table ^ np.uint64(1), others, ends]), table)


@pytest.mark.parametrize("count", [1, 2, 128, 129, 1000])
def test_candidates(run: Executor, count: int) -> None:
    keys = np.sort(oracles.clumped_keys(count))
    match = np.where(np.random.default_rng(4).random(count) < 0.2, np.arange(count), -1).astype(np.int64)
    oracles.check_candidates(run, keys, match)


def test_no_candidates_at_all(run: Executor) -> None:
    keys = np.arange(300, dtype=np.uint64)
    oracles.check_candidates(run, keys, np.full(300, -1, np.int64))
