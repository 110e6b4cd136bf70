"""Pages that are in this process already, as a PageSource."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.protocol import PAGE_BYTES


class ArraySource:
    """The pages of a C-contiguous uint8 array, the last incomplete one left out; each read is one copy."""

    def __init__(self, octets: NDArray[np.uint8]) -> None:
        self._octets = octets.reshape(-1)

    @property
    def pages(self) -> int:
        return len(self._octets) // PAGE_BYTES

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        """See `PageSource.read`; numpy copies without the GIL."""
        np.copyto(out[: count * PAGE_BYTES], self._octets[first * PAGE_BYTES : (first + count) * PAGE_BYTES])
        ok[:count] = True
