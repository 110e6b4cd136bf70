"""Two Geant4 jobs with the same layout that compare every event: python detectors.py SECONDS PYTHON.

PYTHON is the interpreter of an environment with geant4-pybind; the jobs are bench/geant4_job.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COPIES = 2


def main() -> int:
    """Print the verdict."""
    seconds, python = float(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory(prefix="gpuksm-geant4-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "gpuksm", "exec", "--same-layout", "-n", str(COPIES), "--"]
        command += [python, str(ROOT / "bench" / "geant4_job.py"), str(folder)]
        jobs = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while len(list(folder.glob("ready.*"))) < COPIES:
                if jobs.poll() is not None:
                    print(f"CORRUPT the jobs ended with {jobs.returncode} before they had begun", flush=True)
                    return 9
                time.sleep(0.2)
            print("READY", flush=True)
            time.sleep(seconds)
            (folder / "finish").touch()
            status = jobs.wait(300)
        finally:
            jobs.kill()
            jobs.wait()
        done = [path.read_text().split() for path in folder.glob("done.*")]
    if status or len(done) != COPIES or len({crossed for _, crossed in done}) != 1:
        print(f"CORRUPT the jobs ended with {status}: {done}", flush=True)
        return 9
    print(f"OK events={sum(int(events) for events, _ in done)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
