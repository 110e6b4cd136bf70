"""`merge_across_nodes` 0 on real processes: on this machine's own nodes, and as if there were two."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpuksm.client import GuardClient
from gpuksm.scan import NoProgress, ScanOptions, TargetRequest, run_estimate, run_scan, tracker
from tests.support import numa
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 600
OPTION = ("--no-merge-across-nodes",)

pytestmark = pytest.mark.skipif(not numa.nodes(), reason="no NUMA nodes")


def _victims(world: World, count: int, first_seed: int = 1) -> list[Victim]:
    return [
        world.victim("regions", PAGES, 64, seed, "straight") for seed in range(first_seed, first_seed + count)
    ]


def _merged(victims: list[Victim]) -> list[bool]:
    for victim in victims:
        victim.verify()
    return [victim.merged_pages("shared") >= PAGES - 1 for victim in victims]


def _until(done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _only_one_node() -> None:
    if len(numa.nodes()) > 1:
        pytest.skip("where processes lie is the kernel's choice on several nodes")


def test_processes_of_one_node_are_merged_as_without(each_world: World) -> None:
    _only_one_node()
    world = each_world
    node = min(numa.nodes())
    victims = _victims(world, 3)
    result = world.scan(*victims, options=OPTION)
    assert _merged(victims) == [True] * 3
    assert result["skipped"].get("numa-node", 0) == 0
    extents = numa.extents(world)
    assert {of for _, _, of in extents} == {node + 1}
    for victim in victims:
        assert numa.store_policies(victim.pid) == {f"prefer:{node}"}
    slots = world.request("status")["store_slots"]
    later = _victims(world, 1, 7)
    world.scan(*victims, *later, options=OPTION)
    assert _merged(later) == [True]
    assert world.request("status")["store_slots"] < slots + PAGES // 2, "slots of its node are found again"
    world.unmerge()
    _merged(victims + later)


def test_with_the_default_nothing_has_a_node(world: World) -> None:
    victims = _victims(world, 2)
    world.scan(*victims)
    assert _merged(victims) == [True] * 2
    assert {of for _, _, of in numa.extents(world)} == {0}
    assert {name for victim in victims for name in numa.store_policies(victim.pid)} == {"default"}


def test_what_was_merged_across_nodes_has_no_equal_on_any(world: World) -> None:
    _only_one_node()
    victims = _victims(world, 2)
    world.scan(*victims)
    later = _victims(world, 2, 7)
    world.scan(*later, options=OPTION)
    assert _merged(victims + later) == [True] * 4
    assert {of for _, _, of in numa.extents(world)} == {0, min(numa.nodes()) + 1}


def test_a_successor_knows_the_nodes_of_extents(world: World) -> None:
    _only_one_node()
    victims = _victims(world, 2)
    world.scan(*victims, options=OPTION)
    assert _merged(victims) == [True] * 2
    for turn in range(3):  # the journal is written anew meanwhile
        victims[0].ask(f"write 5 {turn}")
        world.scan(*victims, options=OPTION)
    before, guard = numa.extents(world), world.guard_pid()
    os.kill(guard, signal.SIGKILL)
    assert world.guard_pid() != guard
    after = numa.extents(world)
    assert after
    assert set(after) <= set(before)  # it reclaims at once
    later = _victims(world, 1, 7)
    slots = world.request("status")["store_slots"]
    world.scan(*victims, *later, options=OPTION)
    assert _merged(later) == [True]
    assert world.request("status")["store_slots"] < slots + PAGES // 2
    assert numa.store_policies(later[0].pid) == {f"prefer:{min(numa.nodes())}"}


def test_each_node_keeps_what_its_processes_share(world: World) -> None:
    """On a machine with several nodes: two processes on each of two."""
    if len(numa.nodes()) < 2:
        pytest.skip("one NUMA node")
    nodes = [*sorted(numa.nodes())[:2]] * 2
    victims = [
        world.victim("regions", PAGES, 64, seed, "straight", wrapper=numa.on_node(node))
        for seed, node in enumerate(nodes, 1)
    ]
    result = world.scan(*victims, options=OPTION)
    assert _merged(victims) == [True] * 4, result
    for victim, node in zip(victims, nodes, strict=True):
        assert numa.store_policies(victim.pid) == {f"prefer:{node}"}
        assert numa.store_nodes(victim.pid) == {node}
    assert {of for _, _, of in numa.extents(world)} == {node + 1 for node in nodes}
    slots = world.request("status")["store_slots"]
    assert slots >= 2 * PAGES
    later = world.victim("regions", PAGES, 64, 9, "straight", wrapper=numa.on_node(nodes[1]))
    world.scan(*victims, later, options=OPTION)
    assert _merged([later]) == [True]
    assert numa.store_nodes(later.pid) == {nodes[1]}
    assert world.request("status")["store_slots"] < slots + PAGES // 2
    alone = [
        world.victim("regions", PAGES, 64, seed, "straight", 99, wrapper=numa.on_node(nodes[seed % 2]))
        for seed in (5, 6)
    ]
    world.scan(*alone, options=OPTION)
    assert [victim.merged_pages("shared") for victim in alone] == [0, 0]
    world.scan(*alone)
    assert _merged(alone) == [True] * 2


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What the kernel is made to say: {pid: the node of all its pages}."""
    nodes: dict[int, int] = {}

    def nodes_of(pid: int, address: np.ndarray) -> np.ndarray:
        return np.full(len(address), nodes.get(pid, 0) + 1, np.uint16)

    monkeypatch.setattr(tracker, "nodes_of", nodes_of)
    return nodes


