"""What the page hash could reach on a GPU, on paper: `python bench/gpu_roofline.py`.

Compiles the kernels with NVRTC, disassembles them with nvdisasm (from a CUDA
toolkit or pip's nvidia-cuda-nvdisasm), counts the instructions a warp executes
for its four pages, and sets the issue rate of some cards against their memory
and their bus.  Nothing here is measured; docs/gpu.md holds the table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpuksm.hashing import kernels
from gpuksm.hashing.protocol import PAGE_BYTES
from tests import nvrtc

PAGES_OF_A_WARP = 32 // kernels.LANES
INNER_TURNS = 3  # blocks of 1 KiB that the inner loop takes; the fourth is straight code


class Card(NamedTuple):
    """Data sheet: multiprocessors, boost clock, memory and bus bandwidth (one direction, usable)."""

    name: str
    arch: int
    multiprocessors: int
    ghz: float
    memory_gbs: float
    bus_gbs: float


CARDS = (
    Card("T4", 75, 40, 1.59, 320, 12),
    Card("A100 80 GB PCIe", 80, 108, 1.41, 1935, 25),
    Card("L40S", 89, 142, 2.52, 864, 25),
    Card("H100 SXM", 90, 132, 1.83, 3350, 50),
    Card("B200", 100, 148, 1.85, 7700, 50),
    Card("RTX 5090", 120, 170, 2.41, 1792, 50),
)


class Count(NamedTuple):
    """Instructions a warp executes: once at its start, and for each four pages."""

    start: int
    turn: int

    @property
    def page(self) -> float:
        """Of one page, where a warp takes four pages only."""
        return (self.start + self.turn) / PAGES_OF_A_WARP


def disassembler() -> str:
    """Path of nvdisasm."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    import nvidia  # type: ignore[import-untyped]

    for root in nvidia.__path__:
        for path in sorted(Path(root).glob("*/bin/nvdisasm")):
            return str(path)
    raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


def count(arch: int) -> Count:
    """The counts of hash_pages for one architecture."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.compile_binary(kernels.source(), f"sm_{arch}"))
        file.flush()
        command = [disassembler(), "--print-code", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> Count:
    """Counts from a disassembly: the inner loop is the shortest one, the outer the longest."""
    section = re.search(r"^\.text\.hash_pages:\n(.*?)(?=^\s*\.section|\Z)", text, re.S | re.M)
    if section is None:
        raise SystemExit("no hash_pages in the disassembly")
    labels: dict[str, int] = {}
    jumps: list[tuple[str, int]] = []
    executed = 0
    for line in section[1].splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = executed
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            if jump := re.search(r"BRA.*`\((\.L_\w+)\)", code[1]):
                jumps.append((jump[1], executed))
            executed += 1
    loops = sorted((labels[to], at + 1) for to, at in jumps if labels[to] < at)
    (outer_start, outer_end), (inner_start, inner_end) = (
        max(loops, key=lambda loop: loop[1] - loop[0]),
        min(loops, key=lambda loop: loop[1] - loop[0]),
    )
    inner = inner_end - inner_start
    return Count(outer_start, outer_end - outer_start + (INNER_TURNS - 1) * inner)


def main() -> None:
    """Print the table."""
    table = Table(title="page hash, on paper")
    columns = ("card", "sm", "instructions/page", "issue GB/s", "memory GB/s", "bus GB/s", "issue / memory")
    for column in columns:
        table.add_column(column, justify="left" if column == "card" else "right")
    for card in CARDS:
        page = count(card.arch).page
        # Four schedulers a multiprocessor, each issues one warp instruction a clock.
        issue = card.multiprocessors * 4 * card.ghz / page * PAGE_BYTES
        rates = [f"{rate:,.0f}" for rate in (page, issue, card.memory_gbs, card.bus_gbs)]
        table.add_row(card.name, str(card.arch), *rates, f"{issue / card.memory_gbs:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
