"""Who may write to a process's memory besides its threads: devices, the kernel, other processes; and why not.

Everything is an allow-list: a descriptor that is not known to be harmless is a reason to skip a process,
since a device that writes into a pinned page leaves no trace in the page tables.  Nothing is changed here.
Stdlib only.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat as statlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpuksm.errors import GpuksmError, NotPermitted, TargetGone, Unsupported
from gpuksm.linux import mappings, procfs

STORE_PATH = "/memfd:gpuksm"

_HARMLESS_LINK = re.compile(
    r"(pipe:|anon_inode:(\[(eventfd|eventpoll|timerfd|signalfd|fanotify|pidfd|perf_event)\]|inotify$|bpf[-_])"
    r"|pidfd:|(net|mnt|pid|uts|ipc|user|cgroup|time)(_for_children)?:\[)"
)
_KVM_LINK = re.compile(r"anon_inode:kvm-(vm|vcpu:\d+|vm-stats|vcpu-stats:\d+)")
_KVM_DEVICE = (10, 232)
_VHOST_DEVICES = frozenset([(10, 238), (10, 241)])  # vhost-net, vhost-vsock; not vdpa, which is hardware
_MODULES = Path("/sys/module")
# Protocols that copy: not XDP (shares memory with a network card), RDS or SMC.
_HARMLESS_SOCKETS = re.compile(
    r"((TCP|MPTCP|UDP|RAW|PING|SCTP)(v6)?|UDP-Lite|UDPLITEv6|UNIX(-STREAM)?|NETLINK|PACKET|AF_VSOCK|KEY|ALG)"
)
# Documentation/admin-guide/devices.txt: null, zero, full, random, urandom, kmsg; tty, console, ptmx; net/tun,
# which copies into whatever reads from it: the process, or vhost for it.
_HARMLESS_DEVICES = frozenset(
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200)]
)
# File systems that may do direct I/O though nobody asked: FOPEN_DIRECT_IO, cache=none.
_MAY_READ_DIRECTLY = re.compile(r"fuse|virtiofs|9p$|cifs$|smb3$")
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


CanLook = Callable[[], bool]


def cannot_look() -> bool:
    """For those who replace nothing, or cannot tell pages that are held from others."""
    return False


def writer_reason(pid: int, allowed: Allowed, can_look: CanLook = cannot_look) -> GpuksmError | None:
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


def pinning_reason(pid: int, allowed: Allowed, can_look: CanLook = cannot_look) -> GpuksmError | None:
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
    vhosts = 0
    for table, targets in _descriptor_tables(pid):
        if table != pid and any(link.startswith(STORE_PATH) for link in targets.values()):
            continue  # the agent: nobody else holds the store
        for fd, link in sorted(targets.items()):
            if link == "anon_inode:[userfaultfd]":
                return Unsupported(f"process {pid} uses userfaultfd itself; leave it out")
            try:
                if not allowed.direct_io and _device(table, fd, link) in _VHOST_DEVICES:
                    vhosts += 1
                    continue
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
    if vhosts and _vhost_workers(pid) < vhosts:
        return Unsupported(
            f"process {pid} uses vhost, which has not begun, or writes to its memory from no thread of the "
            "process (fork_from_owner_default=0); if you know that it does not: --allow-direct-io"
        )
    return None


def _vhost_workers(pid: int) -> int:
    """How many threads of the process are vhost's: as such (Linux 6.4, 6e890c5d5021) they stop with it.

    They write by way of its page tables.  For each device that has an owner there is one at least.
    """
    found = 0
    for tid in procfs.threads(pid):
        with contextlib.suppress(TargetGone):
            stat = procfs.stat(tid)
            found += bool(stat.flags & procfs.PF_USER_WORKER) and stat.comm.startswith("vhost-")
    return found


def kvm_pins() -> bool:
    """Whether this host's KVM may keep pages of its machines for good: where it lets them run machines.

    For a machine within a machine it holds pages of the outer one without telling anybody
    (kvm_vcpu_map).  All else that it does to a guest's memory it does by way of the page tables, or is told
    of their changes.
    """
    settings = _MODULES.glob("kvm*/parameters/nested")
    return any(setting.read_text().strip() not in ("N", "0") for setting in settings)


def _is_of_kvm(pid: int, fd: int, link: str) -> bool:
    return _KVM_LINK.fullmatch(link) is not None or _device(pid, fd, link) == _KVM_DEVICE


def _device(pid: int, fd: int, link: str) -> tuple[int, int] | None:
    """Major and minor number of the character device in /dev that the descriptor is open on."""
    if not link.startswith("/dev/"):
        return None
    file = procfs.fd_file(pid, fd)
    return file.device if statlib.S_ISCHR(file.mode) else None


def is_virtual_machine(pid: int) -> bool:
    """Whether the process runs one by KVM."""
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
    in fdinfo or VmPin.  It and direct I/O hold each page for that.  So do some file systems while they read,
    without O_DIRECT, if their server or a mount option says so: that is looked at where it can be, and
    no reason where it cannot.
    """
    if _HARMLESS_LINK.match(link):
        return True
    if link == "anon_inode:[io_uring]":
        return can_look()
    if link.startswith("socket:"):
        return _HARMLESS_SOCKETS.fullmatch(procfs.socket_protocol(pid, fd)) is not None
    if not link.startswith("/") or link.startswith("/dmabuf:"):
        return False
    file = procfs.fd_file(pid, fd)
    kind = statlib.S_IFMT(file.mode)
    if kind == statlib.S_IFCHR:
        return file.device in _HARMLESS_DEVICES or file.device[0] in _TTY_MAJORS
    if kind in (statlib.S_IFDIR, statlib.S_IFIFO, statlib.S_IFLNK):
        return True
    if kind in (statlib.S_IFREG, statlib.S_IFBLK):
        flags = re.search(r"^flags:\s*([0-7]+)$", procfs.fdinfo(pid, fd), re.MULTILINE)
        if flags is None or int(flags[1], 8) & os.O_DIRECT:
            return flags is not None and can_look()
        if not file.on[0] and _MAY_READ_DIRECTLY.match(procfs.mounted(pid).get(file.on, "")):
            can_look()
        return True
    return False
