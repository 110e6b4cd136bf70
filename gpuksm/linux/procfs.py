"""/proc/PID parsing: status, stat, threads, descriptors; see mappings.py for what lies where.

Functions take a pid and return plain values.  What a process chooses (its name,
file names, names of anonymous memory) may hold any byte: lines are cut at the
places the kernel guarantees and nowhere else, and text is decoded with
surrogateescape, so that hostile names can confuse nobody.  A process that is
gone raises `TargetGone`, one that may not be looked at `NotPermitted`.
Formats: Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.linux import statx
from gpuksm.linux._libc import PAGE_SIZE

_READ_BYTES = 1 << 20
_FEW_READS = 2000
_GONE = (errno.ENOENT, errno.ESRCH)
_DENIED = (errno.EACCES, errno.EPERM)
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# include/linux/sched.h, the flags field of /proc/PID/stat
PF_EXITING, PF_USER_WORKER, PF_KTHREAD = 0x00000004, 0x00004000, 0x00200000


class Stat(NamedTuple):
    """Fields of /proc/PID/stat; times in clock ticks (SC_CLK_TCK)."""

    pid: int
    comm: str
    state: str
    ppid: int
    flags: int
    num_threads: int
    start_time: int
    utime: int
    stime: int


@contextmanager
def errors_of(pid: int) -> Iterator[None]:
    """Turn ENOENT/ESRCH into TargetGone and EACCES/EPERM into NotPermitted."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise TargetGone(f"process {pid} is gone") from None
        if error.errno in _DENIED:
            raise NotPermitted(f"process {pid} may not be inspected by this user") from None
        raise


def read(pid: int, name: str) -> bytes:
    """All of /proc/PID/name; TargetGone, NotPermitted."""
    return b"".join(pieces(pid, name))


def pieces(pid: int, name: str, *, one_by_one: int = 0) -> Iterator[bytes]:
    """/proc/PID/name as the kernel gives it, a page or so of whole lines each; TargetGone, NotPermitted.

    Records longer than `one_by_one` bytes, where given, are asked for one by one at first, in pieces of any
    length: what fits no more into a page the kernel makes all over again for the next, and some take it long.
    """
    with errors_of(pid):
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            count, size = 0, one_by_one or _READ_BYTES
            while piece := os.read(fd, size):
                yield piece
                count += 1
                if count == _FEW_READS:
                    size = _READ_BYTES
        finally:
            os.close(fd)


def text(raw: bytes) -> str:
    """What a process may have chosen, as text that encodes back to the same bytes."""
    return raw.decode("utf-8", "surrogateescape")


def _parse_status(data: bytes) -> dict[str, str]:
    result: dict[str, str] = {}
    for line in data.split(b"\n"):
        name, colon, value = line.partition(b":")
        if colon:
            result.setdefault(text(name), text(value.strip()))
    return result


def status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status by name; values as written, spaces around them removed."""
    return _parse_status(read(pid, "status"))


def parse_stat(data: bytes) -> Stat:
    """/proc/PID/stat; the name may hold spaces, parentheses and newlines."""
    head, opening, rest = data.partition(b"(")
    comm, closing, tail = rest.rpartition(b")")
    fields = tail.split()
    if not opening or not closing or len(fields) < 20:
        raise ValueError("not a stat file")
    return Stat(
        pid=int(head),
        comm=text(comm),
        state=text(fields[0]),
        ppid=int(fields[1]),
        flags=int(fields[6]),
        num_threads=int(fields[17]),
        start_time=int(fields[19]),
        utime=int(fields[11]),
        stime=int(fields[12]),
    )


def memory_size(pid: int) -> int:
    """Pages that process `pid` has mapped in all (/proc/PID/statm); TargetGone also once it is a zombie."""
    size = int(read(pid, "statm").split()[0])
    if not size:
        raise TargetGone(f"process {pid} has exited")
    return size


def resident_size(pid: int) -> int:
    """Pages of process `pid` that are in memory, of files too (/proc/PID/statm)."""
    return int(read(pid, "statm").split()[1])


def resident_bytes(pids: Iterable[int]) -> int:
    """Bytes of memory that processes `pids` hold, each by itself; nothing for one that cannot be asked."""
    pages = 0
    for pid in pids:
        with suppress(TargetGone, NotPermitted):
            pages += resident_size(pid)
    return pages * PAGE_SIZE


def available_memory() -> int:
    """Bytes that can be had without swapping (MemAvailable of /proc/meminfo); 0 where it does not say."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def user(pid: int) -> int:
    """Real user id of process `pid`."""
    return int(status(pid)["Uid"].split()[0])


def stat(pid: int) -> Stat:
    """/proc/PID/stat of process `pid`."""
    return parse_stat(read(pid, "stat"))


def thread_status(pid: int, tid: int) -> dict[str, str]:
    """The lines of /proc/PID/task/TID/status by name."""
    return _parse_status(read(pid, f"task/{tid}/status"))


def thread_activity(pid: int, tid: int) -> tuple[str, int]:
    """State letter of thread `tid`, and nanoseconds of CPU time it has used (kept current by the tick)."""
    state = parse_stat(read(pid, f"task/{tid}/stat")).state
    return state, int(read(pid, f"task/{tid}/schedstat").split()[0])


