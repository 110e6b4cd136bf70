"""Which processes and which VMAs may be merged, and why not.

Both the guard (before it attaches) and the scanner (for estimates) ask here.
The rules only look; nothing is stopped or changed.  Everything is an allow-list:
a descriptor or flag that is not known to be harmless is a reason to skip, since
a device that writes into a pinned page leaves no trace in the page tables.
Stdlib only.
"""

from __future__ import annotations

import itertools
import os
import re
import stat as statlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpuksm.errors import GpuksmError, NoSuchProcess, NotPermitted, TargetGone, Unsupported
from gpuksm.linux import mappings, procfs, seccomp
from gpuksm.linux._libc import PAGE_SIZE

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
STORE_PATH = "/memfd:gpuksm"
MERGED = "merged"

_ELF_CLASS_64 = 2
_HARMLESS_LINK = re.compile(
    r"(pipe:|anon_inode:(\[(eventfd|eventpoll|timerfd|signalfd|fanotify|pidfd|perf_event)\]|inotify$|bpf[-_])"
    r"|pidfd:|(net|mnt|pid|uts|ipc|user|cgroup|time)(_for_children)?:\[)"
)
_KVM_LINK = re.compile(r"anon_inode:kvm-(vm|vcpu:\d+|vm-stats|vcpu-stats:\d+)")
_KVM_DEVICE = (10, 232)
_MODULES = Path("/sys/module")
# Protocols that copy: not XDP (shares memory with a network card), RDS or SMC.
_HARMLESS_SOCKETS = re.compile(
    r"((TCP|MPTCP|UDP|RAW|PING|SCTP)(v6)?|UDP-Lite|UDPLITEv6|UNIX(-STREAM)?|NETLINK|PACKET|AF_VSOCK|KEY|ALG)"
)
# Documentation/admin-guide/devices.txt: null, zero, full, random, urandom, kmsg; tty, console, ptmx; net/tun,
# which copies as long as nobody but the process reads from it.
_HARMLESS_DEVICES = frozenset(
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200)]
)
_TTY_MAJORS = frozenset([4, *range(136, 144)])


# Libraries of transports that use cross-memory attach (process_vm_writev), or link with one that does.
_PEER_LIBRARIES = re.compile(
    rb"/((lib(mpi|mpich|pmpi|uct|uct_cma|fabric|psm2)|mca_(btl_(vader|sm)|smsc_cma))"
    rb"\.so[.0-9]*)(?: \(deleted\))?$",
    re.MULTILINE,
)


class Allowed(NamedTuple):
    """What the user knows to do no harm, and would otherwise be a reason to skip a process.

    `seccomp`: its filters; `direct_io`: descriptors through which devices might write to its memory;
    `peer_writes`: libraries by which other processes might; `kvm`: that it is a virtual machine.
    """

    seccomp: bool = False
    direct_io: bool = False
    peer_writes: bool = False
    kvm: bool = False


NOTHING = Allowed()
EVERYTHING = Allowed(seccomp=True, direct_io=True, peer_writes=True, kvm=True)


class Region(NamedTuple):
    """Page-aligned bytes [start, end) of plain anonymous memory; `prot` as in mmap(2)."""

    start: int
    end: int
    prot: int


CanLook = Callable[[], bool]


def _cannot_look() -> bool:
    return False


