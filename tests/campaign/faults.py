"""Every fault at every point of the guard, on self-checking victims under write load, as a table.

    python -m tests.campaign.faults --runs 3 [--point P] [--action A] [--json FILE]

The points are read from the source of the guard; what an action does is said in
gpuksm/guard/faults.py.  One run is a fresh guard and fresh victims: scan, provoke every kind
of event, unmerge, with the fault on the way; then everything must work and nothing may be left
behind.  A cell shows the runs in which the fault came to pass, and what was wrong in them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import gpuksm
from gpuksm import errors
from tests.campaign import load
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

ACTIONS = ("kill", "error", "enomem", "eagain", "esrch", "short", "30ms", "exit", "fork", "exec")
_SIGNALS = {"exit": "SIGKILL", "fork": "SIGUSR1", "exec": "SIGUSR2"}
_TURNS = (1, 2, 4, 7, 3, 11)
_ATTEMPTS = 4  # rounds of scan, events and unmerge in which the point's turn may come
WRONG = ("lost write", "dead", "hangs", "left behind", "does not work")


def points() -> dict[str, bool]:
    """Every point of the guard, and whether it is one that reads memory."""
    found = {}
    for source in sorted(Path(gpuksm.__file__).parent.glob("guard/**/*.py")):
        for kind, name in re.findall(r'faults\.(point|read)\("([^"]+)"', source.read_text()):
            found[name] = kind == "read"
    return dict(sorted(found.items()))


@dataclass
class Run:
    """One run: whether the fault came to pass, and what was wrong (None: nothing)."""

    point: str
    action: str
    turn: int
    fired: bool = False
    wrong: str | None = None
    what: str = ""
    seconds: float = 0.0


class Wrong(AssertionError):
    """Something was wrong in a way that the table has a name for."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def classify(error: AssertionError | OSError) -> str:
    """The name for what went wrong, from what a victim or a check said."""
    if isinstance(error, Wrong):
        return error.kind
    text = str(error)
    if "CORRUPT" in text or "FAILED" in text:
        return "lost write"
    if "said nothing" in text or "stay stopped" in text or "does not end" in text:
        return "hangs"
    if "ended with" in text:
        return "dead"
    return "does not work"


def _victims(world: World) -> list[Victim]:
    return [
        *(world.victim("changeling", 48) for _ in range(2)),
        *(world.victim("regions", 256, 16, seed, "straight") for seed in (1, 2)),
        *(world.victim("regions", 700, 16, seed, "permuted", 9000) for seed in (1, 2)),
        *(world.victim("purge", 1) for _ in range(2)),
        *(world.victim("growth", 12) for _ in range(2)),
        *(world.victim("forks") for _ in range(2)),
    ]


def _refill(victims: list[Victim]) -> None:
    """Let everybody have again what can be merged."""
    for victim in victims:
        if victim.program == "purge":
            victim.ask("run refill")
        elif victim.program == "regions":
            victim.ask("rewrite")
        elif victim.program == "changeling":
            load.ask_changeling(victim, "refill")


def _provoke(victims: list[Victim], spared: Victim | None, *, first: bool) -> None:
    """Whatever makes the guard pass its points: events of every kind; growth can be had once."""
    actions = {"purge": "span", "growth": "shrunk", "forks": "drops"}
    for victim in victims:
        if victim is spared or (victim.program == "growth" and not first):
            continue
        if victim.program == "changeling":
            load.ask_changeling(victim, "drop")
        elif victim.program == "regions":
            victim.ask("write 5 3")
        else:
            victim.ask(f"run {actions[victim.program]}", 20)


def _quietly(work: str, *arguments: object) -> None:
    """Scan or unmerge with the fault on the way: it may fail, but only as a command may."""
    try:
        if work == "scan":
            load.scan(*arguments)  # type: ignore[arg-type]
        else:
            with load.GuardClient.connect(start=True) as client:
                client.request("unmerge", pids=None, max_pause_us=5000)
    except errors.GpuksmError:
        return


def _look(victims: list[Victim]) -> None:
    for victim in victims:
        load.look(victim)


def _perform(world: World, run: Run) -> None:
    victims = _victims(world)
    changeling = victims[0]
    before = load.footprints(victims)
    action = run.action
    if action in _SIGNALS:
        action = f"{_SIGNALS[action]}@{changeling.pid}"
    if run.action == "exit":
        changeling.expect_status = -signal.SIGKILL
    os.environ["GPUKSM_FAULT"] = f"{run.point}:{run.turn}:{action}"
    pids = [victim.pid for victim in victims]
    log = world.folder / "guard.log"

    def living() -> list[Victim]:
        if run.action == "exit" and not processes.alive(changeling.pid):
            return victims[1:]
        return victims

    try:
        for attempt in range(_ATTEMPTS):
            _quietly("scan", pids)
            _look(living())
            _provoke_some(living(), changeling if run.action == "exit" else None, first=not attempt)
            _look(living())
            _quietly("unmerge")
            run.fired = log.exists() and "fault injected" in log.read_text()
            if run.fired:
                break
            _refill(living())
    finally:
        del os.environ["GPUKSM_FAULT"]
    _look(living())
    world.check_nothing_stopped()
    if not run.fired:
        load.shut_down(world)  # with it goes the fault
        changeling.expect_status = 0
    _must_work(world, run, living(), before, replaced=changeling if run.action == "exec" else None)