def _scan(world: World, victims: list[Victim], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A scan in this process, by what the kernel is made to say; reasons why pages were skipped."""
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(world.folder))
    options = ScanOptions(merge_across_nodes=False, backend="cpu")
    with GuardClient.connect(start=True) as client:
        result = run_scan(client, [TargetRequest(victim.pid) for victim in victims], options, NoProgress())
    return result.skipped


def test_equal_processes_of_two_nodes_are_not_merged_with_each_other(
    world: World, said: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 1 is not there, so the guard leaves what would have to lie on it as it is."""
    _only_one_node()
    victims = _victims(world, 5)
    for victim in victims[2:]:
        said[victim.pid] = 1
    skipped = _scan(world, victims[:3], monkeypatch)
    assert _merged(victims[:3]) == [True, True, False]
    assert victims[2].merged_pages("shared") == 0
    assert "numa-node" not in skipped, "one alone on its node equals nothing"
    skipped = _scan(world, victims, monkeypatch)
    assert _merged(victims) == [True, True, False, False, False]
    assert [victim.merged_pages("shared") for victim in victims[2:]] == [0, 0, 0]
    assert skipped["numa-node"] >= PAGES
    said.clear()
    _scan(world, victims, monkeypatch)
    assert _merged(victims) == [True] * 5


def test_estimates_tell_nodes_apart(world: World, said: dict[int, int]) -> None:
    victims = _victims(world, 4)
    for victim in victims[2:]:
        said[victim.pid] = 1
    found = {}
    for across in (True, False):
        options = ScanOptions(merge_across_nodes=across, backend="cpu")
        requests = [TargetRequest(victim.pid) for victim in victims]
        found[across] = run_estimate(requests, options, NoProgress(), same_layout=True)
    assert found[True].pages_scanned == found[False].pages_scanned
    assert found[False].pages_mergeable >= 4 * PAGES
    assert found[True].pages_sharing - found[False].pages_sharing >= PAGES
    said[victims[1].pid] = 2
    options = ScanOptions(merge_across_nodes=False, backend="cpu")
    alone = run_estimate([TargetRequest(v.pid) for v in victims[:2]], options, NoProgress(), same_layout=True)
    assert alone.pages_mergeable < PAGES
    assert alone.same_layout_pages is not None
    assert alone.same_layout_pages < PAGES // 2


def test_the_daemons_knob_is_ksms(world: World) -> None:
    victims = _victims(world, 2)
    pids = ["--pid", ",".join(str(victim.pid) for victim in victims)]
    daemon = world.start("daemon", "--backend", "cpu", "--interval", "50ms", "--max-interval", "200ms", *pids)

    _until(lambda: (world.folder / "guard.sock").exists() and all(_merged(victims)))
    assert world.gpuksm("ctl", "get", "merge_across_nodes").out == "1\n"
    refused = world.gpuksm("ctl", "set", "merge_across_nodes", 0)
    assert refused.code == 7
    assert "pages are merged; set run to 2 first" in refused.err
    assert world.gpuksm("ctl", "set", "merge_across_nodes", 1).code == 0, "that is no change"
    assert world.gpuksm("ctl", "set", "run", 2).code == 0
    assert world.gpuksm("ctl", "set", "merge_across_nodes", 0).code == 0
    assert world.gpuksm("ctl", "get", "merge_across_nodes").out == "0\n"
    assert world.gpuksm("ctl", "set", "run", 1).code == 0
    _until(lambda: all(_merged(victims)))
    _until(lambda: world.request("status")["store_slots"] < 2 * PAGES)
    used = {of for _, _, of in numa.extents(world)}
    assert 0 not in used
    daemon.send_signal(signal.SIGTERM)
    _, err = daemon.communicate(timeout=30)
    assert "Traceback" not in err
    assert "merge_across_nodes set from 1 to 0" in err


def test_a_configuration_that_is_read_again_keeps_what_is_merged(world: World, tmp_path: Path) -> None:
    _only_one_node()
    victims = _victims(world, 2)
    pids = [victim.pid for victim in victims]
    config = tmp_path / "gpuksm.toml"
    rest = f'backend = "cpu"\ninterval = "50ms"\nmax-interval = "200ms"\n[targets]\npid = {pids}\n'
    config.write_text("merge-across-nodes = false\n" + rest)
    daemon = world.start("daemon", "--config", config)
    _until(lambda: (world.folder / "guard.sock").exists() and all(_merged(victims)))
    assert {of for _, _, of in numa.extents(world)} == {min(numa.nodes()) + 1}
    config.write_text("merge-across-nodes = true\nmax-cpu = 70\n" + rest)
    daemon.send_signal(signal.SIGHUP)
    _until(lambda: world.gpuksm("ctl", "get", "max_cpu_percent").out == "70\n")
    assert world.gpuksm("ctl", "get", "merge_across_nodes").out == "0\n"
    assert world.gpuksm("ctl", "set", "run", 2).code == 0
    daemon.send_signal(signal.SIGHUP)
    assert world.gpuksm("ctl", "set", "run", 1).code == 0
    _until(lambda: world.gpuksm("ctl", "get", "merge_across_nodes").out == "1\n")
    daemon.send_signal(signal.SIGTERM)
    _, err = daemon.communicate(timeout=30)
    assert "merge_across_nodes stays 0 while something is merged" in err
    assert "Traceback" not in err
