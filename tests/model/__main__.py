"""`python -m tests.model --steps 1000000 --seed N`: the long run; `--replay FILE` for one sequence."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.model.run import Failure, episode, run
from tests.support import victims
from tests.support.world import User


def main() -> int:
    """Print what was done, or the shortest failing sequence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=0, help="episodes side by side")
    parser.add_argument("--shrink", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpuksm-victims-") as folder:
        victims.build(Path(folder), ["puppet"])
        user = User(os.getuid())
        try:
            if arguments.replay:
                lines = arguments.replay.read_text().splitlines()
                counts = episode([json.loads(line) for line in lines if line], Path(folder), user)
            else:
                counts = run(
                    arguments.seed,
                    arguments.steps,
                    Path(folder),
                    user,
                    shrink_seconds=arguments.shrink,
                    verbose=True,
                    workers=arguments.workers,
                )
        except Failure as failure:
            print(failure)
            return 1
    print(f"{counts['steps']} steps in {time.monotonic() - began:.0f} s")
    for name, count in sorted(counts.items()):
        print(f"  {name}\t{count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
