"""XXH3_64bits_withSeed for one fixed length, 4096 bytes: constants and the keys that a seed gives.

Names follow xxHash's own specification (https://github.com/Cyan4973/xxHash,
doc/xxhash_spec.md and xxhash.h); docs/hash_spec.md writes the special case out.
The kernels of every backend are built from what stands here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = (1 << 64) - 1

PRIME32_1 = 0x9E3779B1
PRIME32_2 = 0x85EBCA77
PRIME32_3 = 0xC2B2AE3D
PRIME64_1 = 0x9E3779B185EBCA87
PRIME64_2 = 0xC2B2AE3D27D4EB4F
PRIME64_3 = 0x165667B19E3779F9
PRIME64_4 = 0x85EBCA77C2B2AE63
PRIME64_5 = 0x27D4EB2F165667C5
PRIME_MX1 = 0x165667919E3779F9

ACCUMULATORS = (
    PRIME32_3,
    PRIME64_1,
    PRIME64_2,
    PRIME64_3,
    PRIME64_4,
    PRIME32_2,
    PRIME64_5,
    PRIME32_1,
)

# XXH3_kSecret, 192 bytes, as little-endian 64-bit words.
SECRET = (
    0xBE4BA423396CFEB8,
    0x1CAD21F72C81017C,
    0xDB979083E96DD4DE,
    0x1F67B3B7A4A44072,
    0x78E5C0CC4EE679CB,
    0x2172FFCC7DD05A82,
    0x8E2443F7744608B8,
    0x4C263A81E69035E0,
    0xCB00C391BB52283C,
    0xA32E531B8B65D088,
    0x4EF90DA297486471,
    0xD8ACDEA946EF1938,
    0x3F349CE33F76FAA8,
    0x1D4F0BC7C7BBDCF9,
    0x3159B4CD4BE0518A,
    0x647378D9C97E9FC8,
    0xC3EBD33483ACC5EA,
    0xEB6313FAFFA081C5,
    0x49DAF0B751DD0D17,
    0x9E68D429265516D3,
    0xFCA1477D58BE162B,
    0xCE31D07AD1B8F88F,
    0x280416958F3ACB45,
    0x7E404BBBCAFBD7AF,
)

# Byte offsets into the secret: XXH3_SECRET_LASTACC_START counts back from the
# end of the secret less one stripe (192 - 64 - 7), XXH3_SECRET_MERGEACCS_START
# from its beginning.
LAST_STRIPE_OFFSET = 121
MERGE_OFFSET = 11


def derived_secret(seed: int) -> NDArray[np.uint64]:
    """The 24 words of XXH3_initCustomSecret: even words + seed, odd words - seed."""
    return np.array(
        [(word - seed if at & 1 else word + seed) & U64 for at, word in enumerate(SECRET)], dtype="<u8"
    ).astype(np.uint64)


def page_keys(seed: int) -> NDArray[np.uint64]:
    """All keys a page hash needs, uint64[40].

    [0:24] the derived secret (stripe i of a block uses words i to i + 7, the
    scramble words 16 to 23), [24:32] the last stripe's, [32:40] the merge's.
    """
    secret = derived_secret(seed)
    octets = secret.astype("<u8").tobytes()

    def at(offset: int) -> NDArray[np.uint64]:
        return np.frombuffer(octets, "<u8", 8, offset).astype(np.uint64)

    return np.concatenate([secret, at(LAST_STRIPE_OFFSET), at(MERGE_OFFSET)])
