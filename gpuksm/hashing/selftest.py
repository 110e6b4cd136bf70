"""Known answers that every backend must give before its first batch.

A backend that hashes wrongly could never merge unequal pages, because every
byte is compared before a merge, but it would quietly find nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import BackendUnavailable
from gpuksm.hashing.protocol import KIND_CONSTANT, KIND_NORMAL, KIND_ZERO, PAGE_BYTES

HashPages = Callable[[NDArray[np.uint8], int], tuple[NDArray[np.uint64], NDArray[np.uint8]]]


def known_pages() -> NDArray[np.uint8]:
    """uint8[4, 4096]: zeros, one repeated word, bytes (7 * i + i // 256) % 256, and a lone last byte."""
    pages = np.zeros((4, PAGE_BYTES), np.uint8)
    pages[1].view("<u8")[:] = 0x0123456789ABCDEF
    at = np.arange(PAGE_BYTES)
    pages[2] = (7 * at + at // 256) % 256
    pages[3, -1] = 1
    return pages


KNOWN_KINDS = (KIND_ZERO, KIND_CONSTANT, KIND_NORMAL, KIND_NORMAL)

# XXH3_64bits_withSeed of `known_pages`, from the reference implementation (xxHash 0.8.4).
KNOWN_DIGESTS = {
    0x0: (0x93D76FE148C689BA, 0x97BF775F6F2AC337, 0x5C722D9CEB6F9064, 0xAE1B0B159552488E),
    0x1: (0xECA1FDAFB7B0BD2A, 0x6D2DB651B3ACEA44, 0x4CC7048DAB1BFCCC, 0xE63CCB54E516F0A4),
    0x9E3779B185EBCA87: (0xB227A355398B6215, 0x7F0A2E3EDEC6B556, 0xC1B8230F7833871A, 0x3340BEE49B4FB2E8),
    0xFFFFFFFFFFFFFFFF: (0x02BF7F02D5C3EA3E, 0x4BDE74E8CE801A23, 0x0BA63261554D3AC3, 0xD96C890E73FFFD41),
}


def check(name: str, hash_pages: HashPages) -> None:
    """Hash the known pages under every known seed.

    `hash_pages` takes (pages uint8[n, 4096], seed) and gives (digests
    uint64[n], kinds uint8[n]).  Raises BackendUnavailable when any differs.
    """
    pages = known_pages()
    for seed, expected in KNOWN_DIGESTS.items():
        digests, kinds = hash_pages(pages, seed)
        for page, digest in enumerate(expected):
            if int(digests[page]) != digest or int(kinds[page]) != KNOWN_KINDS[page]:
                raise BackendUnavailable(
                    f"the {name} backend fails its self-test: page {page} with seed {seed:#x} gives "
                    f"{int(digests[page]):#018x} (kind {int(kinds[page])}), not {digest:#018x} "
                    f"(kind {KNOWN_KINDS[page]}); choose another --backend and report this"
                )
