"""A run: episodes of some steps, each with fresh puppets and a fresh guard; and a shorter replay.

Hypothesis is not used: what a step does depends on timing, which it takes for
flakiness, and it would replay real processes some hundred times for each shrinking.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.model.driver import Driver
from tests.model.steps import Step, draw
from tests.support.world import User, World

EPISODE = 1000


class Failure(AssertionError):
    """Steps that make memory wrong, and what was seen."""

    def __init__(self, steps: Sequence[Step], what: str) -> None:
        super().__init__(what)
        self.steps = list(steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, (self.steps, str(self))

    @property
    def kind(self) -> str:
        """The first word of what was seen: a shorter sequence has to fail in the same way."""
        return str(self).split()[0]


def episode(steps: Sequence[Step], victims_folder: Path, user: User) -> Counter[str]:
    """Perform `steps` in a world of their own; what was done, or Failure."""
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-model-"))
    world = World(folder, victims_folder, user)
    driver: Driver | None = None
    try:
        driver = Driver(world)
        driver.perform(steps)
        driver.close()
        for line in driver._log().splitlines() if (folder / "guard.log").exists() else []:
            assert "Traceback" not in line, driver._log()
        world.close()
        return driver.counts
    except AssertionError as error:
        done = len(steps) if driver is None else driver.done
        raise Failure(steps[:done], str(error)) from error
    finally:
        if driver is not None and driver.killing is not None:
            driver.killing.join()
        for victim in world.victims:
            victim.kill()
        world._kill_guards()
        shutil.rmtree(folder, ignore_errors=True)


def shrink(failure: Failure, victims_folder: Path, user: User, seconds: float) -> Failure:
    """Leave out steps, larger pieces first, as long as it still fails and there is time (ddmin)."""
    deadline = time.monotonic() + seconds
    size = max(1, len(failure.steps) // 2)
    while size and time.monotonic() < deadline:
        at, shorter = 0, False
        while at < len(failure.steps) and time.monotonic() < deadline:
            rest = failure.steps[:at] + failure.steps[at + size :]
            try:
                episode(rest, victims_folder, user)
                at += size
            except Failure as smaller:
                if smaller.kind == failure.kind:
                    failure, shorter = smaller, True
                else:
                    at += size
        size = size if shorter and size == 1 else size // 2
    return failure


def _numbered(seed: int, number: int, steps: int, victims_folder: Path, user: User) -> Counter[str] | Failure:
    """Episode `number` of a run of `steps`."""
    sequence = list(draw(f"{seed}:{number}", min(EPISODE, steps - number * EPISODE)))
    try:
        return episode(sequence, victims_folder, user) + Counter(steps=len(sequence))
    except Failure as failure:
        return failure


def _episodes(
    seed: int, steps: int, victims_folder: Path, user: User, workers: int
) -> Iterator[tuple[int, Counter[str] | Failure]]:
    """Every episode with its outcome, as they end."""
    numbers = range(-(-steps // EPISODE))
    if not workers:
        for number in numbers:
            yield number, _numbered(seed, number, steps, victims_folder, user)
        return
    with ProcessPoolExecutor(workers) as pool:
        futures = {
            pool.submit(_numbered, seed, number, steps, victims_folder, user): number for number in numbers
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run(
    seed: int,
    steps: int,
    victims_folder: Path,
    user: User,
    *,
    shrink_seconds: float = 0,
    verbose: bool = False,
    workers: int = 0,
) -> Counter[str]:
    """`steps` steps; Failure, shortened where there is time for it, names its seed.

    With `workers` episodes run side by side in as many processes.
    """
    counts: Counter[str] = Counter()
    began = time.monotonic()
    for number, done in _episodes(seed, steps, victims_folder, user, workers):
        if isinstance(done, Failure):
            failure = done
            if shrink_seconds:
                print(f"seed {seed}:{number}: {failure}; looking for a shorter sequence", flush=True)
                failure = shrink(failure, victims_folder, user, shrink_seconds)
            text = "\n".join(json.dumps(step) for step in failure.steps)
            raise Failure(failure.steps, f"seed {seed}:{number}: {failure}\nreplay:\n{text}")
        counts += done
        if verbose:
            rate = counts["steps"] / (time.monotonic() - began)
            print(f"{counts['steps']} steps, {rate:.0f}/s, {counts['pages merged']} pages merged", flush=True)
    return counts
