"""How gpuksm's costs grow with memory: rounds, scans, and reading for an estimate.

    python bench/scaling.py [--only rounds scan estimate] [--gib 1,2,4,8] [--percent 0,1,10]
                            [--repeats 5] [--json FILE] [--plot FILE.svg]

Four processes (bench/workloads/pages.c), 35 % of each equal in all of them and in the same
order, the rest its own; GiB are of all of them together.  Every figure is a median; all
processes check every byte at the end.

rounds    CPU seconds, of scanner and guard, of the rounds of a settled session, as `gpuksm
          daemon` does them, with 0, 1 and 10 % of all pages written before, in groups of
          eight (bench/rounds.py).  The pages that the rounds read are counted: 0 for 0 %.
scan      Wall and CPU seconds of `gpuksm scan`, from start to end, for each GiB; CPU time is
          that of scan, guard, keeper and of the threads in the processes; the most memory
          that scan and guard held (VmHWM).  Fresh processes
          for each trial.
estimate  GiB/s of `gpuksm estimate`, by its own `seconds` and from the start of the command
          to its end, beside a bare loop of process_vm_readv (bench/workloads/readers.c)
          over the same pages of the same processes with as many threads, in turns.

Without --gib: 1, 2, 4, 8, and for scans 12 as well.  Exit codes: 3 when this machine cannot
do it, 1 when a byte or a count was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rounds
from bench.contestants import ROOT, Gpuksm, Row, bytecode_kept, run_json
from bench.plot import Line, Panel, svg
from bench.versus_ksm import machine, signals_end
from bench.workload import READERS, Processes, Workload, build
from gpuksm import eligibility
from gpuksm.hashing.cpu import CHUNK_PAGES
from gpuksm.hashing.crew import usable_cpus
from gpuksm.linux import pagemap, procfs
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.tracker import Tracker

UNABLE = 3
PARTS = ("rounds", "scan", "estimate")
SIZES = {"rounds": (1.0, 2.0, 4.0, 8.0), "scan": (1.0, 2.0, 4.0, 8.0, 12.0), "estimate": (1.0, 2.0, 4.0, 8.0)}
EQUAL = 0.35
GIB = 1 << 30

Note = Callable[[str], None]


def workload(gib: float, processes: int) -> Workload:
    """`gib` GiB of equal and own pages, rounded to MiB of each process."""
    each = round(gib * 1024 / processes)
    equal = round(EQUAL * each)
    return Workload("mix", "mix", processes, equal, each - equal)


@contextmanager
def new_folder() -> Iterator[Path]:
    """A runtime folder for a guard."""
    with tempfile.TemporaryDirectory(prefix="gpuksm-scaling-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "run"


def medians(rows: list[Row]) -> dict[str, float]:
    """Of what all rows have."""
    names = set(rows[0]).intersection(*rows)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0] if name in names}


def measure_rounds(
    program: Path, chosen: Workload, repeats: int, note: Note, percentages: Sequence[int]
) -> list[dict[str, Any]]:
    """See bench/rounds.py."""
    with new_folder() as folder:
        found = rounds.measure(program, chosen, folder, repeats, percentages)
    for row in found:
        milliseconds = 1000 * row["cpu"]
        note(f"rounds, {gib(row):.3g} GiB, {row['percent']} % written: {milliseconds:.1f} ms of CPU time")
    return found


def scan(program: Path, chosen: Workload) -> Row:
    """One whole scan of fresh processes."""
    with new_folder() as folder, Processes(program, chosen) as processes:
        tool = Gpuksm(processes, chosen, folder)
        try:
            row = tool.merge()
            row["stored"] = tool.store_bytes()
            processes.ask("check")
        finally:
            processes.kill()
            tool.close()
    return row


def measure_scan(program: Path, chosen: Workload, repeats: int, note: Note) -> list[dict[str, Any]]:
    """Scans of one size."""
    rows = []
    for _ in range(repeats):
        rows.append(scan(program, chosen))
        row = rows[-1]
        note(f"scan, {chosen.bytes / GIB:.3g} GiB: {row['wall']:.2f} s, CPU {row['cpu']:.2f} s")
    per_gib = {
        f"{name}_per_gib": [row[name] * GIB / chosen.bytes for row in rows] for name in ("wall", "cpu")
    }
    summary = {name: statistics.median(values) for name, values in per_gib.items()}
    return [{"bytes": chosen.bytes, **medians(rows), **summary, "trials": rows}]


def ranges(processes: Processes) -> list[tuple[int, int, int]]:
    """(pid, first byte, bytes) of every page that an estimate reads."""
    found = []
    for pid in processes.pids:
        regions, _ = eligibility.regions(pid, None, tracked=True)
        tracker = Tracker(pid, regions, passive=True)
        try:
            tracker.look()
        finally:
            tracker.close()
        low, high = tracker.columns.address.stretches()
        found += zip([pid] * len(low), low.tolist(), (high - low).tolist(), strict=True)
    return found


def read_bare(readers: Path, processes: Processes, threads: int) -> Row:
    """All of it read by the loop, in the pieces in which the CPU backend reads."""
    lines = "".join(f"{pid} {first} {size}\n" for pid, first, size in ranges(processes))
    command = [str(readers), str(threads), str(CHUNK_PAGES * PAGE_BYTES)]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    word, *values = done.stdout.split() or ["nothing"]
    if word != "OK":
        raise SystemExit(f"readers says: {done.stdout.strip()}")
    row = {name: float(text) for name, _, text in (value.partition("=") for value in values)}
    return {"bare_bytes": row["bytes"], "bare": row["bytes"] / GIB / row["seconds"]}


def estimate(processes: Processes) -> tuple[Row, str]:
    """One `gpuksm estimate`: GiB/s, and the backend."""
    command = [
        sys.executable,
        "-m",
        "gpuksm",
        "estimate",
        "--json",
        "--pid",
        ",".join(map(str, processes.pids)),
    ]
    ended = run_json(command, {**os.environ, "PYTHONPATH": str(ROOT)})
    found = ended.printed
    size = found["pages_scanned"] * PAGE_BYTES
    rates = {"own": size / GIB / found["seconds"], "whole": size / GIB / ended.wall}
    taken = {"seconds": found["seconds"], "wall": ended.wall, "cpu": ended.cpu, "peak": ended.peak_bytes}
    return {"estimate_bytes": size, **rates, **taken}, str(found["backend"])


def measure_estimate(program: Path, chosen: Workload, repeats: int, note: Note) -> list[dict[str, Any]]:
    """Estimates and the bare loop in turns."""
    threads = usable_cpus()
    readers = program.parent / READERS.stem
    rows: list[Row] = []
    with new_folder() as folder, Processes(program, chosen) as processes:
        os.environ["GPUKSM_RUNTIME_DIR"] = str(folder)  # no guard is started; none that runs is asked
        estimate(processes)  # not counted: it compiles modules
        for repeat in range(repeats):
            row: Row = {}
            # Turns: neither is always the one that comes first.
            for bare in (True, False) if repeat % 2 == 0 else (False, True):
                if bare:
                    row |= read_bare(readers, processes, threads)
                else:
                    more, backend = estimate(processes)
                    row |= more
            rows.append(row)
            note(
                f"estimate, {chosen.bytes / GIB:.3g} GiB: {row['own']:.2f} GiB/s by itself, "
                f"{row['whole']:.2f} as a command; bare loop {row['bare']:.2f}"
            )
        processes.ask("check")
    found: dict[str, Any] = medians(rows)
    for row in rows:
        if abs(row["estimate_bytes"] - row["bare_bytes"]) > 0.02 * row["bare_bytes"]:
            raise SystemExit(f"{row['estimate_bytes']} and {row['bare_bytes']} bytes were read")
    ratios = {"own_to_bare": found["own"] / found["bare"], "whole_to_bare": found["whole"] / found["bare"]}
    facts = {"bytes": chosen.bytes, "threads": threads, "backend": backend}
    return [{**facts, **found, **ratios, "trials": rows}]


MEASURES: dict[str, Callable[[Path, Workload, int, Note], list[dict[str, Any]]]] = {
    "scan": measure_scan,
    "estimate": measure_estimate,
}


def gib(row: dict[str, Any]) -> float:
    """GiB that a row is about."""
    return float(row["bytes"]) / GIB


def rounds_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="rounds of a settled session: CPU time of scanner and guard, in ms")
    heads = (
        "GiB",
        "written",
        "pages written",
        "pages read",
        "plans",
        "round that sees",
        "that reads",
        "both",
        "guard's part",
    )
    for name in heads:
        table.add_column(name, justify="right")
    for row in rows:
        guard = row["seeing_cpu_guard"] + row["reading_cpu_guard"]
        times = (row["seeing_cpu"], row["reading_cpu"], row["cpu"], guard)
        counts = (f"{row['written']:,.0f}", f"{row['read']:,.0f}", f"{row['plans']:g}")
        cells = (f"{gib(row):.3g}", f"{row['percent']} %", *counts)
        table.add_row(*cells, *(f"{1000 * seconds:.1f}" for seconds in times))
    return table


def scan_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="whole scans")
    heads = (
        "GiB",
        "wall s",
        "CPU s",
        "wall s/GiB",
        "CPU s/GiB",
        "CPU s of scan",
        "guard",
        "stored MiB",
        "peak MiB of scan",
        "guard",
        "left out",
    )
    for name in heads:
        table.add_column(name, justify="right")
    for row in rows:
        names = ("wall", "cpu", "wall_per_gib", "cpu_per_gib", "cpu_scanner", "cpu_guard")
        seconds = (f"{row[name]:.2f}" for name in names)
        sizes = (f"{row[name] / 2**20:.0f}" for name in ("stored", "peak_scanner", "peak_guard"))
        table.add_row(f"{gib(row):.3g}", *seconds, *sizes, f"{row['targets_left_out']:.0f}")
    return table


def estimate_table(rows: list[dict[str, Any]]) -> Table:
    threads, backend = rows[0]["threads"], rows[0]["backend"]
    table = Table(title=f"estimate ({backend}) and a bare loop of {threads} threads, in GiB/s")
    for name in ("GiB", "bare loop", "estimate", "of bare", "whole command", "of bare"):
        table.add_column(name, justify="right")
    for row in rows:
        own = (f"{row['own']:.2f}", f"{100 * row['own_to_bare']:.0f} %")
        whole = (f"{row['whole']:.2f}", f"{100 * row['whole_to_bare']:.0f} %")
        table.add_row(f"{gib(row):.3g}", f"{row['bare']:.2f}", *own, *whole)
    return table


TABLES = {"rounds": rounds_table, "scan": scan_table, "estimate": estimate_table}


def lines(rows: list[dict[str, Any]], **names: str) -> list[Line]:
    """A line for each of `names` (key of a row: name) over GiB."""
    return [Line(text, [(gib(row), row[key]) for row in rows]) for key, text in names.items()]


def panels(result: dict[str, Any]) -> list[Panel]:
    """What the plot shows of each part that was measured."""
    found = []
    if rows := result.get("rounds"):
        drawn = [
            Line(
                f"{percent} % written",
                [(gib(row), 1000 * row["cpu"]) for row in rows if row["percent"] == percent],
            )
            for percent in dict.fromkeys(row["percent"] for row in rows)
        ]
        found.append(Panel("Rounds of a settled session", "GiB registered", "CPU ms, two rounds", drawn))
    if rows := result.get("scan"):
        drawn = lines(rows, wall_per_gib="wall time", cpu_per_gib="CPU time")
        found.append(Panel("Whole scans", "GiB scanned", "seconds for each GiB", drawn))
    if rows := result.get("estimate"):
        drawn = lines(rows, bare="bare loop", own="estimate", whole="the whole command")
        found.append(Panel("Estimates", "GiB read", "GiB/s", drawn))
    return found


def sizes(text: str) -> tuple[float, ...]:
    """`1,2,4` as numbers."""
    values = tuple(float(word) for word in text.split(","))
    if not all(0 < value <= 1 << 20 for value in values):
        raise ValueError(text)
    return values


def percentages(text: str) -> tuple[int, ...]:
    """`0,1,10` as numbers; more than a process's own pages cannot be written."""
    values = tuple(int(word) for word in text.split(","))
    if not all(0 <= value <= 100 * (1 - EQUAL) - 1 for value in values):
        raise ValueError(text)
    return values


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="these parts")
    parser.add_argument("--gib", type=sizes, metavar="N,N", help="GiB of all processes together")
    parser.add_argument(
        "--percent", type=percentages, default=rounds.PERCENTAGES, metavar="N,N", help="of pages written"
    )
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write everything that was measured to FILE")
    parser.add_argument("--plot", metavar="FILE", help="also draw it, as SVG, into FILE")
    return parser


