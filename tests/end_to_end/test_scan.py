"""The whole way: unaware processes, `gpuksm scan`, memory measured outside, bytes checked inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests import requirements_env
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import ROOT, World

MIB = 1 << 20
PAGES_256_MIB = 65536

_FIELDS = {
    *("pages_scanned", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "pages_skipped"),
    *("zero_pages", "full_scans", "general_profit", "bytes_saved", "seconds", "cpu_seconds", "max_pause_ms"),
    *("backend", "targets"),
}

_REGISTERING = """
import sys
import numpy, gpuksm
seed = int(sys.argv[1])
array = numpy.random.default_rng(7).integers(0, 2**63, 4 * 2**20 // 8 * 8, dtype=numpy.uint64)
own = numpy.random.default_rng(seed).integers(0, 2**63, 2**20, dtype=numpy.uint64)
expected = array.copy()[::7].sum(), own.sum()
gpuksm.register(array)
print("READY array=%#x:%d" % (-(-array.ctypes.data // 4096) * 4096, array.nbytes // 4096 - 1), flush=True)
for line in sys.stdin:
    if line == "quit\\n":
        break
    if line == "write\\n":
        array[0] += numpy.uint64(seed)
        expected = array.copy()[::7].sum(), own.sum()
    right = (array[::7].sum(), own.sum()) == expected
    print("OK" if right else "CORRUPT sums", flush=True)
"""


def _pss(victims: list[Victim]) -> int:
    return sum(processes.rollup(victim.pid)["Pss"] for victim in victims)


def test_two_unaware_processes(world: World) -> None:
    requirements_env.need("memory")
    victims = [world.victim("regions", PAGES_256_MIB, PAGES_256_MIB, seed, "straight") for seed in (1, 2)]
    before = _pss(victims)
    result = world.scan(*victims, options=["--batch", 65536], timeout=300)
    for victim in victims:
        victim.verify()
    saved = before - _pss(victims)
    assert saved >= 0.99 * 256 * MIB, f"{saved / MIB:.1f} MiB saved: {result}"
    assert 0.98 * 256 * MIB < result["bytes_saved"] <= saved + 2 * MIB
    for victim in victims:
        start, end = victim.area("shared")
        assert [(run.start, run.end) for run in processes.store_mappings(victim.pid, start, end)] == [
            (start, end)
        ], "the identical run is one mapping"
        assert victim.merged_pages("own") == 0

    victims[0].ask("write 10 99", timeout=120)
    victims[1].verify()
    world.unmerge()
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
        victim.verify()
    assert abs(_pss(victims) - before) < 4 * MIB


def test_scattered_pages_stop_at_the_budget_and_say_so(world: World) -> None:
    pages = 40_000
    victims = [world.victim("regions", pages, 16, seed, "permuted") for seed in (1, 2)]
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    result = world.scan(*victims, timeout=300)
    skipped: dict[str, int] = {}
    for victim in victims:
        victim.verify()
        assert len(processes.mappings(victim.pid)) <= limit // 2 + 1024
    for target in result["targets"]:
        for reason, count in target["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    fewest = min(victim.merged_pages("shared") for victim in victims)
    assert fewest > min(limit // 8, pages - pages // 8), result
    if fewest < pages - pages // 8:
        assert any("vma" in reason.lower() or "budget" in reason.lower() for reason in skipped), skipped
    victims[0].ask("write 20 3")
    for victim in victims:
        victim.verify()
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_registered_arrays(each_world: World) -> None:
    world = each_world
    victims = [world.python(_REGISTERING, seed) for seed in range(4)]
    result = world.gpuksm("scan", "--batch", 65536)
    assert result.code == 0, result.err
    for victim in victims:
        start, end = victim.area("array")
        assert victim.merged_pages("array") == (end - start) // 4096, result.out
        # Only what was registered is merged.
        assert processes.merged_pages(victim.pid) == (end - start) // 4096
        victim.ask("verify")
    victims[0].ask("write")
    for victim in victims:
        victim.ask("verify")
    world.unmerge()
    for victim in victims:
        victim.ask("verify")


def test_a_scan_loads_no_more_than_it_needs(world: World) -> None:
    """Of what takes ten milliseconds and more; its kernels are compiled by now."""
    idle = "import sys, numpy\nprint('READY', flush=True)\nsys.stdin.read()"  # many a region
    victims = [world.python(idle) for _ in range(2)]
    world.scan(*victims)
    code = (
        "import sys\nfrom gpuksm import cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "print(*set('numba llvmlite psutil numpy.ma tempfile rich subprocess'.split()) & set(sys.modules))"
    )
    pids = [part for victim in victims for part in ("--pid", str(victim.pid))]
    command = [*world.user.python_prefix, sys.executable, "-c", code, "scan", "--json", *pids]
    done = subprocess.run(command, env=world.env, cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[1:] == ["subprocess"]  # which starts a guard where there is none


def test_json_has_its_fields(world: World) -> None:
    victims = [world.victim("regions", 512, 64, seed, "straight") for seed in (1, 2)]
    done = world.gpuksm("scan", "--json", *[part for v in victims for part in ("--pid", v.pid)])
    result = json.loads(done.out)
    assert set(result) >= _FIELDS
    for target in result["targets"]:
        assert {"pid", "name", "pages_scanned", "pages_merged", "runs", "vmas", "skipped"} <= set(target)


def test_dry_run_and_estimate_touch_nothing(world: World) -> None:
    victims = [world.victim("regions", 512, 64, seed, "straight") for seed in (1, 2)]
    before = [processes.footprint(victim.pid) for victim in victims]
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    for command in (["estimate"], ["scan", "--dry-run"]):
        done = world.gpuksm(*command, *pids)
        assert done.code == 0, done.err
    world.shut_down()
    for victim, old in zip(victims, before, strict=True):
        assert processes.left_behind(old, processes.footprint(victim.pid)) == []


def test_the_output_of_a_scan_ends(world: World) -> None:
    """The guard that a scan starts holds none of the pipes of the scan."""
    victims = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2)]
    world.scan(*victims)  # communicate() reads both pipes to their end
    pid = world.guard_pid()
    assert Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").startswith(b"gpuksm guard")


def test_a_scan_gives_way_to_jobs_and_the_guard_does_not(world: World) -> None:
    victims = [world.victim("regions", 64, 64, seed, "straight") for seed in (1, 2)]
    named = [part for victim in victims for part in ("--pid", victim.pid)]
    scan = world.start("scan", "--settle", "3s", *named)
    guard = world.guard_pid()
    deadline = time.monotonic() + 10
    while os.getpriority(os.PRIO_PROCESS, scan.pid) != 10:
        assert time.monotonic() < deadline
        assert scan.poll() is None
        time.sleep(0.02)
    assert os.getpriority(os.PRIO_PROCESS, guard) == os.getpriority(os.PRIO_PROCESS, 0)
    assert scan.wait(60) == 0
