"""The OpenCL backend on PoCL: everything runs for real, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing import opencl
from gpuksm.hashing.opencl import OpenClHasher
from gpuksm.hashing.sort import match_sorted
from gpuksm.hashing.source import ArraySource
from tests.hashing.test_cuda import SEED, assert_same, digest, on_cpu, source_of
from tests.kernels.executors import PoclExecutor
from tests.kernels.oracles import mixed_pages


def make(**options: Any) -> OpenClHasher:
    given: dict[str, Any] = {"threads": 2, "device": "cpu", "idle_seconds": 0}
    return OpenClHasher(SEED, **(given | options))


@pytest.fixture(scope="module")
def hasher() -> Iterator[OpenClHasher]:
    PoclExecutor("")  # skips or fails where there is no PoCL
    made = make(slot_pages=512)
    yield made
    made.close()


@pytest.mark.parametrize("pages", [0, 1, 511, 512, 513, 5000])
def test_digests_equal_the_cpus(hasher: OpenClHasher, pages: int) -> None:
    source = source_of(pages)
    assert_same(digest(hasher, source), on_cpu(source))


def test_a_full_batch_in_slots_of_the_real_size(hasher: OpenClHasher) -> None:
    whole = make()
    source = ArraySource(mixed_pages(65536).view(np.uint8))
    assert_same(digest(whole, source), on_cpu(source))
    whole.close()


def test_sort_match_candidates_and_batches(hasher: OpenClHasher) -> None:
    source = source_of(3000)
    digests, kinds = on_cpu(source)
    ordered, order = hasher.sort(digests)
    np.testing.assert_array_equal(order, np.argsort(digests, kind="stable"))
    np.testing.assert_array_equal(ordered, digests[order])
    table = np.sort(digests[:700])
    hasher.set_table(table)
    np.testing.assert_array_equal(hasher.match(ordered), match_sorted(ordered, table))
    found = hasher.candidates(digests)
    np.testing.assert_array_equal(found.digests, digests[found.order])
    np.testing.assert_array_equal(found.match, match_sorted(found.digests, table))
    got = np.empty_like(digests), np.empty_like(kinds)
    batches = list(hasher.batches(source, *got, batch_pages=1000))
    assert_same(got, (digests, kinds))
    assert [len(set((batch.order // 1000).tolist())) for batch in batches] == [1, 1, 1]


def test_release_and_return(hasher: OpenClHasher) -> None:
    source = source_of(600)
    hasher.release()
    assert hasher.devices == []
    assert_same(digest(hasher, source), on_cpu(source))
    assert len(hasher.devices) == 1


def test_a_failing_launch_leaves_the_rest_to_the_cpu(
    hasher: OpenClHasher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import pyopencl

    failing, source = make(slot_pages=64), source_of(1000)
    launches = iter(range(100))
    real = opencl.OpenClQueue.launch

    def launch(self: opencl.OpenClQueue, kernel: str, groups: int, *arguments: Any) -> None:
        if next(launches) == 5:
            raise pyopencl.RuntimeError("out of resources")
        real(self, kernel, groups, *arguments)

    monkeypatch.setattr(opencl.OpenClQueue, "launch", launch)
    assert_same(digest(failing, source), on_cpu(source))
    assert len(caplog.records) == 1
    assert failing.devices == []
    failing.close()


def test_names_of_devices(hasher: OpenClHasher) -> None:
    with pytest.raises(UsageError, match="no OpenCL device is called"):
        make(device="no such device")
    with pytest.raises(UsageError):
        make(gpu_memory=-1)
    with pytest.raises(UsageError, match="too little"):
        make(gpu_memory=1 << 20)
    named = make(device="portable computing language")
    assert named.devices == hasher.devices
    named.close()


def test_cpus_are_only_used_when_named() -> None:
    class Kind:
        CPU, GPU = 2, 4

    class One:
        def __init__(self, name: str, kind: int) -> None:
            self.name, self.type = name, kind
            self.platform = type("P", (), {"name": "platform"})()

    cl: Any = type("cl", (), {"device_type": Kind})
    cpu, gpu, other = One("a cpu", 2), One("a gpu", 4), One("another gpu", 4)
    choose = opencl._choose
    assert choose(cl, [cpu, gpu, other], None) == [gpu]
    assert choose(cl, [cpu, gpu, other], "all") == [gpu, other]
    assert choose(cl, [cpu, gpu, other], "cpu") == [cpu]
    assert choose(cl, [cpu, gpu, other], "ANOTHER") == [other]
    with pytest.raises(BackendUnavailable):
        choose(cl, [cpu], None)


def test_compilers_without_shuffles_get_the_plain_kernels(hasher: OpenClHasher) -> None:
    import pyopencl

    assert opencl.variants("cl_khr_fp64 cl_khr_int64_base_atomics") == [["-cl-std=CL1.2", "-DBLOCK=128"]]
    options = opencl.variants("cl_khr_fp64 cl_khr_subgroup_shuffle")
    assert [("-DSUBGROUPS" in one) for one in options] == [True, True, False]
    context = PoclExecutor("").context
    assert opencl.build(pyopencl, context, [["-cl-std=CL99"], *options[-1:]]).kernel_names
    with pytest.raises(pyopencl.Error):
        opencl.build(pyopencl, context, [["-cl-std=CL99"]])


def test_without_pyopencl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    monkeypatch.setattr(opencl.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BackendUnavailable, match="not installed"):
        OpenClHasher(0)
