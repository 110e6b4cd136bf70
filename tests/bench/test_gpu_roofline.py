"""The instruction counts behind docs/gpu.md."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from bench import gpu_roofline
from tests.requirements_env import require

LISTING = """
.text.sort_count:
        /*0000*/                   BRA `(.L_x_9) ;
\t.section\t.text.hash_pages
.text.hash_pages:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_2:
        /*0020*/                   NOP ;
.L_x_1:
        /*0030*/                   IMAD R1, R1, R2, R3 ;
        /*0040*/                   IADD3 R1, R1, R2, R3 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/                   STG.E.64 [R2.64], R4 ;
.L_x_3:
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_loops_are_told_apart() -> None:
    # Three turns of three instructions, and four more, in a turn of the outer loop.
    assert gpu_roofline.parse(LISTING) == gpu_roofline.Count(start=2, turn=13)


@pytest.mark.parametrize("card", gpu_roofline.CARDS, ids=lambda card: card.name)
def test_the_docs_hold_what_is_counted(card: gpu_roofline.Card) -> None:
    if shutil.which("nvdisasm") is None and importlib.util.find_spec("nvidia") is None:
        require("nvdisasm", "no nvdisasm is installed")
    try:
        page = gpu_roofline.count(card.arch).page
    except SystemExit as error:
        require("nvdisasm", str(error))
    text = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {card.name} "))
    written = int(row.split("|")[3])
    # Compilers differ a little from release to release.
    assert abs(page - written) <= 0.1 * written
