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
