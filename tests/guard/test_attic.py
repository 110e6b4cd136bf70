"""The queue of userfaultfds: what is put there stays there without us, until it is taken out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from gpuksm.guard import attic
from gpuksm.guard.attic import Attic, copies, put
from gpuksm.linux import _libc, uffd
from tests import requirements_env

_userfaultfd = _libc.syscall_function("userfaultfd", 323, ctypes.c_int)


@pytest.fixture
def uffds() -> Iterator[list[int]]:
    requirements_env.need("uffd")
    fds = [_userfaultfd(uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY) for _ in range(3)]
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def make_attic() -> Iterator[Callable[[], Attic]]:
    """Makes attics that are closed in the end: what is in them counts as in flight for this user."""
    made: list[Attic] = []

    def make() -> Attic:
        made.append(Attic())
        return made[-1]

    yield make
    for each in made:
        for end in (each.sending, each.receiving):
            with contextlib.suppress(OSError):  # closed by the test
                os.close(end)


def _close(fds: dict[int, int]) -> set[int]:
    for fd in fds.values():
        os.close(fd)
    return set(fds)


def test_it_outlives_who_put_it_there(uffds: list[int], make_attic: Callable[[], Attic]) -> None:
    first = make_attic()
    for number, fd in enumerate(uffds):
        first.put(number, fd)
        first.put(number, fd)  # it is there
    os.close(first.sending)
    assert _close(copies(first.receiving)) == {0, 1, 2}


def test_one_is_taken_out(uffds: list[int], make_attic: Callable[[], Attic]) -> None:
    again = make_attic()
    for number, fd in enumerate(uffds):
        again.put(number, fd)
    successor = Attic(again.sending, again.receiving)
    assert successor.inside == {0, 1, 2}
    assert _close(copies(successor.receiving)) == {0, 1, 2}
    successor.remove(1)
    assert _close(copies(again.receiving)) == {0, 2}
    successor.remove(0)
    successor.remove(2)
    assert not select.select([again.receiving], [], [], 0)[0]


def test_none_is_ever_out_of_the_queue_while_another_is_taken_out(
    uffds: list[int], make_attic: Callable[[], Attic], monkeypatch: pytest.MonkeyPatch
) -> None:
    """We may die, and the keeper with us, between any two system calls of it."""
    again = make_attic()
    for number, fd in enumerate(uffds):
        again.put(number, fd)
    others: list[set[int]] = []
    drop = attic._drop

    def look(end: socket.socket) -> None:
        others.append(_close(copies(again.receiving)))
        drop(end)
        others.append(_close(copies(again.receiving)))
        raise InterruptedError

    monkeypatch.setattr(attic, "_drop", look)
    for _ in range(4):
        with contextlib.suppress(InterruptedError):
            Attic(again.sending, again.receiving).remove(2)
    assert all(seen >= {0, 1} for seen in others)
    monkeypatch.undo()
    for number, left in ((2, {0, 1}), (0, {1}), (1, set[int]())):
        Attic(again.sending, again.receiving).remove(number)
        assert _close(copies(again.receiving)) == left
    assert not select.select([again.receiving], [], [], 0)[0]  # nor is one there twice


def test_what_is_no_userfaultfd_is_not_taken(uffds: list[int], make_attic: Callable[[], Attic]) -> None:
    queue = make_attic()
    one, other = os.pipe()
    put(queue.sending, 7, one)
    queue.put(8, uffds[0])
    with open(os.devnull) as file:
        put(queue.sending, 9, file.fileno())
    assert _close(copies(queue.receiving)) == {8}
    os.close(one)
    os.close(other)


def test_a_full_queue_does_not_block(uffds: list[int], make_attic: Callable[[], Attic]) -> None:
    queue = make_attic()
    with socket.socket(fileno=os.dup(queue.sending)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    for number in range(1000):
        queue.put(number, uffds[0])
    assert 10 < len(queue.inside) < 1000
    assert _close(copies(queue.receiving)) == queue.inside
