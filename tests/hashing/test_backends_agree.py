"""One memory, one seed: every backend gives the same digests, kinds, order, matches and candidates.

cuda runs on the fake runtime, its kernels on the PTX interpreter; opencl on PoCL.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import xxhash

from gpuksm.hashing import KIND_UNREADABLE, create, cuda, gpus
from gpuksm.hashing.offload import OffloadHasher
from gpuksm.hashing.protocol import Hasher
from gpuksm.hashing.sort import match_sorted
from gpuksm.hashing.tables import candidates_of
from tests import fake_cupy, nvrtc
from tests.hashing.test_cuda import digest, source_of
from tests.kernels.executors import PoclExecutor
from tests.kernels.oracles import expected_kinds, mixed_pages

PAGES = 700
SEEDS = (0, 0xDEADBEEFCAFEBABE)


def make(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> Hasher:
    if backend == "opencl":
        PoclExecutor("")  # skips or fails where there is no PoCL
        return create("opencl", seed, 2, "cpu")[0]
    if backend == "cuda":
        nvrtc.library()
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy.FakeCuda().module())
        monkeypatch.setattr(cuda, "unavailable", lambda: None)
        monkeypatch.setattr(gpus, "nvml", lambda: None)
    return create(backend, seed, 2)[0]


@pytest.mark.parametrize("backend", ["cpu", "opencl", "cuda"])
@pytest.mark.parametrize("seed", SEEDS)
def test_backends_agree_with_the_reference(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hasher, source = make(backend, seed, monkeypatch), source_of(PAGES)
    pages = mixed_pages(PAGES)
    gone = np.arange(PAGES) % 13 == 0
    wanted = np.array([xxhash.xxh3_64_intdigest(page, seed) for page in pages], np.uint64)
    wanted[gone] = 0
    digests, kinds = digest(hasher, source)
    np.testing.assert_array_equal(digests, wanted)
    np.testing.assert_array_equal(kinds, np.where(gone, KIND_UNREADABLE, expected_kinds(pages)))

    ordered, order = hasher.sort(digests)
    np.testing.assert_array_equal(order, np.argsort(wanted, kind="stable"))
    np.testing.assert_array_equal(ordered, wanted[order])
    if isinstance(hasher, OffloadHasher):
        table = ordered[::5].copy()
        hasher.set_table(table)
        match = match_sorted(ordered, table)
        np.testing.assert_array_equal(hasher.match(ordered), match)
        expected = candidates_of(ordered, order, match)
        for got, column in zip(hasher.candidates(digests), expected, strict=True):
            np.testing.assert_array_equal(got, column)
        assert hasher.devices, "the device did the work, not the CPU behind it"
    hasher.close()
