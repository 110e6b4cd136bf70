"""A CUDA runtime without a GPU, in the shape of the part of cupy that gpuksm uses.

Streams are threads: copies from and to pinned host memory happen some time
after the call, in the order of their stream, so that code which reuses a
buffer too early gets wrong bytes here too.  Kernels are compiled by NVRTC and
their PTX is run by the interpreter, so the arguments of every launch are
checked against the kernel.  Any call can be told to fail at its nth time, to
be slow, or to hang.

What it does not show: anything about speed; kernels running beside kernels
(they take turns); the driver's own checks; what a real driver does after an
error; releasing and re-creating a real context; page-locking limits; cupy
itself.  `test_cuda.py` checks that every name used here exists in the real one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import nvrtc
from tests.ptx import GlobalMemory, Machine, parse
from tests.ptx.operations import unsigned

NOT_READY, OUT_OF_MEMORY, LAUNCH_FAILED, ILLEGAL_ADDRESS, LOST = 600, 2, 719, 700, 46


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"fake CUDA error {status}")
        self.status = status


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class CompileException(Exception):
    pass


class FakeGpu:
    """One device: memory, host ranges it has pinned, and whether it is lost."""

    def __init__(self, ordinal: int, total: int) -> None:
        self.ordinal, self.total = ordinal, total
        self.bus_id = f"0000:{ordinal + 1:02X}:00.0"
        self.memory = GlobalMemory()
        self.sizes: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.streams: set[Stream] = set()
        self.status = 0
        self.contexts_released = 0


class FakeCuda:
    """All devices, and the faults to inject."""

    def __init__(self, devices: int = 1, memory: int = 1 << 30) -> None:
        self.gpus = [FakeGpu(i, memory) for i in range(devices)]
        self.calls: Counter[str] = Counter()
        self.trace: list[tuple[str, int]] = []  # (copy in, copy out or kernel; number of the stream)
        self.slow: dict[str, float] = {}
        self._faults: dict[tuple[str, int], tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self.kernel_lock = threading.Lock()
        self.local = threading.local()
        self.hung = threading.Event()
        self.errors: list[Exception] = []  # what kernels and copies did that they must not

    def fail(self, call: str, nth: int, status: int = LAUNCH_FAILED, sticky: bool = True) -> None:
        """Let the nth call (from 1) of `call` fail; `sticky`: the device is lost from then on."""
        self._faults[call, nth] = status, sticky

    def enter(self, call: str) -> FakeGpu:
        """Every runtime call begins here: counts, waits, fails."""
        gpu = self.gpus[self.device] if self.gpus else FakeGpu(0, 0)
        with self._lock:
            self.calls[call] += 1
            status, sticky = self._faults.get((call, self.calls[call]), (0, False))
        time.sleep(self.slow.get(call, 0.0))
        if sticky:
            gpu.status = status
        if gpu.status and call not in ("hostUnregister",):
            status = gpu.status
        if status:
            raise CUDARuntimeError(status)
        return gpu

    @property
    def device(self) -> int:
        return int(getattr(self.local, "device", 0))

    @property
    def stream(self) -> Stream | None:
        found: Stream | None = getattr(self.local, "stream", None)
        return found

    @property
    def leaks(self) -> list[str]:
        """What was taken and never given back."""
        left = []
        for gpu in self.gpus:
            left += [f"{size} bytes of device memory" for size in gpu.sizes.values()]
            left += [f"{size} pinned bytes" for size in gpu.pinned.values()]
            left += ["a stream" for _ in gpu.streams]
        return left

    def module(self) -> Any:
        """What `import cupy` gives."""
        return _build(self)


class Stream:
    """Work in order, on a thread of its own."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.gpu = cuda, cuda.enter("streamCreate")
        self.ptr = id(self)
        self.passed = self.queued = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.gpu.streams.add(self)
        self._outer: Stream | None = None

    def __enter__(self) -> Stream:
        assert self.cuda.device == self.gpu.ordinal, "a stream of another device is made current"
        self._outer = self.cuda.stream
        self.cuda.local.stream = self
        return self

    def __exit__(self, *_error: object) -> None:
        self.cuda.local.stream = self._outer

    def add(self, work: Callable[[], None]) -> int:
        self.queued += 1
        self._work.put(work)
        return self.queued

    def synchronize(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self.passed >= self.queued or self.cuda.hung.is_set())
        if self.gpu.status:
            raise CUDARuntimeError(self.gpu.status)

    def end(self) -> None:
        self._work.put(None)
        self.gpu.streams.discard(self)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if not self.gpu.status:
                try:
                    work()
                except Exception as error:
                    # On a device that was lost meanwhile, memory may already be gone.
                    if not self.gpu.status and not isinstance(error, CUDARuntimeError):
                        self.cuda.errors.append(error)
                    self.gpu.status = self.gpu.status or ILLEGAL_ADDRESS
            with self._idle:
                self.passed += 1
                self._idle.notify_all()


