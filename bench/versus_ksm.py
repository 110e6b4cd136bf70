"""Kernel KSM at full speed and gpuksm (on the CPU) on the same workloads, in turns, in one run.

    python bench/versus_ksm.py [--full] [--workload mix ...] [--repeats 3] [--json FILE]

Needs root and a KSM that nobody uses; its settings are put back whatever happens.
Each trial starts fresh processes, has one of the two merge them, measures, and has
the processes check every byte.  All figures are medians; steady is taken once.

KSM: `pages_to_scan` 1000000, `sleep_millisecs` 0, the rest as it is; the processes
ask for merging with MADV_MERGEABLE.  Wall and CPU time (of ksmd) run from writing
`run` until 99 % of its saving is there.  gpuksm: `gpuksm scan`, from start to end,
with the start of the interpreter and of the guard; CPU time is that of the scan, the
guard, the keeper, and of the targets (their agents; not while writers run in them).
Saved is the fall of the processes' PSS, gpuksm's store counted in full.  Steady is
the CPU time per second afterwards, while nothing changes: of ksmd, and of daemon,
guard, keeper and targets.  Exit codes: 3 when this machine cannot do it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import kernel_ksm
from bench.contestants import Gpuksm, Kernel, Row, bytecode_kept
from bench.kernel_ksm import FullSpeed
from bench.workload import Processes, Workload, build

UNABLE = 3
TOOLS = ("ksm", "gpuksm")


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Those that were asked for, in the sizes that were asked for."""
    count, shared, own = (6, 350, 650) if arguments.full else (4, 200, 350)
    count, shared, own = arguments.processes or count, arguments.shared_mb or shared, arguments.own_mb or own
    every = [
        Workload("mix", "mix", count, shared, own),
        Workload("scattered", "scattered", count, shared // 2, own // 4),
        Workload("zeros", "zeros", count, shared // 2, own // 4),
        Workload("constant", "constant", count, shared // 2, own // 4),
        Workload("writers", "mix", count, shared // 2, own // 4, arguments.write_rate),
        Workload("busy writers", "mix", count, shared // 2, own // 4, 0),
    ]
    return [
        replace(each, aio=arguments.aio)
        for each in every
        if not arguments.workload or each.name in arguments.workload
    ]


@contextmanager
def opened(tool: str, ksm: FullSpeed, processes: Processes, workload: Workload) -> Iterator[Kernel | Gpuksm]:
    """A tool for one trial, cleaned up after; the processes are ended first."""
    with ExitStack() as stack:
        if tool == "ksm":
            chosen: Kernel | Gpuksm = Kernel(ksm, processes, workload)
        else:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="gpuksm-versus-", ignore_cleanup_errors=True)
            )
            chosen = Gpuksm(processes, workload, Path(folder) / "run")
        stack.callback(chosen.close)
        stack.callback(processes.kill)
        yield chosen


def writers(processes: Processes, seconds: float, meanwhile: Callable[[float], None]) -> Row:
    """Events a second of all writers, and their longest gap, while `meanwhile(deadline)` runs."""
    processes.ask("reset")
    meanwhile(time.monotonic() + seconds)
    counts = processes.ask("count")
    return {
        "rate": sum(row["events"] / row["seconds"] for row in counts),
        "gap_ms": max(row["longest"] for row in counts) * 1000,
    }


def trial(
    tool: str, program: Path, workload: Workload, ksm: FullSpeed, seconds: float, steady: bool
) -> dict[str, float]:
    """Merge a fresh workload with one tool; all that was measured, in seconds and bytes."""
    with (
        Processes(program, workload) as processes,
        opened(tool, ksm, processes, workload) as chosen,
    ):
        row: Row = {}
        if workload.rate is not None:
            processes.ask(f"write {workload.rate}")
            alone = writers(processes, seconds / 2, lambda until: time.sleep(until - time.monotonic()))
            row |= {f"alone_{name}": value for name, value in alone.items()}
        before, tables = processes.held_bytes(), processes.table_bytes()

        def merge(until: float) -> None:
            nonlocal row
            row |= chosen.merge()
            chosen.keep_on(until)

        if workload.rate is None:
            row |= chosen.merge()
        else:
            row |= {f"under_{name}": value for name, value in writers(processes, seconds, merge).items()}
            row["loss"] = 1 - row["under_rate"] / row["alone_rate"]
        row["saved"] = before - processes.held_bytes() - chosen.store_bytes()
        row["tables"] = processes.table_bytes() - tables
        row["profit"] = chosen.profit()
        if workload.rate is not None:
            processes.ask("halt")
        elif steady:
            row["steady"] = chosen.steady(seconds)
        if tool == "ksm":
            ksm.stop()
        processes.ask("check")
        return row


def compare(arguments: argparse.Namespace, chosen: list[Workload], note: Callable[[str], None]) -> list[Any]:
    """All trials; one object a workload."""
    trials: dict[tuple[str, str], list[Row]] = {}
    ksm = FullSpeed()
    with ExitStack() as stack:
        # Twice, for a signal can raise once (see signals_end), and that may be in the first of them.
        stack.callback(ksm.restore)
        stack.callback(ksm.restore)
        ksm.begin()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuksm-versus-"))
        program = build(Path(folder))
        note("a first scan, not counted, compiles what is compiled on first use")
        trial("gpuksm", program, Workload("first", "mix", 2, 2, 2), ksm, 1.0, False)
        for repeat in range(arguments.repeats):
            for workload in chosen:
                # Turns: neither is always the one that comes first.
                for tool in TOOLS if repeat % 2 == 0 else TOOLS[::-1]:
                    steady = repeat == arguments.repeats - 1
                    row = trial(tool, program, workload, ksm, arguments.seconds, steady)
                    trials.setdefault((workload.name, tool), []).append(row)
                    note(
                        f"{repeat + 1}/{arguments.repeats} {workload.name}, {tool}: "
                        f"{row['wall']:.2f} s, CPU {row['cpu']:.2f} s, saved {row['saved'] / 1e6:.0f} MB"
                    )
    return [summary(workload, trials) for workload in chosen]


def summary(workload: Workload, trials: dict[tuple[str, str], list[Row]]) -> dict[str, Any]:
    """Medians of a workload, and their ratios: above 1 is good for gpuksm."""
    found: dict[str, Any] = {"workload": workload.name, "bytes": workload.bytes}
    for tool in TOOLS:
        rows = trials[workload.name, tool]
        names = dict.fromkeys(name for row in rows for name in row)
        found[tool] = {name: statistics.median(row[name] for row in rows if name in row) for name in names}
        found[f"{tool}_trials"] = rows
    kernel, ours = found["ksm"], found["gpuksm"]
    found["ratios"] = {name: kernel[name] / ours[name] for name in ("wall", "cpu")}
    found["ratios"]["saved"] = ours["saved"] / kernel["saved"] if kernel["saved"] > 0 else None
    if "steady" in kernel and "steady" in ours:
        found["ratios"]["steady"] = ours["steady"] / kernel["steady"]
    return found


def machine() -> dict[str, Any]:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    words = huge.read_text().split() if huge.exists() else []
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "huge_pages": next((word.strip("[]") for word in words if word.startswith("[")), ""),
        **{
            name: kernel_ksm.setting(name)
            for name in ("smart_scan", "use_zero_pages", "max_page_sharing", "merge_across_nodes")
        },
    }


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def show(result: dict[str, Any]) -> None:
    """The table."""
    facts = result["machine"]
    title = f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}; "
    title += f"smart_scan {facts['smart_scan']}, use_zero_pages {facts['use_zero_pages']}; "
    title += f"load {facts['load']:.1f} before, {facts['load_after']:.1f} after; "
    title += f"medians of {result['repeats']}"
    columns = ("wall s", "CPU s", "saved MB", "steady CPU", "events/s", "loss", "longest gap ms")
    table = Table(title=title)
    for name in ("workload", "by"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    for found in result["workloads"]:
        name = f"{found['workload']}, {found['bytes'] >> 20} MiB"
        if "alone_rate" in found["ksm"]:
            rates = [found[tool]["alone_rate"] for tool in TOOLS]
            gap = max(found[tool]["alone_gap_ms"] for tool in TOOLS)
            table.add_row(name, "nobody", "", "", "", "", f"{statistics.mean(rates):.0f}", "", f"{gap:.1f}")
            name = ""
        for tool in TOOLS:
            row = found[tool]
            cells = [name, tool, f"{row['wall']:.2f}", f"{row['cpu']:.2f}", f"{row['saved'] / 1e6:.1f}"]
            cells.append(percent(row.get("steady")))
            if "loss" in row:
                cells += [f"{row['under_rate']:.0f}", percent(row["loss"]), f"{row['under_gap_ms']:.1f}"]
            table.add_row(*cells)
            name = ""
        ratios = found["ratios"]
        cells = ["", "ratio", f"{ratios['wall']:.2f} x", f"{ratios['cpu']:.2f} x"]
        table.add_row(*cells, percent(ratios["saved"]), percent(ratios.get("steady")), style="bold")
        table.add_section()
    Console(width=120).print(table)


@contextmanager
def signals_end() -> Iterator[None]:
    """The first SIGTERM, SIGINT or SIGHUP ends the run in order; later ones do not disturb that."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def end(number: int, _frame: Any) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {name: signal.signal(name, end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="6 processes, of 350 + 650 MiB in mix")
    parser.add_argument("--workload", action="append", help="only this one; may be given several times")
    parser.add_argument("--processes", type=int, help="processes of each workload")
    parser.add_argument("--shared-mb", type=int, help="equal MiB of each process of mix; half in the others")
    parser.add_argument("--own-mb", type=int, help="own MiB of each process of mix; a quarter in the others")
    parser.add_argument("--write-rate", type=int, default=1000, help="events a second of each writer")
    parser.add_argument("--aio", action="store_true", help="have pages looked at for devices that hold them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of steady state, and of writing")
    parser.add_argument("--json", metavar="FILE", help="also write everything that was measured to FILE")
    return parser


def main() -> int:
    """Run the comparison; returns the exit code."""
    arguments = options().parse_args()
    chosen = workloads(arguments)
    reason = unable(chosen)
    if reason:
        print(reason, file=sys.stderr)
        return UNABLE
    result: dict[str, Any] = {"machine": machine(), "repeats": arguments.repeats}
    with signals_end(), bytecode_kept():
        result["workloads"] = compare(
            arguments, chosen, lambda text: print(text, file=sys.stderr, flush=True)
        )
    result["machine"]["load_after"] = os.getloadavg()[0]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    return 0


def unable(chosen: list[Workload]) -> str:
    """Why this machine cannot do it, or nothing."""
    if not chosen:
        return "there is no such workload: mix, scattered, zeros, constant, writers, 'busy writers'"
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    needed = max(workload.bytes for workload in chosen) * 5 // 4
    if available < needed:
        sizes = f"{needed >> 20} MiB of free memory are needed, {available >> 20} are there"
        return f"{sizes}: try --shared-mb and --own-mb"
    return kernel_ksm.why_not()


if __name__ == "__main__":
    sys.exit(main())
