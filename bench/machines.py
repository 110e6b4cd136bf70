"""Kernel KSM and gpuksm on alike virtual machines, in turns: Linux in QEMU.

    python bench/machines.py --kernel /boot/vmlinuz-... --busybox /bin/busybox
                             [--machines 4] [--memory-mb 256] [--files-mb 64] [--own-mb 48] [--json FILE]

Needs root, gcc, qemu-system-x86_64, a static busybox, and a KSM that nobody uses; its settings are put back
whatever happens.  Machines are started anew for each.  Each machine unpacks the same files of this system's
library folder into its memory, makes some memory of its own, and checks the sums of both when it is asked
to: before, after merging, and after `gpuksm unmerge`.

QEMU asks for KSM by itself.  Times and savings are taken as in versus_ksm.py, but that what machines do by
themselves meanwhile is not counted; --accel kvm where the guest's kernel runs there at speed (--allow-kvm is
given to gpuksm then).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.contestants import Gpuksm, Row, bytecode_kept, run_json
from bench.kernel_ksm import FullSpeed
from bench.versus_ksm import TOOLS, UNABLE, machine, signals_end, trial
from bench.workload import Running, Workload, build

LIBRARY = Path("/usr/lib")
LIMIT_SECONDS = 120.0
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
/bin/busybox stty -echo
/bin/busybox dd if=/dev/urandom of=/own bs=1048576 count=OWN 2> /dev/null
/bin/busybox sha256sum /own > /own.sums
echo READY
while read -r word; do
    if /bin/busybox sha256sum -cs /sums && /bin/busybox sha256sum -cs /own.sums
    then echo OK
    else echo BAD
    fi
done
"""


def files(megabytes: int) -> Iterator[tuple[Path, bytes]]:
    """Files of this system, in the order of their names, until there are so many MiB."""
    left = megabytes << 20
    for path in sorted(LIBRARY.rglob("*.so*")):
        if left <= 0:
            return
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()[:left]
            left -= len(content)
            yield path, content


def member(name: str, mode: int, content: bytes) -> bytes:
    """An entry of a cpio archive in the format that the kernel unpacks, "newc"."""
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    head += bytes(-len(head) % 4)
    return head + content + bytes(-len(content) % 4)


def write_root(path: Path, busybox: Path, files_mb: int, own_mb: int) -> None:
    """The machines' root file system, an archive that the kernel unpacks into memory."""
    folder, program = 0o40755, 0o100755
    sums = b""
    with path.open("wb") as archive:
        for name in ("bin", "files"):
            archive.write(member(name, folder, b""))
        archive.write(member("bin/busybox", program, busybox.read_bytes()))
        archive.write(member("init", program, INIT.replace("OWN", str(own_mb)).encode()))
        for number, (_, content) in enumerate(files(files_mb)):
            archive.write(member(f"files/{number}", program, content))
            sums += f"{hashlib.sha256(content).hexdigest()}  /files/{number}\n".encode()
        archive.write(member("sums", program, sums))
        archive.write(member("TRAILER!!!", 0, b""))


class Machines(Running):
    """Those that run."""

    def __init__(self, arguments: argparse.Namespace, root: Path) -> None:
        super().__init__()
        command = [
            *("qemu-system-x86_64", "-accel", arguments.accel, "-m", str(arguments.memory_mb)),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(arguments.kernel), "-initrd", str(root)),
            *("-append", "console=ttyS0 rootfstype=ramfs quiet loglevel=0 panic=-1"),
        ]
        pipe = subprocess.PIPE
        for _ in range(arguments.machines):
            self._running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))

    def expect(self, wanted: str) -> None:
        """Wait until each has said that; anything else ends the benchmark."""
        for each in self._running:
            assert each.stdout is not None
            for line in each.stdout:
                word = line.strip()
                if word == wanted:
                    break
                if word == "BAD":
                    raise SystemExit(f"machine {each.pid} has read a wrong byte")
            else:
                raise SystemExit(f"machine {each.pid} has ended")

    def check(self) -> None:
        """Have each look at all its files."""
        self.send("check")
        self.expect("OK")


