"""estimate: real processes that are only looked at, with and without address randomisation."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from gpuksm.errors import NoSuchProcess
from gpuksm.linux import mappings, procfs
from gpuksm.scan import NoProgress, ScanOptions, TargetRequest, run_estimate
from gpuksm.scan.same_layout import Areas

MIB = 1 << 20
WORKER = f"""
import mmap, os, random, sys
def area(size, data):
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = data
    return memory
keep = [area(8 * {MIB}, random.Random(5).randbytes(8 * {MIB})), area(4 * {MIB}, os.urandom(4 * {MIB}))]
keep += [area({MIB}, bytes({MIB})), mmap.mmap(-1, 64 * {MIB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)]
print("ready", flush=True)
sys.stdin.read()
"""
# A heap full of pointers: equal but for where it lies.
POINTERS = """
#include <stdio.h>
#include <stdlib.h>
struct node { struct node *next; void *code; long number; };
int main(void) {
    struct node *head = 0;
    for (long i = 0; i < 200000; i++) {
        struct node *made = malloc(sizeof *made);
        made->next = head; made->code = (void *)main; made->number = i; head = made;
    }
    puts("ready"); fflush(stdout);
    return getchar();
}
"""


@pytest.fixture
def start():
    started = []

    def run(*command):
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield run
    for child in started:
        child.kill()
        child.wait()


def estimate(processes, **options):
    requests = [TargetRequest(process.pid) for process in processes]
    return run_estimate(requests, ScanOptions(), NoProgress(), **options)


def test_an_estimate_tells_what_two_workers_share_and_touches_nothing(start):
    pair = [start(sys.executable, "-c", WORKER) for _ in range(2)]
    before = [mappings.smaps_rollup(child.pid)["Rss"] for child in pair]
    result = estimate(pair)
    assert result.pages_mergeable >= 2 * 2048
    assert 2048 <= result.pages_shared < 2048 + 1500
    assert result.zero_pages >= 2 * 256
    assert result.pages_unshared >= 2 * 1024
    assert result.bytes_saved > (2048 + 512) * 4096 * 0.95
    assert result.same_layout_pages is None
    assert [report.error for report in result.targets] == [None, None]
    after = [mappings.smaps_rollup(child.pid)["Rss"] for child in pair]
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < MIB
    assert procfs.status(pair[0].pid)["TracerPid"] == "0"
    json.dumps(dataclasses.asdict(result))


def test_ranges_limit_what_is_looked_at(start):
    child = start(sys.executable, "-c", WORKER)
    big = max(mappings.maps(child.pid), key=lambda vma: vma.end - vma.start)
    request = TargetRequest(child.pid, ranges=((big.start, big.start + 10 * 4096 + 5),))
    assert run_estimate([request], ScanOptions(), NoProgress()).pages_scanned <= 10


def test_processes_that_cannot_be_read(start):
    gone = subprocess.Popen(["true"])
    gone.wait()
    child = start(sys.executable, "-c", WORKER)
    result = estimate([gone, child])
    assert result.targets[0].error.startswith("NoSuchProcess")
    assert result.targets[1].pages_scanned > 3000
    with pytest.raises(NoSuchProcess):
        estimate([gone])


def _randomised():
    with open("/proc/sys/kernel/randomize_va_space") as file:
        return file.read().strip() == "2"


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("setarch")), reason="needs gcc and setarch")
@pytest.mark.skipif(not _randomised(), reason="addresses are not randomised here")
def test_equal_layouts_bring_what_the_estimate_says(start, tmp_path):
    (tmp_path / "pointers.c").write_text(POINTERS)
    program = str(tmp_path / "pointers")
    subprocess.run(["gcc", "-O1", "-o", program, str(tmp_path / "pointers.c")], check=True)
    apart = estimate([start(program) for _ in range(2)], same_layout=True)
    alike = estimate([start("setarch", "-R", program) for _ in range(2)], same_layout=True)
    assert apart.pages_sharing < 100
    assert alike.pages_sharing > 1500
    assert abs(apart.same_layout_pages - (alike.pages_sharing - apart.pages_sharing)) <= 5
    assert apart.same_layout_bytes == apart.same_layout_pages * 4096
    assert alike.same_layout_pages <= 5


def test_areas_of_this_process():
    vmas = mappings.maps(os.getpid())
    areas = Areas(vmas)
    base = dict(zip(areas.starts.tolist(), areas.bases.tolist(), strict=True))
    program = next(vma for vma in vmas if vma.path.startswith("/"))
    assert base[program.start] == program.start
    for vma in vmas:
        if vma.path == "[stack]":
            assert base[vma.start] == vma.end
    heap = next(vma for vma in vmas if vma.path == "[heap]")
    assert base[heap.start] == heap.start
