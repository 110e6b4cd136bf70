"""The CUDA backend: cupy's runtime calls behind the `Device` protocol.

cupy is imported when a hasher is made, never before, and only where a driver
is.  Host memory is ordinary memory that is pinned in place (cudaHostRegister),
so that nothing dangles when a device is lost in the middle of a read.  Device
memory is taken call by call and counted against the cap.  Kernels are compiled
by NVRTC at first use; cupy keeps the result in its cache folder
(CUPY_CACHE_DIR, ~/.cupy/kernel_cache).

Nothing of cupy's own algorithms is used: its sort (Thrust) holds the context by
a runtime of its own, so that half a GiB of the device stayed taken after a
release, and does not work again once that context is gone.  Ours is nearly as
quick from host to host (docs/gpu.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing import gpus, kernels
from gpuksm.hashing.device import Budget, DeviceFailed
from gpuksm.hashing.offload import OffloadHasher
from gpuksm.linux.leaving import leave_for_ever

# Share of the free device memory that is used when no cap is given.
_DEFAULT_SHARE = 0.5
_NOT_READY = 600  # cudaErrorNotReady
_LOWEST_PRIORITY = 0  # the range is from 0 down to a negative, most urgent value
_WANTED_EVERY_SECONDS = 1.0
# Any of these is there when a driver is: plain Linux, containers with the driver mapped in, WSL.
_DRIVER_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")


def driver_present() -> bool:
    """True when an NVIDIA driver is loaded, without asking it anything."""
    return any(Path(sign).exists() for sign in _DRIVER_SIGNS)


def unavailable() -> str | None:
    """Why this backend cannot run here, or None; imports nothing."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (pip install 'gpuksm[cuda]')"
    if not driver_present():
        return "there is no NVIDIA driver"
    return None


class _Buffer:
    """Device memory; goes back when it is collected, unless the device is closed by then."""

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer, self.size = pointer, size


class CupyQueue:
    """A stream with one event, which stands for everything queued so far when `mark` was last called."""

    def __init__(self, device: CupyDevice) -> None:
        self._device = device
        cupy = device.cupy
        with cupy.cuda.Device(device.ordinal):
            self.stream: Any = cupy.cuda.Stream(non_blocking=True, priority=_LOWEST_PRIORITY)
            self._event: Any = cupy.cuda.Event(block=True, disable_timing=True)

    def upload(self, target: _Buffer, source: NDArray[Any]) -> None:
        """See `Queue.upload`."""
        self._copy(target.pointer, source.ctypes.data, source.nbytes, "memcpyHostToDevice")

    def download(self, target: NDArray[Any], source: _Buffer) -> None:
        """See `Queue.download`."""
        self._copy(target.ctypes.data, source.pointer, target.nbytes, "memcpyDeviceToHost")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        runtime = self._device.cupy.cuda.runtime
        with self._device.current():
            runtime.memcpyAsync(target, source, size, getattr(runtime, kind), self._live().ptr)

    def launch(self, kernel: str, groups: int, *arguments: Any) -> None:
        """See `Queue.launch`."""
        given = tuple(
            np.uint64(argument.pointer) if isinstance(argument, _Buffer) else argument
            for argument in arguments
        )
        with self._device.current(), self._live():
            self._device.kernel(kernel)((groups,), (kernels.BLOCK,), given)

    def mark(self) -> None:
        """See `Queue.mark`."""
        with self._device.current():
            self._event.record(self._live())

    def done(self, mark: None) -> bool:
        """See `Queue.done`."""
        runtime = self._device.cupy.cuda.runtime
        self._live()
        with self._device.current():
            # Event.done hides errors; eventQuery returns the bare status.
            status = runtime.eventQuery(self._event.ptr)
        if status not in (0, _NOT_READY):
            raise runtime.CUDARuntimeError(status)
        return bool(status == 0)

    def _live(self) -> Any:
        if self.stream is None:
            raise DeviceFailed("the device was given back")
        return self.stream

    def close(self) -> None:
        self.stream = self._event = None


