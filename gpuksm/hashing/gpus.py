"""Which GPUs to use: spare ones, unless the user names others.

A GPU counts as idle when no other process computes on it and it neither works
nor holds memory that somebody must own; in containers NVML shows no processes,
and the other two are what is left.  CUDA and NVML number GPUs differently, so
they are matched by PCI address.  What NVML calls utilisation is of the past sampling
period, up to a second long, whoever used it: a GPU that looks busy is looked at
again before it is called so, or a scanner would find its own last work there.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpuksm.errors import BackendUnavailable, UsageError

IDLE_UTILISATION_PERCENT = 5
IDLE_MEMORY_SHARE = 0.1
# Longer than NVML's sampling period, which is between a sixth of a second and one.
SETTLE_SECONDS = 1.5
_LOOK_EVERY_SECONDS = 0.1


@dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA numbers it, and what NVML says of it (None: nothing)."""

    ordinal: int
    bus_id: str
    handle: Any = None
    utilisation_percent: int | None = None
    used_share: float | None = None
    others: int | None = None

    @property
    def idle(self) -> bool:
        """True when nobody seems to use it, as far as is known."""
        return self._free and not self._worked

    @property
    def settling(self) -> bool:
        """True when it has worked in the past second and nobody seems to have it now."""
        return self._free and self._worked

    @property
    def _free(self) -> bool:
        return not self.others and (self.used_share or 0.0) <= IDLE_MEMORY_SHARE

    @property
    def _worked(self) -> bool:
        return (self.utilisation_percent or 0) > IDLE_UTILISATION_PERCENT


def nvml() -> Any:
    """NVML, initialised, or None where nvidia-ml-py or the driver's library is missing."""
    try:
        module: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        module.nvmlInit()
    except module.NVMLError:
        return None
    return module


def look(ordinal: int, bus_id: str, library: Any) -> Gpu:
    """One GPU as it is now."""
    if library is None:
        return Gpu(ordinal, bus_id)
    try:
        handle = library.nvmlDeviceGetHandleByPciBusId(bus_id.encode())
        memory = library.nvmlDeviceGetMemoryInfo(handle)
        used = memory.used / memory.total if memory.total else 0.0
    except library.NVMLError:
        return Gpu(ordinal, bus_id)
    return Gpu(ordinal, bus_id, handle, _utilisation(handle, library), used, other_processes(handle, library))


def look_at(
    buses: Sequence[str], device: str | None, library: Any, settle_seconds: float = SETTLE_SECONDS
) -> list[Gpu]:
    """All GPUs, by ordinal; those that may only just have been used are given time to show it.

    `device` as in `choose`: one idle GPU is enough for None, and none need be idle when they are named.
    """
    found = [look(ordinal, bus, library) for ordinal, bus in enumerate(buses)]
    deadline = time.monotonic() + settle_seconds
    while device in (None, "idle") and time.monotonic() < deadline:
        settling = [gpu for gpu in found if gpu.settling]
        if not settling or (device is None and any(gpu.idle for gpu in found)):
            break
        time.sleep(_LOOK_EVERY_SECONDS)
        for gpu in settling:
            found[gpu.ordinal] = look(gpu.ordinal, gpu.bus_id, library)
    return found


def context_active(ordinal: int) -> bool:
    """True when this process already has a primary context on the GPU; creates none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    handle, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    status = library.cuDeviceGet(ctypes.byref(handle), ordinal)
    status = status or library.cuDevicePrimaryCtxGetState(handle, ctypes.byref(flags), ctypes.byref(active))
    return not status and bool(active.value)


def other_processes(handle: Any, library: Any) -> int:
    """Processes but this one that compute on the GPU, as far as NVML shows them."""
    try:
        running = library.nvmlDeviceGetComputeRunningProcesses(handle)
    except library.NVMLError:
        return 0
    return sum(process.pid != os.getpid() for process in running)


def _utilisation(handle: Any, library: Any) -> int | None:
    try:
        return int(library.nvmlDeviceGetUtilizationRates(handle).gpu)
    except library.NVMLError:
        return None  # not every card tells


def choose(found: list[Gpu], device: str | None) -> list[Gpu]:
    """The GPUs to use out of those found.

    `device`: None for the one idle GPU with least memory in use, "idle" for all
    idle ones, "all", or a comma-separated list of CUDA ordinals or PCI
    addresses.  Raises BackendUnavailable when none is idle, UsageError for a
    name that is none of these.
    """
    if device == "all":
        return found
    if device is None or device == "idle":
        idle = sorted((gpu for gpu in found if gpu.idle), key=lambda gpu: gpu.used_share or 0.0)
        if not idle:
            raise BackendUnavailable(f"all {len(found)} GPUs are in use; name one with --device to share it")
        return idle if device == "idle" else idle[:1]
    named = {str(gpu.ordinal): gpu for gpu in found} | {gpu.bus_id.lower(): gpu for gpu in found}
    chosen = []
    for name in device.split(","):
        gpu = named.get(name.strip().lower())
        if gpu is None:
            raise UsageError(f"no GPU {name.strip()!r}; there are {', '.join(sorted(named))}, idle and all")
        if gpu not in chosen:
            chosen.append(gpu)
    return chosen
