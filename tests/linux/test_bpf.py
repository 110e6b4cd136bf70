"""Small programs of our own, run by the kernel."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from gpuksm.linux.bpf import R0, R1, R2, R6, R7, R8, Area, Code, Program
from tests import requirements_env


@pytest.fixture
def area() -> Iterator[Area]:
    requirements_env.need("root", "bpf")
    made = Area(100)
    yield made
    made.close()


def _run(code: Code) -> None:
    program = Program(code)
    try:
        program.run()
    finally:
        program.close()


def test_what_is_written_is_shared(area: Area) -> None:
    assert len(area.data) == 4096
    code = Code()
    code.set_area(R7, area)
    code.set(R6, 0x1122334455667788)
    code.store(R7, 8, R6, 8)
    code.load(R6, R7, 12, 4)
    code.store(R7, 16, R6, 8)
    code.end()
    _run(code)
    assert struct.unpack_from("<3Q", area.data) == (0, 0x1122334455667788, 0x11223344)


def test_it_counts_and_jumps(area: Area) -> None:
    """The sum of the bytes below 10 of the first 64."""
    area.data[:64] = bytes(range(64))
    code = Code()
    code.set_area(R7, area)
    code.set(R6, 0)
    code.set(R8, 0)
    code.label("next")
    code.copy(R1, R6)
    code.add_register(R1, R7)
    code.load(R2, R1, 0, 4)
    code.shift_left(R2, 56)
    code.shift_right(R2, 56)
    code.jump_if(R2, ">=", 10, "too large")
    code.add_register(R8, R2)
    code.label("too large")
    code.add(R6, 1)
    code.jump_if(R6, "<", 64, "next")
    code.store(R7, 128, R8, 8)
    code.end()
    _run(code)
    assert struct.unpack_from("<Q", area.data, 128) == (sum(range(10)),)


def test_memory_that_is_not_there(area: Area) -> None:
    code = Code()
    code.set(R6, 0)
    code.set_area(R7, area)
    code.set(R8, 1)
    code.read_kernel(-8, 8, R6, 16)
    code.jump_if(R0, "==", 0, "read")
    code.set(R8, 2)
    code.label("read")
    code.store(R7, 0, R8, 8)
    code.end()
    _run(code)
    assert area.data[0] == 2


def test_the_kernel_refuses_what_goes_beyond(area: Area) -> None:
    code = Code()
    code.set_area(R7, area)
    code.load(R6, R7, 4096, 8)
    code.end()
    with pytest.raises(OSError, match="bpf"):
        Program(code)