class _Contexts:
    """Who may release the process's one context on a GPU: the last of ours, unless others had it first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._holders: Counter[int] = Counter()
        self._foreign: set[int] = set()

    def enter(self, ordinal: int) -> None:
        """Before a device of ours makes its first call that needs the context."""
        with self._lock:
            if not self._holders[ordinal] and gpus.context_active(ordinal):
                self._foreign.add(ordinal)
            self._holders[ordinal] += 1

    def leave(self, ordinal: int) -> bool:
        """When a device of ours has given everything back; True when the context must go as well."""
        with self._lock:
            self._holders[ordinal] -= 1
            return not self._holders[ordinal] and ordinal not in self._foreign


_CONTEXTS = _Contexts()


class CupyDevice:
    """One GPU; see `Device`."""

    def __init__(self, cupy: Any, gpu: gpus.Gpu, cap_bytes: int | None, library: Any, picked: bool) -> None:
        self.cupy, self.ordinal = cupy, gpu.ordinal
        self._gpu, self._nvml, self._picked = gpu, library, picked
        self._looked = time.monotonic()
        self.failures: tuple[type[Exception], ...] = (
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.memory.OutOfMemoryError,
            cupy.cuda.compiler.CompileException,
            DeviceFailed,
        )
        self.name = f"GPU {gpu.ordinal} ({gpu.bus_id})"
        self._closed = False
        self._queues: list[CupyQueue] = []
        self._pinned: list[NDArray[np.uint8]] = []
        self._buffers: weakref.WeakSet[_Buffer] = weakref.WeakSet()
        self._kernels: dict[str, Any] = {}
        self._module: Any = None
        _CONTEXTS.enter(self.ordinal)
        try:
            self._begin(cap_bytes)
        except BaseException:
            self.close()
            raise

    def _begin(self, cap_bytes: int | None) -> None:
        """The first calls that need the context."""
        cupy = self.cupy
        with cupy.cuda.Device(self.ordinal):
            free, _total = cupy.cuda.runtime.memGetInfo()
            cap = int(free * _DEFAULT_SHARE) if cap_bytes is None else min(cap_bytes, free)
            self.budget = Budget(cap)
            self._module = cupy.RawModule(
                code=kernels.source(), options=(f"-DBLOCK={kernels.BLOCK}",), backend="nvrtc"
            )
            self.kernel("hash_pages")
        # Counted with our context there: in a container our own process may go by another number.
        handle = self._gpu.handle
        self._others = 0 if handle is None else gpus.other_processes(handle, self._nvml)

    def current(self) -> Any:
        """Makes this the calling thread's device; refuses once it is closed."""
        if self._closed:
            raise DeviceFailed("the device was given back")
        return self.cupy.cuda.Device(self.ordinal)

    def kernel(self, name: str) -> Any:
        """A kernel by name; the first call compiles or loads."""
        if name not in self._kernels:
            self._kernels[name] = self._module.get_function(name)
        return self._kernels[name]

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Device.pinned`."""
        held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            held.madvise(mmap.MADV_HUGEPAGE)
        octets = np.frombuffer(held, np.uint8)
        with self.current():
            self.cupy.cuda.runtime.hostRegister(octets.ctypes.data, size, 0)
        self._pinned.append(octets)
        return octets

    def buffer(self, size: int) -> _Buffer:
        """See `Device.buffer`."""
        self.budget.take(size)
        try:
            with self.current():
                buffer = _Buffer(self.cupy.cuda.runtime.malloc(size), size)
        except BaseException:
            self.budget.give_back(size)
            raise
        self._buffers.add(buffer)
        weakref.finalize(buffer, self._free, buffer.pointer, size)
        return buffer

    def _free(self, pointer: int, size: int) -> None:
        if not self._closed:
            self.budget.give_back(size)
            with suppress(*self.failures), self.current():
                self.cupy.cuda.runtime.free(pointer)

    def queue(self) -> CupyQueue:
        """See `Device.queue`."""
        queue = CupyQueue(self)
        self._queues.append(queue)
        return queue

    def wanted(self) -> bool:
        """See `Device.wanted`; asks NVML once a second at most."""
        now = time.monotonic()
        if not self._picked or self._gpu.handle is None or now - self._looked < _WANTED_EVERY_SECONDS:
            return False
        self._looked = now
        return gpus.other_processes(self._gpu.handle, self._nvml) > self._others

    def close(self) -> None:
        """See `Device.close`: frees in an order in which nothing outlives the context it lives in."""
        if self._closed:
            return
        cupy = self.cupy
        runtime = cupy.cuda.runtime
        with suppress(*self.failures), cupy.cuda.Device(self.ordinal):
            with suppress(*self.failures):
                runtime.deviceSynchronize()
            self._closed = True
            for octets in self._pinned:
                with suppress(*self.failures):
                    runtime.hostUnregister(octets.ctypes.data)
            for buffer in list(self._buffers):
                with suppress(*self.failures):
                    runtime.free(buffer.pointer)
            for queue in self._queues:
                queue.close()
            self._kernels.clear()
            self._module = None
            cupy.clear_memo()  # kernels and modules that cupy itself keeps for each device
        self._closed = True
        # Outside of `with`, whose end makes a device current again and would bring a context back.
        if _CONTEXTS.leave(self.ordinal):
            with suppress(*self.failures):
                cupy.cuda.driver.devicePrimaryCtxRelease(self.ordinal)

    def abandon(self) -> None:
        """See `Device.abandon`."""
        if self._closed:
            return
        self._closed = True
        leave_for_ever(self, self._module, *self._kernels.values(), *self._queues, *self._pinned)


class CudaHasher(OffloadHasher):
    """`Hasher` on NVIDIA GPUs.

    `device` as in `gpus.choose`; `gpu_memory` caps the device memory taken on
    each GPU, in bytes (None: half of what is free).  Further options are those
    of `OffloadHasher`.  Raises BackendUnavailable and UsageError.
    """

    def __init__(
        self,
        seed: int,
        threads: int = 0,
        device: str | None = None,
        gpu_memory: int | None = None,
        **options: Any,
    ) -> None:
        if gpu_memory is not None and gpu_memory <= 0:
            raise UsageError(f"a GPU memory cap of {gpu_memory} bytes makes no sense")
        if reason := unavailable():
            raise BackendUnavailable(reason)
        try:
            cupy = importlib.import_module("cupy")
        except Exception as error:  # cupy raises whatever its own libraries do
            raise BackendUnavailable(f"cupy cannot be imported: {error}") from error
        super().__init__("cuda", seed, lambda: open_devices(cupy, device, gpu_memory), threads, **options)


def open_devices(cupy: Any, device: str | None, gpu_memory: int | None) -> Sequence[CupyDevice]:
    """The GPUs that `device` names (see `gpus.choose`), ready for work; raises BackendUnavailable."""
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
        buses = [runtime.deviceGetPCIBusId(ordinal) for ordinal in range(count)]
    except runtime.CUDARuntimeError as error:
        raise BackendUnavailable(f"CUDA does not start: {error}") from error
    if not count:
        raise BackendUnavailable("CUDA finds no GPU")
    library = gpus.nvml()
    chosen = gpus.choose(gpus.look_at(buses, device, library), device)
    picked = device is None or device == "idle"
    opened: list[CupyDevice] = []
    failed = []
    for gpu in chosen:
        try:
            opened.append(CupyDevice(cupy, gpu, gpu_memory, library, picked))
        except (
            runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.memory.OutOfMemoryError,
            cupy.cuda.compiler.CompileException,
        ) as error:
            failed.append(f"GPU {gpu.ordinal}: {error}")
    if not opened:
        raise BackendUnavailable(f"no GPU could be opened: {'; '.join(failed)}")
    return opened
