"""kill -9 of guard, keeper, both or scanner, hundreds of times under load, at moments of every kind.

    python -m tests.campaign.kills guard|keeper|both|scanner --kills N --seed S

After each kill every victim compares all its bytes (DONTNEED must have read zeros), no thread
stays stopped, what was merged and not written is still merged, and the next scan merges.  A
killed keeper must have been replaced; in every other turn the guard is killed then, and
its successor must know everything.  Where both were killed, what waits goes on when another guard
was asked for.  A world lasts for some kills, then all of it is
unmerged and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gpuksm import errors
from gpuksm.client import GuardClient
from tests.campaign import load
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

WHO = ("guard", "keeper", "both", "scanner")
EPISODE = 100
_EVERY = 50
_STILL_PAGES = 512


class Episode:
    """One world of victims, and what is done to its guard."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.still = [world.victim("regions", _STILL_PAGES, 16, seed, "straight", 7000) for seed in (1, 2)]
        self.written = [world.victim("regions", 256, 16, seed, "straight") for seed in (3, 4)]
        self.purgers = [world.victim("purge", 1) for _ in range(2)]
        self.forkers = [world.victim("forks")]
        self.changelings = [world.victim("changeling", 48) for _ in range(2)]
        self.writers = [world.victim("writers", 256, 2, 400, 400) for _ in range(2)]
        self.victims = [
            *self.still, *self.written, *self.purgers, *self.forkers, *self.changelings, *self.writers,
        ]  # fmt: skip
        self.pids = [victim.pid for victim in self.victims]
        self.before = load.footprints(self.victims)
        self.scan_seconds = 0.2
        load.scan_well(self.pids)
        self.check()

    # -- load ---------------------------------------------------------------------

    def busy(self, turn: int) -> list[Victim]:
        """Give everybody something to do; the answers are due when all is over."""
        asked = [*self.written, *self.purgers, *self.forkers]
        for victim in self.written:
            victim.send(f"write 10 {turn}" if turn % 2 else "rewrite")
        for victim in self.purgers:
            victim.send("run arena" if turn % 3 else "run bulk")
        for victim in self.forkers:
            victim.send("run drops")
        for victim in self.changelings:
            os.kill(victim.pid, signal.SIGUSR1)
        return asked

    def check(self) -> None:
        """All bytes are right, nobody is stopped, what nobody writes is merged."""
        for victim in self.victims:
            load.look(victim)
        self.world.check_nothing_stopped()
        for victim in self.still:
            merged = victim.merged_pages("shared")
            # A run gives up its last page where nothing watched lies behind it.
            assert merged >= _STILL_PAGES - 2, f"{victim.name}: only {merged} pages are merged"

    def scan(self) -> None:
        """A scan that a kill may end."""
        with contextlib.suppress(errors.GpuksmError):
            load.scan(self.pids)

    def next_scan(self) -> None:
        """The scan after a kill: it must merge what the victims have written anew."""
        for victim in (*self.purgers, *self.changelings):
            if victim.program == "purge":
                victim.ask("run refill", 20)
            else:
                load.ask_changeling(victim, "refill")
        began = time.monotonic()
        load.scan_well(self.pids)
        self.scan_seconds = time.monotonic() - began
        self.check()

    def finish(self) -> None:
        """Unmerge: nothing of us stays in any victim."""
        load.unmerge_well()
        for victim in self.victims:
            load.look(victim)
            assert processes.store_mappings(victim.pid) == [], f"{victim.name}: still maps the store"
            said = load.settled_difference(victim, self.before[victim.pid])
            assert not said, f"{victim.name}: left behind: {'; '.join(said)}"
        load.shut_down(self.world)
        for victim in self.victims:
            victim.stop()

    # -- kills --------------------------------------------------------------------

    def guard(self) -> int:
        return self.world.guard_pid()

    def kill_guard(self, turn: int) -> str:
        """Kill the guard at a moment of some kind; returns the kind."""
        kind = self.chance.choice(("scan", "scan", "purge", "unmerge", "takeover", "idle"))
        guard = self.guard()
        busy = [] if kind == "idle" else self.busy(turn)
        if kind in ("scan", "unmerge"):
            work = self.scan if kind == "scan" else self._unmerge_some
            moment = self.chance.uniform(0, self.scan_seconds * (1.1 if kind == "scan" else 0.3))
            timer = threading.Timer(moment, _kill, [guard])
            timer.start()
            work()
            timer.join()
        else:
            time.sleep(self.chance.uniform(0, 0.01))
            _kill(guard)
        if kind == "takeover":
            time.sleep(self.chance.uniform(0, 0.4))
            for pid in self._guards():
                _kill(pid)
        for victim in busy:
            victim.answer(30)
        assert self.guard() != guard, "the guard was not killed"
        return kind

    def _guards(self) -> list[int]:
        """Guards that are there or are being started: everything but keepers."""
        keepers = set(self.world.keepers())
        return [pid for pid in self.world.guard_processes() if pid not in keepers]

    def _unmerge_some(self) -> None:
        with contextlib.suppress(errors.GpuksmError), GuardClient.connect(start=True) as client:
            client.request("unmerge", pids=[victim.pid for victim in self.written], max_pause_us=5000)

    def kill_keeper(self, turn: int) -> str:
        """Kill the keeper; another must come, and it must be able to do what a keeper is for."""
        busy = self.busy(turn)
        guard = self.guard()
        (keeper,) = self.world.keepers()
        _kill(keeper)
        if turn % 3 == 0:
            self.scan()
        began = time.monotonic()
        self.world.await_other_keeper(keeper)
        late = time.monotonic() - began
        assert late < 5, f"the new keeper took {late:.1f} s"
        kind = "keeper"
        if turn % 2:
            time.sleep(self.chance.uniform(0, 0.3))
            _kill(guard)
            assert self.guard() != guard
            kind = "keeper, then guard"
        for victim in busy:
            victim.answer(30)
        assert turn % 2 or self.guard() == guard, "the guard died with its keeper"
        return kind

    def kill_both(self, turn: int) -> str:
        """Kill guard and keeper together; the next one takes over from the agents."""
        kind = self.chance.choice(("scan", "purge", "idle"))
        guard = self.guard()
        busy = [] if kind == "idle" else self.busy(turn)
        if kind == "scan":
            timer = threading.Timer(
                self.chance.uniform(0, self.scan_seconds), self.world.kill_guard_and_keeper
            )
            timer.start()
            self.scan()
            timer.join()
        else:
            time.sleep(self.chance.uniform(0, 0.01))
        self.world.kill_guard_and_keeper()
        found = GuardClient.find()
        assert found is not None, "nobody looks for what waits"
        found.close()
        for victim in busy:
            victim.answer(30)
        assert self.guard() != guard, "the guard was not killed"
        return f"both, {kind}"

    def kill_scanner(self, turn: int) -> str:
        """Kill a scanner process at any moment of its scan."""
        busy = self.busy(turn)
        guard = self.guard()
        child = os.fork()
        if not child:
            try:
                load.scan(self.pids)
            finally:
                os._exit(0)
        time.sleep(self.chance.uniform(0, self.scan_seconds * 1.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        for victim in busy:
            victim.answer(30)
        assert self.guard() == guard, "the guard died with a scanner"
        return "in the scan" if os.WIFSIGNALED(status) else "after the scan"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def campaign(who: str, kills: int, seed: int, victims_folder: Path, *, verbose: bool = True) -> Counter[str]:
    """`kills` kills of `who`; how many of each kind.  AssertionError, naming the kill, at the first wrong."""
    counts: Counter[str] = Counter()
    began = time.monotonic()
    done = 0
    while done < kills:
        chance = random.Random(f"{seed}:{done}")
        with load.opened(victims_folder) as world:
            turn = -1
            try:
                episode = Episode(world, chance)
                kill: Callable[[int], str] = getattr(episode, f"kill_{who}")
                for turn in range(min(EPISODE, kills - done)):
                    counts[kill(turn)] += 1
                    episode.check()
                    episode.next_scan()
                    done += 1
                    if verbose and done % _EVERY == 0:
                        each = (time.monotonic() - began) / done
                        print(f"{done} kills of the {who}, {each:.2f} s each, nothing wrong", flush=True)
                episode.finish()
            except (AssertionError, OSError, errors.GpuksmError) as error:
                log = world.folder / "guard.log"
                said = log.read_text()[-3000:] if log.exists() else ""
                said += world.ended_victims()
                raise AssertionError(f"seed {seed}, kill {done + 1} ({turn}): {error!r}\n{said}") from error
    return counts


def main() -> int:
    """Print progress, a table of the moments, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=WHO)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("GPUKSM_JOURNAL_BYTES", "256")  # written anew all the time
    began = time.monotonic()
    with load.built("changeling", "regions", "purge", "forks", "writers") as folder:
        try:
            counts = campaign(arguments.who, arguments.kills, arguments.seed, folder)
        except AssertionError as error:
            print(f"WRONG: {error}")
            return 1
    for kind, count in sorted(counts.items()):
        print(f"  {kind}\t{count}")
    seconds = time.monotonic() - began
    print(f"{arguments.kills} kills of the {arguments.who} in {seconds:.0f} s: no byte, thread or scan lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
