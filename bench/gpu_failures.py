"""What happens when a GPU fails, for `bench/gpu_acceptance.py`: each case in a process of its own.

    python bench/gpu_failures.py CASE

The process makes a hasher on the GPU, brings the trouble about on the real card, and
must get the digests that the CPU gives, or a refusal, with the card given back.  A
case ends with 0 when that holds and with the reason on stderr otherwise.  Nothing is
left on the card when the process has ended: a context that a kernel has broken, or in
which one never ends, goes with its process.
"""

from __future__ import annotations

import functools
import importlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpuksm.errors import BackendUnavailable
from gpuksm.hashing import device, gpus, ring, tables
from gpuksm.hashing.cpu import CpuHasher
from gpuksm.hashing.cuda import CudaHasher
from gpuksm.hashing.protocol import PAGE_BYTES, Hasher, PageSource
from gpuksm.hashing.source import ArraySource
from gpuksm.linux.leaving import leave_for_ever

PAGES, SEED, MIB = 1 << 15, 7, 1 << 20
CASE_SECONDS = 60
HANG_SECONDS = 2.0
_SETTLED_SECONDS = 5.0

_KERNELS = r"""
extern "C" __global__ void stray(int *where) { where[threadIdx.x] = 1; }
extern "C" __global__ void endless(volatile int *word) { while (*word == 0) {} }
"""
# Takes the card for itself: a context, and so many bytes.
_TAKER = """
import sys, cupy
held = cupy.cuda.runtime.malloc(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


def digest(hasher: Hasher, source: PageSource) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Digests and kinds of all pages."""
    digests, kinds = np.empty(source.pages, np.uint64), np.empty(source.pages, np.uint8)
    hasher.digest(source, digests, kinds)
    return digests, kinds


def card_of(hasher: CudaHasher, library: Any) -> Any:
    """NVML's handle of the card that a hasher has open."""
    bus_id = hasher.devices[0].split("(")[1].rstrip(")")
    return library.nvmlDeviceGetHandleByPciBusId(bus_id.encode())


