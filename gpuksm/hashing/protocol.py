"""What a hashing backend takes and gives; every backend and every reader meets here.

Pages are 4096 bytes and addressed by their index in a source.  Digests are
XXH3_64bits_withSeed (docs/hash_spec.md), the same on every backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_BYTES = 4096
MAX_SEGMENTS = 1024  # of one process_vm_readv, include/uapi/linux/uio.h

KIND_NORMAL = 0
KIND_ZERO = 1
KIND_CONSTANT = 2  # one 64-bit word repeated over the whole page, and not zero
KIND_UNREADABLE = 255  # gone while it was read; its digest is 0 and means nothing


class PageSource(Protocol):
    """Pages that can be read by index, from several threads at once."""

    @property
    def pages(self) -> int:
        """Number of pages; valid indices are 0 to pages - 1."""

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        """Read pages first to first + count - 1 without holding the GIL.

        Fills out[: count * 4096] and sets every ok[:count]; a page that cannot
        be read gets ok False, and its bytes of `out` are undefined.
        """


class Stretches(NamedTuple):
    """Where pages lie: pages first[i] to first[i + 1] - 1 at address[i] of process pid[i].

    first i8 (one more than there are stretches, the last is the number of pages); address u8; pid i8.
    """

    first: NDArray[np.int64]
    address: NDArray[np.uint64]
    pid: NDArray[np.int64]


@runtime_checkable
class RemoteSource(PageSource, Protocol):
    """Pages of other processes that a backend may read by itself, where `stretches` says.

    What it cannot read whole it asks `read` for.
    """

    @property
    def stretches(self) -> Stretches: ...


class Hasher(Protocol):
    """A backend; `close` gives back its threads and buffers."""

    name: str  # "cpu", "cuda" or "opencl"
    seed: int

    def digest(self, source: PageSource, digests: NDArray[np.uint64], kinds: NDArray[np.uint8]) -> None:
        """Read and hash every page of `source`.

        Sets digests[:source.pages] and kinds[:source.pages] (a KIND_ constant).
        What `source.read` raises comes through; the arrays are then undefined.
        """

    def sort(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """(sorted digests, order) with sorted == digests[order]; stable."""

    def leave(self, cpus: int) -> None:
        """From now on leave so many CPUs to others, where hashing takes all of them."""

    def close(self) -> None:
        """Give back threads and buffers; the hasher cannot be used any more."""
