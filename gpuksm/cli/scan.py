"""`gpuksm scan`: one or more rounds over the targets, then a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuksm.cli import _options, _output, estimate
from gpuksm.targets import Selection

if TYPE_CHECKING:
    from gpuksm.scan import ScanOptions


@click.command()
@_options.targets
@click.option(
    "--batch",
    type=_options.Count(1, _options.MAX_BATCH_PAGES),
    default=65536,
    show_default=True,
    metavar="PAGES",
    help="Pages that are read, hashed and sorted together.",
)
@click.option(
    "--passes",
    type=_options.Count(1, 1000),
    default=2,
    show_default=True,
    metavar="N",
    help="Rounds over everything; a page merges once it was calm from one round to the next.",
)
@click.option(
    "--settle",
    type=_options.Duration(0, 3600),
    default="0.2s",
    show_default=True,
    metavar="TIME",
    help="Time between two rounds, in which a page must not be written.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "cuda", "cpu", "opencl"]),
    default="auto",
    show_default=True,
    help="Where pages are hashed; the results are the same.",
)
@click.option(
    "--device",
    metavar="NAME",
    help="GPUs: 0 or 0,1 or a PCI address, idle, all; part of a name for opencl. Default: an idle one.",
)
@click.option(
    "--gpu-memory",
    type=_options.Size(),
    metavar="SIZE",
    help="Most memory to take on each GPU, such as 512M; default: half of what is free.",
)
@click.option(
    "--threads",
    type=_options.Count(0, 1024),
    default=0,
    metavar="N",
    help="Reader and CPU hashing threads; 0, the default, takes what the machine has.",
)
@_options.max_pause
@click.option("--dry-run", is_flag=True, help="Only say what would be merged, like `gpuksm estimate`.")
@click.option("--allow-seccomp", is_flag=True, help="Also processes with seccomp filters.")
@click.option(
    "--allow-direct-io",
    is_flag=True,
    help="Also processes whose memory a device may write to (O_DIRECT, io_uring, RDMA, GPUs).",
)
@_options.json_flag
def command(
    selection: Selection,
    batch: int,
    passes: int,
    settle: float,
    backend: str,
    device: str | None,
    gpu_memory: int | None,
    threads: int,
    max_pause: float,
    dry_run: bool,
    allow_seccomp: bool,
    allow_direct_io: bool,
    as_json: bool,
) -> None:
    """Find equal pages of the TARGETS and merge them into one shared, copy-on-write page each.

    TARGETS: --pid N... | --tree PID | --name REGEX | --user U | --cgroup PATH |
    --registered (the default). --name, --user and --cgroup narrow each other
    down; processes with capabilities are taken only when named by --pid, --tree
    or registration.
    """
    from gpuksm.scan import ScanOptions

    options = ScanOptions(
        batch_pages=batch,
        passes=passes,
        settle_seconds=settle,
        backend=backend,
        device=device,
        gpu_memory=gpu_memory,
        threads=threads,
        max_pause_us=round(max_pause * 1e6),
        allow_seccomp=allow_seccomp,
        allow_direct_io=allow_direct_io,
    )
    if dry_run:
        estimate.run(selection, options, as_json)
    else:
        _run(selection, options, as_json)


def _run(selection: Selection, options: ScanOptions, as_json: bool) -> None:
    from gpuksm import targets
    from gpuksm.client import GuardClient
    from gpuksm.report import json, progress, text
    from gpuksm.scan import run_scan

    requests = targets.resolve(selection)
    with GuardClient.connect(start=True) as guard, progress.bar() as bar:
        result = run_scan(guard, requests, options, bar)
    _output.show(json.as_object(result), text.scan, as_json)
