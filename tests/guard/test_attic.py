"""The queue of userfaultfds: what is put there stays there without us, until it is taken out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest

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
    for attic in made:
        for end in (attic.sending, attic.receiving):
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


def test_what_is_no_userfaultfd_is_not_taken(uffds: list[int], make_attic: Callable[[], Attic]) -> None:
    attic = make_attic()
    one, other = os.pipe()
    put(attic.sending, 7, one)
    attic.put(8, uffds[0])
    with open(os.devnull) as file:
        put(attic.sending, 9, file.fileno())
    assert _close(copies(attic.receiving)) == {8}
    os.close(one)
    os.close(other)


def test_a_full_queue_does_not_block(uffds: list[int], make_attic: Callable[[], Attic]) -> None:
    attic = make_attic()
    with socket.socket(fileno=os.dup(attic.sending)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    for number in range(1000):
        attic.put(number, uffds[0])
    assert 10 < len(attic.inside) < 1000
    assert _close(copies(attic.receiving)) == attic.inside
