"""The engine: divergence, barriers, exchanges, and everything that must raise."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import GlobalMemory, Machine, PtxError, parse
from tests.ptx.programs import program, run, run_with, store_result

SHARED = ".shared .align 8 .b8 room[256];\n shl.b32 %r2, %r1, 2; mov.u32 %r3, room; add.s32 %r4, %r3, %r2;\n"


def test_divergent_branches_meet_again() -> None:
    values = store_result(
        """
        and.b32 %r2, %r1, 1;
        setp.eq.s32 %p1, %r2, 0;
        mov.u32 %r3, 0;
        @%p1 bra $even;
        mul.lo.s32 %r3, %r1, 10;
        bra.uni $done;
    $even:
        setp.gt.u32 %p2, %r1, 15;
        @!%p2 add.s32 %r3, %r3, 7;
    $done:
        add.s32 %r3, %r3, 1;
        vote.sync.ballot.b32 %r4, %p1, -1;
        add.s32 %r3, %r3, %r4;
        sub.s32 %r3, %r3, 0x55555555;""",
        "%r3",
        "u32",
    )
    assert values == [i * 10 + 1 if i % 2 else 8 if i <= 15 else 1 for i in range(32)]


def test_loops_of_different_length() -> None:
    values = store_result(
        """
        mov.u32 %r2, 0; mov.u32 %r3, 0;
    $loop:
        add.s32 %r2, %r2, %r3;
        add.s32 %r3, %r3, 1;
        setp.le.u32 %p1, %r3, %r1;
        @%p1 bra $loop;""",
        "%r2",
        "u32",
    )
    assert values == [i * (i + 1) // 2 for i in range(32)]


@pytest.mark.parametrize("lanes", [1, 2, 16])
def test_butterfly(lanes: int) -> None:
    values = store_result(f"shfl.sync.bfly.b32 %r2|%p1, %r1, {lanes}, 31, -1;", "%r2", "u32")
    assert values == [i ^ lanes for i in range(32)]


@pytest.mark.parametrize("reverse", [False, True])
def test_shared_memory_across_a_barrier(reverse: bool) -> None:
    body = (
        SHARED
        + """
        st.shared.u32 [%r4], %r1;
        bar.sync 0;
        sub.s32 %r5, 63, %r1;
        shl.b32 %r5, %r5, 2;
        add.s32 %r5, %r5, %r3;
        ld.shared.u32 %r6, [%r5];
        cvt.u64.u32 %rd3, %r6;
        st.global.u64 [%rd2], %rd3;
        ret;"""
    )
    _, room = run_with(body, np.zeros(512, np.uint8), reverse=reverse)
    assert room.view(np.uint64).tolist() == list(range(63, -1, -1))


RAISES = {
    "shuffle in a divergent warp": (
        "setp.lt.u32 %p1, %r1, 5; @!%p1 bra $end; shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1; $end: ret;",
        "missing",
    ),
    "ballot of some lanes": (
        "setp.lt.u32 %p1, %r1, 5; @!%p1 bra $end; vote.sync.ballot.b32 %r2, %p1, -1; $end: ret;",
        "missing",
    ),
    "partial member mask": ("shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, 0xFF; ret;", "member"),
    "clamped shuffle": ("shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 0x181f, -1; ret;", "butterflies"),
    "shuffle up": ("shfl.sync.up.b32 %r2|%p2, %r1, 1, 0, -1; ret;", "unknown"),
    "barrier of half a warp": (
        "setp.lt.u32 %p1, %r1, 5; @!%p1 bra $end; bar.sync 0; $end: ret;",
        "divergent warp",
    ),
    "barrier of one warp": (
        "setp.lt.u32 %p1, %r1, 32; @!%p1 bra $end; bar.sync 0; $end: ret;",
        "only some threads",
    ),
    "different barriers": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra $a; bar.sync 0; ret; $a: bar.sync 0; ret;",
        "only some threads",
    ),
    "numbered barrier": ("bar.sync 1; ret;", "unknown barrier"),
    "uniform branch that is not": ("setp.lt.u32 %p1, %r1, 5; @%p1 bra.uni $a; $a: ret;", "diverges"),
    "load beyond": ("ld.global.u64 %rd3, [%rd1+512]; ret;", "illegal address"),
    "load before": ("ld.global.u64 %rd3, [%rd1+-8]; ret;", "illegal address"),
    "misaligned load": ("ld.global.u64 %rd3, [%rd1+4]; ret;", "misaligned"),
    "misaligned store": ("st.global.u32 [%rd2+2], %r1; ret;", "misaligned"),
    "all threads store one word": ("st.global.u32 [%rd1], %r1; ret;", "two threads"),
    "neighbour's word without a barrier": (
        "st.global.u64 [%rd2], %rd1; xor.b64 %rd3, %rd2, 8; ld.global.u64 %rd4, [%rd3]; ret;",
        "another thread|a thread",
    ),
    "word others have read": (
        "ld.global.u64 %rd4, [%rd1]; st.global.u64 [%rd2], %rd4; ret;",
        "another thread",
    ),
    "nc load of what is written": (
        "st.global.u64 [%rd2], %rd1; ld.global.nc.u64 %rd3, [%rd2]; ret;",
        "a thread",
    ),
    "store to what nc loads read": (
        "ld.global.nc.u64 %rd3, [%rd2]; st.global.u64 [%rd2], %rd1; ret;",
        "another thread",
    ),
    "shared never written": (SHARED + "ld.shared.u32 %r5, [%r4]; ret;", "never written"),
    "shared beyond": (SHARED + "st.shared.u32 [%r4+256], %r1; ret;", "out of bounds"),
    "shared before": (SHARED + "st.shared.u32 [%r4+-4], %r1; ret;", "out of bounds"),
    "shared misaligned": (SHARED + "st.shared.u32 [%r4+2], %r1; ret;", "misaligned"),
    "shared race": (
        SHARED + "st.shared.u32 [%r4], %r1; xor.b32 %r5, %r4, 4; ld.shared.u32 %r6, [%r5]; ret;",
        "without a barrier",
    ),
    "shared race of warps": (
        SHARED
        + "st.shared.u32 [%r4], %r1; xor.b32 %r5, %r4, 128; ld.shared.u32 %r6, [%r5]; bar.sync 0; ret;",
        "never written|without a barrier",
    ),
    "shared overwritten while read": (
        SHARED
        + "st.shared.u32 [%r4], %r1; bar.sync 0; ld.shared.u32 %r6, [%r3]; st.shared.u32 [%r4], %r6; ret;",
        "without a barrier",
    ),
    "shared store of all": (SHARED + "st.shared.u32 [%r3], %r1; ret;", "at once|same shared"),
    "register never written": ("add.s32 %r2, %r3, 1; ret;", "before it is written"),
    "register written by other lanes": (
        "setp.lt.u32 %p1, %r1, 5; @%p1 mov.u32 %r2, 1; add.s32 %r3, %r2, 1; ret;",
        "before it is written",
    ),
    "register of another width": ("add.s64 %rd3, %r1, 1; ret;", "%r1 is .b32"),
    "unknown label": ("bra $nowhere; ret;", "unknown branch"),
    "unknown special register": ("mov.u32 %r2, %smid; ret;", "unknown special"),
    "unknown symbol": ("mov.u64 %rd3, nothing; ret;", "unknown symbol"),
    "unknown space": ("ld.local.u32 %r2, [%rd1]; ret;", "unknown"),
    "vector load": ("ld.global.v2.u32 {%r2, %r3}, [%rd1]; ret;", "unknown"),
    "atomic": ("atom.global.add.u32 %r2, [%rd1], 1; ret;", "unknown"),
    "no end": ("mov.u32 %r2, 1;", "over its end"),
    "parameter of another type": ("ld.param.u32 %r2, [a]; ret;", "no parameter"),
}


@pytest.mark.parametrize("name", RAISES)
@pytest.mark.parametrize("reverse", [False, True])
def test_what_cuda_leaves_undefined_raises(name: str, reverse: bool) -> None:
    body, message = RAISES[name]
    with pytest.raises(PtxError, match=message):
        run(body, out=512, reverse=reverse)


def test_launches_that_cannot_be() -> None:
    machine = Machine(parse(program("ret;", ".param .u32 a")))
    for grid, block, arguments in ((0, 32, [1]), (1, 33, [1]), (1, 96, [1]), (1, 32, []), (1, 32, [1 << 32])):
        with pytest.raises(PtxError):
            machine.launch("f", grid, block, arguments)
    with pytest.raises(PtxError):
        machine.launch("g", 1, 32, [1])
    machine.launch("f", 1, 32, [1])


def test_global_memory() -> None:
    memory = GlobalMemory()
    address = memory.allocate(16)
    memory.write(address + 8, np.arange(8, dtype=np.uint8))
    assert memory.read(address + 8, 8).tolist() == list(range(8))
    threads = np.zeros(1, np.int64)
    with pytest.raises(PtxError, match="never written"):
        memory.load(np.array([address], np.uint64), np.dtype(np.uint64), threads, False)
    assert memory.load(np.array([address + 8], np.uint64), np.dtype(np.uint8), threads, False)[0] == 0
    with pytest.raises(PtxError, match="illegal"):
        memory.write(address + 9, np.zeros(8, np.uint8))
    fixed = memory.place(np.arange(4, dtype=np.uint32), writable=False)
    with pytest.raises(PtxError, match="read-only"):
        memory.store(np.array([fixed], np.uint64), np.zeros(1, np.uint32), threads)
    memory.free(address)
    with pytest.raises(PtxError, match="illegal"):
        memory.read(address, 1)
    with pytest.raises(PtxError, match="no allocation"):
        memory.free(address)


def test_blocks_and_their_numbers() -> None:
    body = """
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r4, %r2, %r3, %r1;
        mov.u32 %r5, %nctaid.x; mov.u32 %r6, %laneid; add.s32 %r6, %r6, %r5;
        cvt.u64.u32 %rd3, %r6; mul.wide.u32 %rd4, %r4, 8; add.s64 %rd4, %rd1, %rd4;
        st.global.u64 [%rd4], %rd3; ret;"""
    machine, room = run_with(body, np.zeros(3 * 64 * 8, np.uint8), grid=3)
    assert room.view(np.uint64).tolist() == [i % 32 + 3 for i in range(192)]
    assert machine.executed["st.global.u64"] == 1
