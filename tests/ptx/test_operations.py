"""Each instruction computes what the PTX manual says, on edge values, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx import PtxError
from tests.ptx.operations import compile_operation, unsigned
from tests.ptx.programs import store_result

EDGES = (
    0,
    1,
    2,
    31,
    32,
    63,
    64,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x123456789ABCDEF0,
    0x7FFFFFFFFFFFFFFF,
    0x8000000000000000,
    0xFFFFFFFFFFFFFFFF,
)


def to_signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def shift_right(kind: str) -> Callable[[int, int], int]:
    bits = int(kind[1:])
    return lambda a, n: (to_signed(a, bits) if kind[0] == "s" else a) >> min(n, bits)


def binary(kind: str) -> dict[str, Callable[[int, int], int]]:
    """Name and meaning of the two-source instructions of one type."""
    bits = int(kind[1:])
    meant: Callable[[int], int] = (lambda v: to_signed(v, bits)) if kind[0] == "s" else (lambda v: v)
    return {
        f"add.{kind}": lambda a, b: a + b,
        f"sub.{kind}": lambda a, b: a - b,
        f"mul.lo.{kind}": lambda a, b: a * b,
        f"min.{kind}": lambda a, b: min(meant(a), meant(b)),
        f"max.{kind}": lambda a, b: max(meant(a), meant(b)),
        f"and.b{bits}": lambda a, b: a & b,
        f"or.b{bits}": lambda a, b: a | b,
        f"xor.b{bits}": lambda a, b: a ^ b,
    }


def check(opcode: str, meaning: Callable[..., int], result_bits: int) -> None:
    operation = compile_operation(tuple(opcode.split(".")))
    columns = np.meshgrid(
        *(
            np.array([edge & (1 << 8 * kind.itemsize) - 1 for edge in EDGES], kind)
            for kind in operation.sources
        )
    )
    columns = [column.reshape(-1) for column in columns]
    got = operation.compute(*columns)
    assert got.dtype.itemsize * 8 == result_bits or got.dtype == np.bool_
    for values in zip(got.tolist(), *(column.tolist() for column in columns), strict=True):
        assert values[0] == meaning(*values[1:]) & (1 << result_bits) - 1, (opcode, values)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_two_sources(kind: str) -> None:
    for opcode, meaning in binary(kind).items():
        check(opcode, meaning, int(kind[1:]))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_and_comparisons(kind: str) -> None:
    bits = int(kind[1:])
    meant: Callable[[int], int] = (lambda v: to_signed(v, bits)) if kind[0] == "s" else (lambda v: v)
    check(f"shl.b{bits}", lambda a, n: a << min(n, bits), bits)
    check(f"shr.{kind}", shift_right(kind), bits)
    check(f"setp.lt.{kind}", lambda a, b: meant(a) < meant(b), 1)
    check(f"setp.le.{kind}", lambda a, b: meant(a) <= meant(b), 1)
    check(f"setp.gt.{kind}", lambda a, b: meant(a) > meant(b), 1)
    check(f"setp.ge.{kind}", lambda a, b: meant(a) >= meant(b), 1)
    check(f"setp.eq.{kind}", lambda a, b: a == b, 1)
    check(f"setp.ne.{kind}", lambda a, b: a != b, 1)


def test_products() -> None:
    check("mul.wide.u32", lambda a, b: a * b, 64)
    check("mul.wide.s32", lambda a, b: to_signed(a, 32) * to_signed(b, 32), 64)
    check("mul.wide.u16", lambda a, b: a * b, 32)
    check("mul.hi.u64", lambda a, b: a * b >> 64, 64)
    check("mul.hi.u32", lambda a, b: a * b >> 32, 32)
    check("mul.hi.s32", lambda a, b: to_signed(a, 32) * to_signed(b, 32) >> 32, 32)
    check("mad.lo.s32", lambda a, b, c: a * b + c, 32)
    check("mad.lo.s64", lambda a, b, c: a * b + c, 64)
    check("mad.wide.u32", lambda a, b, c: a * b + c, 64)


def test_the_rest() -> None:
    check("neg.s32", lambda a: -a, 32)
    check("neg.s64", lambda a: -a, 64)
    check("not.b64", lambda a: ~a, 64)
    check("popc.b64", lambda a: a.bit_count(), 32)
    check("selp.b64", lambda a, b, p: a if p else b, 64)
    check("shf.l.wrap.b32", lambda low, high, n: (high << 32 | low) << (n & 31) >> 32, 32)
    check("shf.r.wrap.b32", lambda low, high, n: (high << 32 | low) >> (n & 31), 32)
    check("cvt.u32.u64", lambda a: a, 32)
    check("cvt.u64.u32", lambda a: a, 64)
    check("cvt.s64.s32", lambda a: to_signed(a, 32), 64)
    check("cvt.s32.s8", lambda a: to_signed(a, 8), 32)
    check("cvt.u16.s8", lambda a: to_signed(a, 8), 16)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    def meaning(field: int, into: int, at: int, length: int) -> int:
        mask = ((1 << (length & 255)) - 1 << (at & 255)) & (1 << bits) - 1
        return into & ~mask | (field << (at & 255)) & mask

    operation = compile_operation(("bfi", f"b{bits}"))
    width = unsigned(f"b{bits}")
    for at in (0, 1, 31, 32, 40, 63, 64, 255):
        for length in (0, 1, 31, 32, 63, 64, 255):
            for field, into in ((0x123456789ABCDEF0, 0), (0, ~0), (~0, 0x0F0F0F0F0F0F0F0F)):
                field, into = field & (1 << bits) - 1, into & (1 << bits) - 1
                given = [
                    np.array([value], kind)
                    for value, kind in zip((field, into, at, length), operation.sources, strict=True)
                ]
                assert int(operation.compute(*given)[0]) == meaning(field, into, at, length), (at, length)
    assert width.itemsize * 8 == bits


@pytest.mark.parametrize(
    "opcode",
    [
        "add.f32",
        "add.sat.s32",
        "mul.lo.b32",
        "mad.hi.u32",
        "shf.l.clamp.b32",
        "setp.lt.b32",
        "setp.eq.and.s32",
        "cvt.f32.u32",
        "cvt.sat.u8.u32",
        "cvta.to.shared.u64",
        "fma.rn.f32",
        "atom.global.add.u32",
        "min.b32",
        "add.cc.u32",
        "lop3.b32",
        "neg.u32",
        "mov.f64",
        "shr.b8",
    ],
)
def test_unknown_instructions_raise(opcode: str) -> None:
    with pytest.raises(PtxError, match="unknown"):
        compile_operation(tuple(opcode.split(".")))


def test_moves_between_pairs_and_narrow_stores() -> None:
    assert (
        store_result("mov.b64 %rd3, {%r1, %r1}; mov.b64 {%r2, %r3}, %rd3;", "%rd3", "u64")[5] == 5 << 32 | 5
    )
    assert (
        store_result("mov.b64 %rd3, 0x1122334455667788; mov.b64 {%r2, %r3}, %rd3;", "%r3", "u32")[0]
        == 0x11223344
    )
    assert store_result("mov.u32 %r2, 0x1FE;", "%r2", "u8")[0] == 0xFE
    assert store_result("cvt.u16.u32 %rs1, %r1; cvt.u32.u8 %r2, %rs1;", "%r2", "u32")[7] == 7
