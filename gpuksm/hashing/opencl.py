"""The OpenCL backend: pyopencl behind the `Device` protocol, for GPUs of any vendor.

An optional extra (pip install 'gpuksm[opencl]').  It runs the kernels that CUDA
runs, compiled by the vendor's driver (which keeps its own cache); PoCL, OpenCL
on the CPU, is used only when it is named, because the CPU backend is faster.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing import kernels
from gpuksm.hashing.device import Budget, DeviceFailed
from gpuksm.hashing.offload import OffloadHasher
from gpuksm.linux.leaving import leave_for_ever

_DEFAULT_SHARE = 0.5


def unavailable() -> str | None:
    """Why this backend cannot run here, or None; imports nothing."""
    if importlib.util.find_spec("pyopencl") is None:
        return "pyopencl is not installed (pip install 'gpuksm[opencl]')"
    return None


class _Buffer:
    """Device memory; goes back when it is collected."""

    def __init__(self, held: Any) -> None:
        self.held = held


class OpenClQueue:
    """A command queue with kernels of its own: setting a kernel's arguments is not thread-safe.

    pyopencl's event of a copy from or to an array keeps the array, and freeing it waits for the copy.
    So they are kept until a mark behind them has been passed.
    """

    def __init__(self, device: OpenClDevice) -> None:
        self._device, self._cl = device, device.cl
        self._queue: Any = self._cl.CommandQueue(device.context)
        self._kernels: dict[str, Any] = {}
        self._copies: list[Any] = []
        self._marked: list[tuple[Any, list[Any]]] = []

    def upload(self, target: _Buffer, source: NDArray[Any]) -> None:
        """See `Queue.upload`."""
        self._copies.append(self._cl.enqueue_copy(self._live(), target.held, source, is_blocking=False))

    def download(self, target: NDArray[Any], source: _Buffer) -> None:
        """See `Queue.download`."""
        self._copies.append(self._cl.enqueue_copy(self._live(), target, source.held, is_blocking=False))

    def launch(self, kernel: str, groups: int, *arguments: Any) -> None:
        """See `Queue.launch`."""
        queue = self._live()
        if kernel not in self._kernels:
            self._kernels[kernel] = self._cl.Kernel(self._device.program, kernel)
        given = [argument.held if isinstance(argument, _Buffer) else argument for argument in arguments]
        self._kernels[kernel](queue, (groups * kernels.BLOCK,), (kernels.BLOCK,), *given)

    def mark(self) -> Any:
        """See `Queue.mark`."""
        queue = self._live()
        event = self._cl.enqueue_marker(queue)
        queue.flush()  # nothing starts before, on some drivers
        self._marked.append((event, self._copies))
        self._copies = []
        return event

    def done(self, mark: Any) -> bool:
        """See `Queue.done`."""
        self._live()
        status = mark.command_execution_status
        if status < 0:
            raise DeviceFailed(f"OpenCL error {status}")
        passed = bool(status == self._cl.command_execution_status.COMPLETE)
        if passed and any(event is mark for event, _copies in self._marked):
            while self._marked.pop(0)[0] is not mark:
                pass
        return passed

    def _live(self) -> Any:
        if self._queue is None:
            raise DeviceFailed("the device was given back")
        return self._queue

    def close(self) -> None:
        queue, self._queue = self._queue, None
        self._kernels.clear()
        if queue is not None:
            with suppress(self._cl.Error):
                queue.finish()
        self._marked, self._copies = [], []

    def abandon(self) -> None:
        leave_for_ever(self._queue, self._marked, self._copies, *self._kernels.values())
        self._queue = None


class OpenClDevice:
    """One OpenCL device; see `Device`."""

    def __init__(self, cl: Any, device: Any, cap_bytes: int | None) -> None:
        self.cl = cl
        self.name = f"{device.name.strip()} ({device.platform.name.strip()})"
        self.failures: tuple[type[Exception], ...] = (cl.Error, DeviceFailed)
        # OpenCL does not tell what is free.
        share = int(device.global_mem_size * _DEFAULT_SHARE)
        self.budget = Budget(share if cap_bytes is None else min(cap_bytes, device.global_mem_size))
        self.context: Any = cl.Context([device])
        self.program: Any = build(cl, self.context, variants(device.extensions))
        self._map_queue: Any = cl.CommandQueue(self.context)
        self._queues: list[OpenClQueue] = []
        self._pinned: list[Any] = []
        self._buffers: weakref.WeakSet[_Buffer] = weakref.WeakSet()

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Device.pinned`: a mapped buffer in host memory, which drivers pin."""
        cl = self.cl
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.ALLOC_HOST_PTR
        held = cl.Buffer(self._context(), flags, size)
        access = cl.map_flags.READ | cl.map_flags.WRITE
        octets, _event = cl.enqueue_map_buffer(self._map_queue, held, access, 0, (size,), np.uint8)
        mapped: NDArray[np.uint8] = octets
        self._pinned.append(mapped)
        return mapped

    def buffer(self, size: int) -> _Buffer:
        """See `Device.buffer`."""
        self.budget.take(size)
        try:
            buffer = _Buffer(self.cl.Buffer(self._context(), self.cl.mem_flags.READ_WRITE, size))
        except BaseException:
            self.budget.give_back(size)
            raise
        self._buffers.add(buffer)
        weakref.finalize(buffer, self.budget.give_back, size)
        return buffer

    def _context(self) -> Any:
        if self.context is None:
            raise DeviceFailed("the device was given back")
        return self.context

    def queue(self) -> OpenClQueue:
        """See `Device.queue`; OpenCL 1.2 knows no priorities."""
        self._context()
        queue = OpenClQueue(self)
        self._queues.append(queue)
        return queue

    def wanted(self) -> bool:
        """See `Device.wanted`: OpenCL cannot tell."""
        return False

    def close(self) -> None:
        """See `Device.close`."""
        for queue in self._queues:
            queue.close()
        self._forget()

    def abandon(self) -> None:
        """See `Device.abandon`."""
        for queue in self._queues:
            queue.abandon()
        leave_for_ever(self.context, self._map_queue, self.program, *self._pinned, *self._buffers)
        self._forget()

    def _forget(self) -> None:
        self._queues.clear()
        self._pinned.clear()
        self.context = self.program = self._map_queue = None