def unable(chosen: list[Workload], processes: int, repeats: int) -> str:
    """Why this machine cannot do it, or nothing."""
    if processes < 2 or repeats < 1:
        return "at least two processes and one repeat are needed"
    smallest = min(min(each.shared_mb, each.own_mb) for each in chosen)
    if not smallest:
        return f"{processes} processes need more memory than that, of 2 MiB each at the least"
    available = procfs.available_memory()
    needed = max(each.bytes for each in chosen) * 5 // 4
    if available < needed:
        return f"{needed >> 20} MiB of free memory are needed, {available >> 20} are there: try --gib"
    return "" if pagemap.probe() else "this kernel has no PAGEMAP_SCAN (Linux 6.7 has it)"


def main() -> int:
    """Measure; returns the exit code."""
    arguments = options().parse_args()
    parts = [part for part in PARTS if part in arguments.only]
    chosen = {
        part: [workload(size, arguments.processes) for size in arguments.gib or SIZES[part]] for part in parts
    }
    reason = unable(
        [each for every in chosen.values() for each in every], arguments.processes, arguments.repeats
    )
    if reason:
        print(reason, file=sys.stderr)
        return UNABLE

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    result: dict[str, Any] = {"machine": machine(), "repeats": arguments.repeats}
    with (
        signals_end(),
        bytecode_kept(),
        tempfile.TemporaryDirectory(prefix="gpuksm-scaling-") as folder,
    ):
        program = build(Path(folder))
        build(Path(folder), READERS)
        note("a first scan, not counted, compiles what is compiled on first use")
        scan(program, workload(1 / 64, 2))
        for part in parts:
            result[part] = []
            for size in chosen[part]:
                if part == "rounds":
                    result[part] += measure_rounds(program, size, arguments.repeats, note, arguments.percent)
                else:
                    result[part] += MEASURES[part](program, size, arguments.repeats, note)
    result["machine"]["load_after"] = os.getloadavg()[0]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        Path(arguments.plot).write_text(svg(panels(result)))
    show(result, parts)
    return 0


def show(result: dict[str, Any], parts: list[str]) -> None:
    """The tables."""
    facts = result["machine"]
    console = Console(width=120, highlight=False)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}; load {facts['load']:.1f} before, "
        f"{facts['load_after']:.1f} after; medians of {result['repeats']}"
    )
    for part in parts:
        console.print(TABLES[part](result[part]))


if __name__ == "__main__":
    sys.exit(main())
