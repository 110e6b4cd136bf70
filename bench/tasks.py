"""What threads, forks, programs and signals cost a process in which memory is merged.

    python bench/tasks.py                                  # as root
    unshare --user --map-root-user python bench/tasks.py   # as an ordinary user hears of no forks

Needs gcc.  Two processes with 64 MiB equal; one of them starts threads, processes and programs
(`system`) and signals itself, before and after they are merged.  Prints a Markdown table of medians
and longest of 101 each, in microseconds.  Exit code 1 when a byte is wrong or nothing was merged.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "workloads" / "tasks.c"
MIB = 64


def _line(process: subprocess.Popen[str]) -> dict[str, tuple[int, int]]:
    """Median and longest of each thing that the process has measured."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    parts = process.stdout.readline().split()
    if not parts or parts == ["CORRUPT"]:
        raise SystemExit("a byte is wrong")
    pairs = (part.split("=") for part in parts)
    return {name: (int(value.split(",")[0]), int(value.split(",")[1])) for name, value in pairs}


def main() -> int:
    """Measure, merge, measure again; the exit code."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "tasks"
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE, "-lpthread"], check=True)
        runtime = Path(folder) / "run"
        runtime.mkdir(mode=0o700)
        env = {**os.environ, "GPUKSM_RUNTIME_DIR": str(runtime)}
        command = [program, str(MIB)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
        gpuksm = [sys.executable, "-m", "gpuksm"]
        try:
            for process in processes:
                process.stdout.readline()
            before = _line(processes[0])
            named = [part for process in processes for part in ("--pid", str(process.pid))]
            subprocess.run([*gpuksm, "scan", *named], env=env, check=True, stdout=subprocess.DEVNULL)
            if "gpuksm-store" not in Path(f"/proc/{processes[0].pid}/maps").read_text():
                print("nothing was merged", file=sys.stderr)
                return 1
            after = _line(processes[0])
            subprocess.run([*gpuksm, "unmerge", "--all"], env=env, check=True, stdout=subprocess.DEVNULL)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    print("| microseconds, median (longest) | not merged | merged |\n|---|---:|---:|")
    for name, (median, longest) in before.items():
        print(f"| {name} | {median} ({longest}) | {after[name][0]} ({after[name][1]}) |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
