"""A disk whose reads wait until a test lets them go on."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import requirements_env
from tests.support import groups

_FOLDER = Path("/var/tmp")  # a tmpfs has no direct I/O on older kernels
_SLOW = 1024  # bytes a second


class Disk(NamedTuple):
    """A loop device at `path`; programs that are started by `wrapper` wait for what they read of it."""

    path: str
    wrapper: tuple[str, ...]
    limit: Path
    unlimited: str

    def let_go(self) -> None:
        """From now on nobody waits."""
        self.limit.write_text(self.unlimited)


@contextlib.contextmanager
def slow_disk(size: int) -> Iterator[Disk]:
    """One of `size` bytes, all zeros; gone in the end, as its control group is."""
    requirements_env.need("root", "losetup")
    image = _FOLDER / f"gpuksm-test-disk-{os.getpid()}"
    image.write_bytes(bytes(size))
    with contextlib.ExitStack() as undo:
        undo.callback(image.unlink)
        made = subprocess.run(
            ["losetup", "--find", "--show", image], capture_output=True, text=True, check=False, timeout=30
        )
        device = made.stdout.strip()
        if made.returncode:
            requirements_env.require("slow_disk", f"no loop device: {made.stderr.strip()}")
        undo.callback(subprocess.run, ["losetup", "--detach", device], check=False, timeout=30)
        number = os.stat(device).st_rdev
        name = f"{os.major(number)}:{os.minor(number)}"
        for base, file, slow, fast in (
            ("blkio", "blkio.throttle.read_bps_device", f"{name} {_SLOW}", f"{name} 0"),
            ("", "io.max", f"{name} rbps={_SLOW}", f"{name} rbps=max"),
        ):
            group = Path("/sys/fs/cgroup", base, f"gpuksm-test-disk-{os.getpid()}")
            with contextlib.suppress(OSError):
                group.mkdir()
                undo.callback(groups.remove, group)
            if (group / file).exists():
                (group / file).write_text(slow)
                yield Disk(device, groups.inside(group), group / file, fast)
                return
        requirements_env.require("slow_disk", "no control group can limit what is read of a disk")