def _build(cuda: FakeCuda) -> Any:
    runtime = _runtime(cuda)
    memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    return SimpleNamespace(
        __version__="fake",
        RawModule=lambda **given: RawModule(cuda, **given),
        clear_memo=lambda: None,
        cuda=SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(
                CUDADriverError=CUDADriverError, devicePrimaryCtxRelease=lambda n: _release_context(cuda, n)
            ),
            memory=memory,
            compiler=SimpleNamespace(CompileException=CompileException),
            Device=lambda ordinal: CurrentDevice(cuda, ordinal),
            Stream=lambda non_blocking, priority: _new_stream(cuda, non_blocking, priority),
            Event=lambda block, disable_timing: Event(cuda),
        ),
    )


def _runtime(cuda: FakeCuda) -> Any:
    def hang_or_finish(gpu: FakeGpu) -> None:
        for stream in list(gpu.streams):
            stream.synchronize()

    def get_count() -> int:
        cuda.enter("getDeviceCount")
        return len(cuda.gpus)

    def memory_info() -> tuple[int, int]:
        gpu = cuda.enter("memGetInfo")
        return gpu.total - sum(gpu.sizes.values()), gpu.total

    def malloc(size: int) -> int:
        gpu = cuda.enter("malloc")
        if sum(gpu.sizes.values()) + size > gpu.total:
            raise CUDARuntimeError(OUT_OF_MEMORY)
        pointer = gpu.memory.allocate(size)
        gpu.sizes[pointer] = size
        return pointer

    def free(pointer: int) -> None:
        gpu = cuda.gpus[cuda.device]
        if cuda.hung.is_set():
            cuda.errors.append(RuntimeError("cudaFree would wait for ever"))
        if not gpu.status:
            hang_or_finish(gpu)  # cudaFree waits for the device
        del gpu.sizes[pointer]
        gpu.memory.free(pointer)

    def register(pointer: int, size: int, flags: int) -> None:
        assert flags == 0
        gpu = cuda.enter("hostRegister")
        assert pointer % 4096 == 0, "pinned memory begins on a page"
        gpu.pinned[pointer] = size

    def unregister(pointer: int) -> None:
        cuda.enter("hostUnregister")
        del cuda.gpus[cuda.device].pinned[pointer]

    def copy_async(target: int, source: int, size: int, kind: int, stream_pointer: int) -> None:
        gpu = cuda.enter("memcpyAsync")
        stream = next(stream for stream in gpu.streams if stream.ptr == stream_pointer)
        host = {1: source, 2: target}.get(kind)
        inside = any(
            start <= (host or 0) and (host or 0) + size <= start + n for start, n in gpu.pinned.items()
        )

        def work() -> None:
            time.sleep(cuda.slow.get("copy", 0.0))
            if kind == 1:
                gpu.memory.write(target, _host(source, size).copy())
            elif kind == 2:
                _host(target, size)[:] = gpu.memory.read(source, size)
            else:
                gpu.memory.write(target, gpu.memory.read(source, size))
            cuda.trace.append(({1: "copy in", 2: "copy out", 3: "copy"}[kind], id(stream)))

        stream.add(work)
        if host is not None and not inside:
            stream.synchronize()  # pageable memory: staged by the driver, the call waits

    def event_query(event: Event) -> int:
        gpu = cuda.gpus[cuda.device]
        try:
            cuda.enter("eventQuery")
        except CUDARuntimeError as error:
            return error.status
        if gpu.status:
            return gpu.status
        return 0 if event.passed and not cuda.hung.is_set() else NOT_READY

    def synchronize() -> None:
        if cuda.hung.is_set():
            cuda.errors.append(RuntimeError("cudaDeviceSynchronize would wait for ever"))
        hang_or_finish(cuda.enter("deviceSynchronize"))

    return SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=get_count,
        deviceGetPCIBusId=lambda ordinal: cuda.gpus[ordinal].bus_id,
        memGetInfo=memory_info,
        malloc=malloc,
        free=free,
        hostRegister=register,
        hostUnregister=unregister,
        memcpyAsync=copy_async,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        memcpyDeviceToDevice=3,
        eventQuery=event_query,
        driverGetVersion=lambda: 0,
        getDeviceProperties=lambda ordinal: {"name": b"fake GPU"},
        deviceGetAttribute=lambda attribute, ordinal: attribute,
        cudaDevAttrMultiProcessorCount=16,
        cudaDevAttrGlobalMemoryBusWidth=37,
        deviceSynchronize=synchronize,
    )


