"""A scanner that proposes nonsense: the guard compares every byte itself (hazard 13).

These tests speak the control protocol as a broken or hostile scanner would.  The
guard may refuse a plan or leave pages out; it may not merge what is not equal, and
it may not end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpuksm import wire
from tests.support import numa
from tests.support.scanner import Scanner
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 64


@pytest.fixture
def victims(request: pytest.FixtureRequest, world: World) -> list[Victim]:
    """Two victims of unlike content, and a guard that runs; by parameter with so many comparers."""
    if hasattr(request, "param"):
        world.extra_env |= {"GPUKSM_COMPARERS": str(request.param), "GPUKSM_COMPARER_PAGES": "16"}
    starters = [world.victim("regions", 16, 4, seed, "straight", 777000) for seed in (8, 9)]
    world.scan(*starters)
    return [world.victim("regions", PAGES, PAGES, seed, "straight", 1000 * seed) for seed in (1, 2)]


@pytest.fixture
def scanner(world: World, victims: list[Victim]) -> Iterator[Scanner]:
    connection = Scanner(world, victims)
    yield connection
    connection.close()


# Slots of new extents, records, and where it matters the column.
Plan = Callable[
    [list[int], list[int]],
    tuple[list[int], list[tuple[int, ...]]] | tuple[list[int], list[tuple[int, ...]], list[int]],
]
FILL, MAP, ZERO, REPLICA, EACH, NEW, IN_NEW = (
    wire.OP_FILL,
    wire.OP_MAP,
    wire.OP_ZERO,
    wire.OP_FILL_REPLICA,
    wire.OP_MAP_EACH,
    wire.FLAG_NEW_EXTENT,
    wire.EACH_NEW_EXTENT,
)

# name -> plan over (target ids, addresses of the shared areas)
WRONG: dict[str, Plan] = {
    "unlike content": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (MAP, NEW, 0, t[1], at[1], PAGES, 0, 0, 0, 0)],
    ),
    "shifted by a page": lambda t, at: (
        [PAGES],
        [
            (FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0),
            (MAP, NEW, 0, t[0], at[0] + 4096, PAGES - 1, 0, 0, 0, 0),
        ],
    ),
    "slots that nobody filled": lambda t, at: (
        [PAGES],
        [(MAP, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0)],
    ),
    "behind the extent": lambda t, at: (
        [8],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (MAP, NEW, 0, t[0], at[0], 16, 0, 4, 0, 0)],
    ),
    "an extent that is none": lambda t, at: (
        [8],
        [(FILL, NEW, 0, t[0], at[0], 8, 5, 0, 0, 0)],
    ),
    "an absolute slot far away": lambda t, at: ([], [(MAP, 0, 0, t[0], at[0], PAGES, 0, 1 << 40, 0, 0)]),
    "slots of others": lambda t, at: ([], [(MAP, 0, 0, t[0], at[0], 16, 0, 0, 0, 0)]),
    "filling slots of others": lambda t, at: ([], [(FILL, 0, 0, t[0], at[0], 16, 0, 0, 0, 0)]),
    "zeros that are none": lambda t, at: ([], [(ZERO, 0, 0, t[0], at[0], PAGES, 0, 0, 0, 0)]),
    "half a page": lambda t, at: ([PAGES], [(FILL, NEW, 0, t[0], at[0] + 17, 4, 0, 0, 0, 0)]),
    "no page": lambda t, at: ([PAGES], [(FILL, NEW, 0, t[0], at[0], 0, 0, 0, 0, 0)]),
    "outside of all memory": lambda t, at: ([PAGES], [(FILL, NEW, 0, t[0], 4096, PAGES, 0, 0, 0, 0)]),
    "beyond the address space": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], (1 << 64) - 4096, 4, 0, 0, 0, 0)],
    ),
    "more than there is": lambda t, at: (
        [1 << 31],
        [(FILL, NEW, 0, t[0], at[0], (1 << 32) - 1, 0, 0, 0, 0)],
    ),
    "a target that is none": lambda t, at: ([PAGES], [(FILL, NEW, 0, 12345, at[0], PAGES, 0, 0, 0, 0)]),
    "an operation that is none": lambda t, at: ([PAGES], [(9, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0)]),
    "a replica of another page": lambda t, at: (
        [PAGES],
        [
            (REPLICA, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0),
            (MAP, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0),
        ],
    ),
    "the same pages twice": lambda t, at: (
        [PAGES, PAGES],
        [
            (FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0),
            (FILL, NEW, 0, t[0], at[0], PAGES, 1, 0, 0, 0),
            (ZERO, 0, 0, t[0], at[0], PAGES, 0, 0, 0, 0),
        ],
    ),
    "the same slots twice": lambda t, at: (
        [PAGES],
        [
            (FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0),
            (FILL, NEW, 0, t[1], at[1], PAGES, 0, 0, 0, 0),
        ],
    ),
    "digests that are not there": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 1 << 60)],
    ),
    "each to unlike content": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (EACH, 0, 0, t[1], at[1], PAGES, 0, 0, 0, PAGES)],
        [*[0] * PAGES, *(IN_NEW + (page * 5 + 1) % PAGES for page in range(PAGES))],
    ),
    "each to slots that nobody filled": lambda t, at: (
        [PAGES],
        [(EACH, 0, 0, t[0], at[0], PAGES, 0, 0, 0, 0)],
        [IN_NEW + PAGES - 1 - page for page in range(PAGES)],
    ),
    "each to one slot": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (EACH, 0, 0, t[1], at[1], PAGES, 0, 0, 0, PAGES)],
        [*[0] * PAGES, *[IN_NEW] * PAGES],
    ),
    "each behind the extent": lambda t, at: (
        [8],
        [(FILL, NEW, 0, t[0], at[0], 8, 0, 0, 0, 0), (EACH, 0, 0, t[1], at[1], 4, 0, 0, 0, 8)],
        [*[0] * 8, *range(IN_NEW + 5, IN_NEW + 9)],
    ),
    "each in an extent that is none": lambda t, at: (
        [8],
        [(FILL, NEW, 0, t[0], at[0], 8, 0, 0, 0, 0), (EACH, 0, 0, t[1], at[1], 4, 0, 0, 0, 8)],
        [*[0] * 8, *((IN_NEW | 1 << wire.EACH_EXTENT_SHIFT) + slot for slot in range(4))],
    ),
    "each far away": lambda t, at: (
        [],
        [(EACH, 0, 0, t[0], at[0], 4, 0, 0, 0, 0)],
        [1 << 40, IN_NEW - 1, 7, 0],
    ),
    "each of slots of others": lambda t, at: (
        [],
        [(EACH, 0, 0, t[0], at[0], 16, 0, 0, 0, 0)],
        list(range(16)),
    ),
    "each beyond the column": lambda t, at: (
        [],
        [(EACH, 0, 0, t[0], at[0], 16, 0, 0, 0, 1)],
        list(range(16)),
    ),
    "each by one part of the column": lambda t, at: (
        [],
        [(EACH, 0, 0, t[0], at[0], 16, 0, 0, 0, 0), (EACH, 0, 0, t[1], at[1], 16, 0, 0, 0, 0)],
        list(range(16)),
    ),
    "each beyond the address space": lambda t, at: (
        [],
        [(EACH, 0, 0, t[0], (1 << 64) - 4096, 16, 0, 0, 0, 0)],
        list(range(16)),
    ),
    "each over memory that is not there": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (EACH, 0, 0, t[1], 4096, 16, 0, 0, 0, PAGES)],
        [*[0] * PAGES, *range(IN_NEW, IN_NEW + 16)],
    ),
    "each of a target that is none": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (EACH, 0, 0, 12345, at[1], 16, 0, 0, 0, PAGES)],
        [*[0] * PAGES, *range(IN_NEW, IN_NEW + 16)],
    ),
    "the same pages twice, once each": lambda t, at: (
        [PAGES],
        [(FILL, NEW, 0, t[0], at[0], PAGES, 0, 0, 0, 0), (EACH, 0, 0, t[0], at[0], 16, 0, 0, 0, PAGES)],
        [*[0] * PAGES, *range(IN_NEW, IN_NEW + 16)],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_plan(world: World, victims: list[Victim], scanner: Scanner, name: str) -> None:
    guard = world.guard_pid()
    addresses = [victim.area("shared")[0] for victim in victims]
    extents, plan, *column = WRONG[name](scanner.targets, addresses)
    reply = scanner.commit(extents, plan, *column)
    assert reply.get("ok") or reply["error"], reply
    for victim in (*victims, *world.victims[:2]):
        victim.verify()
    for victim in victims:
        victim.ask("write 30 4")
    scanner.close()
    assert world.guard_pid() == guard
    for victim in world.victims:
        victim.verify()
    world.unmerge()
    for victim in world.victims:
        victim.verify()


@pytest.mark.parametrize("victims", [2], indirect=True)
def test_wrong_plans_compared_beside_the_guard(world: World, victims: list[Victim], scanner: Scanner) -> None:
    """All of them, one after the other: what compares them does not matter."""
    addresses = [victim.area("shared")[0] for victim in victims]
    for name, wrong in WRONG.items():
        extents, plan, *column = wrong(scanner.targets, addresses)
        reply = scanner.commit(extents, plan, *column)
        assert reply.get("ok") or reply["error"], (name, reply)
        for victim in (*victims, *world.victims[:2]):
            victim.verify()
        assert len(scanner.ask("status", budgets=[])["comparers"]) == 2
        scanner.ask("unmerge", pids=[victim.pid for victim in victims], max_pause_us=5000)
        for target in scanner.targets:
            scanner.ask("arm", target=target)
    for victim in victims:
        victim.ask("write 30 4")
        victim.verify()


def test_pages_written_between_arm_and_commit_stay(
    world: World, victims: list[Victim], scanner: Scanner
) -> None:
    """What is written after arming is never merged, even when the plan says so."""
    victims[0].ask("write 50 3")
    at = victims[0].area("shared")[0]
    reply = scanner.commit([PAGES], [(FILL, NEW, 0, scanner.targets[0], at, PAGES, 0, 0, 0, 0)])
    assert reply.get("ok"), reply
    assert victims[0].merged_pages("shared") < PAGES
    victims[0].verify()


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff" * 8,
        b"\x00" * 8,
        b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]",
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        b"\x10\x00\x00\x00\x00\x00\x00\x00{",
        wire.encode({"op": "nonsense"}),
        wire.encode({"op": "attach", "targets": 7}),
        wire.encode({"op": "commit", "extents": -1}, b"x" * 47),
        wire.encode({"op": "unmerge", "pids": "all"}),
        wire.encode({"op": "register", "pid": "1", "ranges": [[5]]}),
        wire.encode({"op": "arm", "target": 10**30}),
    ],
)
def test_broken_frames(world: World, victims: list[Victim], frame: bytes) -> None:
    guard = world.guard_pid()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(str(world.folder / "guard.sock"))
        connection.sendall(frame)
        with contextlib.suppress(TimeoutError, ConnectionError):
            connection.recv(4096)
    assert world.guard_pid() == guard
    for victim in world.victims:
        victim.verify()


_REGISTERING = """
import socket, sys
from gpuksm import wire
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    wire.send(connection, {"op": "register", "pid": int(sys.argv[2]), "ranges": None})
    reply, _ = wire.receive(connection)
