"""Small hand-written PTX programs for the interpreter's own tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.ptx import Machine, parse

_TEMPLATE = """
.version 8.0
.target sm_75
.address_size 64
.visible .entry f(
    {parameters}
)
.maxntid 64, 1, 1
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<16>;
    {body}
}}
"""


def program(body: str, parameters: str = "") -> str:
    """A module with the one kernel f."""
    return _TEMPLATE.format(body=body, parameters=parameters)


def run(body: str, threads: int = 64, grid: int = 1, out: int = 8, reverse: bool = False) -> Machine:
    """Run `body` as f(out): %rd1 is the address of `out` bytes, %rd2 that of the thread's own u64."""
    return run_with(body, np.zeros(out, np.uint8), threads, grid, reverse)[0]


def run_with(
    body: str, room: NDArray[np.uint8], threads: int = 64, grid: int = 1, reverse: bool = False
) -> tuple[Machine, NDArray[np.uint8]]:
    """As `run`, over the bytes given; returns them too."""
    head = """
    ld.param.u64 %rd1, [a];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 8;
    add.s64 %rd2, %rd1, %rd2;
    """
    machine = Machine(parse(program(head + body, ".param .u64 a")))
    machine.launch("f", grid, threads, [machine.memory.place(room)], reverse)
    return machine, room


def store_result(body: str, register: str, kind: str, threads: int = 32) -> Sequence[int]:
    """Run `body` and store `register` of type `kind` for each thread."""
    size = {"8": 1, "16": 2, "32": 4, "64": 8}[kind[1:]]
    place = f"mul.wide.u32 %rd15, %r1, {size};\n add.s64 %rd15, %rd1, %rd15;"
    text = f"{body}\n {place}\n st.global.{kind} [%rd15], {register};\n ret;"
    _, room = run_with(text, np.zeros(threads * size, np.uint8), threads)
    values: list[int] = room.view(f"u{size}").tolist()
    return values
