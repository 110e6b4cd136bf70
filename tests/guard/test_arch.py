"""The machine code: what is checked in is what the assembly says, and restarts are computed right."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from gpuksm.guard.arch import assemble, x86_64
from gpuksm.linux.ptrace import Registers
from tests.requirements_env import require

SAVED_RAX, SAVED_RIP = 3, 18


def test_code_is_what_the_assembly_gives() -> None:
    if not (shutil.which("gcc") and shutil.which("objcopy")):
        require("gcc", "no assembler")
    checked_in = Path(assemble.HERE, "x86_64_code.py").read_text()
    assert checked_in == assemble.generate()


def test_never_touches_the_stack() -> None:
    if not shutil.which("objdump"):
        require("gcc", "no objdump")
    import re
    import subprocess
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(x86_64.BOOTSTRAP[: x86_64.BOOTSTRAP_DATA])
        file.flush()
        listing = subprocess.run(
            ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    assert "syscall" in listing
    assert not re.search(r"%[er]?sp\b|\b(push|pop|call|ret|enter|leave)", listing)


@pytest.mark.parametrize(
    ("orig_rax", "rax", "want_rax", "moved"),
    [
        (35, -516, 219, True),  # nanosleep: restart_syscall
        (0, -512, 0, True),  # read
        (202, -513, 202, True),
        (34, -514, 34, True),  # pause
        (0, 17, 17, False),  # finished
        (0, -4, -4, False),  # EINTR stays EINTR
        (-1, -512, -512, False),  # not in a system call: a plain register value
    ],
)
def test_restarts_as_the_kernel_would(orig_rax: int, rax: int, want_rax: int, moved: bool) -> None:
    registers = Registers(orig_rax=orig_rax % 2**64, rax=rax % 2**64, rip=0x1000, eflags=0x8D5)
    code = x86_64.bootstrap_code(registers, 0x1234, 0x5678000)
    words = struct.unpack_from("<20Q", code, x86_64.BOOTSTRAP_DATA)
    assert words[19] == 0x5678000
    assert len(code) == len(x86_64.BOOTSTRAP)
    assert words[0] == 2**64 - 1
    assert words[1] == 0x1234
    assert words[2] == 1 | 0xD5 << 8  # overflow was set
    assert words[SAVED_RAX] == want_rax % 2**64
    assert words[SAVED_RIP] == 0x1000 - 2 * moved
