"""Processes that compare beside the guard: they find what it would have found, and hold nothing else."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuksm import wire
from gpuksm.guard import comparer, comparers, comparing, faults, verify
from gpuksm.guard.chains import Chain
from gpuksm.guard.commit import Outcome
from gpuksm.guard.comparer import PIECES
from gpuksm.guard.comparers import MOST, Job
from gpuksm.guard.request import Planned
from gpuksm.guard.store import Store
from gpuksm.guard.verify import Piece
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import PageBuffer
from tests.support.comparing import Host, target
from tests.support.merging import scan_until_merged
from tests.support.scanner import Scanner
from tests.support.world import World

PAGES, USER = 500, 7


class Memory:
    """Pages of ours that are like the slots of an extent, but for some; every 7th of both is zeros."""

    def __init__(self, store: Store) -> None:
        self.first = store.allocate(PAGES, USER)
        self.buffer = PageBuffer(PAGES)
        for page in range(PAGES):
            content = (0 if page % 7 == 0 else page + 1).to_bytes(8, "little") * (PAGE_SIZE // 8)
            store.write(self.first + page, [memoryview(content)])
            self.buffer.view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content
        self.wrong = set(random.Random(3).sample(range(PAGES), 40))
        for page in self.wrong:
            self.buffer.view[page * PAGE_SIZE + random.Random(page).randrange(PAGE_SIZE)] ^= 0x40

    def at(self, page: int) -> int:
        return self.buffer.address + page * PAGE_SIZE

    def portion(self) -> list[Planned]:
        """Records of two targets: all of the extent in pieces, what is zeros by itself, and a wrong claim."""
        rng = random.Random(5)
        records: list[Planned] = []
        for number in (1, 2):
            page = 0
            while page < PAGES:
                pages = min(rng.choice([1, 2, 3, 60, 150]), PAGES - page)
                record = (len(records), wire.OP_MAP, number, self.at(page), pages, self.first + page)
                records.append(Planned(*record, None, 0, 0))
                page += pages
        for page in range(0, PAGES, 35):
            records.append(Planned(len(records), wire.OP_ZERO, 1, self.at(page), 2, 0, None, 0, 0))
        return records

    def wanted(self, portion: list[Planned]) -> dict[int, set[tuple[int, int | None]]]:
        """Pages (record, address) of each target that may be mapped."""
        pages: dict[int, set[tuple[int, int | None]]] = {1: set(), 2: set()}
        for item in portion:
            for at in range(item.pages):
                page = (item.addr - self.buffer.address) // PAGE_SIZE + at
                zeros = page % 7 == 0 or item.op == wire.OP_MAP
                if page not in self.wrong and zeros:
                    pages[item.target].add((item.record, self.at(page)))
        return pages


def _pages(pieces: dict[int, list[Piece]]) -> dict[int, set[tuple[int, int | None]]]:
    return {
        number: {(piece.record, piece.addr + at * PAGE_SIZE) for piece in mine for at in range(piece.pages)}
        for number, mine in pieces.items()
    }


def _compared(host: Host, memory: Memory, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Compare all of `memory` and insist on what is found; `meanwhile` when it has begun."""
    portion, outcome = memory.portion(), Outcome()
    finish = comparing.begin_pieces(host, portion, {}, outcome)
    meanwhile()
    found, wanted = finish(), memory.wanted(portion)
    assert _pages(found) == wanted
    differ = sum(item.pages for item in portion) - sum(map(len, wanted.values()))
    assert outcome.skipped == {"differs": differ}
    for number in (1, 2):
        for piece in found[number]:
            slot = memory.first + (piece.addr - memory.buffer.address) // PAGE_SIZE
            assert piece.slot in (slot, None)


def _host(store: Store) -> Host:
    return Host(store, {number: target(os.getpid(), USER) for number in (1, 2)})


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("pages", [16, 130, 100_000])
def test_they_find_what_the_guard_would(
    store: Store, monkeypatch: pytest.MonkeyPatch, count: int, pages: int
) -> None:
    monkeypatch.setattr(comparing, "JOB_PAGES", pages)
    memory, host = Memory(store), _host(store)
    with host.helped(count):
        for _ in range(3):
            _compared(host, memory)
        assert len(host.comparers) == count
    _compared(host, memory)


