"""round: whole scans of real processes through a guard of their own."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time

import pytest

from gpuksm import eligibility, writers
from gpuksm.client import GuardClient
from gpuksm.errors import NoSuchProcess
from gpuksm.linux import mappings, pagemap, procfs, vm
from gpuksm.scan import NoProgress, ScanOptions, TargetRequest, run_scan, slices
from gpuksm.scan import round as round_module

MIB = 1 << 20
# 8 MiB of equal memory, 4 MiB of its own, zeros, a constant; and 1 MiB that is written all the time.
WORKER = f"""
import mmap, os, random, sys, threading, time, zlib
def area(size, data):
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = data
    return memory
padding = area(4096 + int(sys.argv[1]) * {MIB}, os.urandom(4096 + int(sys.argv[1]) * {MIB}))
same = area(8 * {MIB}, random.Random(5).randbytes(8 * {MIB}))
own = area(4 * {MIB}, os.urandom(4 * {MIB}))
zeros = area(2 * {MIB}, bytes(2 * {MIB}))
constant = area(2 * {MIB}, b"\\7" * 2 * {MIB})
busy = area({MIB}, random.Random(6).randbytes({MIB}))
def scribble():
    while True:
        for page in range(0, {MIB}, 4096):
            busy[page] = (busy[page] + 1) % 256
        time.sleep(0.001)
if int(sys.argv[2]):
    threading.Thread(target=scribble, daemon=True).start()
sums = [zlib.crc32(part) for part in (same, own, zeros, constant)]
print("ready", flush=True)
for line in sys.stdin:
    print([zlib.crc32(part) for part in (same, own, zeros, constant)] == sums, flush=True)
