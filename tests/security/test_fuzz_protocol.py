"""Random frames and mutated plans over the control socket: the guard stays, victims keep every byte."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuksm import wire
from tests.support.scanner import Scanner
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 32
_FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OPS = (
    *("hello", "attach", "arm", "commit", "slots", "unmerge", "status"),
    *("register", "unregister", "registered", "nonsense"),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["pid", "ranges"]), inner, max_size=2)
    ),
    max_leaves=5,
)
FIELDS = ("targets", "options", "target", "extents", "records", "max_pause_us", "pids", "pid", "ranges")
FRAMES = st.tuples(
    st.fixed_dictionaries({"op": st.sampled_from(OPS)}, optional=dict.fromkeys(FIELDS, VALUES)),
    st.binary(max_size=200),
)
# What a field of a plan record may become: the edges of each width, and small numbers.
NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 31, 32, 33, 4095, 4096, 1 << 20, 1 << 31, (1 << 32) - 1])
WIDTHS = (8, 8, 16, 32, 64, 32, 32, 64, 64, 64)
MUTATIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), NUMBERS, st.booleans()), max_size=5)
# What an element of the column may become.
SLOTS = st.one_of(
    NUMBERS,
    st.builds(
        lambda number, extent: wire.EACH_NEW_EXTENT | extent << 32 | number % (1 << 32), NUMBERS, NUMBERS
    ),
)
IN_COLUMN = st.lists(st.tuples(st.integers(0, PAGES // 2 - 1), SLOTS), max_size=5)


@pytest.fixture
def victims(world: World) -> list[Victim]:
    starters = [world.victim("regions", 16, 4, seed, "straight", 777000) for seed in (8, 9)]
    world.scan(*starters)
    return [world.victim("regions", PAGES, 4, seed, "straight") for seed in (1, 2)]


@pytest.fixture
def scanner(world: World, victims: list[Victim]) -> Iterator[Scanner]:
    connection = Scanner(world, victims)
    yield connection
    connection.close()


def _all_is_well(world: World, guard: int) -> None:
    assert world.guard_pid() == guard
    for victim in world.victims:
        victim.verify()


def test_random_bytes(world: World, victims: list[Victim]) -> None:
    guard = world.guard_pid()

    @_FUZZ
    @given(st.lists(st.binary(max_size=60), max_size=8))
    def run(pieces: list[bytes]) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(world.folder / "guard.sock"))
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)

    run()
    _all_is_well(world, guard)


def test_random_requests(world: World, victims: list[Victim], scanner: Scanner) -> None:
    """Well-formed frames with any fields: each gets one reply, which is never an internal error."""
    guard = world.guard_pid()

    @_FUZZ
    @given(st.lists(FRAMES, min_size=1, max_size=10))
    def run(frames: list[tuple[dict[str, object], bytes]]) -> None:
        for message, payload in frames:
            reply = scanner.ask(str(message.pop("op")), payload, **message)
            assert reply.get("ok") or reply["error"], (message, reply)
            json.dumps(reply)

    run()
    _all_is_well(world, guard)


def test_mutated_plans(world: World, victims: list[Victim], scanner: Scanner) -> None:
    """A plan that would merge both victims, with some of its numbers changed."""
    guard = world.guard_pid()
    first, second = (victim.area("shared")[0] for victim in victims)
    t = scanner.targets
    new, half = wire.FLAG_NEW_EXTENT, PAGES // 2
    plan = [
        (wire.OP_FILL, new, 0, t[0], first, half, 0, 0, 0, 0),
        (wire.OP_MAP, new, 0, t[1], second, half, 0, 0, 0, 0),
        (wire.OP_FILL, new, 0, t[0], first + half * 4096, half, 1, 0, 0, 0),
        (wire.OP_MAP, new, 0, t[1], second + half * 4096, half // 2, 1, 0, 0, 0),
        (wire.OP_MAP_EACH, 0, 0, t[1], second + (half + half // 2) * 4096, half // 2, 0, 0, 0, half // 2),
    ]
    column = [wire.EACH_NEW_EXTENT | 1 << wire.EACH_EXTENT_SHIFT | slot for slot in range(half)]

    @_FUZZ
    @given(MUTATIONS, IN_COLUMN)
    def run(mutations: list[tuple[int, int, int, bool]], in_column: list[tuple[int, int]]) -> None:
        mutated = [list(record) for record in plan]
        for record, field, number, added in mutations:
            value = mutated[record][field] + number if added else number
            mutated[record][field] = value % (1 << WIDTHS[field])
        slots = column.copy()
        for index, number in in_column:
            slots[index] = number % (1 << 64)
        reply = scanner.commit([half, half], [tuple(record) for record in mutated], slots)
        assert reply.get("ok") or reply["error"] == "UsageError", reply
        for victim in victims:
            victim.verify()

    run()
    for victim in victims:
        victim.ask("write 30 4")
    _all_is_well(world, guard)


def test_a_client_that_never_reads(world: World, victims: list[Victim]) -> None:
    """Many requests and no reply taken: others are answered meanwhile."""
    guard = world.guard_pid()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0.2)
        connection.connect(str(world.folder / "guard.sock"))
        with contextlib.suppress(TimeoutError):
            connection.sendall(wire.encode({"op": "status"}) * 2000)
        _all_is_well(world, guard)