def thread_processor(pid: int, tid: int) -> int:
    """The processor that thread `tid` ran on last."""
    return int(read(pid, f"task/{tid}/stat").rpartition(b")")[2].split()[36])


def command_line(pid: int) -> list[str]:
    """The arguments of process `pid`; empty for kernel threads and zombies."""
    return text(read(pid, "cmdline")).split("\0")[:-1]


def in_first_user_namespace() -> bool:
    """Whether all user ids of the machine are ours to see, as in no other user namespace."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def user_namespace(pid: int) -> str:
    """A name for the user namespace of process `pid`, equal for processes in the same one."""
    with errors_of(pid):
        return os.readlink(f"/proc/{pid}/ns/user")


def owner(pid: int) -> int:
    """The uid that owns files in /proc/PID: the effective uid, or 0 for a process that is not dumpable."""
    with errors_of(pid):
        # Not of the folder itself, which belongs to the effective uid in any case.
        return os.stat(f"/proc/{pid}/stat").st_uid


def executable_head(pid: int) -> bytes:
    """The first 20 bytes of the program process `pid` runs (ELF identification, type and machine)."""
    with errors_of(pid), open(f"/proc/{pid}/exe", "rb") as file:
        return file.read(20)


def may_attach(pid: int) -> bool:
    """Whether the kernel lets this process trace process `pid` (opening its mem asks just that)."""
    try:
        with errors_of(pid):
            os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except NotPermitted:
        return False
    return True


def asynchronous_io_is_used() -> bool:
    """False when no process at all has a context of asynchronous I/O (io_setup)."""
    try:
        with open("/proc/sys/fs/aio-nr", "rb") as file:
            return file.read().strip() != b"0"
    except OSError:
        return True


def threads(pid: int) -> list[int]:
    """Thread ids of process `pid`, sorted."""
    with errors_of(pid):
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def children(pid: int) -> list[int]:
    """Pids of the children of all threads of process `pid`, sorted."""
    found: set[int] = set()
    for tid in threads(pid):
        try:
            found.update(int(word) for word in read(pid, f"task/{tid}/children").split())
        except TargetGone:
            # The thread ended, or the kernel lacks CONFIG_PROC_CHILDREN.
            if not os.path.exists("/proc/thread-self/children"):
                return _children_by_parent(pid)
    return sorted(found)


def _children_by_parent(pid: int) -> list[int]:
    found = []
    for other in pids():
        try:
            if stat(other).ppid == pid:
                found.append(other)
        except (TargetGone, NotPermitted):
            continue
    return found


def max_map_count() -> int:
    """The kernel's limit of VMAs per process."""
    with open("/proc/sys/vm/max_map_count") as file:
        return int(file.read())


def pids() -> list[int]:
    """Every pid that /proc shows, sorted."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def thread_syscall(pid: int, tid: int) -> tuple[int, tuple[int, ...]] | None:
    """(number, six arguments) of the system call thread `tid` waits in; None when it runs or is in none."""
    words = read(pid, f"task/{tid}/syscall").split()
    if len(words) < 7 or words[0] == b"-1":
        return None
    return int(words[0]), tuple(int(word, 16) for word in words[1:7])


def wchan(pid: int, tid: int) -> str:
    """The kernel function thread `tid` sleeps in; "" when it does not sleep or the kernel does not tell."""
    name = text(read(pid, f"task/{tid}/wchan").strip())
    return "" if name == "0" else name


def fd_numbers(pid: int) -> frozenset[int]:
    """The open descriptors of process `pid`; given a thread id, those of that thread's table."""
    with errors_of(pid):
        return frozenset(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def fd_targets(pid: int) -> dict[int, str]:
    """{descriptor: what /proc/PID/fd says it is open on}; descriptors closed meanwhile are left out."""
    result = {}
    for fd in fd_numbers(pid):
        try:
            with errors_of(pid):
                result[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
        except TargetGone:
            continue
    return result


def fdinfo(pid: int, fd: int) -> str:
    """The text of /proc/PID/fdinfo/FD."""
    return text(read(pid, f"fdinfo/{fd}"))


def fd_file(pid: int, fd: int) -> statx.Known:
    """What is known of the file that descriptor `fd` of process `pid` is open on."""
    with errors_of(pid):
        return statx.known(f"/proc/{pid}/fd/{fd}")


def mounted(pid: int) -> dict[tuple[int, int], str]:
    """Types of the file systems that process `pid` sees, by the numbers of their devices."""
    found = {}
    for line in read(pid, "mountinfo").decode(errors="surrogateescape").splitlines():
        before, _, behind = line.partition(" - ")
        major, _, minor = before.split()[2].partition(":")
        found[int(major), int(minor)] = behind.split()[0]
    return found


def socket_protocol(pid: int, fd: int) -> str:
    """The kernel's name for the protocol of a socket (TCP, UNIX, XDP...); "" when it does not tell."""
    with errors_of(pid):
        try:
            name = os.getxattr(f"/proc/{pid}/fd/{fd}", "system.sockprotoname")
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return ""
            raise
    return text(name.rstrip(b"\0"))
