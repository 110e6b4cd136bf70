"""An interpreter for the PTX of integer kernels: CI's stand-in for a GPU.

`parser` turns the text that NVRTC emits into decoded instructions, `memory` is
global and shared memory with every access checked, `operations` is what each
instruction computes, `machine` runs warps over it.  It is stricter than the
hardware: what CUDA leaves undefined (divergent barriers and shuffles, races,
reads of memory never written) raises `PtxError`, and so does any instruction
it does not know.  It says nothing about speed, occupancy, caches or the
memory model beyond barriers.
"""

from tests.ptx.errors import PtxError
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import parse

__all__ = ["GlobalMemory", "Machine", "PtxError", "parse"]
