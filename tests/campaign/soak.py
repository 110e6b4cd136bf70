"""Model steps, kills, faults and real programs in turn until the time is over.

    python -m tests.campaign.soak --hours 8 [--seed S]

Each turn has a seed of its own, which is printed, and what was wrong in it; the soak goes on
all the same, and ends with 0 only when nothing was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.campaign import faults, kills, load, programs
from tests.model.run import run as run_model
from tests.support.world import User

_STEPS = 5000
_KILLS = {"guard": 50, "keeper": 20, "both": 20, "scanner": 50}
_PROGRAM_MINUTES = 3
_PROGRAM_KILL_SECONDS = 20


class Soak:
    """What is done in turn, and how often."""

    def __init__(self, victims_folder: Path) -> None:
        self.folder = victims_folder
        self.done: Counter[str] = Counter()
        self.programs = [program for program in programs.PROGRAMS if program.missing() is None]
        self.faults = [
            (point, action)
            for point, reads in faults.points().items()
            for action in faults.ACTIONS
            if reads or action != "short"
        ]

    def model(self, seed: int) -> None:
        """Some thousand steps of the model."""
        counts = run_model(seed, _STEPS, self.folder, User(os.getuid()))
        self.done["model steps"] += counts["steps"]

    def kill(self, seed: int) -> None:
        """Kills of each process."""
        for who, count in _KILLS.items():
            kills.campaign(who, count, seed, self.folder, verbose=False)
            self.done[f"kills of the {who}"] += count

    def fault(self, seed: int) -> None:
        """Each fault at each point, the turn at which it comes depending on the seed."""
        for point, action in self.faults:
            run = faults.perform(self.folder, point, action, seed)
            self.done["faults"] += run.fired
            assert run.wrong is None, f"{point}:{run.turn}:{action}: {run.wrong}: {run.what}"

    def program(self, seed: int) -> None:
        """One real program, while the guard is killed now and then."""
        program = self.programs[seed % len(self.programs)]
        report = programs.perform(program, _PROGRAM_MINUTES, _PROGRAM_KILL_SECONDS)
        assert report.good, f"{program.name}: {report.verdict}"
        self.done[f"minutes of {program.name}"] += _PROGRAM_MINUTES
        self.done["kills of the guard under programs"] += report.kills


def main() -> int:
    """Print a line for each part, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    began = time.monotonic()
    wrong = 0
    with load.built() as folder:
        soak = Soak(folder)
        parts: tuple[Callable[[int], None], ...] = (
            soak.model, soak.program, soak.kill, soak.program, soak.model, soak.fault, soak.program,
        )  # fmt: skip
        turn = 0
        while time.monotonic() < began + arguments.hours * 3600:
            part, seed = parts[turn % len(parts)], arguments.seed + turn
            try:
                part(seed)
                said = "right"
            except Exception:  # whatever it is, the soak is to go on, and to say it
                wrong += 1
                said = f"WRONG\n{traceback.format_exc()}"
            hours = (time.monotonic() - began) / 3600
            print(f"{hours:.2f} h: {part.__name__}, seed {seed}: {said}", flush=True)
            turn += 1
    for name, count in sorted(soak.done.items()):
        print(f"  {name}\t{count}")
    print(f"{turn} parts in {(time.monotonic() - began) / 3600:.2f} h, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
