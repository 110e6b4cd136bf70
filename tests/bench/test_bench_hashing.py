"""bench/hashing.py runs and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SMALL = ["--megabytes", "4", "--keys", "1000", "--repeats", "1"]


def run(*arguments: str) -> str:
    script = Path(__file__).parents[2] / "bench" / "hashing.py"
    done = subprocess.run(
        [sys.executable, str(script), *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_json():
    result = json.loads(run("--json"))
    assert set(result["ratios"]) >= {"hash from DRAM / plain read, 1 core", "radix sort / np.argsort, 1 core"}
    for section in ("gigabytes_per_second", "million_keys_per_second", "ratios"):
        assert all(rate > 0 for rate in result[section].values())


def test_table():
    text = run()
    assert "hash from L2, 1 core" in text
    assert "np.argsort, stable" in text
