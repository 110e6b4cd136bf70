"""What a process holds itself: by the kernel's counts, and by PSS where these are not exact."""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys

import pytest

from gpuksm.linux import mappings, procfs
from gpuksm.scan import measure
from tests.support import processes


@pytest.fixture(params=["counts", "pss"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    way = str(request.param)
    if way == "counts" and not measure.counts_are_exact():
        pytest.skip("this kernel's counts of pages are not exact")
    monkeypatch.setattr(measure, "counts_are_exact", lambda: way == "counts")
    return way


# Writes to as many more pages as each line of its input says.
_WRITER = """
import mmap
memory = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
at = 0
print("READY", flush=True)
while word := input():
    for _ in range(int(word)):
        memory[at] = 1
        at += 4096
    print("DONE", flush=True)
"""


def test_each_page_counts(way: str) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-S", "-c", _WRITER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        held = []
        for pages in (1, 10, 30, 0):
            child.stdout.readline()
            found = measure.held(child.pid)
            assert found is not None
            held.append(found.anonymous // mmap.PAGESIZE)
            child.stdin.write(f"{pages or ''}\n")
            child.stdin.flush()
    assert [after - before for before, after in itertools.pairwise(held[1:])] == [10, 30]
    assert measure.held(child.pid) is None


def test_counts_are_what_pages_add_up_to() -> None:
    if not measure.counts_are_exact():
        pytest.skip("this kernel's counts of pages are not exact")
    with processes.sleeping() as pid:
        found, rollup = measure.held(pid), mappings.smaps_rollup(pid)
        assert found is not None
        assert found.anonymous == rollup["Anonymous"] + rollup.get("Swap", 0)
        assert found.tables == int(procfs.status(pid)["VmPTE"].split()[0]) * 1024


def test_a_count_that_comes_late_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Linux 6.16: some dozen pages are told of at once."""
    measure.counts_are_exact.cache_clear()
    status, told = procfs.status, 0

    def late(pid: int) -> dict[str, str]:
        nonlocal told
        told += 1
        return status(pid) | {"RssAnon": f"{1000 + told // 12 * 32 * 4} kB"}

    monkeypatch.setattr(procfs, "status", late)
    assert not measure.counts_are_exact()
    measure.counts_are_exact.cache_clear()


def test_what_is_saved() -> None:
    held = measure.Held
    before = {1: held(1000, 10), 2: held(2000, 20), 3: held(5000, 50)}
    after = {1: held(400, 14), 2: held(1500, 20), 4: held(1, 1)}
    assert measure.saved_bytes(before, after, 300) == 600 + 500 - 4 - 300
