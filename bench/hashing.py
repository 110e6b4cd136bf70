"""Measures read, hash and sort on the CPU in one run; prints a table, or JSON with --json.

    python bench/hashing.py [--json] [--megabytes 512] [--keys 16777216] [--repeats 5]

Every figure is the median of repeats that take turns, so that all of them meet
the same noise, each behind an uncounted one that warms up; ratios are of those
medians.  Plain read is the quicker of two sums of a buffer larger than any L3
cache, by one core: a compiled loop of vector additions, and numpy's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpuksm.hashing import xxh3
from gpuksm.hashing.cpu import CHUNK_PAGES, CpuHasher, hash_pages
from gpuksm.hashing.crew import Crew, usable_cpus
from gpuksm.hashing.protocol import PAGE_BYTES
from gpuksm.hashing.sort import radix_sort
from gpuksm.linux import vm

SEED = 0x9E3779B97F4A7C15
L2_PAGES = 64  # 256 KiB, as much as any L2 cache holds
PIECE_PAGES = 1024


@numba.njit("uint64(uint64[::1])", nogil=True)
def sum_words(words: Any) -> Any:
    """Sum of all words, which the compiler turns into vector additions."""
    total = np.uint64(0)
    for word in words:
        total += word
    return total


class OtherProcess:
    """The same buffer in another process, read by process_vm_readv."""

    def __init__(self, pid: int, octets: NDArray[np.uint8]) -> None:
        self._pid, self._address = pid, octets.ctypes.data
        self.pages = len(octets) // PAGE_BYTES

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        size = count * PAGE_BYTES
        got = vm.readv(self._pid, [(out.ctypes.data, size)], [(self._address + first * PAGE_BYTES, size)])
        ok[:count] = got == size


@contextmanager
def forked() -> Iterator[int]:
    """A child that shares this process's memory as it is now, and ends with it."""
    end, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        os.read(end, 1)
        os._exit(0)
    os.close(end)
    try:
        yield pid
    finally:
        os.close(ours)
        os.waitpid(pid, 0)


def random_words(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(1).integers(0, 2**64, count, np.uint64)


class Bench:
    """What is measured: name -> a function to time, in rounds."""

    def __init__(
        self, pid: int, words: NDArray[np.uint64], keys: NDArray[np.uint64], stack: ExitStack
    ) -> None:
        self.words, self.keys = words, keys
        pages = len(words) * 8 // PAGE_BYTES
        self.digests, self.kinds = np.empty(pages, np.uint64), np.empty(pages, np.uint8)
        self.ok = np.ones(pages, np.bool_)
        self.page_keys = xxh3.page_keys(SEED)
        self.source = OtherProcess(pid, words.view(np.uint8))
        self.staging = np.empty(CHUNK_PAGES * PAGE_BYTES, np.uint8)
        self.cores = usable_cpus()
        self.one, self.all = CpuHasher(SEED, 1), CpuHasher(SEED, self.cores)
        self.crew = Crew(self.cores)
        for each in (self.one, self.all, self.crew):
            stack.callback(each.close)

    def hash(self, first: int, count: int) -> None:
        words = self.words[first * PAGE_BYTES // 8 : (first + count) * PAGE_BYTES // 8]
        end = first + count
        hash_pages(words, self.ok, self.page_keys, self.digests[first:end], self.kinds[first:end])

    def hash_by_all(self) -> None:
        pieces = -(-len(self.digests) // PIECE_PAGES)

        def piece(_worker: int, at: int) -> None:
            first = at * PIECE_PAGES
            self.hash(first, min(PIECE_PAGES, len(self.digests) - first))

        self.crew.run(piece, pieces)

    def hash_in_l2(self) -> None:
        for _ in range(len(self.digests) // L2_PAGES):
            self.hash(0, L2_PAGES)

    def read_process(self) -> None:
        for first in range(0, self.source.pages, CHUNK_PAGES):
            count = min(CHUNK_PAGES, self.source.pages - first)
            self.source.read(first, count, self.staging, self.ok)

    def moved(self) -> dict[str, Callable[[], Any]]:
        """Figures in GB/s of the buffer."""
        return {
            "plain read, 1 core, compiled sum": lambda: sum_words(self.words),
            "plain read, 1 core, numpy sum": self.words.sum,
            "hash from DRAM, 1 core": lambda: self.hash(0, len(self.digests)),
            f"hash from DRAM, {self.cores} cores": self.hash_by_all,
            "hash from L2, 1 core": self.hash_in_l2,
            "read a process, 1 core": self.read_process,
            "read and hash a process, 1 core": lambda: self.one.digest(self.source, self.digests, self.kinds),
            f"read and hash a process, {self.cores} cores": lambda: self.all.digest(
                self.source, self.digests, self.kinds
            ),
        }

    def sorted(self) -> dict[str, Callable[[], Any]]:
        """Figures in million keys a second."""
        return {
            "np.argsort, stable": lambda: np.argsort(self.keys, kind="stable"),
            "radix sort, 1 core": lambda: radix_sort(self.keys, 1),
            f"radix sort, {self.cores} cores": lambda: radix_sort(self.keys, self.cores),
        }


def medians(tests: dict[str, Callable[[], Any]], amount: float, repeats: int) -> dict[str, float]:
    """`amount` / median seconds of each test."""
    seconds: dict[str, list[float]] = {name: [] for name in tests}
    for _ in range(repeats):
        for name, test in tests.items():
            # Uncounted, so that none pays for memory that the one before gave
            # back: a virtual machine may have to fetch it from its host anew.
            test()
            start = time.perf_counter()
            test()
            seconds[name].append(time.perf_counter() - start)
    return {name: amount / statistics.median(taken) for name, taken in seconds.items()}


def ratios(moved: dict[str, float], keys: dict[str, float], cores: int) -> dict[str, float]:
    plain = max(rate for name, rate in moved.items() if name.startswith("plain read"))
    return {
        "hash from DRAM / plain read, 1 core": moved["hash from DRAM, 1 core"] / plain,
        "read and hash / read a process, 1 core": moved["read and hash a process, 1 core"]
        / moved["read a process, 1 core"],
        "radix sort / np.argsort, 1 core": keys["radix sort, 1 core"] / keys["np.argsort, stable"],
        f"radix sort on {cores} cores / np.argsort": keys[f"radix sort, {cores} cores"]
        / keys["np.argsort, stable"],
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    words = random_words(arguments.megabytes * 2**20 // 8)
    with ExitStack() as stack:
        # Forked before any thread is started.
        pid = stack.enter_context(forked())
        bench = Bench(pid, words, random_words(arguments.keys), stack)
        moved = medians(bench.moved(), words.nbytes / 1e9, arguments.repeats)
        keys = medians(bench.sorted(), arguments.keys / 1e6, arguments.repeats)
    return {
        "cpu": cpu_model(),
        "cores": bench.cores,
        "megabytes": arguments.megabytes,
        "keys": arguments.keys,
        "repeats": arguments.repeats,
        "gigabytes_per_second": moved,
        "million_keys_per_second": keys,
        "ratios": ratios(moved, keys, bench.cores),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['cpu']}, {result['cores']} cores, medians of {result['repeats']}")
    table.add_column("what")
    table.add_column("rate", justify="right")
    for section, unit in (
        ("gigabytes_per_second", "GB/s"),
        ("million_keys_per_second", "M keys/s"),
        ("ratios", "x"),
    ):
        for name, value in result[section].items():
            table.add_row(name, f"{value:.2f} {unit}")
        table.add_section()
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the buffer")
    parser.add_argument("--keys", type=int, default=1 << 24, help="digests to sort")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
