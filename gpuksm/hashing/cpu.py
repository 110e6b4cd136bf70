"""The CPU backend: a few threads that each read a chunk and hash it while it is still in their cache."""

from __future__ import annotations

import sys
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import BackendUnavailable
from gpuksm.hashing import selftest, xxh3
from gpuksm.hashing.compiled import library
from gpuksm.hashing.crew import Crew, usable_cpus
from gpuksm.hashing.protocol import MAX_SEGMENTS, PAGE_BYTES, PageSource, RemoteSource
from gpuksm.hashing.sort import radix_sort
from gpuksm.linux import vm

if sys.byteorder != "little":
    raise BackendUnavailable("the cpu backend needs a little-endian machine")

KERNELS = "gpuksm.hashing._page_kernel"
_KERNELS = library(KERNELS)
hash_pages = _KERNELS.hash_pages

# Large enough that the cost of a read call is spread out, small enough that
# the chunk is still in the reader's L2 cache when it is hashed.
CHUNK_PAGES = 128
# More of them read hardly faster on 16 cores, for a fifth more CPU time, and a scan no faster: what is
# merged takes the guard longer (docs/performance.md).
READERS = 6


def readers(threads: int) -> int:
    """How many threads read and hash where `threads` are asked for, 0: as many as are worth it."""
    return threads or min(usable_cpus(), READERS)


def digest_pages(pages: NDArray[np.uint8], seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """(digests uint64[n], kinds uint8[n]) of pages that are in memory already; `pages` is uint8[n, 4096]."""
    count = len(pages)
    digests, kinds = np.empty(count, np.uint64), np.empty(count, np.uint8)
    readable = np.ones(count, np.bool_)
    hash_pages(pages.reshape(-1).view(np.uint64), readable, xxh3.page_keys(seed), digests, kinds)
    return digests, kinds


class _Staging:
    """One thread's place to read a chunk into."""

    def __init__(self, pages: int) -> None:
        # Aligned to a page: no vector load straddles two cache lines.
        room = np.empty((pages + 1) * PAGE_BYTES, np.uint8)
        start = -room.ctypes.data % PAGE_BYTES
        self.octets = room[start : start + pages * PAGE_BYTES]
        self.words = self.octets.view(np.uint64)
        self.ok = np.empty(pages, np.bool_)
        self.all_ok = np.ones(pages, np.bool_)
        self.segments = np.empty(2 + 2 * MAX_SEGMENTS, np.uint64)


class CpuHasher:
    """XXH3 in vector code on `threads` threads (0: one for each CPU this process may use, at most 6).

    Raises BackendUnavailable when the kernel fails its self-test.
    """

    name = "cpu"

    def __init__(self, seed: int, threads: int = 0, chunk_pages: int = CHUNK_PAGES) -> None:
        selftest.check(self.name, digest_pages)
        self.seed = seed
        self.chunk_pages = chunk_pages
        self._keys = xxh3.page_keys(seed)
        self._crew = Crew(readers(threads))
        self._staging = [_Staging(chunk_pages) for _ in range(self._crew.threads)]
        self._busy = Lock()
        self._workers = self._crew.threads

    @property
    def threads(self) -> int:
        return self._crew.threads

    def digest(self, source: PageSource, digests: NDArray[np.uint64], kinds: NDArray[np.uint8]) -> None:
        """See `Hasher.digest`; calls from several threads take turns."""
        pages = source.pages
        if len(digests) < pages or len(kinds) < pages:
            raise ValueError(f"{pages} pages need as many digests and kinds")

        def chunk(worker: int, item: int) -> None:
            staging = self._staging[worker]
            first = item * self.chunk_pages
            end = min(first + self.chunk_pages, pages)
            source.read(first, end - first, staging.octets, staging.ok)
            hash_pages(staging.words, staging.ok, self._keys, digests[first:end], kinds[first:end])

        chunks = -(-pages // self.chunk_pages)
        with self._busy:
            if isinstance(source, RemoteSource):
                left = self._read_and_hash(source, digests[:pages], kinds[:pages], chunks)
                self._crew.run(lambda worker, item: chunk(worker, left[item]), len(left), self._workers)
            else:
                self._crew.run(chunk, chunks, self._workers)

    def _read_and_hash(
        self, source: RemoteSource, digests: NDArray[np.uint64], kinds: NDArray[np.uint8], chunks: int
    ) -> list[int]:
        """Do the chunks of `source` that can be read whole; the numbers of the others."""
        stretches, claims = source.stretches, np.zeros(1, np.int64)
        left: list[int] = []

        def labour(worker: int, _item: int) -> None:
            staging, failed = self._staging[worker], np.empty(chunks, np.int64)
            count = _KERNELS.read_and_hash(
                vm.READV_ADDRESS,
                *stretches,
                self.chunk_pages,
                claims,
                staging.octets.ctypes.data,
                staging.words,
                staging.all_ok,
                staging.segments.ctypes.data,
                staging.segments,
                self._keys,
                digests,
                kinds,
                failed,
            )
            left.extend(failed[:count].tolist())

        self._crew.run(labour, min(chunks, self._workers), self._workers)
        return left

    def sort(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """See `Hasher.sort`."""
        return radix_sort(digests, self._crew.threads)

    def leave(self, cpus: int) -> None:
        """See `Hasher.leave`."""
        threads = self._crew.threads
        self._workers = max(1, min(threads, usable_cpus() - cpus)) if cpus else threads

    def close(self) -> None:
        """End the threads and drop the staging buffers."""
        self._crew.close()
        self._staging.clear()
