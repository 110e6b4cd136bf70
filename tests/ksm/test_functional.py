"""The scenarios of the kernel's own functional tests of KSM, against gpuksm (docs/ksm_scenarios.md)."""

from __future__ import annotations

import pytest

from tests.support import processes
from tests.support.merging import perform_all
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 512
WHOLE = {PAGES, PAGES - 1}  # the last page may stay private at the end of a run


def _merged(world: World, key: int = 207) -> Victim:
    """One process with a whole area of one content, merged within itself."""
    victim = world.victim("ksm", PAGES, key)
    world.scan(victim)
    assert victim.merged_pages("memory") in WHOLE
    victim.verify()
    return victim


def _nothing_left(world: World, victim: Victim) -> None:
    world.unmerge()
    assert processes.store_mappings(victim.pid) == []
    victim.verify()


def test_unmerge(each_world: World) -> None:
    victim = _merged(each_world)
    _nothing_left(each_world, victim)


def test_unmerge_discarded(each_world: World) -> None:
    """Half of the merged range is dropped before it is unmerged: that half reads zeros, before and after."""
    victim = _merged(each_world)
    victim.ask(f"drop 0 {PAGES // 2}")
    _nothing_left(each_world, victim)


def test_unmerge_zero_pages(world: World) -> None:
    """Pages of zeros go back to the kernel instead of to the store, and stay zeros."""
    victim = world.victim("ksm", PAGES, 207)
    for page in range(PAGES // 2):
        victim.ask(f"write {page} 0")
    result = world.scan(victim)
    assert result["zero_pages"] >= PAGES // 2
    start, _ = victim.area("memory")
    assert processes.merged_pages(victim.pid, start, start + PAGES // 2 * 4096) == 0
    assert victim.merged_pages("memory") >= PAGES // 2 - 1
    victim.verify()
    for page in (0, 7, PAGES // 2 - 1):
        victim.ask(f"write {page} 9")
    _nothing_left(world, victim)


def test_unmerge_uffd_wp(world: World) -> None:
    """KSM leaves write-protected pages out; gpuksm the process, since it cannot share a range's tracking."""
    victim = world.victim("ksm", PAGES, 207)
    victim.ask("watch")
    result = world.gpuksm("scan", "--pid", victim.pid)
    assert result.code == 6, result
    assert "userfaultfd" in result.err
    assert processes.store_mappings(victim.pid) == []
    victim.verify()


def test_prot_none(each_world: World) -> None:
    """Merged memory without access, written to through /proc/self/mem, then unmerged."""
    victim = _merged(each_world)
    victim.ask("none")
    victim.ask("poke 0 11")
    victim.ask(f"poke {PAGES // 2} 0")
    each_world.unmerge()
    assert processes.store_mappings(victim.pid) == []
    victim.ask("rw")


def test_prctl(world: World) -> None:
    """Registering a whole process, asking about it, and taking it back."""
    victim = world.victim("ksm", PAGES, 207)
    assert world.gpuksm("register", "--pid", victim.pid).code == 0
    assert victim.pid in [item["pid"] for item in world.request("registered")["targets"]]
    result = world.gpuksm("scan", "--json").json()
    assert [target["pid"] for target in result["targets"]] == [victim.pid]
    assert victim.merged_pages("memory") in WHOLE
    assert world.gpuksm("unregister", "--pid", victim.pid).code == 0
    assert world.request("registered")["targets"] == []
    _nothing_left(world, victim)


_FORKING = """
import os, sys
ready, gone = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.close(gone[1])
    os.read(gone[0], 1)
    os._exit(0)
print("READY child=%d" % child, flush=True)
sys.stdin.read()
os.close(gone[1])
"""


def test_prctl_fork_and_exec_do_not_inherit(world: World) -> None:
    """A child and a program that was started in a process's place are named anew: they did not ask."""
    parent = world.python(_FORKING)
    victim = world.victim("ksm", PAGES, 207)
    for each in (parent, victim):
        assert world.gpuksm("register", "--pid", each.pid).code == 0
    registered = [item["pid"] for item in world.request("registered")["targets"]]
    assert int(parent.values["child"]) not in registered
    world.scan(victim)
    assert victim.merged_pages("memory") in WHOLE
    victim.send("exec")
    victim.values = victim.answer(verdict="READY")
    assert processes.store_mappings(victim.pid) == []
    world.scan(victim)
    assert victim.merged_pages("memory") in WHOLE
    _nothing_left(world, victim)
    assert parent.process.stdin is not None
    parent.process.stdin.close()
    parent.process.wait(20)


def test_prctl_unmerge(world: World) -> None:
    """One process is unmerged, the other stays as it is."""
    first, second = _merged(world), _merged(world)
    world.unmerge("--pid", first.pid)
    assert processes.store_mappings(first.pid) == []
    assert second.merged_pages("memory") in WHOLE
    perform_all([first, second], "verify")
    _nothing_left(world, second)


def test_child_copies_on_write(each_world: World) -> None:
    """A child writes and drops merged memory: it sees its own, the parent nothing of it."""
    victim = _merged(each_world)
    victim.ask("child")
    assert victim.merged_pages("memory") in WHOLE
    _nothing_left(each_world, victim)
    victim.ask("child")


def test_moved(world: World) -> None:
    """One merged run is moved by mremap; a move of many mappings may be refused, and moves nothing then."""
    pair = [world.victim("ksm", PAGES, 1) for _ in range(2)]
    perform_all(pair, "ramp 5000")
    world.scan(*pair)
    assert all(victim.merged_pages("memory") in WHOLE for victim in pair)
    for victim in pair:
        answer = victim.ask("move")
        assert answer["errno"] in ("0", "14")  # EFAULT where the last page is a mapping of its own
        victim.values |= answer
    perform_all(pair, "fill 31")
    world.scan(*pair)
    assert all(victim.merged_pages("memory") in WHOLE for victim in pair)
    for victim in pair:
        assert victim.ask("move")["errno"] in ("0", "14")
    world.unmerge()
    perform_all(pair, "verify")


def test_one_changed_byte(world: World) -> None:
    """A write of one byte copies one page, and no other page changes."""
    victim = _merged(world)
    for page in (0, 7, 8, PAGES - 2):
        victim.ask(f"byte {page}")
    _nothing_left(world, victim)


def test_kernel_services_on_merged_pages(each_world: World) -> None:
    """Futex words, robust locks and MADV_COLLAPSE work as on private memory."""
    victim = _merged(each_world)
    perform_all([victim], "futex")
    perform_all([victim], "robust")
    assert victim.ask("huge")["errno"] in ("0", "11", "22")  # EAGAIN, EINVAL: not now, not here
    _nothing_left(each_world, victim)
    perform_all([victim], "futex")
    victim.ask("huge")
    victim.verify()


def test_unmerge_below_an_address_space_limit(world: World) -> None:
    """A process with hardly any address space left can be unmerged, in smaller steps; with none it stays."""
    victim = _merged(world)
    victim.ask("limit 0")
    failed = world.request("unmerge", pids=None, max_pause_us=5000)["failed"]
    assert "cannot map memory" in failed[str(victim.pid)]
    victim.verify()
    victim.ask("limit 3")
    failed = world.request("unmerge", pids=None, max_pause_us=5000)["failed"]
    assert failed == {}
    _nothing_left(world, victim)
    victim.ask("unlimit")
    victim.ask("child")


@pytest.mark.parametrize("first", ["limit 0", "lock"])
def test_limits_that_were_there_before(world: World, first: str) -> None:
    """A process at its address space limit, or all locked, is left whole whatever can be merged of it."""
    victim, other = world.victim("ksm", PAGES, 207), world.victim("ksm", PAGES, 207)
    victim.ask(first)
    world.gpuksm("scan", "--pid", victim.pid, "--pid", other.pid)
    assert other.merged_pages("memory") in WHOLE
    if first == "lock":
        assert processes.store_mappings(victim.pid) == []
    perform_all([victim, other], "verify")
    victim.ask("unlimit")
    victim.ask("child")
    world.unmerge()
    perform_all([victim, other], "verify")


def test_mlockall_after_the_merge(world: World) -> None:
    """Locking everything makes each page private (the kernel breaks the sharing of writable pages)."""
    victim = _merged(world)
    victim.ask("lock")
    victim.ask("byte 9")
    victim.ask("unlock")
    _nothing_left(world, victim)