print("READY error=%s" % reply.get("error"), flush=True)
"""


def test_a_registration_of_another_users_process_is_refused(user_world: World) -> None:
    victims = [user_world.victim("regions", 16, 4, seed, "straight") for seed in (8, 9)]
    user_world.scan(*victims)
    client = user_world.python(_REGISTERING, user_world.folder / "guard.sock", os.getpid())
    assert client.values["error"] == "NotPermitted"


@pytest.mark.parametrize("node", [1025, 1 << 16, (1 << 32) - 1])
def test_a_numa_node_that_no_kernel_has_is_malformed(
    world: World, victims: list[Victim], scanner: Scanner, node: int
) -> None:
    at = victims[0].area("shared")[0]
    record = (FILL, NEW, 0, scanner.targets[0], at, PAGES, 0, 0, 0, 0)
    before = numa.extents(world)
    reply = scanner.commit([PAGES], [record], column=[0] * PAGES, node=node)
    assert reply["error"] == "UsageError"
    assert "malformed plan" in reply["message"]
    assert numa.extents(world) == before


def test_memory_is_not_filled_from_a_numa_node_that_is_not_there(
    world: World, victims: list[Victim], scanner: Scanner
) -> None:
    """A cpuset may keep the guard from a node, too: what cannot lie there stays as it is, and is told."""
    if not numa.nodes():
        pytest.skip("no NUMA nodes")
    at = victims[0].area("shared")[0]
    record = (FILL, NEW, 0, scanner.targets[0], at, PAGES, 0, 0, 0, 0)
    reply = scanner.commit([PAGES], [record], column=[0] * PAGES, node=max(numa.nodes()) + 2)
    assert reply["skipped"] == {"numa-node": PAGES}
    assert victims[0].merged_pages("shared") == 0
    reply = scanner.commit([PAGES], [record], column=[0] * PAGES, node=min(numa.nodes()) + 1)
    assert reply["mapped_pages"] >= PAGES - 1, reply
    assert numa.store_policies(victims[0].pid) == {f"prefer:{min(numa.nodes())}"}
    for victim in victims:
        victim.verify()


def test_nothing_is_merged_before_memory_was_calm_for_as_long_as_was_said(
    world: World, victims: list[Victim], scanner: Scanner
) -> None:
    """Not even if the plan comes at once; what is written meanwhile stays.  Who says too much gets less."""
    at = victims[0].area("shared")[0]
    began = time.monotonic()
    assert scanner.ask("arm", target=scanner.targets[0], calm_us=400_000)["ok"]
    replies: list[dict[str, Any]] = []
    plan = [(FILL, NEW, 0, scanner.targets[0], at, PAGES, 0, 0, 0, 0)]
    commit = threading.Thread(target=lambda: replies.append(scanner.commit([PAGES], plan)))
    commit.start()
    time.sleep(0.1)
    victims[0].ask("write 50 3")
    assert victims[0].merged_pages("shared") == 0
    commit.join()
    assert time.monotonic() - began >= 0.4
    assert replies[0].get("ok"), replies
    assert 0 < victims[0].merged_pages("shared") < PAGES
    assert scanner.ask("arm", target=scanner.targets[1], calm_us=10**9)["ok"]
    at, began = victims[1].area("shared")[0], time.monotonic()
    assert scanner.commit([PAGES], [(FILL, NEW, 0, scanner.targets[1], at, PAGES, 0, 0, 0, 0)])["ok"]
    assert 0.9 < time.monotonic() - began < 20
    assert victims[1].merged_pages("shared")
    for victim in victims:
        victim.verify()
