"""Assemble x86_64.S with gcc and write the bytes and offsets into x86_64_code.py.

Run as `python -m gpuksm.guard.arch.assemble`; needs gcc and objcopy.  Only
developers who change the assembly need it; a test compares its output with the
module that is checked in.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

SYMBOLS = ("bootstrap", "bootstrap_data", "bootstrap_end", "agent", "agent_end")
HERE = Path(__file__).parent


def generate() -> str:
    """The text of x86_64_code.py."""
    with tempfile.TemporaryDirectory() as folder:
        object_file, binary = Path(folder, "code.o"), Path(folder, "code.bin")
        subprocess.run(["gcc", "-c", HERE / "x86_64.S", "-o", object_file], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", object_file, binary], check=True)
        listing = subprocess.run(["nm", object_file], check=True, capture_output=True, text=True).stdout
        code = binary.read_bytes()
    at = {name: int(value, 16) for value, _, name in (line.split() for line in listing.splitlines())}
    bootstrap = code[at["bootstrap"] : at["bootstrap_end"]]
    agent = code[at["agent"] : at["agent_end"]]
    return "\n".join(
        (
            '"""Machine code assembled from x86_64.S by assemble.py; do not edit."""',
            "",
            f"BOOTSTRAP = bytes.fromhex({_hex(bootstrap)})",
            f"BOOTSTRAP_DATA = {at['bootstrap_data'] - at['bootstrap']}",
            f"AGENT = bytes.fromhex({_hex(agent)})",
            "",
        )
    )


def _hex(data: bytes) -> str:
    lines = [data[i : i + 40].hex() for i in range(0, len(data), 40)]
    return "\n" + "\n".join(f'    "{line}"' for line in lines) + "\n"


def main() -> None:
    (HERE / "x86_64_code.py").write_text(generate())


if __name__ == "__main__":
    main()
