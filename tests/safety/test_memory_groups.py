"""Memory control groups: who is charged for what is merged, and what happens at their limits.

The kernel answers a charge that a group's limit does not allow by killing a process of that group:
a target when it is unmerged, the guard when it fills the store.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from gpuksm import errors
from gpuksm.linux import cgroup
from tests import requirements_env
from tests.support.merging import scan_until_merged
from tests.support.world import World

PAGES = 8192
MIB = 1 << 20
_IN_GROUP = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class Group(NamedTuple):
    """A memory control group of our own; `limit` and `usage` are its files."""

    path: Path
    limit: Path
    usage: Path

    @property
    def wrapper(self) -> tuple[str, ...]:
        """What starts a program inside of it."""
        return ("sh", "-c", _IN_GROUP, str(self.path))

    def used(self) -> int:
        """Bytes charged to it, anonymous and shared memory alone."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(self.usage.read_text()) - int(stat["inactive_file"]) - int(stat["active_file"])

    def allow(self, size: int) -> None:
        """Limit it to `size` bytes."""
        self.limit.write_text(str(size))

    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        name = "memory.events" if (self.path / "memory.events").exists() else "memory.oom_control"
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return int(dict(lines)["oom_kill"])


@contextlib.contextmanager
def _group(name: str) -> Iterator[Group]:
    requirements_env.need("root")
    for base, limit, usage in (
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("", "memory.max", "memory.current"),
    ):
        path = Path("/sys/fs/cgroup", base, f"gpuksm-test-{name}-{os.getpid()}")
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if (path / limit).exists():
                yield Group(path, path / limit, path / usage)
                return
        finally:
            _remove(path)
    requirements_env.require("memcg", "no memory control group can be made here")


def _remove(path: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for pid in (path / "cgroup.procs").read_text().split():
                (path.parent / "cgroup.procs").write_text(pid)
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.05)


@pytest.fixture
def jobs() -> Iterator[Group]:
    with _group("jobs") as group:
        yield group


@pytest.fixture
def service() -> Iterator[Group]:
    with _group("service") as group:
        yield group


def test_unmerging_beyond_a_limit_is_refused(world: World, jobs: Group) -> None:
    """Merged memory is charged to the guard's group; giving it back would have a job killed."""
    victims = [
        world.victim("regions", PAGES, 4, seed, "straight", wrapper=jobs.wrapper) for seed in (1, 2, 3)
    ]
    before = jobs.used()
    scan_until_merged(world, victims, ["shared"])
    merged = sum(victim.merged_pages("shared") for victim in victims) * 4096
    assert before - jobs.used() > 0.9 * merged
    jobs.allow(jobs.used() + merged // 2)
    assert cgroup.memory_room(victims[0].pid)[jobs.path] < merged
    refused = world.gpuksm("unmerge", "--all")
    assert refused.code == errors.NotEnoughMemory.exit_code, refused
    assert str(jobs.path) in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert sum(victim.merged_pages("shared") for victim in victims) * 4096 == merged
    world.unmerge("--pid", victims[0].pid)  # what the line says
    for victim in victims:
        victim.verify()
    assert not jobs.kills()
    jobs.allow(1 << 40)
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_the_store_stays_below_the_limit_of_the_guard(world: World, service: Group) -> None:
    """What does not fit stays unmerged, with the reason; nobody is killed."""
    small = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2)]
    victims = [world.victim("regions", PAGES, 4, seed, "straight", 1 << 20) for seed in (3, 4)]
    (service.path / "cgroup.procs").write_text(str(os.getpid()))  # whoever starts the guard
    try:
        world.scan(*small)
    finally:
        (service.path.parent / "cgroup.procs").write_text(str(os.getpid()))
    service.allow(service.used() + 24 * MIB)
    result = world.scan(*victims)
    assert result["skipped"].get("guard-memory-limit", 0) > 0, result
    assert service.used() < int(service.limit.read_text())
    assert not service.kills()
    for victim in victims:
        victim.verify()
    service.allow(1 << 40)
    world.scan(*victims)
    for victim in victims:
        victim.verify()
        assert victim.merged_pages("shared") >= PAGES - 1
    world.unmerge()
