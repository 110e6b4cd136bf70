"""How much of two real Geant4 jobs one scan merges, and whether they survive it.

    python bench/geant4_share.py --job-python ENV/bin/python [--copies 2] [--layout same|random]

ENV is an environment with `geant4-pybind`.  Starts the copies by `gpuksm exec`
(with `--same-layout` unless told otherwise), scans once, lets them simulate on,
unmerges, lets them finish.  Prints one JSON object: the share of the jobs' anonymous
memory that was merged (with and without pages of files that they have written to,
which are never merged), PSS before and after, the pause.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
JOB = Path(__file__).with_name("geant4_job.py")


def gpuksm(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpuksm", *arguments]


def anonymous_bytes(pid: int) -> tuple[int, int]:
    """(anonymous bytes, PSS of all pages) of a process, from smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return values["Anonymous"], values["Pss"]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def measure(job_python: str, copies: int, layout: str, folder: Path) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "GPUKSM_RUNTIME_DIR": str(folder / "run")}
    (folder / "run").mkdir(mode=0o700)
    same = ["--same-layout"] if layout == "same" else []
    command = gpuksm("exec", *same, "-n", str(copies), "--", job_python, str(JOB), str(folder))
    jobs = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(folder.glob("ready.*"))) == copies, 300, "jobs ready")
        pids = [int(path.suffix[1:]) for path in folder.glob("ready.*")]
        before = [anonymous_bytes(pid) for pid in pids]
        done = subprocess.run(gpuksm("scan", "--json"), env=env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            sys.exit(f"scan ended with {done.returncode}: {done.stderr}")
        scan = json.loads(done.stdout)
        time.sleep(3)  # let them use what was merged
        after = [anonymous_bytes(pid) for pid in pids]
        subprocess.run(gpuksm("unmerge", "--all"), env=env, check=True, timeout=600)
        (folder / "finish").touch()
        status = jobs.wait(120)
        wait_for(lambda: len(list(folder.glob("done.*"))) == copies, 10, "jobs done")
    finally:
        jobs.kill()
        jobs.wait()
    merged = sum(target["pages_merged"] for target in scan["targets"]) * 4096
    written_file = sum(target["skipped"].get("file-backed", 0) for target in scan["targets"]) * 4096
    anonymous_bytes_before = sum(anonymous for anonymous, _ in before)
    return {
        "layout": layout,
        "share_merged": merged / (anonymous_bytes_before - written_file),
        "share_of_all_anonymous": merged / anonymous_bytes_before,
        "anonymous_mb_before": [round(anonymous / 1e6, 1) for anonymous, _ in before],
        "pss_mb_before": [round(pss / 1e6, 1) for _, pss in before],
        "pss_mb_after": [round(pss / 1e6, 1) for _, pss in after],
        "pages_volatile": scan["pages_volatile"],
        "targets": scan["targets"],
        "bytes_saved": scan["bytes_saved"],
        "max_pause_ms": scan["max_pause_ms"],
        "seconds": scan["seconds"],
        "jobs_status": status,
        "events_done": [int(path.read_text().split()[0]) for path in folder.glob("done.*")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of two Geant4 jobs that one scan merges.")
    parser.add_argument("--job-python", required=True, help="interpreter that has geant4-pybind")
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--layout", choices=["same", "random"], default="same")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuksm-geant4-") as folder:
        result = measure(options.job_python, options.copies, options.layout, Path(folder))
    print(json.dumps(result, indent=2))


main()