"""


@pytest.fixture
def workers():
    started = []

    def start(count, padding=0, busy=True):
        fresh = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(padding), str(int(busy))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        started.extend(fresh)
        for worker in fresh:
            assert worker.stdout.readline() == "ready\n"
        return fresh

    yield start
    for worker in started:
        worker.kill()
        worker.wait()


@pytest.fixture
def guard(tmp_path, monkeypatch):
    if not pagemap.probe():
        pytest.skip("no PAGEMAP_SCAN in this kernel")
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(folder))
    yield lambda: GuardClient.connect(start=True)
    with GuardClient.connect(start=False) as client:
        keeper = procfs.stat(client.request("hello")[0]["pid"]).ppid
        client.request("unmerge", pids=None)
        client.request("shutdown", force=True)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{keeper}/exe") and time.monotonic() < deadline:
        time.sleep(0.05)


def scan(guard, processes, **options):
    options.setdefault("passes", 1)
    with guard() as client:
        return run_scan(
            client,
            [TargetRequest(process.pid) for process in processes],
            ScanOptions(**options),
            NoProgress(),
        )


def unharmed(worker):
    worker.stdin.write("\n")
    worker.stdin.flush()
    return worker.stdout.readline() == "True\n"


def test_three_workers_are_merged_and_later_ones_join_them(guard, workers):
    first = workers(3)
    result = scan(guard, first, passes=2, batch_pages=1000)
    assert all(unharmed(worker) for worker in first)
    # Per worker: 2048 equal pages, 512 constant ones, 512 of zeros; and what making them left in its heap.
    assert result.pages_merged >= 3 * (2048 + 512 + 512)
    assert 2048 < result.pages_shared < 2048 + 2300
    assert result.zero_pages >= 3 * 512
    assert result.pages_unshared >= 3 * 1024
    assert result.pages_volatile >= 3 * 100
    freed = 3 * (2048 + 512 + 512) - 2048 - 50
    assert result.bytes_saved > freed * 4096 * 0.9
    assert result.general_profit > freed * 4096 * 0.8
    assert result.full_scans == 2
    assert 0 < result.max_pause_ms < 1000
    assert 0 < result.seconds < 60
    assert 0 < result.cpu_seconds < 60
    for report in result.targets:
        assert report.error is None
        assert report.runs < 120
        assert report.skipped["stack"] > 0
    json.dumps(dataclasses.asdict(result))

    for worker in first:  # the agent in it is no reason to leave it out
        assert eligibility.process_reason(worker.pid, named=True, allowed=writers.Allowed()) is None
    again = scan(guard, first)
    assert again.pages_merged < 300
    assert again.pages_shared <= result.pages_shared + 300

    fourth = workers(1)
    joined = scan(guard, first + fourth)
    assert joined.targets[3].pages_merged >= 2048 + 512 + 512 - 10
    assert joined.pages_shared <= result.pages_shared + 400  # its equal part needs no new slots
    assert all(unharmed(worker) for worker in first + fourth)


@pytest.mark.parametrize("slice_pages", [700, 5000])
def test_slices_find_what_one_pass_finds(guard, workers, monkeypatch, slice_pages):
    monkeypatch.setattr(slices, "SLICE_PAGES", slice_pages)
    # Their equal memory is not at the same share of each: other sizes come before it.
    trio = workers(2) + workers(1, padding=3)
    result = scan(guard, trio, passes=1, batch_pages=1000)
    assert result.pages_merged >= 3 * (2048 + 512 + 512)
    assert 2048 < result.pages_shared < 2048 + 2300
    assert result.zero_pages >= 3 * 512
    assert result.pages_unshared >= 3 * 1024
    assert all(unharmed(worker) for worker in trio)
    again = scan(guard, trio)
    assert again.pages_merged < 300


def test_a_second_pass_needs_a_reason(guard, workers, monkeypatch):
    """It looks only at what was written since, and not at all when that is next to nothing."""
    looked = []
    monkeypatch.setattr(round_module, "_look_again", lambda tracker, written: looked.append(written))
    quiet = workers(2, busy=False)
    began = time.monotonic()
    scan(guard, quiet, passes=5, settle_seconds=1.0)
    assert not looked
    assert time.monotonic() - began < 4  # one settle, not five
    monkeypatch.undo()
    busy = workers(2)
    result = scan(guard, busy, passes=2)
    assert result.pages_volatile >= 100


def test_memory_is_read_while_it_settles_and_what_is_written_then_is_left_out(guard, workers):
    pair = workers(2, busy=False)
    large = max(mappings.maps(pair[0].pid), key=lambda vma: (vma.end - vma.start) * (not vma.path))
    stages = []

    class Writer:
        def update(self, stage, done, total):
            if stage == "settle":
                for page in range(large.start, large.start + 256 * 4096, 4096):
                    byte = bytearray(1)
                    vm.read_into(pair[0].pid, page, byte)
                    vm.writev(pair[0].pid, [(vm.address_of(byte), 1)], [(page, 1)])
            stages.append(stage)

    options = ScanOptions(passes=1, settle_seconds=0.5)
    with guard() as client:
        result = run_scan(client, [TargetRequest(worker.pid) for worker in pair], options, Writer())
    assert stages.index("hash") < stages.index("settle") < stages.index("plan")
    assert result.pages_volatile >= 256
    assert result.skipped.get("written", 0) < 128
    assert all(unharmed(worker) for worker in pair)


def test_a_target_that_cannot_be_attached_is_reported_and_the_rest_is_scanned(guard, workers):
    gone = subprocess.Popen(["true"])
    gone.wait()
    pair = workers(2)
    result = scan(guard, [gone, *pair])
    assert result.targets[0].error is not None
    assert result.targets[0].error.startswith("NoSuchProcess")
    assert all(report.pages_merged > 2048 for report in result.targets[1:])
    with pytest.raises(NoSuchProcess):
        scan(guard, [gone])


def test_a_target_that_exits_meanwhile_is_no_error(guard, workers):
    pair = workers(3)

    class Killer:
        def update(self, stage, done, total):
            if stage == "hash" and pair[0].poll() is None:
                pair[0].kill()
                pair[0].wait()

    with guard() as client:
        result = run_scan(
            client, [TargetRequest(worker.pid) for worker in pair], ScanOptions(passes=2), Killer()
        )
    assert all(report.error is None for report in result.targets)
    assert all(report.pages_merged > 2048 for report in result.targets[1:])
    assert all(unharmed(worker) for worker in pair[1:])


def test_nothing_of_a_scan_stays_open(guard, workers):
    pair = workers(2)
    scan(guard, pair)
    gc.collect()  # what tests before left to be collected is not for the scan to close
    before = len(os.listdir("/proc/self/fd"))
    scan(guard, pair)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