def _host(pointer: int, size: int) -> NDArray[np.uint8]:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


def _new_stream(cuda: FakeCuda, non_blocking: bool, priority: int) -> StreamHandle:
    assert non_blocking
    assert priority == 0, "only the lowest priority is asked for"
    return StreamHandle(Stream(cuda))


class StreamHandle:
    """What the program holds: the stream goes when it does."""

    def __init__(self, stream: Stream) -> None:
        self.inner = stream
        self.ptr = stream.ptr

    def __enter__(self) -> Stream:
        return self.inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self.inner.__exit__(*error)

    def synchronize(self) -> None:
        self.inner.synchronize()

    def __del__(self) -> None:
        self.inner.end()


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self._at: tuple[Stream, int] | None = None

    @property
    def ptr(self) -> Event:
        return self

    def record(self, stream: StreamHandle) -> None:
        self.cuda.enter("eventRecord")
        self._at = stream.inner, stream.inner.queued

    @property
    def passed(self) -> bool:
        assert self._at is not None
        stream, number = self._at
        return stream.passed >= number


class CurrentDevice:
    def __init__(self, cuda: FakeCuda, ordinal: int) -> None:
        self.cuda, self.ordinal = cuda, ordinal
        self._outer: list[int] = []

    def __enter__(self) -> CurrentDevice:
        self._outer.append(self.cuda.device)
        self.cuda.local.device = self.ordinal
        return self

    def __exit__(self, *_error: object) -> None:
        self.cuda.local.device = self._outer.pop()


class RawModule:
    def __init__(self, cuda: FakeCuda, code: str, options: tuple[str, ...], backend: str) -> None:
        assert backend == "nvrtc"
        self.cuda, self.gpu = cuda, cuda.gpus[cuda.device]
        try:
            cuda.enter("compile")
        except CUDARuntimeError as error:
            raise CompileException(str(error)) from error
        self.machine = Machine(parse(nvrtc.compile_source(code, "compute_75", *options)), self.gpu.memory)

    def get_function(self, name: str) -> Callable[..., None]:
        kernel = self.machine.kernels[name]

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[np.generic, ...]) -> None:
            assert self.cuda.enter("launch") is self.gpu, "a kernel of another device is launched"
            stream = self.cuda.stream
            assert stream is not None, "a launch on the default stream"
            assert stream.gpu is self.gpu
            kinds = [unsigned(kind) for _name, kind in kernel.parameters]
            assert [argument.dtype for argument in arguments] == kinds, (name, arguments)

            def work() -> None:
                time.sleep(self.cuda.slow.get("kernel", 0.0))
                with self.cuda.kernel_lock:
                    self.machine.launch(name, grid[0], block[0], [int(one) for one in arguments])
                self.cuda.trace.append((name, id(stream)))

            stream.add(work)

        return launch


def _release_context(cuda: FakeCuda, ordinal: int) -> None:
    gpu = cuda.gpus[ordinal]
    assert not gpu.sizes, "device memory outlives its context"
    assert not gpu.pinned, "pinned memory outlives its context"
    assert not gpu.streams, "a stream outlives its context"
    gpu.contexts_released += 1
