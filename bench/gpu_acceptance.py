"""What only a GPU can show, in under five minutes: `python bench/gpu_acceptance.py`.

Needs a CUDA GPU, cupy and this checkout with its ordinary dependencies, and
takes no arguments.  Checks every kernel against the CPU backend and numpy,
measures hash and sort against the card's memory and the bus, reads and scans
live processes on each backend, and prints one table.  The same figures go to
gpu_acceptance.json.  Ends with 0 only when every check holds.

The GPU is picked as `--device` does by default: an idle one.  Rates are medians
of repeats behind one that warms up.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_failures
from bench.gpu_failures import digest
from gpuksm.errors import GpuksmError
from gpuksm.hashing import cuda, gpus, opencl
from gpuksm.hashing.cpu import CpuHasher
from gpuksm.hashing.crew import usable_cpus
from gpuksm.hashing.cuda import CudaHasher
from gpuksm.hashing.device import wait
from gpuksm.hashing.kernels import BLOCK, LANES
from gpuksm.hashing.opencl import OpenClHasher
from gpuksm.hashing.protocol import PAGE_BYTES, Hasher
from gpuksm.hashing.sort import match_sorted, radix_sort
from gpuksm.hashing.source import ArraySource
from gpuksm.hashing.tables import Tables, candidates_of
from gpuksm.scan.reader import LivePages

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 0x9E3779B97F4A7C15, (1 << 64) - 1)
OUTPUT = "gpu_acceptance.json"
GIB, MIB = 1 << 30, 1 << 20
Columns = tuple[NDArray[Any], ...]

# Holds memory of which every second page is in the next child too, until its stdin ends.
CHILD = """
import sys, numpy
pages, seed = int(sys.argv[1]), int(sys.argv[2])
memory = numpy.random.default_rng(seed).integers(0, 1 << 64, (pages + 1, 512), dtype=numpy.uint64)
memory[::2] = numpy.random.default_rng(0).integers(0, 1 << 64, memory[::2].shape, dtype=numpy.uint64)
print(-(-memory.ctypes.data // 4096) * 4096, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults suit any card."""

    pages: int = 65536
    device_bytes: int = GIB
    sort_keys: int = 1 << 24
    process_pages: int = 1 << 17
    processes: int = 4
    job_mb: int = 250
    repeats: int = 7
    launches: int = 20

    @classmethod
    def of_machine(cls) -> Sizes:
        """The defaults, or less where this machine has little memory to spare."""
        pages = psutil.virtual_memory().available // PAGE_BYTES
        return cls(process_pages=min(cls.process_pages, pages // 4 // cls.processes))


@dataclass
class Report:
    """Everything that was found, in the order of the table."""

    machine: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    live: dict[str, dict[str, float]] = field(default_factory=dict)
    scans: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return bool(self.checks) and all(result == "ok" for result in self.checks.values())

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Note `name` as ok, or as what went wrong."""
        try:
            yield
            self.checks[name] = "ok"
        except Exception as error:  # whatever it is, the rest is still worth knowing
            lines = str(error).strip().splitlines()
            self.checks[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"


def same(got: Columns, wanted: Columns) -> None:
    """Raise AssertionError unless the arrays are equal, one by one."""
    for mine, right in zip(got, wanted, strict=True):
        if len(mine) != len(right):
            raise AssertionError(f"{len(mine)} values instead of {len(right)}")
        if not np.array_equal(mine, right):
            raise AssertionError(f"{int((mine != right).sum())} of {len(right)} differ")


def mixed_pages(count: int, seed: int) -> NDArray[np.uint8]:
    """Random pages with zero, constant and almost constant ones among them."""
    pages = np.random.default_rng(seed).integers(0, 1 << 64, (count, 512), dtype=np.uint64)
    pages[3::16] = 0
    pages[5::16] = 0x0123456789ABCDEF
    pages[7::16] = 0
    pages[7::16, 300] = 1
    pages[9::16] = np.tile(np.arange(8, dtype=np.uint64), 64)
    pages[11::16] = pages[10:-1:16][: len(pages[11::16])]
    return pages.view(np.uint8)


def median_seconds(repeats: int, work: Callable[[], object]) -> float:
    """Median duration of `work`, behind one run that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def whole_backend(report: Report, sizes: Sizes) -> None:
    """The backend as a scan uses it, against the CPU's; its context goes and comes back in between."""
    for seed in SEEDS:
        source = ArraySource(mixed_pages(sizes.pages - 3, seed & 0xFF))
        with (
            report.check(f"digests and kinds, seed {seed:#x}"),
            closing(CpuHasher(seed)) as cpu,
            closing(CudaHasher(seed)) as gpu,
        ):
            wanted = digest(cpu, source)
            same(digest(gpu, source), wanted)
            gpu.release()
            same(digest(gpu, source), wanted)
            if not gpu.devices:
                raise AssertionError("the GPU did not come back after a release")
            with closing(CudaHasher(seed)) as second:
                same(digest(second, source), wanted)
            same(digest(gpu, source), wanted)
            if not gpu.devices:
                raise AssertionError("closing a hasher took the GPU from another")


def conformance(report: Report, device: Any, sizes: Sizes) -> None:
    """Every kernel and the ways they are used, against the CPU."""
    with report.check("hash_pages over odd grids"):
        check_grids(device, sizes)
    keys = np.random.default_rng(1).integers(0, sizes.sort_keys // 16, sizes.sort_keys // 16 + 77, np.uint64)
    keys *= np.uint64(0x9E3779B97F4A7C15)
    ordered, order = radix_sort(keys)
    table = ordered[::3].copy()
    match = match_sorted(ordered, table)
    tables = Tables(device)
    with report.check("sort, stable"):
        same(tables.sort(keys), (ordered, order))
    with report.check("match and candidates"):
        tables.set_table(table)
        same((tables.match(ordered),), (match,))
        same(tables.candidates(keys), candidates_of(ordered, order, match))


def check_grids(device: Any, sizes: Sizes) -> None:
    """hash_pages gives the same whatever the grid."""
    count = sizes.pages // 16 + 5
    octets = mixed_pages(count, 4)
    cpu = CpuHasher(7)
    wanted = digest(cpu, ArraySource(octets))
    cpu.close()
    queue = device.queue()
    pages, digests, kinds = (device.buffer(size) for size in (octets.nbytes, count * 8, count))
    queue.upload(pages, octets.reshape(-1))
    for groups in (1, 7, 1000):
        queue.launch("hash_pages", groups, pages, np.uint64(7), np.uint32(count), digests, kinds)
        got = np.zeros(count, np.uint64), np.zeros(count, np.uint8)
        queue.download(got[0], digests)
        queue.download(got[1], kinds)
        wait(queue, queue.mark())
        same(got, wanted)


def device_rates(report: Report, device: Any, sizes: Sizes) -> None:
    """Hash and sort on the card against its memory, and the bus."""
    runtime = device.cupy.cuda.runtime
    queue = device.queue()
    size = min(sizes.device_bytes, device.budget.left_bytes // 4 // MIB * MIB)
    pages = size // PAGE_BYTES
    content, copy = device.buffer(size), device.buffer(size)
    digests, kinds = device.buffer(pages * 8), device.buffer(pages)
    staging = device.pinned(min(size, 256 << 20))
    staging[:] = np.arange(len(staging), dtype=np.uint32).view(np.uint8)[: len(staging)]

    def finish() -> None:
        wait(queue, queue.mark())

    for at in range(0, size, len(staging)):
        with device.current():
            to, kind = content.pointer + at, runtime.memcpyHostToDevice
            runtime.memcpyAsync(to, staging.ctypes.data, len(staging), kind, queue.stream.ptr)
    finish()

    def copy_on_card() -> None:
        for _ in range(sizes.launches):
            with device.current():
                kind = runtime.memcpyDeviceToDevice
                runtime.memcpyAsync(copy.pointer, content.pointer, size, kind, queue.stream.ptr)
        finish()

    def hash_on_card() -> None:
        groups = -(-pages // (BLOCK // LANES))
        for _ in range(sizes.launches):
            queue.launch("hash_pages", groups, content, np.uint64(1), np.uint32(pages), digests, kinds)
        finish()

    def send() -> None:
        queue.upload(content, staging)
        finish()

    def bring() -> None:
        queue.download(staging, content)
        finish()

    rates = report.rates
    rates["copy on the card GB/s (read + written)"] = (
        2e-9 * size * sizes.launches / median_seconds(sizes.repeats, copy_on_card)
    )
    rates["hash on the card GB/s"] = (
        1e-9 * size * sizes.launches / median_seconds(sizes.repeats, hash_on_card)
    )
    rates["hash / copy"] = rates["hash on the card GB/s"] / rates["copy on the card GB/s (read + written)"]
    rates["pinned host to card GB/s"] = 1e-9 * len(staging) / median_seconds(sizes.repeats, send)
    rates["card to pinned host GB/s"] = 1e-9 * len(staging) / median_seconds(sizes.repeats, bring)


def array_rates(report: Report, sizes: Sizes) -> None:
    """Memory of this process through the whole ring: copies, transfers and kernels beside each other."""
    octets = np.arange(sizes.device_bytes // 8, dtype=np.uint64).view(np.uint8)
    source = ArraySource(octets)
    for make in (CpuHasher, CudaHasher):
        with closing(make(SEEDS[1])) as hasher:
            found = digest(hasher, source)  # and the results' memory is there
            taken = median_seconds(sizes.repeats, lambda: hasher.digest(source, *found))  # noqa: B023
        report.rates[f"an array's digests on {hasher.name} GB/s"] = 1e-9 * octets.nbytes / taken


def sort_rates(report: Report, device: Any, sizes: Sizes) -> None:
    """Sorting from host to host on the card, and on the CPU."""
    keys = np.random.default_rng(2).integers(0, 1 << 64, sizes.sort_keys, np.uint64)
    million, tables = len(keys) / 1e6, Tables(device)
    taken = median_seconds(sizes.repeats, lambda: tables.sort(keys))
    report.rates["sort on the card, host to host Mkeys/s"] = million / taken
    taken = median_seconds(2, lambda: radix_sort(keys, usable_cpus()))
    report.rates["sort on the CPU Mkeys/s"] = million / taken


def hashers() -> Iterator[tuple[str, Callable[[], Hasher]]]:
    """The backends this machine has."""
    yield "cpu", lambda: CpuHasher(SEEDS[1], usable_cpus())
    yield "cuda", lambda: CudaHasher(SEEDS[1])
    if opencl.unavailable() is None:
        yield "opencl", lambda: OpenClHasher(SEEDS[1])


@contextmanager
def children(sizes: Sizes) -> Iterator[LivePages]:
    """Processes with memory to read, as one source."""
    command = [sys.executable, "-c", CHILD, str(sizes.process_pages)]
    running = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(1, sizes.processes + 1)
    ]
    try:
        parts = []
        for child in running:
            assert child.stdout is not None
            first = int(child.stdout.readline())
            addresses = first + np.arange(sizes.process_pages, dtype=np.uint64) * np.uint64(PAGE_BYTES)
            parts.append((child.pid, addresses))
        source = LivePages(parts)
        yield source
        source.close()
    finally:
        for child in running:
            child.kill()
            child.communicate()


def live_rates(report: Report, sizes: Sizes) -> None:
    """Read, hash and sort the pages of live processes on each backend."""
    wanted: Columns | None = None
    with children(sizes) as source:
        size = source.pages * PAGE_BYTES
        for name, make in hashers():
            try:
                hasher = make()
            except GpuksmError as error:
                report.live[name] = {}
                report.machine[f"{name} backend"] = str(error)
                continue
            took, cpu_took = [], []
            with report.check(f"live processes on {name}"):
                for repeat in range(sizes.repeats + 1):
                    wall, cpu = time.perf_counter(), time.process_time()
                    found = digest(hasher, source)
                    order = hasher.sort(found[0])
                    if repeat:
                        took.append(time.perf_counter() - wall)
                        cpu_took.append(time.process_time() - cpu)
                    got = (*found, *order)
                    wanted = wanted or got
                    same(got, wanted)
            hasher.close()
            report.live[name] = {
                "GB/s": 1e-9 * size / statistics.median(took),
                "CPU s/GiB": statistics.median(cpu_took) * GIB / size,
            }
    for row in report.live.values():
        if row:
            row["CPU s saved per GiB"] = report.live["cpu"]["CPU s/GiB"] - row["CPU s/GiB"]


def scans(report: Report, sizes: Sizes) -> None:
    """`gpuksm scan` of four detector-like jobs on each backend; fresh jobs each, and once before that."""
    for name, _make in hashers():
        if not report.live.get(name):
            continue
        with (
            report.check(f"gpuksm scan --backend {name}"),
            tempfile.TemporaryDirectory(prefix="gpuksm-acceptance-", ignore_cleanup_errors=True) as folder,
        ):
            scan_jobs(name, folder, sizes)  # compiles what is not in a cache yet
            report.scans[name] = scan_jobs(name, folder, sizes)
            if not report.scans[name]["bytes_saved"] > 0:
                raise AssertionError("nothing was saved")


def scan_jobs(backend: str, folder: str, sizes: Sizes) -> dict[str, Any]:
    """Start jobs, scan them, end them; the scan's figures."""
    environment = os.environ | {"GPUKSM_RUNTIME_DIR": folder + "/run", "PYTHONPATH": str(ROOT)}
    job = [sys.executable, str(ROOT / "bench" / "detector.py")]
    job += ["--shared-mb", str(sizes.job_mb), "--own-mb", str(sizes.job_mb // 2), "--seed"]
    pipe = subprocess.PIPE
    jobs = [
        subprocess.Popen([*job, str(seed)], stdin=pipe, stdout=pipe, text=True, env=environment)
        for seed in range(4)
    ]
    try:
        for one in jobs:
            assert one.stdout is not None
            if not one.stdout.readline():
                raise AssertionError("a job ended")
        command = [sys.executable, "-m", "gpuksm", "scan", "--json", "--backend", backend]
        for one in jobs:
            command += ["--pid", str(one.pid)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise AssertionError(done.stderr.strip() or f"exit code {done.returncode}")
        found = json.loads(done.stdout)
    finally:
        for one in jobs:
            one.kill()
            one.communicate()
    fields = ("seconds", "cpu_seconds", "bytes_saved", "pages_scanned", "max_pause_ms", "backend")
    return {name: found[name] for name in fields}


def memory_after_release(report: Report) -> None:
    """What a released hasher still holds on the card: its context must be gone too."""
    library = gpus.nvml()
    if library is None:
        report.machine["NVML"] = "nvidia-ml-py is not installed; GPUs in use cannot be told from idle ones"
        return
    hasher = CudaHasher(0)
    handle = gpu_failures.card_of(hasher, library)

    def used() -> int:
        return int(library.nvmlDeviceGetMemoryInfo(handle).used)

    open_bytes = used()
    hasher.release()
    report.rates["MiB given back by a release"] = (open_bytes - used()) / MIB
    hasher.close()


def failing_cards(report: Report) -> None:
    """A broken context, a kernel that never ends, a full card, another process, SIGKILL."""
    for name in gpu_failures.CASES:
        with report.check(f"a card that is {name}" if name != "killed" else "a scanner that is killed"):
            gpu_failures.run(name)


def describe(report: Report, device: Any) -> None:
    """What this was measured on."""
    runtime = device.cupy.cuda.runtime
    ordinal = device.ordinal

    def attribute(name: str) -> int:
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), ordinal))

    report.machine |= {
        "gpu": runtime.getDeviceProperties(ordinal)["name"].decode(),
        "multiprocessors": attribute("MultiProcessorCount"),
        "memory bus bits": attribute("GlobalMemoryBusWidth"),
        "driver": runtime.driverGetVersion(),
        "cupy": device.cupy.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def run(sizes: Sizes) -> Report:
    """Do everything; raises BackendUnavailable where there is no GPU to do it on."""
    began = time.monotonic()
    report = Report()
    if reason := cuda.unavailable():
        raise SystemExit(f"no GPU to accept: {reason}")
    whole_backend(report, sizes)
    device: Any = cuda.open_devices(importlib.import_module("cupy"), None, None)[0]
    describe(report, device)
    conformance(report, device, sizes)
    with report.check("rates on the card"):
        device_rates(report, device, sizes)
    with report.check("sort rates"):
        sort_rates(report, device, sizes)
    device.close()
    with report.check("rates of arrays"):
        array_rates(report, sizes)
    with report.check("live processes"):
        live_rates(report, sizes)
    with report.check("memory after a release"):
        memory_after_release(report)
    scans(report, sizes)
    failing_cards(report)
    report.seconds = time.monotonic() - began
    return report


def table_of(report: Report) -> Table:
    """The one table."""
    table = Table(title=f"GPU acceptance: {report.machine.get('gpu', '?')}", title_justify="left")
    table.add_column("what")
    table.add_column("result", justify="right")
    for name, value in report.machine.items():
        table.add_row(name, str(value))
    table.add_section()
    for name, result in report.checks.items():
        table.add_row(name, result, style=None if result == "ok" else "bold red")
    table.add_section()
    for name, rate in report.rates.items():
        table.add_row(name, f"{rate:,.2f}" if rate < 100 else f"{rate:,.0f}")
    for rows in (report.live, report.scans):
        table.add_section()
        for name, row in rows.items():
            for what, value in row.items():
                kind = "live processes" if rows is report.live else "gpuksm scan"
                table.add_row(
                    f"{kind}, {name}: {what}", f"{value:,.3f}" if isinstance(value, float) else str(value)
                )
    table.add_section()
    table.add_row("all of this took", f"{report.seconds:.0f} s")
    return table


def main() -> int:
    """Run, print, write; returns the exit code."""
    try:
        report = run(Sizes.of_machine())
    except GpuksmError as error:
        raise SystemExit(f"no GPU to accept: {error}") from None
    Console(highlight=False).print(table_of(report))
    Path(OUTPUT).write_text(json.dumps(vars(report) | {"good": report.good}, indent=1) + "\n")
    print(f"{'all checks hold' if report.good else 'CHECKS FAILED'}; written to {OUTPUT}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