def _provoke_some(victims: list[Victim], mortal: Victim | None, *, first: bool) -> None:
    """`_provoke`, where `mortal` may be killed by what it is asked to do."""
    if mortal in victims:
        try:
            load.ask_changeling(mortal, "drop")  # type: ignore[arg-type]
        except (AssertionError, BrokenPipeError):
            if processes.alive(mortal.pid):  # type: ignore[union-attr]
                raise
    _provoke([victim for victim in victims if processes.alive(victim.pid)], mortal, first=first)


def _must_work(
    world: World,
    run: Run,
    victims: list[Victim],
    before: dict[int, processes.Footprint],
    replaced: Victim | None,
) -> None:
    """With the fault behind us a scan merges, an unmerge gives everything back, nothing stays."""
    _refill(victims)
    load.scan_well([victim.pid for victim in victims])
    for victim in victims:
        if victim.program == "regions" and victim.merged_pages("shared") < 250:
            raise Wrong("does not work", f"only {victim.merged_pages('shared')} pages merged afterwards")
    _look(victims)
    for victim in victims:
        if victim.program == "changeling":
            load.ask_changeling(victim, "drop")
        elif victim.program == "purge":
            victim.ask("run bulk")
    load.unmerge_well()
    _look(victims)
    for victim in victims:
        if mapped := processes.store_mappings(victim.pid):
            raise Wrong("left behind", f"{victim.name}: store mappings {mapped}")
        if victim is replaced:
            continue
        said = load.settled_difference(victim, before[victim.pid])
        if said:
            raise Wrong("left behind", f"{victim.name}: {'; '.join(said)}")
    load.shut_down(world)
    for victim in victims:
        victim.stop()


def perform(victims_folder: Path, point: str, action: str, number: int) -> Run:
    """One run; what was wrong is noted in it."""
    run = Run(point, action, _TURNS[number % len(_TURNS)])
    began = time.monotonic()
    with load.opened(victims_folder) as world:
        try:
            _perform(world, run)
        except (AssertionError, OSError, errors.GpuksmError) as error:
            run.wrong = classify(error) if not isinstance(error, errors.GpuksmError) else "does not work"
            run.what = f"{type(error).__name__}: {error}"
            log = world.folder / "guard.log"
            if log.exists():
                run.what += f"\n{log.read_text()[-2000:]}"
    run.seconds = time.monotonic() - began
    return run


def _cell(runs: list[Run]) -> str:
    fired = sum(run.fired for run in runs)
    wrong = Counter(run.wrong for run in runs if run.wrong)
    text = f"{fired}/{len(runs)}" if fired < len(runs) else str(fired)
    return " ".join([text, *(f"{count} {kind}" for kind, count in wrong.items())])


def table(runs: list[Run]) -> str:
    """Points x actions, in Markdown."""
    actions = [action for action in ACTIONS if any(run.action == action for run in runs)]
    lines = ["| point | " + " | ".join(actions) + " |", "|---" * (len(actions) + 1) + "|"]
    for point in dict.fromkeys(run.point for run in runs):
        cells = []
        for action in actions:
            mine = [run for run in runs if (run.point, run.action) == (point, action)]
            cells.append(_cell(mine) if mine else "")
        lines.append(f"| {point} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def campaign(
    victims_folder: Path, runs: int, only_points: list[str], only_actions: list[str], *, verbose: bool = True
) -> list[Run]:
    """The whole matrix, or some of it."""
    done: list[Run] = []
    for number in range(runs):
        for point, reads in points().items():
            for action in ACTIONS:
                if point not in (only_points or [point]) or action not in (only_actions or ACTIONS):
                    continue
                if action == "short" and not reads:
                    continue
                run = perform(victims_folder, point, action, number)
                done.append(run)
                if run.wrong:
                    print(f"{point}:{run.turn}:{action}: {run.wrong}: {run.what}", flush=True)
        if verbose:
            seconds = sum(run.seconds for run in done)
            print(f"{len(done)} runs, {seconds / max(1, len(done)):.2f} s each", flush=True)
    return done


def main() -> int:
    """Print the table; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each point with each action")
    parser.add_argument("--point", action="append", default=[], choices=points())
    parser.add_argument("--action", action="append", default=[], choices=ACTIONS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ.setdefault("GPUKSM_JOURNAL_BYTES", "256")  # written anew all the time
    with load.built("changeling", "regions", "purge", "growth", "forks") as folder:
        runs = campaign(folder, arguments.runs, arguments.point, arguments.action)
    print(table(runs))
    wrong = Counter(run.wrong for run in runs if run.wrong)
    fired = sum(run.fired for run in runs)
    print(f"{len(runs)} runs, {fired} with a fault; " + ", ".join(f"{kind}: {wrong[kind]}" for kind in WRONG))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
