"""The page hash as LLVM vector code, eight 64-bit accumulators to a vector.

numba's own vectoriser reaches a third of what the memory gives, so the hash of
one page is emitted as LLVM IR on `<8 x i64>`: one AVX-512 register, or two or
four narrower ones, which LLVM splits by itself.  Pages that may be constant
show on the way, in the sums that the hash needs anyhow, and only those are
looked at again, while in cache.  The loop over pages is in this same file
because numba's disk cache only notices changes of the file that holds the
compiled function.  Words are read in native order: little-endian
machines only, as docs/hash_spec.md says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpuksm.hashing import xxh3
from gpuksm.hashing._jit import kernel
from gpuksm.hashing.protocol import (
    KIND_CONSTANT,
    KIND_NORMAL,
    KIND_UNREADABLE,
    KIND_ZERO,
    MAX_SEGMENTS,
    PAGE_BYTES,
)

_LANES = 8
_STRIPES = 16  # per block: (192-byte secret - 64) / 8
_BLOCK_WORDS = _LANES * _STRIPES
_PAGE_WORDS = PAGE_BYTES // 8
_FULL_BLOCKS = 3  # the fourth block of a page ends in the last stripe and is not scrambled

_I32, _I64, _I128 = ir.IntType(32), ir.IntType(64), ir.IntType(128)
_VECTOR = ir.VectorType(_I64, _LANES)
_SWAP_NEIGHBOURS = ir.Constant(ir.VectorType(_I32, _LANES), [lane ^ 1 for lane in range(_LANES)])


def _word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _vector(values: Any) -> ir.Constant:
    return ir.Constant(_VECTOR, list(values))


def _splat(value: int) -> ir.Constant:
    return _vector([value] * _LANES)


class _PageHash:
    """Emits the hash of the page at `page` with the 40 words of `xxh3.page_keys` at `keys`."""

    def __init__(self, builder: ir.IRBuilder, page: Any, keys: Any) -> None:
        self.builder = builder
        self.page = page
        self.stripe_keys = [self._load(keys, _word(stripe)) for stripe in range(_STRIPES)]
        self.scramble_key = self._load(keys, _word(16))
        self.last_key = self._load(keys, _word(24))
        self.merge_key = self._load(keys, _word(32))
        first = builder.load(page, align=8)
        lane0 = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), first, ir.Constant(_I32, 0))
        first_word = builder.shuffle_vector(
            lane0, lane0, ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES)
        )
        self.constant_sum = builder.mul(first_word, _splat(_STRIPES))

    def _load(self, base: Any, word: Any) -> Any:
        address = self.builder.bitcast(self.builder.gep(base, [word]), _VECTOR.as_pointer())
        return self.builder.load(address, align=8)

    def _low(self, vector: Any) -> Any:
        return self.builder.and_(vector, _splat(0xFFFFFFFF))

    def _high(self, vector: Any) -> Any:
        return self.builder.lshr(vector, _splat(32))

    def _block(self, accumulators: Any, differing: Any, first_word: Any, keys: list[Any]) -> tuple[Any, Any]:
        """XXH3_accumulate_512 for the stripes of one block.

        XXH3 adds each data word to the neighbouring accumulator.  Additions
        commute, so the words are summed in place and swapped once per block.
        In a page of one repeated word every sum is 16 times that word; how the
        sums differ from it is ORed into `differing`.
        """
        build = self.builder
        total = _splat(0)
        for stripe, key in enumerate(keys):
            data = self._load(self.page, build.add(first_word, _word(stripe * _LANES)))
            keyed = build.xor(data, key)
            accumulators = build.add(accumulators, build.mul(self._low(keyed), self._high(keyed)))
            total = build.add(total, data)
        differing = build.or_(differing, build.xor(total, self.constant_sum))
        swapped = build.shuffle_vector(total, total, _SWAP_NEIGHBOURS)
        return build.add(accumulators, swapped), differing

    def _scramble(self, accumulators: Any) -> Any:
        """XXH3_scrambleAcc; two 32-bit products, because most CPUs have no quick 64-bit vector multiply."""
        build = self.builder
        mixed = build.xor(accumulators, build.lshr(accumulators, _splat(47)))
        mixed = build.xor(mixed, self.scramble_key)
        low = build.mul(self._low(mixed), _splat(xxh3.PRIME32_1))
        high = build.mul(self._high(mixed), _splat(xxh3.PRIME32_1))
        return build.add(low, build.shl(high, _splat(32)))

    def _merge(self, accumulators: Any) -> Any:
        """XXH3_mergeAccs over four 64 x 64 -> 128 bit products, then XXH3_avalanche."""
        build = self.builder
        keyed = build.xor(accumulators, self.merge_key)
        result = _word(PAGE_BYTES * xxh3.PRIME64_1 & xxh3.U64)
        for pair in range(_LANES // 2):
            left, right = (
                build.zext(build.extract_element(keyed, ir.Constant(_I32, 2 * pair + lane)), _I128)
                for lane in (0, 1)
            )
            product = build.mul(left, right)
            high = build.trunc(build.lshr(product, ir.Constant(_I128, 64)), _I64)
            result = build.add(result, build.xor(build.trunc(product, _I64), high))
        result = build.xor(result, build.lshr(result, _word(37)))
        result = build.mul(result, _word(xxh3.PRIME_MX1))
        return build.xor(result, build.lshr(result, _word(32)))

    def emit(self) -> tuple[Any, Any]:
        """(digest, 0 only when all words of the page may be equal)"""
        build = self.builder
        entry = build.block
        loop = build.append_basic_block("full_block")
        rest = build.append_basic_block("last_block")
        build.branch(loop)

        build.position_at_end(loop)
        block = build.phi(_I64)
        accumulators, differing = build.phi(_VECTOR), build.phi(_VECTOR)
        block.add_incoming(_word(0), entry)
        accumulators.add_incoming(_vector(xxh3.ACCUMULATORS), entry)
        differing.add_incoming(_splat(0), entry)
        mixed, differs = self._block(
            accumulators, differing, build.mul(block, _word(_BLOCK_WORDS)), self.stripe_keys
        )
        mixed = self._scramble(mixed)
        following = build.add(block, _word(1))
        block.add_incoming(following, build.block)
        accumulators.add_incoming(mixed, build.block)
        differing.add_incoming(differs, build.block)
        build.cbranch(build.icmp_unsigned("<", following, _word(_FULL_BLOCKS)), loop, rest)

        build.position_at_end(rest)
        keys = [*self.stripe_keys[:-1], self.last_key]
        mixed, differs = self._block(mixed, differs, _word(_FULL_BLOCKS * _BLOCK_WORDS), keys)
        any_difference = build.extract_element(differs, ir.Constant(_I32, 0))
        for lane in range(1, _LANES):
            any_difference = build.or_(
                any_difference, build.extract_element(differs, ir.Constant(_I32, lane))
            )
        return self._merge(mixed), any_difference


def _page_digest(_typing: Any, words: Any, first: Any, keys: Any) -> Any:
    """(digest, suspicion) of the page that starts at words[first]; see `_PageHash.emit`."""
    signature = types.UniTuple(types.uint64, 2)(words, types.intp, keys)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pages = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        keys = context.make_array(signature.args[2])(context, builder, arguments[2]).data
        digest, difference = _PageHash(builder, builder.gep(pages, [arguments[1]]), keys).emit()
        return cgutils.pack_array(builder, [digest, difference])  # type: ignore[no-untyped-call]

    return signature, generate


_hash_page: Any = intrinsic(_page_digest)

_READ_ONLY_WORDS = types.Array(types.uint64, 1, "C", readonly=True)


@kernel(
    types.void(_READ_ONLY_WORDS, types.boolean[::1], _READ_ONLY_WORDS, types.uint64[::1], types.uint8[::1])
)
def hash_pages(words: Any, ok: Any, keys: Any, digests: Any, kinds: Any) -> None:
    """Hash digests.size pages that lie one after another in `words` (uint64).

    `ok` (bool) says which of them hold anything, `keys` are `xxh3.page_keys`;
    sets `digests` and `kinds`.
    """
    for page in range(digests.size):
        if not ok[page]:
            digests[page] = 0
            kinds[page] = KIND_UNREADABLE
            continue
        first = page * _PAGE_WORDS
        digest, difference = _hash_page(words, first, keys)
        digests[page] = digest
        if difference == 0:
            repeated = words[first]
            # Unsigned, or numba's handling of negative indices keeps this from being vectorised.
            for at in range(np.uint64(first), np.uint64(first + _PAGE_WORDS)):
                difference |= words[at] ^ repeated
        if difference != 0:
            kinds[page] = KIND_NORMAL
        else:
            kinds[page] = KIND_ZERO if words[first] == 0 else KIND_CONSTANT


def _call_readv(_typing: Any, function: Any, pid: Any, local: Any, remote: Any, segments: Any) -> Any:
    """process_vm_readv, which lies at `function`: one segment at `local`, `segments` of them at `remote`."""
    signature = types.int64(function, pid, local, remote, segments)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        at, pid, local, remote, segments = arguments
        kind = ir.FunctionType(_I64, [_I32, _I64, _I64, _I64, _I64, _I64])
        call = builder.inttoptr(at, kind.as_pointer())
        return builder.call(call, [builder.trunc(pid, _I32), local, _word(1), remote, segments, _word(0)])

    return signature, generate


def _claim_one(_typing: Any, counter: Any) -> Any:
    """counter[0]++ for several threads; its value before."""
    signature = types.int64(counter)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", place, _word(1), "monotonic")

    return signature, generate


_readv: Any = intrinsic(_call_readv)
_claim: Any = intrinsic(_claim_one)


_NUMBERS = types.Array(types.int64, 1, "C", readonly=True)


@kernel(
    types.int64(
        types.uint64,
        _NUMBERS,
        _READ_ONLY_WORDS,
        _NUMBERS,
        types.int64,
        types.int64,
        types.int64,
        types.uint64,
        types.uint64,
        types.uint64[::1],
    )
)
def read_pages(
    readv: Any,
    firsts: Any,
    addresses: Any,
    pids: Any,
    first: Any,
    end: Any,
    chunk_pages: Any,
    staging_at: Any,
    segments_at: Any,
    segments: Any,
) -> Any:
    """Read pages `first` to `end` - 1 of other processes to address `staging_at`, `chunk_pages` a call.

    Stretch i is pages firsts[i] .. firsts[i + 1] - 1, at addresses[i] of process pids[i].  `segments`
    (2 + 2 * MAX_SEGMENTS), at address `segments_at`, is room to work in.  `readv` is the address of
    process_vm_readv: calling it from here spares the interpreter.  Returns the first page of a call
    that did not read everything, or `end`; what lies before it was read.
    """
    at, above = 0, pids.size
    while above - at > 1:
        middle = (at + above) // 2
        if firsts[middle] <= first:
            at = middle
        else:
            above = middle
    page = first
    while page < end:
        begin, pid, count = page, pids[at], 0
        stop = min(end, begin + chunk_pages)
        while page < stop and count < MAX_SEGMENTS and pids[at] == pid:
            pages = min(firsts[at + 1], stop) - page
            segments[2 + 2 * count] = addresses[at] + np.uint64((page - firsts[at]) * PAGE_BYTES)
            segments[3 + 2 * count] = np.uint64(pages * PAGE_BYTES)
            count += 1
            page += pages
            if page < end and page == firsts[at + 1]:
                at += 1
        segments[0] = staging_at + np.uint64((begin - first) * PAGE_BYTES)
        segments[1] = np.uint64((page - begin) * PAGE_BYTES)
        got = _readv(readv, pid, segments_at, segments_at + np.uint64(16), np.uint64(count))
        if got != (page - begin) * PAGE_BYTES:
            return begin
    return end


@kernel(
    types.int64(
        types.uint64,
        _NUMBERS,
        _READ_ONLY_WORDS,
        _NUMBERS,
        types.int64,
        types.int64[::1],
        types.uint64,
        types.uint64[::1],
        types.boolean[::1],
        types.uint64,
        types.uint64[::1],
        _READ_ONLY_WORDS,
        types.uint64[::1],
        types.uint8[::1],
        types.int64[::1],
    )
)
def read_and_hash(
    readv: Any,
    firsts: Any,
    addresses: Any,
    pids: Any,
    chunk_pages: Any,
    claims: Any,
    staging_at: Any,
    staging: Any,
    ok: Any,
    segments_at: Any,
    segments: Any,
    keys: Any,
    digests: Any,
    kinds: Any,
    failed: Any,
) -> Any:
    """Read chunks of pages of other processes and hash them, until none is left to claim.

    See `read_pages`.  Every thread has a `staging` of its own, `segments`, and `failed`, which takes
    the numbers of the chunks that could not be read whole; returns how many.
    """
    missing = 0
    while True:
        chunk = _claim(claims)
        first = chunk * chunk_pages
        if first >= digests.size:
            return missing
        end = min(first + chunk_pages, digests.size)
        got = read_pages(
            readv, firsts, addresses, pids, first, end, chunk_pages, staging_at, segments_at, segments
        )
        if got == end:
            hash_pages(staging, ok, keys, digests[first:end], kinds[first:end])
        else:
            failed[missing] = chunk
            missing += 1
