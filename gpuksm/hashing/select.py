"""Chooses the backend: the one asked for, or the one that measures best here.

Backends are imported only when they are tried.  A GPU backend module says by
`unavailable()` why it cannot run, without importing what it needs.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing.protocol import PAGE_BYTES

if TYPE_CHECKING:
    from gpuksm.hashing.protocol import Hasher

SAMPLE_PAGES = 16384
_BATCHES = 3
# A backend that is this close to the quickest wins when it costs less CPU time.
NEARLY = 0.9
# About what importing cupy, opening a context, pinning the ring and the self-tests take: a guess.
GPU_START_SECONDS = 1.0
# Any of these is there where a GPU's driver is: graphics of any vendor, AMD's and NVIDIA's computing,
# WSL, Arm's Mali, accelerators.
_GPU_SIGNS = (
    "/dev/dri",
    "/dev/kfd",
    "/dev/nvidiactl",
    "/proc/driver/nvidia/version",
    "/dev/dxg",
    "/dev/mali0",
    "/dev/accel",
)


class Wanted(NamedTuple):
    """What a backend is made with; see `create`."""

    seed: int
    threads: int
    device: str | None
    gpu_memory: int | None
    work_bytes: int | None = None
    automatic: bool = False  # no backend was asked for


def _cpu(wanted: Wanted) -> Hasher:
    from gpuksm.hashing.cpu import CpuHasher

    return CpuHasher(wanted.seed, wanted.threads)


def _gpu_may_be_here() -> bool:
    return any(map(os.path.exists, _GPU_SIGNS))


def _gpu(name: str, class_name: str, wanted: Wanted) -> Hasher:
    # Loading a GPU's libraries only to find none there takes 0.1 s, a third of a small estimate.
    if wanted.automatic and wanted.device is None and not _gpu_may_be_here():
        raise BackendUnavailable("there is no device file of a GPU")
    try:
        module: Any = importlib.import_module(f"gpuksm.hashing.{name}")
    except ImportError as error:
        raise BackendUnavailable(f"the {name} backend cannot be loaded: {error}") from error
    if reason := module.unavailable():
        raise BackendUnavailable(reason)
    make = getattr(module, class_name)
    hasher: Hasher = make(
        wanted.seed, threads=wanted.threads, device=wanted.device, gpu_memory=wanted.gpu_memory
    )
    return hasher


_BACKENDS: dict[str, Callable[[Wanted], Hasher]] = {
    "cuda": partial(_gpu, "cuda", "CudaHasher"),
    "opencl": partial(_gpu, "opencl", "OpenClHasher"),
    "cpu": _cpu,
}


class Measured(NamedTuple):
    """What one batch took on a backend."""

    hasher: Hasher
    bytes_per_second: float
    cpu_seconds_per_gib: float

    def __str__(self) -> str:
        return (
            f"{self.hasher.name} {self.bytes_per_second / 1e9:.1f} GB/s, "
            f"{self.cpu_seconds_per_gib:.2f} CPU s/GiB"
        )


def measure(hasher: Hasher, pages: int = SAMPLE_PAGES) -> Measured:
    """The quickest of three batches of `pages` pages, read as a scan does, behind one that warms up."""
    import numpy as np

    from gpuksm.hashing.source import OwnMemory

    octets = np.arange(pages * PAGE_BYTES // 8, dtype=np.uint64).view(np.uint8)
    source, digests, kinds = OwnMemory(octets), np.empty(pages, np.uint64), np.empty(pages, np.uint8)
    hasher.digest(source, digests, kinds)
    took = []
    for _ in range(_BATCHES):
        wall, cpu = time.perf_counter(), time.process_time()
        hasher.digest(source, digests, kinds)
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = min(took)
    return Measured(hasher, octets.nbytes / wall, cpu * 2**30 / octets.nbytes)


def best(candidates: list[Measured]) -> Measured:
    """The quickest, or the one among the nearly quickest that costs least CPU time."""
    quickest = max(each.bytes_per_second for each in candidates)
    near = [each for each in candidates if each.bytes_per_second >= NEARLY * quickest]
    return min(near, key=lambda each: each.cpu_seconds_per_gib)


def create(
    backend: str = "auto",
    seed: int = 0,
    threads: int = 0,
    device: str | None = None,
    gpu_memory: int | None = None,
    work_bytes: int | None = None,
) -> tuple[Hasher, str]:
    """(hasher, one line that says why this one).

    `backend` is auto, cuda, opencl or cpu; `seed` a 64-bit number; `threads`
    the CPU threads, 0 for one per usable CPU and 6 at most; `device` names a device of cuda
    or opencl; `gpu_memory` caps the bytes taken on each; `work_bytes` is how much
    is to be hashed in all (None: there is no end to it), so that auto opens no
    GPU for what the CPU has done sooner.  Raises
    BackendUnavailable with what is missing, UsageError for values that make no
    sense.
    """
    if backend != "auto" and backend not in _BACKENDS:
        raise UsageError(f"no backend is called {backend!r}; choose one of auto, {', '.join(_BACKENDS)}")
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"the seed {seed} is not a 64-bit number")
    if threads < 0:
        raise UsageError(f"{threads} threads make no sense; 0 means one per CPU")
    wanted = Wanted(seed, threads, device, gpu_memory, work_bytes)
    if backend != "auto":
        if backend == "cpu" and device is not None:
            raise UsageError(f"device {device!r} makes no sense with the cpu backend")
        return _BACKENDS[backend](wanted), "asked for"
    return _automatic(wanted._replace(automatic=True))


def _automatic(wanted: Wanted) -> tuple[Hasher, str]:
    if wanted.work_bytes is not None and wanted.device is None and _gpu_may_be_here():
        alone = measure(_cpu(wanted))
        seconds = wanted.work_bytes / alone.bytes_per_second
        if seconds < GPU_START_SECONDS:
            return alone.hasher, f"the CPU needs {seconds:.2f} s, less than a GPU takes to start"
        alone.hasher.close()
    found: list[Hasher] = []
    missing: dict[str, str] = {}
    refused: UsageError | None = None
    for name, make in _BACKENDS.items():
        try:
            found.append(make(wanted))
        except (BackendUnavailable, UsageError) as error:
            # A name of one backend's devices means nothing to the other.
            missing[name] = str(error)
            refused = refused or (error if isinstance(error, UsageError) else None)
    if refused is not None and all(hasher.name == "cpu" for hasher in found):
        for hasher in found:
            hasher.close()
        raise refused
    if not found:
        raise BackendUnavailable("; ".join(f"{name}: {why}" for name, why in missing.items()))
    if len(found) == 1:
        return found[0], f"only {found[0].name} runs here ({'; '.join(dict.fromkeys(missing.values()))})"
    measured = [measure(hasher) for hasher in found]
    chosen = best(measured)
    for each in measured:
        if each is not chosen:
            each.hasher.close()
    return chosen.hasher, "measured: " + "; ".join(
        str(each) for each in sorted(measured, key=lambda each: each is not chosen)
    )
