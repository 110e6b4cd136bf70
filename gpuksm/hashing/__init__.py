"""Page digests: one hash, several backends that agree on every bit, and the sort that groups equal ones.

`select.create` gives a hasher; nothing here imports numba, cupy or pyopencl
before that, so that `gpuksm --help` stays quick.  Digests only propose: what
they call equal is compared byte for byte elsewhere before anything is merged.
"""

from gpuksm.hashing.protocol import (
    KIND_CONSTANT,
    KIND_NORMAL,
    KIND_UNREADABLE,
    KIND_ZERO,
    PAGE_BYTES,
    Hasher,
    PageSource,
)
from gpuksm.hashing.select import create

__all__ = [
    "KIND_CONSTANT",
    "KIND_NORMAL",
    "KIND_UNREADABLE",
    "KIND_ZERO",
    "PAGE_BYTES",
    "Hasher",
    "PageSource",
    "create",
]
