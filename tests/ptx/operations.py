"""What each arithmetic instruction computes, on arrays with one element a lane.

Registers are unsigned (or bool); a function gets its sources as the unsigned
type of their width and returns the destination likewise.  `compile_operation`
turns an opcode into such a function once; it raises PtxError for every opcode,
type or modifier that is not listed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import PtxError

Lanes = NDArray[np.generic]
BITS = {"16": 16, "32": 32, "64": 64, "8": 8}


@dataclass(frozen=True)
class Operation:
    """`compute` and the types of its sources (dtypes as registers hold them)."""

    compute: Callable[..., Lanes]
    sources: tuple[np.dtype, ...]


@functools.cache
def unsigned(kind: str) -> np.dtype:
    """The dtype in which a register holds PTX type `kind` (u32, s64, b16, pred...)."""
    if kind == "pred":
        return np.dtype(np.bool_)
    if kind[0] in "usb" and kind[1:] in BITS:
        return np.dtype(f"u{BITS[kind[1:]] // 8}")
    raise PtxError(f"unknown type .{kind}")


def signed(kind: str) -> np.dtype:
    """The dtype in which comparisons and shifts of `kind` happen."""
    width = unsigned(kind)
    return np.dtype(f"i{width.itemsize}") if kind[0] == "s" else width


def compile_operation(opcode: tuple[str, ...]) -> Operation:
    """The operation of a dotted opcode."""
    maker = _MAKERS.get(opcode[0])
    operation = maker(opcode[1:]) if maker is not None else None
    if operation is None:
        raise PtxError(f"unknown instruction {'.'.join(opcode)}")
    return operation


def _simple(
    function: Callable[..., Lanes], sources: int, kinds: str
) -> Callable[[tuple[str, ...]], Operation | None]:
    """An opcode with one type suffix out of `kinds`, whose sources have that type."""
    allowed = kinds.split()

    def make(modifiers: tuple[str, ...]) -> Operation | None:
        if len(modifiers) != 1 or modifiers[0] not in allowed:
            return None
        return Operation(function, (unsigned(modifiers[0]),) * sources)

    return make


def _signed_aware(
    function: Callable[..., Lanes], kinds: str
) -> Callable[[tuple[str, ...]], Operation | None]:
    """Two sources, computed in the signed or unsigned type, result stored unsigned."""
    allowed = kinds.split()

    def make(modifiers: tuple[str, ...]) -> Operation | None:
        if len(modifiers) != 1 or modifiers[0] not in allowed:
            return None
        store, compute = unsigned(modifiers[0]), signed(modifiers[0])
        return Operation(lambda a, b: function(a.view(compute), b.view(compute)).view(store), (store, store))

    return make


def _wide(a: Lanes, b: Lanes, kind: str) -> Lanes:
    double = np.dtype(f"{signed(kind).kind}{unsigned(kind).itemsize * 2}")
    product = a.view(signed(kind)).astype(double) * b.view(signed(kind)).astype(double)
    return product.view(np.dtype(f"u{double.itemsize}"))


def _high64(a: Lanes, b: Lanes) -> Lanes:
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = a & mask, a >> half, b & mask, b >> half
    cross, other = a_low * b_high, a_high * b_low
    carry = ((a_low * b_low) >> half) + (cross & mask) + (other & mask)
    return a_high * b_high + (cross >> half) + (other >> half) + (carry >> half)


def _multiply(modifiers: tuple[str, ...]) -> Operation | None:
    if len(modifiers) != 2:
        return None
    mode, kind = modifiers
    width = unsigned(kind)
    if mode == "lo" and kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        return Operation(lambda a, b: a * b, (width, width))
    if mode == "wide" and kind in ("s16", "u16", "s32", "u32"):
        return Operation(lambda a, b: _wide(a, b, kind), (width, width))
    if mode == "hi" and kind == "u64":
        return Operation(_high64, (width, width))
    if mode == "hi" and kind in ("u32", "s32"):
        return Operation(lambda a, b: (_wide(a, b, kind) >> np.uint64(32)).astype(width), (width, width))
    return None


def _multiply_add(modifiers: tuple[str, ...]) -> Operation | None:
    product = _multiply(modifiers)
    if product is None or modifiers[0] == "hi":
        return None
    width = product.sources[0]
    total = width if modifiers[0] == "lo" else np.dtype(f"u{width.itemsize * 2}")
    return Operation(lambda a, b, c: product.compute(a, b) + c, (width, width, total))


def _shift(left: bool) -> Callable[[tuple[str, ...]], Operation | None]:
    """Shifts clamp: by the width or more gives zeros, or the sign for shr.s."""

    def make(modifiers: tuple[str, ...]) -> Operation | None:
        kinds = (
            ("b16", "b32", "b64") if left else ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
        )
        if len(modifiers) != 1 or modifiers[0] not in kinds:
            return None
        width, compute = unsigned(modifiers[0]), signed(modifiers[0])
        bits = width.itemsize * 8

        def shift(value: Lanes, count: Lanes) -> Lanes:
            within = np.minimum(count, bits - 1).astype(width).view(compute)
            moved = (value << within.view(width)) if left else (value.view(compute) >> within).view(width)
            beyond = (
                (value.view(compute) >> compute.type(bits - 1)).view(width)
                if compute.kind == "i"
                else width.type(0)
            )
            return np.where(count >= bits, beyond, moved).astype(width)

        return Operation(shift, (width, np.dtype(np.uint32)))

    return make


def _funnel(modifiers: tuple[str, ...]) -> Operation | None:
    if len(modifiers) != 3 or modifiers[0] not in "lr" or modifiers[1:] != ("wrap", "b32"):
        return None
    word = np.dtype(np.uint32)

    def shift(low: Lanes, high: Lanes, count: Lanes) -> Lanes:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        by = (count & np.uint32(31)).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if modifiers[0] == "l" else both >> by).astype(np.uint32)

    return Operation(shift, (word, word, word))


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _set_predicate(modifiers: tuple[str, ...]) -> Operation | None:
    if len(modifiers) != 2 or modifiers[0] not in _COMPARE:
        return None
    compare, kind = modifiers
    if (kind[0] == "b" and compare not in ("eq", "ne")) or (
        kind[0] != "u" and compare in ("lo", "ls", "hi", "hs")
    ):
        return None
    width, compute = unsigned(kind), signed(kind)
    return Operation(lambda a, b: _COMPARE[compare](a.view(compute), b.view(compute)), (width, width))


def _select(modifiers: tuple[str, ...]) -> Operation | None:
    if len(modifiers) != 1:
        return None
    width = unsigned(modifiers[0])
    return Operation(lambda a, b, p: np.where(p, a, b), (width, width, np.dtype(np.bool_)))


def _convert(modifiers: tuple[str, ...]) -> Operation | None:
    if len(modifiers) != 2 or any(kind[0] not in "us" for kind in modifiers):
        return None
    target, source = modifiers
    return Operation(
        lambda a: a.view(signed(source)).astype(signed(target)).view(unsigned(target)), (unsigned(source),)
    )


def _bit_field_insert(modifiers: tuple[str, ...]) -> Operation | None:
    if modifiers not in (("b32",), ("b64",)):
        return None
    width, count = unsigned(modifiers[0]), np.dtype(np.uint32)
    bits = width.itemsize * 8

    def insert(field: Lanes, into: Lanes, position: Lanes, length: Lanes) -> Lanes:
        at = (position & np.uint32(0xFF)).astype(np.uint64)
        long = np.minimum(length & np.uint32(0xFF), 64).astype(np.uint64)
        ones = np.where(long >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(long, 63)) - np.uint64(1))
        mask = np.where(at >= bits, np.uint64(0), ones << np.minimum(at, 63)).astype(width)
        placed = (field.astype(np.uint64) << np.minimum(at, 63)).astype(width)
        return (into & ~mask) | (placed & mask)

    return Operation(insert, (width, width, count, count))


def _address_space(modifiers: tuple[str, ...]) -> Operation | None:
    # Generic and global addresses are the same numbers here, as on the hardware.
    return Operation(lambda a: a, (np.dtype(np.uint64),)) if modifiers == ("to", "global", "u64") else None


_INTEGERS = "u16 s16 u32 s32 u64 s64"
_BITWISE = "pred b16 b32 b64"
_MAKERS: dict[str, Callable[[tuple[str, ...]], Operation | None]] = {
    "add": _simple(lambda a, b: a + b, 2, _INTEGERS),
    "sub": _simple(lambda a, b: a - b, 2, _INTEGERS),
    "neg": _simple(lambda a: ~a + a.dtype.type(1), 1, "s16 s32 s64"),
    "not": _simple(lambda a: ~a, 1, _BITWISE),
    "and": _simple(lambda a, b: a & b, 2, _BITWISE),
    "or": _simple(lambda a, b: a | b, 2, _BITWISE),
    "xor": _simple(lambda a, b: a ^ b, 2, _BITWISE),
    "mov": _simple(lambda a: a, 1, "pred b16 b32 b64 u16 u32 u64 s16 s32 s64"),
    "min": _signed_aware(np.minimum, _INTEGERS),
    "max": _signed_aware(np.maximum, _INTEGERS),
    "popc": _simple(lambda a: np.bitwise_count(a).astype(np.uint32), 1, "b32 b64"),
    "mul": _multiply,
    "mad": _multiply_add,
    "shl": _shift(True),
    "shr": _shift(False),
    "shf": _funnel,
    "setp": _set_predicate,
    "selp": _select,
    "cvt": _convert,
    "cvta": _address_space,
    "bfi": _bit_field_insert,
}
