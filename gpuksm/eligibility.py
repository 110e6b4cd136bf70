"""Which processes and which VMAs may be merged, and why not.

Both the guard (before it attaches) and the scanner (for estimates) ask here.
The rules only look; nothing is stopped or changed.  A mapping with a flag that is
not known to be harmless is left out; who may write to a process's memory is what
writers.py is about.  Stdlib only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpuksm.errors import GpuksmError, NoSuchProcess, NotPermitted, TargetGone, Unsupported
from gpuksm.linux import mappings, procfs, seccomp
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.writers import (
    NOTHING,
    STORE_PATH,
    Allowed,
    CanLook,
    cannot_look,
    is_virtual_machine,
    writer_reason,
)

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MERGED = "merged"

_ELF_CLASS_64 = 2


class Region(NamedTuple):
    """Page-aligned bytes [start, end) of plain anonymous memory; `prot` as in mmap(2)."""

    start: int
    end: int
    prot: int


def process_reason(
    pid: int, *, named: bool, allowed: Allowed, can_look: CanLook = cannot_look
) -> GpuksmError | None:
    """Why process `pid` is not merged, as an error that says what to do, or None when it may be.

    `named` is true for a process that the user named (--pid, --tree, exec,
    registration), false for one found by a pattern; `can_look`: see `pinning_reason`.
    """
    try:
        return (
            _identity_reason(pid)
            or _permission_reason(pid)
            or _thread_reason(pid, allowed.seccomp)
            or _program_reason(pid, named)
            or writer_reason(pid, allowed, can_look)
        )
    except TargetGone:
        return NoSuchProcess(f"there is no process {pid}; see `ps -e` for those that run")
    except NotPermitted:
        return _no_permission(pid)


def is_own(pid: int) -> bool:
    """Whether process `pid` is this process or a part of gpuksm (guard, keeper, scanner)."""
    if pid == os.getpid():
        return True
    comm = procfs.stat(pid).comm
    if comm == "gpuksm" or comm.startswith("gpuksm "):
        return True
    arguments = procfs.command_line(pid)
    modules = [name for flag, name in itertools.pairwise(arguments[:5]) if flag == "-m"]
    if any(name in ("gpuksm", "gpuksm.cli") or name.startswith("gpuksm.guard") for name in modules):
        return True
    # What becomes a keeper (starting.py).
    if any(flag == "-c" and name.startswith("# gpuksm") for flag, name in itertools.pairwise(arguments[:5])):
        return True
    return any(os.path.basename(word) == "gpuksm" or word.startswith("gpuksm ") for word in arguments[:2])


def _identity_reason(pid: int) -> GpuksmError | None:
    stat = procfs.stat(pid)
    if stat.flags & procfs.PF_KTHREAD:
        return Unsupported(f"process {pid} ({stat.comm}) is a kernel thread; it has no memory to merge")
    if pid == 1:
        return Unsupported("process 1 (init) is never merged; name the processes below it instead")
    if is_own(pid):
        return Unsupported(f"process {pid} is gpuksm itself; leave it out")
    if stat.state in "ZX":
        return Unsupported(f"process {pid} ({stat.comm}) has ended and waits to be reaped; leave it out")
    return None


def _no_permission(pid: int) -> GpuksmError:
    return NotPermitted(
        f"no permission to trace process {pid}; run as root, or with Yama ptrace_scope=1 "
        "start it by `gpuksm exec -- CMD` or have it register itself"
    )


def _permission_reason(pid: int) -> GpuksmError | None:
    uids = set(procfs.status(pid)["Uid"].split()[:3])
    me = str(os.geteuid())
    if me != "0" and uids != {me}:
        return NotPermitted(
            f"process {pid} belongs to another user (uid {min(uids)}); run gpuksm as that user or as root"
        )
    if procfs.owner(pid) == 0 and "0" not in uids:
        return Unsupported(f"process {pid} has made itself non-dumpable to protect its memory; leave it out")
    if not procfs.may_attach(pid):
        return _no_permission(pid)
    if procfs.user_namespace(pid) != procfs.user_namespace(os.getpid()):
        return Unsupported(f"process {pid} runs in another user namespace; run gpuksm inside of it")
    return None


def _thread_reason(pid: int, allow_seccomp: bool) -> GpuksmError | None:
    for tid in procfs.threads(pid):
        try:
            status = procfs.thread_status(pid, tid)
        except TargetGone:
            continue
        tracer = int(status.get("TracerPid", "0"))
        if tracer and not _is_guard(tracer):
            return Unsupported(
                f"process {pid} is traced by process {tracer} (a debugger?); detach that first"
            )
        seccomp_mode = status.get("Seccomp", "0")
        if seccomp_mode == "1":
            return Unsupported(f"process {pid} is in seccomp's strict mode; leave it out")
        if seccomp_mode != "0" and not allow_seccomp and not seccomp.readable():
            return Unsupported(
                f"process {pid} has seccomp filters that only root can read, and that could kill it when "
                "gpuksm attaches; if you know that they let mmap and clone pass: --allow-seccomp"
            )
    return None


def _is_guard(pid: int) -> bool:
    try:
        return is_own(pid)
    except (TargetGone, NotPermitted):
        return False


def _program_reason(pid: int, named: bool) -> GpuksmError | None:
    head = procfs.executable_head(pid)
    if head[:4] != b"\x7fELF" or head[4] != _ELF_CLASS_64:
        return Unsupported(f"process {pid} is not a 64-bit program; only those can be merged")
    status = procfs.status(pid)
    capable = any(int(status.get(field, "0"), 16) for field in ("CapPrm", "CapEff"))
    if capable and not named:
        return Unsupported(f"process {pid} has capabilities; name it by --pid {pid} if it is to be merged")
    return None


# VmFlags that rule a VMA out, in the order they are tried (Documentation/filesystems/proc.rst).
_FLAG_REASONS = (
    ("ht", "hugetlb"),
    ("sh", "shared"),
    ("io", "device"),
    ("pf", "device"),
    ("mm", "device"),
    ("lo", "locked"),
    ("lf", "locked"),
    ("gd", "stack"),
    ("ss", "shadow stack"),
    ("ex", "executable"),
    ("wf", "wipe-on-fork"),
    ("dd", "dont-dump"),
    ("dc", "dont-fork"),
    ("dp", "droppable"),
    ("sl", "sealed"),
    ("um", "userfaultfd"),
    ("ui", "userfaultfd"),
)


def vma_reason(entry: mappings.SmapsVma, *, tracked: bool = False, unforked: bool = False) -> str | None:
    """Why no page of this VMA is merged, in one or two words, or None.

    PROT_NONE and read-only memory is eligible.  `tracked` says that the guard
    is attached, so that write tracking on the VMA is its own, `unforked` that MADV_DONTFORK is no reason.
    """
    vma, flags = entry.vma, entry.flags
    if vma.path.startswith(STORE_PATH):
        return MERGED
    if vma.path.startswith(("[vdso", "[vvar", "[vsyscall", "[uprobes")):
        return "kernel"
    if vma.perms[3] == "s":
        return "shared"
    for flag, reason in _FLAG_REASONS:
        if flag in flags and not (unforked and flag == "dc"):
            return reason
    if vma.path.startswith("[stack"):
        return "stack"
    if entry.protection_key:
        return "protection key"
    if "uw" in flags and not tracked:
        return "userfaultfd"
    if vma.inode or vma.path.startswith("/") or vma.dev.strip("0") != ":":
        return "file-backed"
    return None


def _may_replace_unforked(pid: int, allowed: Allowed) -> bool:
    """Whether memory that the process keeps from its children may be merged.

    Virtual machines keep their guests' so, and RDMA what devices write to.  Only `direct_io` lets devices in,
    and with that it has to be said that they do not write to guests' memory either.
    """
    return not allowed.direct_io or (allowed.kvm and is_virtual_machine(pid))


def _resident(entry: mappings.SmapsVma, reason: str) -> int:
    if reason == "hugetlb":
        return entry.hugetlb
    private_file = entry.vma.inode and entry.vma.perms[3] == "p"
    return entry.anonymous if private_file else entry.rss


def _cut(start: int, end: int, ranges: Sequence[tuple[int, int]] | None) -> Iterator[tuple[int, int]]:
    if ranges is None:
        yield start, end
        return
    for low, high in ranges:
        inside = max(start, -(-low // PAGE_SIZE) * PAGE_SIZE), min(end, high // PAGE_SIZE * PAGE_SIZE)
        if inside[0] < inside[1]:
            yield inside


def united(ranges: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    """The same bytes as `ranges`, sorted and disjoint."""
    if ranges is None:
        return None
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    return joined


def regions(
    pid: int,
    ranges: Sequence[tuple[int, int]] | None = None,
    *,
    tracked: bool = False,
    allowed: Allowed = NOTHING,
    entries: list[mappings.SmapsVma] | None = None,
) -> tuple[list[Region], dict[str, int]]:
    """The regions of process `pid` that may be merged, in address order, and what is left out.

    `ranges` (bytes, from registration) limits them to the page-aligned insides; `entries` is what smaps says
    of the process, where that is known.
    The second value counts, by reason, resident pages of VMAs that are left out
    (of files only those the process has written to; merged memory is not left
    out).  Raises TargetGone and NotPermitted.
    """
    wanted = united(ranges)
    found: list[Region] = []
    skipped: dict[str, int] = {}
    unforked = _may_replace_unforked(pid, allowed)
    for entry in mappings.smaps(pid) if entries is None else entries:
        vma = entry.vma
        parts = list(_cut(vma.start, vma.end, wanted))
        if not parts:
            continue
        reason = vma_reason(entry, tracked=tracked, unforked=unforked)
        if reason is None:
            prot = PROT_READ * (vma.perms[0] == "r") | PROT_WRITE * (vma.perms[1] == "w")
            found.extend(Region(start, end, prot) for start, end in parts)
            continue
        pages = min(_resident(entry, reason), sum(end - start for start, end in parts)) // PAGE_SIZE
        if pages and reason != MERGED:
            skipped[reason] = skipped.get(reason, 0) + pages
    return found, skipped
