"""Reading which processes a control group holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuksm.linux import cgroup


def test_groups_below_count_and_zero_does_not(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text("12\n0\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "cgroup.procs").write_text("7\n12\n")
    assert cgroup.processes(str(tmp_path)) == [7, 12]


def test_a_group_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError):
        cgroup.processes("/no/such/group")


@pytest.mark.skipif(not (cgroup.MOUNT / "cgroup.procs").is_file(), reason="no cgroup v2")
def test_the_root_group_of_this_machine_holds_this_process() -> None:
    assert os.getpid() in cgroup.processes("/")


def _groups(mount: Path) -> list[tuple[Path, bool]]:
    """The folders that this process's memory groups have below `mount`, and whether they are of version 2."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = mount / "memory" if controllers else mount
            found.append((top / path.lstrip("/"), not controllers))
    return found


def _limited(group: Path, version_2: bool, limit: str) -> None:
    prefix = "" if version_2 else "total_"
    group.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version_2 else cgroup._VERSION_1[:2]
    for name, text in zip(names, (limit, "1000\n"), strict=True):
        (group / name).write_text(text)
    stat = f"{prefix}inactive_file 30\n{prefix}active_file 4\nanon 7\n"
    (group / "memory.stat").write_text(stat)


def test_room_below_a_limit_counts_file_cache(tmp_path: Path) -> None:
    groups = _groups(tmp_path)
    assert groups
    for group, version_2 in groups:
        _limited(group, version_2, "5000\n")
    assert cgroup.memory_room(os.getpid(), tmp_path) == dict.fromkeys((group for group, _ in groups), 4034)


def test_no_limit_is_no_room_to_tell_of(tmp_path: Path) -> None:
    assert cgroup.memory_room(os.getpid(), tmp_path) == {}
    for group, version_2 in _groups(tmp_path):
        _limited(group, version_2, "max\n" if version_2 else "9223372036854771712\n")
    assert cgroup.memory_room(os.getpid(), tmp_path) == {}


def test_a_parent_may_be_what_limits(tmp_path: Path) -> None:
    for group, version_2 in _groups(tmp_path):
        top = tmp_path if version_2 else tmp_path / "memory"
        group.mkdir(parents=True, exist_ok=True)
        _limited(top, version_2, "900\n")
        assert cgroup.memory_room(os.getpid(), tmp_path)[top] == 0


def test_a_process_that_is_gone_has_no_groups() -> None:
    assert cgroup.memory_room(1 << 22) == {}