def of_ksm(machines: Machines, ksm: FullSpeed) -> Row:
    """What KSM saves, and takes for it."""
    before = machines.held_bytes()
    wall, cpu = ksm.merge(1 << 40, LIMIT_SECONDS)
    saved = before - machines.held_bytes()
    ksm.stop()
    machines.check()
    return {"wall": wall, "cpu": cpu, "saved": saved, "held": before}


def of_gpuksm(machines: Any, accelerator: str, folder: Path) -> Row:
    """What gpuksm saves, and takes for it, and for undoing it."""
    before = machines.held_bytes()
    ours = Gpuksm(machines, Workload("machines", "", len(machines.pids), 0, 0, 0), folder)
    ours.options = ["--allow-kvm"] if accelerator == "kvm" else []
    try:
        row = ours.merge()
        row |= {"saved": before - machines.held_bytes() - ours.store_bytes(), "held": before}
        machines.check()
        command = [sys.executable, "-m", "gpuksm", "unmerge", "--all", "--json"]
        row["unmerge"] = run_json(command, ours.environment).wall
        machines.check()
    finally:
        machines.kill()
        ours.close()
    return row


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both, each on machines that have just been started."""
    root = folder / "root.cpio"
    write_root(root, arguments.busybox, arguments.files_mb, arguments.own_mb)
    rows: dict[str, list[Row]] = {tool: [] for tool in TOOLS}
    with ExitStack() as stack:
        ksm = FullSpeed()
        stack.callback(ksm.restore)
        stack.callback(ksm.restore)  # a signal may have come into the first of them
        ksm.begin()
        # A first scan, not counted, compiles what is compiled on first use.
        trial("gpuksm", build(folder), Workload("first", "mix", 2, 2, 2), ksm, 1.0, False)
        for repeat in range(arguments.repeats):
            for tool in TOOLS if repeat % 2 == 0 else TOOLS[::-1]:
                with Machines(arguments, root) as machines:
                    machines.expect("READY")
                    machines.check()
                    if tool == "ksm":
                        rows[tool].append(of_ksm(machines, ksm))
                    else:
                        rows[tool].append(of_gpuksm(machines, arguments.accel, folder / f"run{repeat}"))
                ksm.clear()
                print(f"{repeat + 1}/{arguments.repeats} {tool}: {told(rows[tool][-1])}", file=sys.stderr)
    medians = {
        tool: {name: statistics.median(row[name] for row in found) for name in found[0] if name in found[-1]}
        for tool, found in rows.items()
    }
    return {"machine": machine(), "machines": arguments.machines, "trials": rows, **medians}


def told(row: Row) -> str:
    """A row as one reads it."""
    return f"{row['wall']:.2f} s, CPU {row['cpu']:.2f} s, saved {row['saved'] / 1e6:.0f} MB"


def main() -> int:
    """Run the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", type=Path, required=True, help="the guests' kernel, a bzImage")
    parser.add_argument("--busybox", type=Path, required=True, help="their program, statically linked")
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--memory-mb", type=int, default=256, help="of each")
    parser.add_argument("--files-mb", type=int, default=64, help="equal files in each")
    parser.add_argument("--own-mb", type=int, default=48, help="its own file in each")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--json", metavar="FILE", help="also write everything that was measured to FILE")
    arguments = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        print("there is no qemu-system-x86_64: install QEMU", file=sys.stderr)
        return UNABLE
    with signals_end(), bytecode_kept(), tempfile.TemporaryDirectory(prefix="gpuksm-machines-") as folder:
        found = compare(arguments, Path(folder))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    ours = found["gpuksm"]
    print(
        f"{arguments.machines} machines, {ours['held'] / 1e6:.0f} MB in all; medians of {arguments.repeats}"
    )
    for tool in TOOLS:
        print(f"{tool}: {told(found[tool])}")
    print(f"longest pause {ours['max_pause_ms']:.1f} ms, unmerged in {ours['unmerge']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