@pytest.mark.parametrize("count", [0, 2])
def test_chains_too(store: Store, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(comparing, "JOB_PAGES", 60)
    memory, host, outcome = Memory(store), _host(store), Outcome()
    order = random.Random(9).sample(range(PAGES), PAGES)
    other = PageBuffer(PAGES)
    for at, page in enumerate(order):
        other.view[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] = memory.buffer.view[page * PAGE_SIZE :][:PAGE_SIZE]
    slots = array("Q", [memory.first + page for page in order])
    with host.helped(count):
        chains = {number: [Chain(number, other.address, slots)] for number in (1, 2)}
        found = comparing.begin_chains(host, chains, outcome)()
    for number in (1, 2):
        pages = {
            order[(part.addr - other.address) // PAGE_SIZE + at]
            for part in found[number]
            for at in range(len(part.slots))
        }
        assert pages == set(range(PAGES)) - memory.wrong
    assert outcome.skipped == {"differs": 2 * len(memory.wrong)}


def test_one_holds_the_store_read_only_and_its_socket(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the guard goes on, however long that takes."""
    shed = comparer._shed

    def slow(sock: socket.socket, store: Store) -> None:
        time.sleep(0.2)
        shed(sock, store)

    monkeypatch.setattr(comparer, "_shed", slow)
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]
    host = _host(store)
    with host.helped(2) as pids:
        for pid in pids:
            _check_descriptors(pid)
    for fd in extra:
        os.close(fd)


def _check_descriptors(pid: int) -> None:
    """A comparer has the standard streams, one socket, and the store so that it cannot write it."""
    folder = Path(f"/proc/{pid}/fd")
    held = {int(fd.name): os.readlink(fd) for fd in folder.iterdir() if int(fd.name) > 2}
    assert len(held) == 2, held
    assert sorted(name.partition(":")[0] for name in held.values()) == [
        "/memfd",
        "socket",
    ], held
    for fd, name in held.items():
        if name.startswith("/memfd:gpuksm-store"):
            flags = int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            assert flags & os.O_ACCMODE == os.O_RDONLY


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_nobody_answers_the_guard_compares(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(comparing, "JOB_PAGES", 16)
    monkeypatch.setattr(comparers, "_ANSWER_SECONDS", 0.3)
    memory, host = Memory(store), _host(store)
    with host.helped(2) as pids:
        os.kill(pids[0], number)
        _compared(host, memory, lambda: os.kill(pids[1], number))
        assert len(host.comparers) == 0
        _compared(host, memory)


def test_what_one_may_not_read_the_guard_compares(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Yama lets the guard read a process, and nobody else."""
    monkeypatch.setattr(comparing, "JOB_PAGES", 16)
    ours, read = os.getpid(), verify.bytes_read

    def refused(call: Callable[[], int]) -> int:
        if os.getpid() != ours:
            raise PermissionError(1, "not you")
        return read(call)

    monkeypatch.setattr(verify, "bytes_read", refused)
    memory, host = Memory(store), _host(store)
    with host.helped(2):
        _compared(host, memory)
        assert len(host.comparers) == 0


@pytest.mark.parametrize("action", ["kill", "error", "stop"])
def test_one_that_fails_at_its_third_job(store: Store, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    monkeypatch.setattr(comparing, "JOB_PAGES", 16)
    monkeypatch.setattr(comparers, "_ANSWER_SECONDS", 0.3)
    for name, value in {"_POINT": "comparing", "_NTH": "3", "_ACTION": action}.items():
        monkeypatch.setattr(faults, name, value)
    memory, host = Memory(store), _host(store)
    with host.helped(2):
        _compared(host, memory)
        _compared(host, memory)
        assert len(host.comparers) == 0


def test_a_job_that_fits_no_message_is_done_here(store: Store) -> None:
    memory, host = Memory(store), _host(store)
    pieces = [Piece(record, memory.at(1), 1, memory.first + 1) for record in range(30_000)]
    good = 1 not in memory.wrong
    with host.helped(1):
        jobs = [Job(PIECES, {1: os.getpid()}, {1: pieces}) for _ in range(2)]
        host.comparers.begin(jobs)
        host.comparers.finish(jobs, host.breathe)
        assert [len(job.answer[1]) for job in jobs] == [30_000 * good] * 2
        assert len(host.comparers) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_a_target_that_is_gone_is_dropped(store: Store, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(comparing, "JOB_PAGES", 16)
    ended = subprocess.Popen(["true"])
    ended.wait()
    memory, host, outcome = Memory(store), _host(store), Outcome()
    host.targets[2] = target(ended.pid, USER)
    portion = memory.portion()
    slots = array("Q", range(memory.first, memory.first + PAGES))
    with host.helped(count):
        found = comparing.begin_pieces(host, portion, {}, outcome)()
        assert _pages(found)[1] == memory.wanted(portion)[1]
        assert 2 not in found
        assert comparing.begin_chains(host, {2: [Chain(0, memory.at(0), slots)]}, outcome)() == {}
    assert host.dropped == [host.targets[2]] * 2


def test_how_many_there_are_and_for_how_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    host = _host(store)
    crew = host.comparers
    crew.want(1000)
    assert len(crew) == 0, "started in the midst of a request"
    crew.tend()
    assert len(crew) == MOST
    crew.want(1)
    crew.tend()
    assert len(crew) == MOST
    monkeypatch.setattr(comparers, "_IDLE_SECONDS", -60.0)
    crew.tend()
    assert len(crew) == MOST, "memory may have to settle first"
    crew.finish([], host.breathe)
    crew.tend()
    assert len(crew) == 0
    deadline = time.monotonic() + 10
    while crew.ending and time.monotonic() < deadline:
        crew.tend()
    assert not crew.ending


# -- beside a guard ------------------------------------------------------------------------


@pytest.fixture
def helped_world(world: World) -> World:
    """A world whose guard has two comparers, which are given a few pages at a time."""
    world.extra_env |= {"GPUKSM_COMPARERS": "2", "GPUKSM_COMPARER_PAGES": "16"}
    return world


def _eventually(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def _comparers(world: World) -> list[int]:
    children = Path(f"/proc/{world.guard_pid()}/task/{world.guard_pid()}/children").read_text().split()
    return [int(pid) for pid in children if b"comparer" in Path(f"/proc/{pid}/comm").read_bytes()]


def test_a_scan_with_them(helped_world: World) -> None:
    victims = [helped_world.victim("regions", 700, 16, seed, "straight", 9000) for seed in (1, 2)]
    victims += [helped_world.victim("regions", 700, 16, seed, "permuted", 9000) for seed in (3, 4)]
    for salt in range(3):
        scan_until_merged(helped_world, victims, ["shared"])
        for victim in victims:
            victim.ask(f"write 40 {salt}")
            victim.ask("rewrite")
    helped_world.unmerge()
    for victim in victims:
        victim.verify()
    _eventually(lambda: not _comparers(helped_world), "comparers stay after the scan")


def test_what_they_hold_and_when_they_end(helped_world: World) -> None:
    """Nothing that an agent relies on; and they do not outlive their guard."""
    starters = [helped_world.victim("regions", 64, 4, seed, "straight", 777000) for seed in (8, 9)]
    helped_world.scan(*starters)
    victims = [helped_world.victim("regions", 64, 64, seed, "straight", 1000 * seed) for seed in (1, 2)]
    scanner = Scanner(helped_world, victims)
    pids = _comparers(helped_world)
    assert len(pids) == 2
    for pid in pids:
        _check_descriptors(pid)
        assert os.getpriority(os.PRIO_PROCESS, pid) == 10, "jobs do not come first"
    os.kill(helped_world.guard_pid(), signal.SIGKILL)
    _eventually(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "comparers outlive their guard"
    )
    scanner.close()
    for victim in (*starters, *victims):
        victim.verify()
    helped_world.unmerge()
