"""Virtual machines of KVM: their guests read what they wrote, merged or not (hazards 55 to 57)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from gpuksm import eligibility, writers
from gpuksm.errors import Unsupported
from gpuksm.guard import attach, leftovers
from gpuksm.linux import procfs, ptrace
from tests import requirements_env
from tests.support.merging import perform, scan_until_merged
from tests.support.processes import thread_states
from tests.support.victims import Victim
from tests.support.world import World

_ALLOWED = ["--allow-kvm"]  # this host's KVM may let them run machines


def _machines(world: World) -> list[Victim]:
    requirements_env.need("kvm")
    return [world.victim("machine") for _ in range(2)]


def test_a_guest_is_merged_while_it_runs(world: World) -> None:
    first, second = machines = _machines(world)
    scan_until_merged(world, machines, ["memory"], _ALLOWED)
    perform(first, "child write rest discard child", machines)
    perform(second, "write", machines)
    world.scan(*machines, options=_ALLOWED)
    perform(second, "rest discard child", machines)
    world.scan(*machines, options=_ALLOWED)
    assert all(machine.merged_pages("memory") > 40 for machine in machines)  # 13 were given back
    world.unmerge()
    for machine in machines:
        assert machine.merged_pages("memory") == 0
        perform(machine, "child write", machines)


def test_guests_that_write_all_the_time_under_guards_that_die(world: World) -> None:
    machines = _machines(world)
    for machine in machines:
        perform(machine, "write")
    merged = 0
    for turn in range(6):
        world.scan(*machines, options=_ALLOWED)
        merged += sum(machine.merged_pages("memory") for machine in machines)
        if turn % 2:
            os.kill(world.guard_pid(), signal.SIGKILL)
            perform(machines[turn // 2 % 2], "discard" if turn == 3 else "child", machines)
    assert merged > 100
    world.unmerge()
    for machine in machines:
        machine.verify()


def test_a_machine_that_may_run_machines_is_asked_about(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = _machines(world)[0].pid
    for nested in (False, True):
        monkeypatch.setattr(writers, "kvm_pins", lambda nested=nested: nested)
        reason = eligibility.process_reason(pid, named=True, allowed=writers.Allowed())
        if nested:
            assert isinstance(reason, Unsupported)
            assert "--allow-kvm" in str(reason)
        else:
            assert reason is None
        allowed = writers.Allowed(kvm=True)
        assert eligibility.process_reason(pid, named=True, allowed=allowed) is None
    # Where devices are let in its guest's memory is left alone, unless both is said.
    assert _leaves_unforked_out(pid, writers.Allowed(direct_io=True))
    assert not _leaves_unforked_out(pid, writers.Allowed(direct_io=True, kvm=True))


def _leaves_unforked_out(pid: int, allowed: writers.Allowed) -> bool:
    return "dont-fork" in eligibility.regions(pid, allowed=allowed)[1]


@pytest.mark.parametrize(
    ("modules", "pins"),
    [
        ({}, False),
        ({"kvm_intel": "N"}, False),
        ({"kvm_intel": "Y"}, True),
        ({"kvm_amd": "0"}, False),
        ({"kvm_amd": "1"}, True),
        ({"kvm_amd": "0", "kvm_intel": "Y"}, True),
    ],
)
def test_hosts_that_let_machines_run_machines(
    modules: dict[str, str], pins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvm" / "parameters").mkdir(parents=True)
    for name, value in modules.items():
        (tmp_path / name / "parameters").mkdir(parents=True)
        (tmp_path / name / "parameters" / "nested").write_text(value + "\n")
    monkeypatch.setattr(writers, "_MODULES", tmp_path)
    assert writers.kvm_pins() is pins


def test_threads_of_the_kernel_are_not_taken_for_the_programs(world: World) -> None:
    """vhost's and KVM's never run code of the process, so none is borrowed; nor are they agents."""
    machine = _machines(world)[0]
    deadline = time.monotonic() + 10
    while True:
        flags = {tid: procfs.stat(tid).flags for tid in thread_states(machine.pid)}
        workers = [tid for tid, each in flags.items() if each & procfs.PF_USER_WORKER]
        if workers:
            break
        if time.monotonic() > deadline:
            pytest.skip("this kernel's KVM has no thread of its own in the process")
        time.sleep(0.05)
    stopped = ptrace.Stop("stop", signal.SIGTRAP, ptrace.EVENT_STOP)
    assert not any(attach._usable(tid, -1, stopped) for tid in workers)
    assert not leftovers.older_agents(machine.pid)
