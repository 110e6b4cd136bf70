"""bench/scaling.py, with workloads of a few MiB: it measures what it says, and counts right."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.plot import round_up
from bench.workload import PAGES_PER_MB, Processes, Workload, build
from tests import requirements_env

SCRIPT = Path(__file__).parents[2] / "bench" / "scaling.py"
SIZE = 1 / 32  # GiB
SMALL = ("--gib", str(SIZE), "--processes", "2", "--repeats", "1")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *SMALL, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_measures_every_part(tmp_path: Path) -> None:
    requirements_env.need("uffd", "gcc")
    found, plot = tmp_path / "found.json", tmp_path / "plot.svg"
    done = _run("--json", str(found), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    result = json.loads(found.read_text())
    rounds = {row["percent"]: row for row in result["rounds"]}
    pages = SIZE * 1024 * PAGES_PER_MB
    assert rounds[0]["read"] == rounds[0]["written"] == 0
    for percent in (1, 10):
        assert rounds[percent]["written"] == pytest.approx(pages * percent / 100, rel=0.15)
        assert rounds[percent]["written"] <= rounds[percent]["read"] < rounds[percent]["written"] + 64
        assert rounds[percent]["cpu"] >= rounds[percent]["seeing_cpu"] > 0
    (scan,), (estimate,) = result["scan"], result["estimate"]
    assert scan["wall_per_gib"] == pytest.approx(scan["wall"] / SIZE)
    assert scan["cpu"] > scan["cpu_scanner"] > 0
    assert estimate["bare_bytes"] >= pages * 4096
    assert estimate["whole"] < estimate["own"]
    assert estimate["bare"] > 0
    assert done.stdout.count("GiB") >= 3
    drawn = [node.text for node in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert {"10 % written", "wall time", "bare loop"} <= set(drawn)


@pytest.mark.parametrize("words", [("--gib", str(1 << 20)), ("--repeats", "0"), ("--gib", "0.001")])
def test_says_in_one_line_that_it_cannot(words: tuple[str, str]) -> None:
    done = _run(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)


def test_what_is_rewritten_is_checked(tmp_path: Path) -> None:
    requirements_env.need("gcc")
    with Processes(build(tmp_path), Workload("mix", "mix", processes=1, shared_mb=1, own_mb=3)) as processes:
        for percent, pages in ((0, 0), (1, 8), (10, 96), (75, 768)):
            assert processes.ask(f"rewrite {percent}") == [{"pages": pages}]
            processes.ask("check")
        with pytest.raises(SystemExit, match="FAILED"):
            processes.ask("rewrite 80")


@pytest.mark.parametrize(("value", "rounded"), [(0, 1), (1, 1), (0.3, 0.5), (12, 20), (2.1, 2.5), (9.99, 10)])
def test_axes_end_at_round_numbers(value: float, rounded: float) -> None:
    assert round_up(value) == pytest.approx(rounded)
