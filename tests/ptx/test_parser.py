"""The parser reads what NVRTC writes and refuses everything else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import PtxError, parse
from tests.ptx.parser import Address, Immediate, Pair, Register, Special, Symbol
from tests.ptx.programs import program


def test_operands_of_every_kind() -> None:
    kernel = parse(
        program("""
        .shared .align 4 .b8 room[64];
        @!%p1 bra.uni $L_1;
        mov.b64 {%r1, %r2}, %rd1;
        ld.global.nc.u64 %rd1, [%rd2+-16];
        shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;
        mov.u32 %r1, room;
        mov.u32 %r1, %tid.x;
        mov.b32 %r1, 0x10;
    $L_1:
        ret;""")
    ).kernels["f"]
    branch, split, load, shuffle, place, special, number, _ = kernel.instructions
    assert branch.negated
    assert branch.guard == Register("%p1", "pred")
    assert kernel.labels == {"$L_1": 7}
    assert split.operands[0] == Pair(Register("%r1", "b32"), Register("%r2", "b32"))
    assert load.operands[1] == Address(Register("%rd2", "b64"), -16)
    assert shuffle.operands[0] == Pair(Register("%r1", "b32"), Register("%p1", "pred"))
    assert shuffle.operands[4] == Immediate(-1)
    assert place.operands[1] == Symbol("room")
    assert special.operands[1] == Special("%tid.x")
    assert number.operands[1] == Immediate(16)
    assert kernel.shared == {"room": (0, 64)}
    assert not kernel.has_barriers


def test_parameters_globals_and_limits() -> None:
    text = program("ret;", parameters=".param .u64 .ptr .global .align 8 a,\n.param .u32 b")
    text = text.replace(".visible", ".global .align 8 .b8 table[4] = {1, 2, 255};\n.visible")
    module = parse(text)
    assert module.target == "sm_75"
    assert module.kernels["f"].parameters == [("a", "u64"), ("b", "u32")]
    assert module.kernels["f"].max_threads == 64
    np.testing.assert_array_equal(module.globals["table"], np.array([1, 2, 255, 0], np.uint8))


@pytest.mark.parametrize(
    "body",
    [
        ".local .align 4 .b8 room[64]; ret;",
        ".reg .f32 %f<2>; ret;",
        ".shared .f32 room; ret;",
        "add.f32 %f1, %f2, 0f3F800000; ret;",
        "mov.b32 %r1, {%r1, %r2, %r3}; ret;",
    ],
)
def test_what_is_unknown_is_refused(body: str) -> None:
    with pytest.raises(PtxError):
        parse(program(body))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".address_size 64", ".address_size 32"),
        (".target sm_75", ""),
        (".visible", ".global .f32 one;\n.visible"),
        (".visible", ".func helper() { ret; }\n.visible"),
        (".param .u64 a", ".param .align 4 .b8 a[8]"),
    ],
)
def test_modules_that_are_not_understood(old: str, new: str) -> None:
    with pytest.raises(PtxError):
        parse(program("ret;", parameters=".param .u64 a").replace(old, new))
