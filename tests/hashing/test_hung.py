"""A device that hangs keeps neither the work nor, at the end, the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kernels.executors import PoclExecutor

ROOT = Path(__file__).resolve().parents[2]

# PoCL's own threads run a kernel that never ends; what else is queued there waits for ever.
ON_POCL = """
import sys
import numpy as np
import pyopencl as cl
from gpuksm.hashing import device
from gpuksm.hashing.cpu import CpuHasher
from gpuksm.hashing.opencl import OpenClHasher
from gpuksm.hashing.source import ArraySource
from gpuksm.linux.leaving import leave_for_ever

def digest(hasher):
    digests, kinds = np.zeros(4096, np.uint64), np.zeros(4096, np.uint8)
    hasher.digest(source, digests, kinds)
    return digests

source = ArraySource(np.random.default_rng(1).integers(0, 256, 4096 * 4096, np.uint8))
wanted = digest(CpuHasher(7))
hasher = OpenClHasher(7, device="cpu", threads=2)
assert np.array_equal(digest(hasher), wanted)
context = cl.Context([one for platform in cl.get_platforms() for one in platform.get_devices()][:1])
word = cl.Buffer(context, cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR, hostbuf=np.zeros(1, np.int32))
text = "__kernel void endless(volatile __global int *word) { while (*word == 0) {} }"
program = cl.Program(context, text).build()
kernels = [program.endless for _ in range(8)]  # enough for all of PoCL's threads
queues = [cl.CommandQueue(context) for _ in kernels]
for queue, kernel in zip(queues, kernels):
    kernel(queue, (1024,), (1,), word)
    queue.flush()
device.wait.__defaults__ = (1.0,)
assert np.array_equal(digest(hasher), wanted)
assert not hasher.devices, "the device that hangs is still in use"
hasher.close()
leave_for_ever(*queues, *kernels, program, word, context)
print("done")
sys.exit(5)
"""

# A driver as one meets it at the end: freeing waits, and so does what it left for exit.
AT_EXIT = """
import ctypes, sys, time
from gpuksm.linux.leaving import leave_for_ever

class Held:
    def __del__(self):
        time.sleep(60)

library = ctypes.CDLL(None)
library.__cxa_atexit(library.pause, None, None)
held = Held()
leave_for_ever(held)
print("done")
sys.exit(5)
"""


def _ends(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "done\n"), done.stderr


def test_the_work_is_done_and_the_process_ends_on_pocl() -> None:
    PoclExecutor("")  # skips or fails where there is no PoCL
    _ends(ON_POCL)


def test_neither_freeing_nor_exit_handlers_keep_the_process() -> None:
    _ends(AT_EXIT)
