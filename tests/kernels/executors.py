"""Two ways to run the shipped kernels without a GPU, behind one small interface."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.kernels import BLOCK
from tests import nvrtc
from tests.ptx import GlobalMemory, Machine, parse
from tests.requirements_env import require

Array = NDArray[np.generic]


class Executor(Protocol):
    """Runs kernels of one source; buffers are opaque, scalars are numpy scalars of the right width."""

    def place(self, array: Array) -> Any:
        """A device copy of the array that kernels may also write."""

    def constant(self, array: Array) -> Any:
        """A device copy that kernels only read."""

    def allocate(self, size: int) -> Any:
        """`size` bytes that hold nothing yet."""

    def launch(self, name: str, groups: int, *arguments: Any) -> None:
        """Run a kernel over `groups` groups of BLOCK threads."""

    def read(self, buffer: Any, dtype: type[np.generic], count: int) -> Array:
        """`count` values from the buffer's start."""


class PtxExecutor:
    """NVRTC's PTX on the interpreter; `reverse` runs the warps of a block in the other order."""

    def __init__(self, source: str, arch: str = "compute_75", reverse: bool = False) -> None:
        self.memory = GlobalMemory()
        self.machine = Machine(_parsed(source, arch), self.memory)
        self.reverse = reverse

    def place(self, array: Array) -> int:
        return self.memory.place(array.copy())

    def constant(self, array: Array) -> int:
        return self.memory.place(array, writable=False)

    def allocate(self, size: int) -> int:
        return self.memory.allocate(size)

    def launch(self, name: str, groups: int, *arguments: Any) -> None:
        self.machine.launch(name, groups, BLOCK, [int(value) for value in arguments], self.reverse)

    def read(self, buffer: int, dtype: type[np.generic], count: int) -> Array:
        return self.memory.read(buffer, count * np.dtype(dtype).itemsize).view(dtype)


@functools.cache
def _parsed(source: str, arch: str) -> Any:
    return parse(nvrtc.compile_source(source, arch))


class PoclExecutor:
    """The same source as OpenCL C on the CPU, by PoCL."""

    def __init__(self, source: str, *options: str) -> None:
        import pyopencl

        self.cl = pyopencl
        self.context, self.queue = _pocl()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compiler remarks
            self.program = pyopencl.Program(self.context, source).build(["-cl-std=CL1.2", *options])

    def place(self, array: Array) -> Any:
        flags = self.cl.mem_flags.READ_WRITE | self.cl.mem_flags.COPY_HOST_PTR
        return self.cl.Buffer(self.context, flags, hostbuf=np.ascontiguousarray(array))

    constant = place

    def allocate(self, size: int) -> Any:
        return self.cl.Buffer(self.context, self.cl.mem_flags.READ_WRITE, size)

    def launch(self, name: str, groups: int, *arguments: Any) -> None:
        self.cl.Kernel(self.program, name)(self.queue, (groups * BLOCK,), (BLOCK,), *arguments)
        self.queue.finish()

    def read(self, buffer: Any, dtype: type[np.generic], count: int) -> Array:
        out = np.empty(count, dtype)
        self.cl.enqueue_copy(self.queue, out, buffer)
        return out


@functools.cache
def _pocl() -> tuple[Any, Any]:
    try:
        import pyopencl
    except ImportError:
        require("pocl", "pyopencl is not installed")
    try:
        platforms = pyopencl.get_platforms()
    except pyopencl.Error:
        platforms = []
    for platform in platforms:
        if "Portable Computing Language" in platform.name:
            context = pyopencl.Context([platform.get_devices()[0]])
            return context, pyopencl.CommandQueue(context)
    require("pocl", "no PoCL platform is installed")


def make(kind: str, source: str) -> Executor:
    """An executor by name: ptx75, ptx120, ptx75-reverse, pocl."""
    if kind == "pocl":
        return PoclExecutor(source)
    arch, _, order = kind.removeprefix("ptx").partition("-")
    return PtxExecutor(source, f"compute_{arch}", order == "reverse")
