"""kcmp: who shares an address space, asked one by one and of many."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from gpuksm.linux import pidfd


@pytest.fixture
def others() -> Iterator[tuple[int, int, int]]:
    """(a thread of ours, a process of its own, a process that is gone)."""
    ended, told = threading.Event(), threading.Event()
    tids: list[int] = []

    def wait() -> None:
        tids.append(threading.get_native_id())
        told.set()
        ended.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    told.wait(60)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with subprocess.Popen(["sleep", "60"]) as child:
        yield tids[0], child.pid, gone.pid
        child.kill()
    ended.set()
    thread.join()


@pytest.mark.parametrize("quick", [True, False])
def test_who_shares_our_memory(
    others: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    if not quick:
        monkeypatch.setattr(pidfd, "_compare", lambda *_: -1)
    thread, child, gone = others
    me = os.getpid()
    assert list(pidfd.sharing_memory(me, [1, child, thread, gone, me])) == [thread, me]
    assert list(pidfd.sharing_memory(child, [me, thread, gone])) == []
    assert list(pidfd.sharing_memory(gone, [me, child, thread, gone])) == []
    assert pidfd.same_memory(me, thread)
    assert pidfd.same_memory(me, child) is False
    assert pidfd.same_memory(me, gone) is None


def test_a_kernel_without_kcmp_is_no_reason_to_say_that_nobody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pidfd, "_compare", lambda *_: -1)

    def missing(*_: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(pidfd, "_kcmp", missing)
    with pytest.raises(OSError, match="not implemented"):
        list(pidfd.sharing_memory(os.getpid(), [1]))
