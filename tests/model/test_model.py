"""Drawn sequences of memory operations, scans and kills: no puppet may ever read a wrong byte."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import requirements_env
from tests.model.run import episode, run
from tests.support.world import User

REPLAYS = sorted((Path(__file__).parent / "replays").glob("*.jsonl"))
STEPS = int(os.environ.get("GPUKSM_MODEL_STEPS", "10000"))
SEED = int(os.environ.get("GPUKSM_MODEL_SEED", "1"))


@pytest.mark.timeout(300 + STEPS // 10)
def test_model(victims_folder: Path) -> None:
    """GPUKSM_MODEL_STEPS steps of seed GPUKSM_MODEL_SEED; a failure prints its replay."""
    requirements_env.need("uffd")
    counts = run(SEED, STEPS, victims_folder, User(os.getuid()))
    print(f"seed {SEED}: {dict(counts)}")
    assert counts["pages merged"] >= STEPS // 2, f"hardly anything was merged: {counts}"


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda path: path.stem)
def test_found_before(victims_folder: Path, replay: Path) -> None:
    """The shortest sequences of failures that the model found, each named after what must hold."""
    requirements_env.need("uffd")
    episode([json.loads(line) for line in replay.read_text().splitlines()], victims_folder, User(os.getuid()))