class OpenClHasher(OffloadHasher):
    """`Hasher` on OpenCL devices.

    `device`: None for the first GPU or accelerator, "all" for all of them,
    "cpu" for PoCL and the like, or part of a device's or platform's name.
    `gpu_memory` caps the device memory taken, in bytes (None: half of all).
    Further options are those of `OffloadHasher`.  Raises BackendUnavailable
    and UsageError.
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
            cl: Any = importlib.import_module("pyopencl")
        except Exception as error:  # whatever loading its libraries brings
            raise BackendUnavailable(f"pyopencl cannot be imported: {error}") from error
        super().__init__("opencl", seed, lambda: open_devices(cl, device, gpu_memory), threads, **options)


def variants(extensions: str) -> list[list[str]]:
    """Compiler options to try, best first: shuffles where the device has them, local memory everywhere."""
    plain = ["-cl-std=CL1.2", f"-DBLOCK={kernels.BLOCK}"]
    if "cl_khr_subgroup_shuffle" not in extensions.split():
        return [plain]
    shuffling = [f"-DBLOCK={kernels.BLOCK}", "-DSUBGROUPS"]
    return [["-cl-std=CL3.0", *shuffling], ["-cl-std=CL2.0", *shuffling], plain]


def build(cl: Any, context: Any, options: list[list[str]]) -> Any:
    """The kernels, with the first options the device's compiler takes; raises cl.Error."""
    *first, last = options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers' remarks that are no errors
        for given in first:
            with suppress(cl.Error):
                return cl.Program(context, kernels.source()).build(given)
        return cl.Program(context, kernels.source()).build(last)


def open_devices(cl: Any, device: str | None, gpu_memory: int | None) -> Sequence[OpenClDevice]:
    """The devices that `device` names (see `OpenClHasher`), ready for work; raises BackendUnavailable."""
    try:
        found = [one for platform in cl.get_platforms() for one in platform.get_devices()]
    except cl.Error as error:
        raise BackendUnavailable(f"no OpenCL platform is installed ({error})") from error
    opened: list[OpenClDevice] = []
    failed = []
    for one in _choose(cl, found, device):
        try:
            opened.append(OpenClDevice(cl, one, gpu_memory))
        except cl.Error as error:
            failed.append(f"{one.name}: {str(error).splitlines()[0]}")
    if not opened:
        raise BackendUnavailable(f"no OpenCL device could be opened: {'; '.join(failed)}")
    return opened


def _choose(cl: Any, found: list[Any], device: str | None) -> list[Any]:
    spare = [one for one in found if not one.type & cl.device_type.CPU]
    if device is None or device == "all":
        if not spare:
            raise BackendUnavailable("there are no OpenCL devices but CPUs; name one with --device cpu")
        return spare if device == "all" else spare[:1]
    if device == "cpu":
        named = [one for one in found if one.type & cl.device_type.CPU][:1]
    else:
        named = [one for one in found if device.lower() in f"{one.name} {one.platform.name}".lower()]
    if not named:
        known = ", ".join(sorted({one.name.strip() for one in found})) or "none"
        raise UsageError(f"no OpenCL device is called {device!r}; there are: {known}")
    return named
