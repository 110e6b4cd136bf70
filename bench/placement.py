"""How merged memory is mapped where shared memory gets huge pages, and that it swaps.

    python bench/placement.py [--only huge|swap] [--swap-file FILE]

Needs root and gcc.  `huge` sets /sys/kernel/mm/transparent_hugepage/shmem_enabled to each
mode in turn and puts it back; `swap` makes a swap file of 256 MiB, uses it and removes it.  In both
the processes check every byte at the end.  Prints lines `mode: facts`.  Exit code 3 without root.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.contestants import Gpuksm
from bench.workload import Processes, Workload, build
from gpuksm.linux import mappings

SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MODES = ("never", "advise", "within_size", "always")
_PAGEOUT = 21
_PROCESS_MADVISE = 440  # asm-generic/unistd.h
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def merged(program: Path, look: Callable[[Processes, Gpuksm], str]) -> str:
    """Three processes with 64 MiB equal and 16 MiB of their own, merged; what `look` says of them."""
    with (
        Processes(program, Workload("placement", "mix", 3, 64, 16)) as processes,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        guard = Gpuksm(processes, Workload("placement", "mix", 3, 64, 16), Path(folder) / "run")
        try:
            guard.merge()
            return look(processes, guard)
        finally:
            processes.kill()
            guard.close()


@contextlib.contextmanager
def shmem_enabled(mode: str) -> Iterator[None]:
    """Set the mode, and put back what it was."""
    words = SHMEM.read_text().split()
    before = next(word.strip("[]") for word in words if word.startswith("["))
    try:
        SHMEM.write_text(mode)
        yield
    finally:
        SHMEM.write_text(before)


def huge(processes: Processes, guard: Gpuksm) -> str:
    """How much of the merged memory is mapped by huge page table entries once it was read."""
    processes.ask("check")
    mapped = sum(mappings.smaps_rollup(pid).get("ShmemPmdMapped", 0) for pid in processes.pids)
    store = guard.store_bytes() / 2**20
    return f"{mapped / 2**20:.0f} of {3 * 64} MiB mapped huge, the store takes {store:.1f} MiB"


def swap(processes: Processes, guard: Gpuksm) -> str:
    """Page the store out through everybody who maps it, and have its content checked."""
    before = _swapped_kib()
    runs = []
    for pid in processes.pids:
        handle = os.pidfd_open(pid)
        for vma in mappings.maps(pid):
            if "gpuksm-store" in vma.path:
                runs.append((vma.offset, vma.end - vma.start))
                segment = (ctypes.c_size_t * 2)(vma.start, vma.end - vma.start)
                libc.syscall(_PROCESS_MADVISE, handle, segment, 1, _PAGEOUT, 0)
        os.close(handle)
    store = os.open(_store_of(guard), os.O_RDWR)
    for offset, size in set(runs):
        at = libc.mmap(None, size, 3, 1, store, offset)
        for page in range(0, size, 4096):
            ctypes.c_char.from_address(at + page).value  # noqa: B018
        libc.madvise(at, size, _PAGEOUT)
        libc.munmap(at, size)
    os.close(store)
    time.sleep(1)
    out = _swapped_kib() - before
    processes.ask("check")
    return f"{out} KiB went out, {_swapped_kib() - before} KiB are there after all bytes were checked"


def _store_of(guard: Gpuksm) -> str:
    pid = guard.guard_pid()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if re.search(r"memfd:gpuksm-store", os.readlink(entry)):
                return str(entry)
    raise SystemExit("the guard has no store")


def _swapped_kib() -> int:
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(facts["SwapTotal"].split()[0]) - int(facts["SwapFree"].split()[0])


@contextlib.contextmanager
def swap_file(path: Path) -> Iterator[None]:
    """A swap file that is in use while the block runs."""
    try:
        for command in (["fallocate", "-l", "256M"], ["chmod", "600"], ["mkswap", "-q"], ["swapon"]):
            subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)
        yield
    finally:
        subprocess.run(["swapoff", str(path)], check=False)
        path.unlink(missing_ok=True)


def main() -> int:
    """Run what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("huge", "swap"))
    parser.add_argument("--swap-file", type=Path, default=Path("/var/tmp/gpuksm-swap"))
    arguments = parser.parse_args()
    if os.geteuid():
        print("root is needed to change shmem_enabled and to swap", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        if arguments.only != "swap":
            for mode in MODES:
                with shmem_enabled(mode):
                    print(f"shmem_enabled {mode}: {merged(program, huge)}", flush=True)
        if arguments.only != "huge":
            with swap_file(arguments.swap_file):
                print(f"swap: {merged(program, swap)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
