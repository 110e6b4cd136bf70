"""numa: where our own pages lie, and the policy of a memfd as the kernel shows it in a mapping."""

from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpuksm.errors import FeatureMissing, TargetGone
from gpuksm.linux import numa, vm
from tests.support.numa import DEFAULT, PREFERRED, nodes, policy

PAGE = 4096

pytestmark = pytest.mark.skipif(not Path("/sys/devices/system/node/node0").exists(), reason="no NUMA nodes")


def nodes_of(pid: int, start: int, pages: int) -> list[int]:
    addresses = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(start)
    status = np.full(pages, 77, np.int32)
    numa.nodes_at(pid, pages, addresses.ctypes.data, status.ctypes.data)
    return status.tolist()


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    area = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    yield area
    area.close()


def test_a_page_that_is_there_has_a_node_and_no_other(memory: mmap.mmap) -> None:
    start = vm.address_of(memory)
    for page in (0, 1, 5, 63):
        memory[page * PAGE] = 1
    _ = memory[9 * PAGE]  # the zero page
    found = nodes_of(os.getpid(), start, 64)
    assert [page for page, node in enumerate(found) if node >= 0] == [0, 1, 5, 63]
    assert {found[page] for page in (0, 1, 5, 63)} <= nodes()
    assert found[9] == -errno.EFAULT
    assert found[2] == -errno.ENOENT
    assert nodes_of(os.getpid(), 1 << 40, 1)[0] < 0


def test_pages_of_another_process() -> None:
    script = (
        "import mmap, ctypes, sys\n"
        "area = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area[4096] = 1\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        start = int(child.stdout.readline())
        found = nodes_of(child.pid, start, 3)
        assert found[0] < 0
        assert found[1] in nodes()
        child.communicate("")
    with pytest.raises(TargetGone):
        nodes_of(child.pid, start, 3)


def test_the_policy_stays_with_the_file(memory: mmap.mmap) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 50)
    node = min(nodes())
    offset = 1 << 41
    try:
        numa.prefer(fd, offset, 4 * PAGE, node)
        os.pwrite(fd, b"x" * PAGE, offset)
        with mmap.mmap(fd, 8 * PAGE, offset=offset) as later:
            start = vm.address_of(later)
            assert later[0] == ord("x")
            later[PAGE] = 1
            assert [policy(start + page * PAGE) for page in (0, 3, 4)] == [PREFERRED, PREFERRED, DEFAULT]
            assert nodes_of(os.getpid(), start, 2) == [node, node]
            assert re.search(rf"^{start:x} prefer:{node} ", _numa_maps(), re.MULTILINE)
            numa.prefer(fd, offset, 4 * PAGE, None)
            assert policy(start) == DEFAULT
            assert later[0] == ord("x")
    finally:
        os.close(fd)


def test_a_node_that_is_not_there_is_refused_and_leaves_nothing_mapped() -> None:
    fd = os.memfd_create("refused")
    os.ftruncate(fd, 1 << 20)
    try:
        for node in (max(nodes()) + 1, numa.MAX_NODES - 1):
            with pytest.raises(OSError, match="mbind") as caught:
                numa.prefer(fd, 0, PAGE, node)
            assert caught.value.errno == errno.EINVAL
        assert "memfd:refused" not in Path("/proc/self/maps").read_text()
    finally:
        os.close(fd)


def test_without_numa_there_is_nothing_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numa.probe()

    def refuse(number: int) -> None:
        def move_pages(*_: object) -> int:
            raise OSError(number, f"move_pages: {os.strerror(number)}")

        monkeypatch.setattr(numa, "_move_pages", move_pages)

    refuse(errno.ENOSYS)
    assert not numa.probe()
    refuse(errno.EPERM)
    with pytest.raises(FeatureMissing, match="move_pages: Operation not permitted"):
        numa.probe()


def _numa_maps() -> str:
    return re.sub("^0*", "", Path("/proc/self/numa_maps").read_text(), flags=re.MULTILINE)