def process_reason(
    pid: int, *, named: bool, allowed: Allowed, can_look: CanLook = _cannot_look
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


def writer_reason(pid: int, allowed: Allowed, can_look: CanLook = _cannot_look) -> GpuksmError | None:
    """Why others than its own threads may write to memory of process `pid`, or None.

    Raises TargetGone and NotPermitted.
    """
    return _peer_reason(pid, allowed.peer_writes) or pinning_reason(pid, allowed, can_look)


def _peer_reason(pid: int, allow_peer_writes: bool) -> GpuksmError | None:
    """Why another process may write to its memory just while it is being replaced (hazard 7), or None."""
    library = None if allow_peer_writes else mappings.maps_match(pid, _PEER_LIBRARIES)
    if library is None:
        return None
    return Unsupported(
        f"process {pid} uses {library}: processes of its job may write into its memory, and a write just "
        "while it is merged would be lost; if they do not use cross-memory attach: --allow-peer-writes"
    )


def pinning_reason(pid: int, allowed: Allowed, can_look: CanLook = _cannot_look) -> GpuksmError | None:
    """Why devices may write to memory of process `pid` unseen, or None.

    Descriptors come and go: what was harmless at attaching may not be at a commit.  `can_look` is asked, if
    there are pages that somebody may hold, whether whoever replaces pages can tell those from others.
    Raises TargetGone and NotPermitted.
    """
    advice = (
        "devices may write to its memory unseen, and which pages they hold is told to root alone (`gpuksm "
        "doctor`); if you know that none does: --allow-direct-io"
    )
    if not allowed.direct_io:
        pinned = procfs.status(pid).get("VmPin", "0 kB").split()[0]
        if pinned != "0" and not can_look():
            return Unsupported(f"process {pid} has pinned {pinned} kB of memory; {advice}")
        # The whole table of mappings, which may be long, is read only where somebody may have one.
        aio = procfs.asynchronous_io_is_used() and mappings.maps_mention(pid, " /[aio]")
        if aio and not can_look():
            return Unsupported(f"process {pid} uses asynchronous I/O (io_setup); {advice}")
    for table, targets in _descriptor_tables(pid):
        if table != pid and any(link.startswith(STORE_PATH) for link in targets.values()):
            continue  # the agent: nobody else holds the store
        for fd, link in sorted(targets.items()):
            if link == "anon_inode:[userfaultfd]":
                return Unsupported(f"process {pid} uses userfaultfd itself; leave it out")
            try:
                if not allowed.direct_io and _is_of_kvm(table, fd, link):
                    if not allowed.kvm and kvm_pins() and not can_look():
                        return Unsupported(
                            f"process {pid} is a virtual machine (KVM), and where machines run within it KVM "
                            "writes to some of its pages unseen; if you know that none do: --allow-kvm"
                        )
                    continue
                harmless = allowed.direct_io or _harmless_descriptor(table, fd, link, can_look)
            except TargetGone:
                continue  # closed meanwhile
            if not harmless:
                return Unsupported(f"process {pid} has descriptor {fd} open on {link!r}; {advice}")
    return None


def kvm_pins() -> bool:
    """Whether this host's KVM may keep pages of its machines for good: where it lets them run machines.

    For a machine within a machine it holds pages of the outer one without telling anybody
    (kvm_vcpu_map).  All else that it does to a guest's memory it does by way of the page tables, or is told
    of their changes.
    """
    settings = _MODULES.glob("kvm*/parameters/nested")
    return any(setting.read_text().strip() not in ("N", "0") for setting in settings)


def _is_of_kvm(pid: int, fd: int, link: str) -> bool:
    if not link.startswith("/dev/"):
        return _KVM_LINK.fullmatch(link) is not None
    info = procfs.fd_mode(pid, fd)
    return statlib.S_ISCHR(info.st_mode) and (os.major(info.st_rdev), os.minor(info.st_rdev)) == _KVM_DEVICE


def _is_virtual_machine(pid: int) -> bool:
    return any(link == "anon_inode:kvm-vm" for link in procfs.fd_targets(pid).values())


def _descriptor_tables(pid: int) -> Iterator[tuple[int, dict[int, str]]]:
    """What the process has open, and every thread with descriptors that the process does not have.

    A thread may have a table of its own (unshare(CLONE_FILES)).
    """
    yield pid, procfs.fd_targets(pid)
    known = procfs.fd_numbers(pid)
    for tid in procfs.threads(pid):
        try:
            targets = {} if procfs.fd_numbers(tid) <= known else procfs.fd_targets(tid)
        except TargetGone:
            continue
        except NotPermitted:
            if not _is_ending(tid):
                raise
            continue  # without memory already, so that its files in /proc are root's
        if targets:
            yield tid, targets


def _is_ending(tid: int) -> bool:
    try:
        return bool(procfs.stat(tid).flags & procfs.PF_EXITING)
    except TargetGone:
        return True


def _harmless_descriptor(pid: int, fd: int, link: str, can_look: CanLook) -> bool:
    """Whether nothing behind this descriptor writes to the process's memory past its page tables.

    io_uring does: provided-buffer rings and rings in user memory are pinned and written to without a trace
    in fdinfo or VmPin.  It and direct I/O hold each page for that, and write to no other.
    """
    if _HARMLESS_LINK.match(link):
        return True
    if link == "anon_inode:[io_uring]":
        return can_look()
    if link.startswith("socket:"):
        return _HARMLESS_SOCKETS.fullmatch(procfs.socket_protocol(pid, fd)) is not None
    if not link.startswith("/") or link.startswith("/dmabuf:"):
        return False
    info = procfs.fd_mode(pid, fd)
    kind = statlib.S_IFMT(info.st_mode)
    if kind == statlib.S_IFCHR:
        device = (os.major(info.st_rdev), os.minor(info.st_rdev))
        return device in _HARMLESS_DEVICES or device[0] in _TTY_MAJORS
    if kind in (statlib.S_IFDIR, statlib.S_IFIFO, statlib.S_IFLNK):
        return True
    if kind in (statlib.S_IFREG, statlib.S_IFBLK):
        flags = re.search(r"^flags:\s*([0-7]+)$", procfs.fdinfo(pid, fd), re.MULTILINE)
        return flags is not None and (not int(flags[1], 8) & os.O_DIRECT or can_look())
    return False


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
    return not allowed.direct_io or (allowed.kvm and _is_virtual_machine(pid))


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
