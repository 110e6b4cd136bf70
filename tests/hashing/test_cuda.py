"""The CUDA backend's orchestration on a fake runtime: ring, streams, caps, faults, release.

`tests/fake_cupy.py` says what such a test cannot show.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing import cuda, device, gpus, kernels, ring, tables
from gpuksm.hashing.cpu import CpuHasher
from gpuksm.hashing.cuda import CudaHasher
from gpuksm.hashing.sort import match_sorted
from gpuksm.hashing.source import ArraySource, OwnMemory
from tests import fake_cupy, nvrtc
from tests.kernels.oracles import expected_marks, mixed_pages
from tests.requirements_env import require

SEED = 0xC0FFEE
Digests = tuple[NDArray[np.uint64], NDArray[np.uint8]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., fake_cupy.FakeCuda]]:
    """Install a fake runtime; at the end of the test nothing of it may be left in use.

    It sorts a thousand keys at each start, as real ones do, only where asked to: that takes the
    interpreter two seconds.
    """
    nvrtc.library()
    made: list[fake_cupy.FakeCuda] = []
    check = tables.Tables._check

    def install(*, sorts_at_start: bool = False, **options: Any) -> fake_cupy.FakeCuda:
        monkeypatch.setattr(tables.Tables, "_check", check if sorts_at_start else lambda _: None)
        made.append(fake_cupy.FakeCuda(**options))
        monkeypatch.setitem(sys.modules, "cupy", made[-1].module())
        monkeypatch.setattr(cuda, "unavailable", lambda: None)
        monkeypatch.setattr(gpus, "nvml", lambda: None)
        monkeypatch.setattr(cuda, "_CONTEXTS", cuda._Contexts())  # abandoned devices keep theirs
        return made[-1]

    yield install
    gc.collect()
    for one in made:
        assert not one.errors
        assert one.hung.is_set() or not one.leaks


class HoledSource(ArraySource):
    """Pages of which every 13th cannot be read."""

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        super().read(first, count, out, ok)
        ok[:count] = (np.arange(first, first + count) % 13) != 0


def source_of(pages: int) -> ArraySource:
    return HoledSource(mixed_pages(pages).view(np.uint8))


def digest(hasher: Any, source: ArraySource) -> Digests:
    digests, kinds = np.full(source.pages, 7, np.uint64), np.full(source.pages, 7, np.uint8)
    hasher.digest(source, digests, kinds)
    return digests, kinds


def on_cpu(source: ArraySource) -> Digests:
    hasher = CpuHasher(SEED, 1)
    try:
        return digest(hasher, source)
    finally:
        hasher.close()


def assert_same(got: Digests, wanted: Digests) -> None:
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


def make(**options: Any) -> CudaHasher:
    given: dict[str, Any] = {"threads": 2, "slot_pages": 64, "idle_seconds": 0}
    return CudaHasher(SEED, **(given | options))


@pytest.mark.parametrize("pages", [0, 1, 63, 64, 65, 1000])
def test_digests_equal_the_cpus(fake: Callable[..., fake_cupy.FakeCuda], pages: int) -> None:
    fake()
    hasher, source = make(), source_of(pages)
    assert_same(digest(hasher, source), on_cpu(source))
    hasher.close()


@pytest.mark.parametrize("pages", [1, 63, 1000])
def test_memory_that_is_read_without_the_interpreter(
    fake: Callable[..., fake_cupy.FakeCuda], pages: int
) -> None:
    fake()
    hasher, octets = make(), mixed_pages(pages).view(np.uint8)
    assert_same(digest(hasher, OwnMemory(octets)), on_cpu(ArraySource(octets)))
    hasher.close()


def test_slow_copies_do_not_mix_slots(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake(devices=2)
    runtime.slow = {"copy": 0.003, "kernel": 0.002}
    hasher, source = make(device="all"), source_of(1500)
    assert_same(digest(hasher, source), on_cpu(source))
    assert hasher.devices == ["GPU 0 (0000:01:00.0)", "GPU 1 (0000:02:00.0)"]
    hasher.close()


def test_the_fake_notices_results_taken_too_early(
    fake: Callable[..., fake_cupy.FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake()
    hasher, source = make(), source_of(64 * 6)
    with monkeypatch.context() as patch:
        patch.setattr(ring, "wait", lambda _queue, _mark: None)
        runtime.slow = {"copy": 0.02}
        assert (digest(hasher, source)[0] != on_cpu(source)[0]).any()
    hasher.close()


def test_devices_take_turns_and_streams_overlap(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake(devices=2)
    hasher, source = make(device="0,1"), source_of(64 * 16)
    runtime.trace.clear()
    runtime.slow = {"kernel": 0.01}
    digest(hasher, source)
    hashed = [stream for what, stream in runtime.trace if what == "hash_pages"]
    assert len(hashed) == 16
    assert len(set(hashed)) == 8
    # A copy in happens between another stream's copy in and its kernel: they ran beside each other.
    events = runtime.trace
    assert any(a[0] == b[0] == "copy in" and a[1] != b[1] for a, b in itertools.pairwise(events))
    hasher.close()


def test_sort_match_and_candidates(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake()
    hasher = make()
    keys = np.random.default_rng(5).integers(0, 300, 700, dtype=np.uint64) << np.uint64(40)
    ordered, order = hasher.sort(keys)
    np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(ordered, keys[order])
    np.testing.assert_array_equal(hasher.match(ordered), np.full(700, -1))
    table = np.sort(keys[:50])
    hasher.set_table(table)
    match = match_sorted(ordered, table)
    copies_in = runtime.calls["memcpyAsync"]
    np.testing.assert_array_equal(hasher.match(ordered), match)
    np.testing.assert_array_equal(hasher.match(ordered), match)
    # The table goes up once: keys in and matches out are two copies a call.
    assert runtime.calls["memcpyAsync"] - copies_in == 5
    found = hasher.candidates(keys)
    marks = expected_marks(ordered, match)
    chosen = np.flatnonzero(marks & 6)
    for column, expected in zip(found, (ordered, order, match, marks), strict=True):
        np.testing.assert_array_equal(column, expected[chosen])
    assert hasher.candidates(keys[:0]).order.size == 0
    hasher.close()


def test_batches_overlap_sorting_with_hashing(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake()
    runtime.slow = {"copy": 0.002}
    hasher, source = make(), source_of(1024)
    digests, kinds = np.empty(1024, np.uint64), np.empty(1024, np.uint8)
    runtime.trace.clear()
    batches = list(hasher.batches(source, digests, kinds, batch_pages=256))
    assert_same((digests, kinds), on_cpu(source))
    assert len(batches) == 4
    for number, batch in enumerate(batches):
        assert (batch.order // 256 == number).all()
        np.testing.assert_array_equal(batch.digests, digests[batch.order])
    done = [what for what, _stream in runtime.trace]
    first_sort, last_hash = done.index("sort_count"), len(done) - 1 - done[::-1].index("hash_pages")
    assert first_sort < last_hash
    hasher.close()


FAULTS = [
    ("launch", 9), ("launch", 12), ("memcpyAsync", 13), ("memcpyAsync", 22), ("eventQuery", 10),
    ("eventQuery", 14), ("eventRecord", 11),
]  # fmt: skip


@pytest.mark.parametrize(("call", "after"), FAULTS)
@pytest.mark.parametrize("status", [fake_cupy.LAUNCH_FAILED, fake_cupy.LOST, fake_cupy.OUT_OF_MEMORY])
def test_a_fault_in_mid_scan_changes_nothing_but_who_works(
    fake: Callable[..., fake_cupy.FakeCuda],
    caplog: pytest.LogCaptureFixture,
    call: str,
    after: int,
    status: int,
) -> None:
    runtime = fake()
    hasher, source = make(), source_of(64 * 12)
    runtime.fail(call, runtime.calls[call] + after - 8, status, sticky=status != fake_cupy.OUT_OF_MEMORY)
    with caplog.at_level(logging.WARNING):
        assert_same(digest(hasher, source), on_cpu(source))
        assert_same(digest(hasher, source), on_cpu(source))
        keys = source.pages * np.arange(50, dtype=np.uint64)[::-1]
        np.testing.assert_array_equal(hasher.sort(keys)[0], np.sort(keys))
    assert len(caplog.records) == 1
    assert "the CPU does its work from here on" in caplog.text
    assert hasher.devices == []
    hasher.close()


def test_a_fault_of_a_copy_that_was_already_queued(
    fake: Callable[..., fake_cupy.FakeCuda], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = fake()
    hasher, source = make(), source_of(64 * 12)

    def broken(*_arguments: Any) -> None:
        raise fake_cupy.CUDARuntimeError(fake_cupy.ILLEGAL_ADDRESS)

    monkeypatch.setattr(runtime.gpus[0].memory, "write", broken)
    with caplog.at_level(logging.WARNING):
        assert_same(digest(hasher, source), on_cpu(source))
    assert len(caplog.records) == 1
    hasher.close()


def test_one_of_two_devices_fails(
    fake: Callable[..., fake_cupy.FakeCuda], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = fake(devices=2)
    hasher, source = make(device="all"), source_of(64 * 20)
    runtime.fail("launch", runtime.calls["launch"] + 6, fake_cupy.LOST)
    with caplog.at_level(logging.WARNING):
        assert_same(digest(hasher, source), on_cpu(source))
        assert len(hasher.devices) == 1
        assert_same(digest(hasher, source), on_cpu(source))
    assert not caplog.records
    hasher.close()


@pytest.mark.parametrize("call", ["launch", "malloc", "memcpyAsync", "eventQuery"])
def test_a_fault_in_sorting(
    fake: Callable[..., fake_cupy.FakeCuda], caplog: pytest.LogCaptureFixture, call: str
) -> None:
    runtime = fake()
    hasher, source = make(), source_of(200)
    runtime.fail(call, runtime.calls[call] + 1, fake_cupy.OUT_OF_MEMORY, sticky=False)
    keys = np.random.default_rng(1).integers(0, 99, 500, dtype=np.uint64)
    with caplog.at_level(logging.WARNING):
        ordered, order = hasher.sort(keys)
        np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))
        np.testing.assert_array_equal(ordered, keys[order])
        assert_same(digest(hasher, source), on_cpu(source))
    assert len(caplog.records) == 1
    hasher.close()


@pytest.mark.parametrize("first", ["digest", "sort"])
def test_a_hung_device_is_given_up(
    fake: Callable[..., fake_cupy.FakeCuda],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:
    runtime = fake()
    hasher, source = make(), source_of(300)
    hasher.set_table(np.arange(9, dtype=np.uint64))
    hasher.match(np.arange(5, dtype=np.uint64))
    monkeypatch.setattr(device.wait, "__defaults__", (0.2,))
    runtime.hung.set()
    keys = np.random.default_rng(1).integers(0, 99, 500, dtype=np.uint64)
    with caplog.at_level(logging.WARNING):
        if first == "sort":
            np.testing.assert_array_equal(hasher.sort(keys)[0], np.sort(keys))
        assert_same(digest(hasher, source), on_cpu(source))
        np.testing.assert_array_equal(hasher.sort(keys)[0], np.sort(keys))
    assert "no answer" in caplog.text
    assert len(caplog.records) == 1
    hasher.close()


def test_sources_that_raise_leave_the_device_well(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    fake()

    class Broken(ArraySource):
        def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
            if first >= 500:
                raise ProcessLookupError("gone")
            super().read(first, count, out, ok)

    hasher, source = make(), source_of(1000)
    with pytest.raises(ProcessLookupError):
        digest(hasher, Broken(mixed_pages(1000).view(np.uint8)))
    assert_same(digest(hasher, source), on_cpu(source))
    assert hasher.devices
    hasher.close()


def test_the_memory_cap_shapes_the_ring_and_sends_large_sorts_to_the_cpu(
    fake: Callable[..., fake_cupy.FakeCuda], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = fake()
    cap = 3 << 20
    most = 0
    hasher, source = make(slot_pages=4096, gpu_memory=cap), source_of(500)
    most = max(most, sum(runtime.gpus[0].sizes.values()))
    assert_same(digest(hasher, source), on_cpu(source))
    keys = np.random.default_rng(1).integers(0, 1 << 64, 100_000, dtype=np.uint64)
    launches = runtime.calls["launch"]
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(hasher.sort(keys)[0], np.sort(keys))
    assert runtime.calls["launch"] == launches
    assert not caplog.records
    assert 0 < most <= cap / 2
    hasher.close()
    with pytest.raises(UsageError):
        make(gpu_memory=100_000)
    with pytest.raises(UsageError):
        make(gpu_memory=0)


def test_a_device_that_sorts_wrongly_is_refused(
    fake: Callable[..., fake_cupy.FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(sorts_at_start=True)
    wrong = kernels.source().replace("values[i] = i;", "values[i] = n - 1u - i;")
    monkeypatch.setattr(kernels, "source", lambda: wrong)
    with pytest.raises(BackendUnavailable, match="could be used"):
        make()


def test_idle_devices_are_released_and_come_back(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake()
    hasher, source = make(idle_seconds=0.1), source_of(200)
    expected = on_cpu(source)
    assert_same(digest(hasher, source), expected)
    hasher.set_table(np.sort(expected[0]))
    deadline = time.monotonic() + 10
    while hasher.devices and time.monotonic() < deadline:
        time.sleep(0.02)
    assert hasher.devices == []
    assert runtime.gpus[0].contexts_released == 1
    assert not runtime.leaks
    ordered, _order = hasher.sort(expected[0])
    assert hasher.devices
    np.testing.assert_array_equal(hasher.match(ordered), match_sorted(ordered, ordered))
    hasher.release()
    assert not runtime.leaks
    assert_same(digest(hasher, source), expected)
    hasher.close()
    with pytest.raises(ValueError, match="closed"):
        digest(hasher, source)


def test_a_device_that_does_not_come_back_after_a_release(
    fake: Callable[..., fake_cupy.FakeCuda], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = fake()
    hasher, source = make(), source_of(200)
    hasher.release()
    runtime.fail("compile", runtime.calls["compile"] + 1, fake_cupy.LOST)
    with caplog.at_level(logging.WARNING):
        assert_same(digest(hasher, source), on_cpu(source))
        assert_same(digest(hasher, source), on_cpu(source))
    assert len(caplog.records) == 1
    hasher.close()


def test_a_device_another_process_wants_is_given_back(
    fake: Callable[..., fake_cupy.FakeCuda], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake()
    library = FakeNvml(["0000:01:00.0"])
    # As in a container, where our own process goes by another number.
    library.ours = lambda: int(runtime.calls["compile"] > 0)
    monkeypatch.setattr(gpus, "nvml", lambda: library)
    monkeypatch.setattr(cuda, "_WANTED_EVERY_SECONDS", 0.0)
    hasher, source = make(), source_of(600)
    assert_same(digest(hasher, source), on_cpu(source))
    assert hasher.devices
    library.processes["0000:01:00.0"] = 1
    with caplog.at_level(logging.WARNING):
        assert_same(digest(hasher, source), on_cpu(source))
    assert "another process wants it back" in caplog.text
    assert hasher.devices == []
    hasher.close()


def test_the_last_hasher_of_a_process_releases_the_context(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake()
    first, second, source = make(), make(), source_of(200)
    second.close()
    assert runtime.gpus[0].contexts_released == 0
    assert_same(digest(first, source), on_cpu(source))
    assert first.devices
    first.close()
    assert runtime.gpus[0].contexts_released == 1


def test_a_context_that_the_process_had_before_is_left_to_it(
    fake: Callable[..., fake_cupy.FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake(devices=2)
    monkeypatch.setattr(gpus, "context_active", lambda ordinal: ordinal == 1)
    make(device="all").close()
    assert [gpu.contexts_released for gpu in runtime.gpus] == [1, 0]


def test_a_failed_start_leaves_no_context(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake()
    runtime.fail("compile", 1, sticky=False)
    with pytest.raises(BackendUnavailable):
        make()
    assert runtime.gpus[0].contexts_released == 1
    make().close()
    assert runtime.gpus[0].contexts_released == 2


def test_digest_and_sort_from_two_threads_while_faults_come(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    runtime = fake()
    hasher, source = make(), source_of(64 * 20)
    expected = on_cpu(source)
    keys = np.random.default_rng(1).integers(0, 1 << 64, 400, dtype=np.uint64)
    wrong: list[str] = []

    def sorting() -> None:
        for _ in range(6):
            if not (hasher.sort(keys)[0] == np.sort(keys)).all():
                wrong.append("sort")

    # A sort is 49 launches.
    runtime.fail("launch", runtime.calls["launch"] + 200, fake_cupy.LOST)
    thread = threading.Thread(target=sorting)
    thread.start()
    for _ in range(3):
        assert_same(digest(hasher, source), expected)
    thread.join()
    assert not wrong
    assert hasher.devices == []
    hasher.close()


def test_a_device_that_computes_wrongly_is_refused(
    fake: Callable[..., fake_cupy.FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    wrong = kernels.source().replace("0x165667919E3779F9ull", "0x165667919E3779FBull")
    monkeypatch.setattr(kernels, "source", lambda: wrong)
    with pytest.raises(BackendUnavailable, match="self-test"):
        make()


STARTS = [
    ("getDeviceCount", 1), ("compile", 1), ("memGetInfo", 1), ("malloc", 1), ("hostRegister", 1),
    ("streamCreate", 1), ("streamCreate", 3), ("streamCreate", 5), ("launch", 1), ("launch", 7),
    ("memcpyAsync", 2),
]  # fmt: skip


@pytest.mark.parametrize(("call", "nth"), STARTS)
def test_what_fails_at_the_start_makes_the_backend_unavailable(
    fake: Callable[..., fake_cupy.FakeCuda], call: str, nth: int
) -> None:
    runtime = fake()
    runtime.fail(call, nth, fake_cupy.LOST)
    with pytest.raises(BackendUnavailable):
        make()


def test_no_gpu_at_all(fake: Callable[..., fake_cupy.FakeCuda]) -> None:
    fake(devices=0)
    with pytest.raises(BackendUnavailable, match="finds no GPU"):
        make()


class FakeNvml:
    """The part of pynvml that is used."""

    class NVMLError(Exception):
        pass

    def __init__(self, buses: list[str]) -> None:
        self.processes = dict.fromkeys(buses, 0)
        self.utilisation = dict.fromkeys(buses, 0)
        self.used = dict.fromkeys(buses, 0)
        self.ours: Callable[[], int] = lambda: 0

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> str:
        if bus.decode() not in self.processes:
            raise self.NVMLError
        return bus.decode()

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self.used[handle], total=1000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self.utilisation[handle])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        return [SimpleNamespace(pid=1) for _ in range(self.processes[handle] + self.ours())]


def test_idle_gpus_are_picked() -> None:
    buses = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0", "0000:05:00.0"]
    library = FakeNvml(buses[:4])
    library.processes[buses[0]] = 2
    library.used[buses[1]] = 50
    library.utilisation[buses[3]] = 80
    found = [gpus.look(i, bus, library) for i, bus in enumerate(buses)]

    def ordinals(device: str | None) -> list[int]:
        return [gpu.ordinal for gpu in gpus.choose(found, device)]

    assert ordinals(None) == [2]
    assert ordinals("idle") == [2, 4, 1]
    assert ordinals("all") == [0, 1, 2, 3, 4]
    assert ordinals("3, 0000:01:00.0,3") == [3, 0]
    with pytest.raises(UsageError):
        ordinals("7")
    with pytest.raises(BackendUnavailable, match="in use"):
        gpus.choose(found[:1], None)


def test_a_gpu_that_was_just_used_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, other = "0000:01:00.0", "0000:02:00.0"
    library = FakeNvml([busy, other])
    library.utilisation[busy] = 80
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            library.utilisation[busy] = 0

    monkeypatch.setattr(gpus.time, "sleep", nap)
    assert gpus.look_at([busy], None, library)[0].idle
    assert len(naps) == 3
    library.utilisation[busy] = 80
    naps.clear()
    gpus.look_at([busy, other], None, library)  # there is an idle one
    gpus.look_at([busy], "0", library)  # named: need not be idle
    library.processes[busy] = 1
    gpus.look_at([busy], "idle", library)  # in use, whatever it does
    assert not naps
    library.processes[busy] = 0
    assert [gpu.idle for gpu in gpus.look_at([busy, other], "idle", library)] == [True, True]
    library.utilisation[busy] = 80
    assert not gpus.look_at([busy], None, library, settle_seconds=0.05)[0].idle


def test_nothing_is_imported_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_DRIVER_SIGNS", ("/nonexistent",))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert cuda.unavailable()
    with pytest.raises(BackendUnavailable):
        CudaHasher(0)
    assert "cupy" not in sys.modules


def test_cupy_has_what_the_backend_calls() -> None:
    try:
        import cupy
    except ImportError:
        require("cupy", "cupy is not installed")
    runtime = cupy.cuda.runtime
    for name in vars(fake_cupy.FakeCuda().module().cuda.runtime):
        assert hasattr(runtime, name), name
    for name in vars(fake_cupy.FakeCuda().module().cuda):
        assert hasattr(cupy.cuda, name), name
    for name in ("RawModule", "clear_memo"):
        assert hasattr(cupy, name), name
    assert hasattr(cupy.cuda.driver, "devicePrimaryCtxRelease")
    assert issubclass(runtime.CUDARuntimeError, Exception)
    assert issubclass(cupy.cuda.driver.CUDADriverError, Exception)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, Exception)
    assert issubclass(cupy.cuda.compiler.CompileException, Exception)
    assert "priority" in cupy.cuda.Stream.__init__.__doc__