@functools.cache
def work() -> tuple[ArraySource, NDArray[np.uint64]]:
    """Pages, and their digests by the CPU."""
    octets = np.random.default_rng(1).integers(0, 1 << 64, PAGES * PAGE_BYTES // 8, np.uint64)
    source = ArraySource(octets.view(np.uint8))
    with closing(CpuHasher(SEED)) as cpu:
        return source, digest(cpu, source)[0]


def must_agree(hasher: Hasher) -> None:
    """AssertionError unless the hasher gives the CPU's digests, and sorts them."""
    source, wanted = work()
    if not np.array_equal(digest(hasher, source)[0], wanted):
        raise AssertionError("wrong digests")
    order = hasher.sort(wanted)[1]
    if not np.array_equal(order, np.argsort(wanted, kind="stable")):
        raise AssertionError("a wrong order")


def _launch(cupy: Any, name: str, pointer: int, blocks: int) -> tuple[Any, ...]:
    """Queue one of the kernels above on a stream of its own; what must not be freed before it ends."""
    module = cupy.RawModule(code=_KERNELS, backend="nvrtc")
    kernel = module.get_function(name)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        kernel((blocks,), (1024,), (np.uint64(pointer),), stream=stream)
    return module, kernel, stream


def broken() -> None:
    """A kernel writes where nothing is: every later call in this context fails."""
    cupy = importlib.import_module("cupy")
    with closing(CudaHasher(SEED)) as hasher:
        must_agree(hasher)
        held = _launch(cupy, "stray", 64, 1)
        time.sleep(0.2)
        must_agree(hasher)
        if hasher.devices:
            raise AssertionError("the broken card is still in use")
        del held


def hung() -> None:
    """A kernel that never ends has all multiprocessors."""
    cupy = importlib.import_module("cupy")
    for module in (ring, tables):
        module.wait = functools.partial(device.wait, seconds=HANG_SECONDS)  # type: ignore[attr-defined]
    with closing(CudaHasher(SEED)) as hasher:
        must_agree(hasher)
        word = cupy.cuda.runtime.malloc(4)
        cupy.cuda.runtime.memset(word, 0, 4)
        leave_for_ever(*_launch(cupy, "endless", word, 4096))
        began = time.monotonic()
        must_agree(hasher)
        if hasher.devices:
            raise AssertionError("the hung card is still in use")
        if time.monotonic() - began > 5 * HANG_SECONDS:
            raise AssertionError("waited too long for the hung card")


def _taker(size: int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    taker = subprocess.Popen([sys.executable, "-c", _TAKER, str(size)], stdin=pipe, stdout=pipe, text=True)
    assert taker.stdout is not None
    if not taker.stdout.readline():
        raise AssertionError("the other process could not take the card's memory")
    return taker


def _end(taker: subprocess.Popen[str]) -> None:
    taker.kill()
    taker.communicate()


def full() -> None:
    """Another process has nearly all of the card's memory: less is done at a time, or it is refused."""
    cupy = importlib.import_module("cupy")
    free, _total = cupy.cuda.runtime.memGetInfo()
    cupy.cuda.driver.devicePrimaryCtxRelease(0)
    for left in (1024 * MIB, 600 * MIB, 400 * MIB):
        taker = _taker(free - left)
        try:
            with closing(CudaHasher(SEED, device="0")) as hasher:
                must_agree(hasher)
        except BackendUnavailable as error:
            print(f"with {left // MIB} MiB left: {error}")
        finally:
            _end(taker)


def wanted() -> None:
    """Another process comes to the idle card that was picked: it is given back at the next scan."""
    with closing(CudaHasher(SEED)) as hasher:
        must_agree(hasher)
        taker = _taker(MIB)
        try:
            time.sleep(2)
            library = gpus.nvml()
            seen = bool(library) and gpus.other_processes(card_of(hasher, library), library) > 0
            must_agree(hasher)
            if seen and hasher.devices:
                raise AssertionError("the card was kept from a process that NVML shows")
            if not seen:
                print("NVML shows no other process here")
        finally:
            _end(taker)


def killed() -> None:
    """SIGKILL in the middle of hashing: the card's memory is free again."""
    library = gpus.nvml()
    if library is None:
        print("NVML is not here")
        return
    handle = library.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(library.nvmlDeviceGetMemoryInfo(handle).used)

    before = used()
    child = subprocess.Popen([sys.executable, __file__, "for-ever"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    if not child.stdout.readline():
        raise AssertionError("the process that was to be killed has ended")
    held = used() - before
    child.kill()
    child.communicate()
    deadline = time.monotonic() + _SETTLED_SECONDS
    while used() > before + 16 * MIB and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"{held // MIB} MiB were held, {(used() - before) // MIB} after the kill")
    if held < MIB or used() > before + 16 * MIB:
        raise AssertionError(f"{(used() - before) // MIB} MiB of {held // MIB} are still taken")


def for_ever() -> None:
    """What `killed` kills."""
    source, _digests = work()
    with closing(CudaHasher(SEED)) as hasher:
        while True:
            digest(hasher, source)
            print("hashed", flush=True)


CASES: dict[str, Callable[[], None]] = {
    "broken": broken,
    "hung": hung,
    "full": full,
    "wanted": wanted,
    "killed": killed,
}


def run(case: str) -> None:
    """Run one case in its own process; raises AssertionError with the reason where it does not hold."""
    done = subprocess.run(
        [sys.executable, __file__, case], capture_output=True, text=True, timeout=CASE_SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise AssertionError(lines[-1])


def main() -> None:
    """One case, or all in turn with what they say."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    names = sys.argv[1:] or list(CASES)
    for name in names:
        if name == "for-ever":
            for_ever()
        if name not in CASES:
            raise SystemExit(f"no case {name!r}; there are {', '.join(CASES)}")
        CASES[name]()


if __name__ == "__main__":
    main()
