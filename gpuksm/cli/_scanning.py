"""Options of the verbs that scan: how pages are read, hashed and merged."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gpuksm.cli import _options

if TYPE_CHECKING:
    from gpuksm.scan import ScanOptions

Function = TypeVar("Function", bound=Callable[..., Any])

_NICE = 10
_SWITCH_SECONDS = 0.0005

_BEFORE = (
    click.option(
        "--batch",
        type=_options.Count(1, _options.MAX_BATCH_PAGES),
        default=65536,
        show_default=True,
        metavar="PAGES",
        help="Pages that are read, hashed and sorted together.",
    ),
)
_AFTER = (
    click.option(
        "--backend",
        type=click.Choice(["auto", "cuda", "cpu", "opencl"]),
        default="auto",
        show_default=True,
        help="Where pages are hashed; the results are the same.",
    ),
    click.option(
        "--device",
        metavar="NAME",
        help="GPUs: 0 or 0,1 or a PCI address, idle, all; part of a name for opencl. Default: an idle one.",
    ),
    click.option(
        "--gpu-memory",
        type=_options.Size(),
        metavar="SIZE",
        help="Most memory to take on each GPU, such as 512M; default: half of what is free.",
    ),
    click.option(
        "--threads",
        type=_options.Count(0, 1024),
        default=0,
        metavar="N",
        help="Reader and CPU hashing threads; 0, the default, takes as many as are of use here.",
    ),
    _options.max_pause,
)
_NODES = (
    click.option(
        "--merge-across-nodes/--no-merge-across-nodes",
        default=True,
        show_default=True,
        help="Merge pages of different NUMA nodes with each other, or only those of one node.",
    ),
)
_ALLOWED = (
    click.option(
        "--allow-seccomp",
        is_flag=True,
        help="Also processes whose seccomp filters cannot be read (root reads them).",
    ),
    click.option(
        "--allow-direct-io",
        is_flag=True,
        help="Also processes whose memory a device may write to (RDMA, GPUs; for an ordinary user also "
        "O_DIRECT, io_uring), whatever it holds.",
    ),
    click.option(
        "--allow-peer-writes",
        is_flag=True,
        help="Also processes into whose memory others may write (MPI by cross-memory attach).",
    ),
    click.option(
        "--allow-kvm",
        is_flag=True,
        help="For an ordinary user: also virtual machines (KVM) on a host that lets them run machines "
        "themselves, if none does.",
    ),
)


def _adds(decorators: tuple[Callable[[Any], Any], ...]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


batch, hashing, across_nodes, allowed = map(_adds, (_BEFORE, _AFTER, _NODES, _ALLOWED))


def give_way() -> None:
    """Lower this process's priority, so that jobs on busy processors come first.

    On a processor that both want a job gets nine times as much as we do; ksmd (nice 5) leaves it three times.

    Not before the guard was started, which would inherit it: a job that is stopped waits for it.
    """
    behind = _NICE - os.getpriority(os.PRIO_PROCESS, 0)
    if behind > 0:
        os.nice(behind)


def load_meanwhile() -> None:
    """Load what scanning needs in a thread, while this one waits for the guard to start and to attach.

    Who waits for an answer gets its turn soon after that has come, not after the 5 ms that Python leaves
    to a thread which is busy.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)

    def load() -> None:
        # What is wrong is told where it is needed.
        with contextlib.suppress(Exception):
            from gpuksm import scan

            scan.load()

    threading.Thread(target=load, daemon=True).start()


def scan_options(given: dict[str, Any], **more: Any) -> ScanOptions:
    """ScanOptions from the values of all options above, and `more` of its fields."""
    from gpuksm.scan import ScanOptions

    values = dict(given)
    return ScanOptions(
        batch_pages=values.pop("batch"), max_pause_us=round(values.pop("max_pause") * 1e6), **values, **more
    )
