"""Registers and spills, as NVIDIA's assembler reports them: what docs/gpu.md relies on."""

from __future__ import annotations

import re

import pytest

from gpuksm.hashing import kernels
from tests import nvrtc
from tests.kernels.test_conformance import ARCHITECTURES

# 65536 registers a multiprocessor: 80 leave room for six blocks of 128 threads.
MOST_REGISTERS = 80


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_nothing_is_spilled(number: int) -> None:
    log = nvrtc.assembler_log(kernels.source(), f"sm_{number}")
    used = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(used) == kernels.source().count("\nKERNEL ")
    assert max(used) <= MOST_REGISTERS
    assert re.findall(r"(\d+) bytes spill", log)
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    assert set(re.findall(r"(\d+) bytes stack frame", log)) == {"0"}
