"""eligibility: real processes, one for each reason, and the VMAs of one with all kinds."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from gpuksm import eligibility, writers
from gpuksm.errors import NoSuchProcess, NotPermitted, Unsupported
from gpuksm.linux import procfs, seccomp, vm
from gpuksm.linux.mappings import SmapsVma, Vma

PAGE = 4096
PRELUDE = "import ctypes, mmap, os, socket, sys, time; libc = ctypes.CDLL(None, use_errno=True)\n"
root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@contextlib.contextmanager
def victim(code: str, after: str = "time.sleep(600)"):
    """A Python child that has run `code`, printed one line and sleeps."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{PRELUDE}{code}\nprint('ready', flush=True)\n{after}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        yield child.pid
    finally:
        child.kill()
        child.wait()


def reason(pid, named=True, can_look=lambda: False, **allowed):
    return eligibility.process_reason(pid, named=named, allowed=writers.Allowed(**allowed), can_look=can_look)


def test_a_plain_process_may_be_merged(tmp_path):
    code = (
        "import select, signal\nkeep = [os.pipe(), socket.socketpair(), socket.socket(), select.epoll(),\n"
        f"open('{tmp_path}/f', 'wb'), os.open('{tmp_path}', 0), os.memfd_create('x'), os.eventfd(0),\n"
        "os.pidfd_open(os.getpid()), os.openpty(), libc.inotify_init(), libc.timerfd_create(1, 0),\n"
        "open('/dev/urandom'), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)]"
    )
    with victim(code) as pid:
        assert reason(pid) is None


def test_no_such_process_kernel_thread_init_and_itself():
    assert isinstance(reason(2**22 - 1), NoSuchProcess)
    assert isinstance(reason(1), Unsupported)
    assert "itself" in str(reason(os.getpid()))
    if os.path.exists("/proc/2/comm") and procfs.stat(2).flags & procfs.PF_KTHREAD:
        assert "kernel thread" in str(reason(2))


@pytest.mark.parametrize(
    "arguments",
    [["-m", "gpuksm.guard.keeper", "/run"], ["-I", "-m", "gpuksm", "scan"], ["/usr/bin/gpuksm", "scan"]],
)
def test_parts_of_gpuksm_are_never_merged(arguments):
    code = "import time; print('ready', flush=True); time.sleep(600)"
    child = subprocess.Popen(
        ["bash", "-c", 'exec -a "$0" "$@"', "gpuksm guard", sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        child.stdout.readline()
        assert "gpuksm itself" in str(reason(child.pid))
    finally:
        child.kill()
        child.wait()


def test_zombie():
    child = subprocess.Popen(["true"])
    for _ in range(200):
        if procfs.stat(child.pid).state == "Z":
            break
        time.sleep(0.01)
    assert "has ended" in str(reason(child.pid))
    child.wait()
    assert isinstance(reason(child.pid), NoSuchProcess)


@root
def test_other_user_and_no_ptrace_permission():
    code = (
        "import os, sys; sys.path.insert(0, os.getcwd())\nfrom gpuksm import eligibility, writers\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "error = eligibility.process_reason(int(sys.argv[1]), named=True, allowed=writers.Allowed())\n"
        "print(type(error).__name__, error)"
    )

    def asked_by_nobody(pid):
        return subprocess.run(
            [sys.executable, "-c", code, str(pid)], capture_output=True, text=True, check=True
        ).stdout

    with victim("") as pid:
        told = asked_by_nobody(pid)
        assert told.startswith("NotPermitted")
        assert "another user (uid 0)" in told
    # Same uid, but owned by root as far as /proc goes: it is not dumpable.
    with victim("os.setgroups([]); os.setgid(65534); os.setuid(65534)") as pid:
        assert "non-dumpable" in asked_by_nobody(pid)
        assert "non-dumpable" in str(reason(pid))
    # Same uid and dumpable, but it holds a capability that the asker lacks.
    keep_caps = (
        "libc.prctl(8, 1, 0, 0, 0); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "header = (ctypes.c_uint32 * 2)(0x20080522, 0); data = (ctypes.c_uint32 * 6)(1 << 10, 1 << 10)\n"
        "assert libc.capset(header, data) == 0; assert libc.prctl(4, 1, 0, 0, 0) == 0"
    )
    with victim(keep_caps) as pid:
        assert "no permission to trace" in asked_by_nobody(pid)
        assert "capabilities" in str(reason(pid, named=False))
        assert reason(pid) is None


def test_traced_by_a_debugger():
    with victim("") as pid:
        tracer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"{PRELUDE}libc.ptrace.argtypes = [ctypes.c_long] * 4\n"
                f"assert libc.ptrace(0x4206, {pid}, 0, 0) == 0; print('ready', flush=True); time.sleep(600)",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert tracer.stdout.readline() == "ready\n"
            assert f"traced by process {tracer.pid}" in str(reason(pid))
        finally:
            tracer.kill()
            tracer.wait()


def test_seccomp_of_any_thread(monkeypatch):
    monkeypatch.setattr(seccomp, "readable", lambda: False)
    filtered = (
        "import threading\ndef run():\n"
        "  code = (ctypes.c_uint64 * 1)(0x7FFF000000000006)\n"
        "  program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(code))\n"
        "  assert libc.prctl(38, 1, 0, 0, 0) == 0\n"
        "  assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0\n"
        "  done.set(); time.sleep(600)\n"
        "done = threading.Event(); threading.Thread(target=run, daemon=True).start(); done.wait()"
    )
    with victim(filtered) as pid:
        assert "seccomp" in str(reason(pid))
        assert reason(pid, seccomp=True) is None
        monkeypatch.setattr(seccomp, "readable", lambda: True)
        assert reason(pid) is None  # whoever attaches it reads them


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("fd = os.open(sys.executable, os.O_RDONLY | os.O_DIRECT)", "descriptor"),
        ("assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) > 0", "io_uring"),
        ("keep = ctypes.c_ulong(); assert libc.syscall(206, 8, ctypes.byref(keep)) == 0", "asynchronous I/O"),
        ("keep = socket.socket(44, socket.SOCK_RAW, 0)", "socket:"),
    ],
)
def test_what_lets_devices_write_unseen(code, told):
    if told == "socket:":
        try:
            socket.socket(44, socket.SOCK_RAW).close()
        except OSError:
            pytest.skip("no AF_XDP in this kernel")
    with victim(code) as pid:
        assert told in str(reason(pid))
        assert "--allow-direct-io" in str(reason(pid))
        assert reason(pid, direct_io=True) is None
        asked = []
        looked = reason(pid, can_look=lambda: not asked.append(1))
        if told == "socket:":
            assert told in str(looked), "it writes to pages by other means, too"
        else:
            assert (looked, len(asked)) == (None, 1)


def test_nobody_asks_whether_pages_can_be_looked_at_where_nobody_holds_them():
    with victim("keep = [os.pipe(), open(sys.executable)]") as pid:
        assert reason(pid, can_look=lambda: pytest.fail("asked")) is None


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("tmpfs", 0), ("fuse.cvmfs2", 1), ("virtiofs", 1), ("9p", 1), ("cifs", 1), ("nfs4", 0)],
)
def test_file_systems_that_read_directly_without_being_asked(kind, asked, monkeypatch):
    """That is looked at where it can be; where it cannot, jobs with such files are merged all the same."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        number = os.fstat(file.fileno()).st_dev
        if os.major(number):
            pytest.skip("/dev/shm is no tmpfs")
        monkeypatch.setattr(procfs, "mounted", lambda _pid: {(0, os.minor(number)): kind})
        with victim(f"keep = open({file.name!r})") as pid:
            for able in (False, True):
                times = []
                looked = reason(pid, can_look=lambda able=able, times=times: times.append(1) or able)
                assert (looked, bool(times)) == (None, bool(asked))


def test_vhost_is_known_by_its_threads(monkeypatch):
    """There is no such device here: /dev/null stands for one."""
    monkeypatch.setattr(writers, "_VHOST_DEVICES", frozenset([(1, 3)]))
    threads, stat = procfs.threads, procfs.stat
    workers = {}

    def stat_of(tid):
        return workers.get(tid) or stat(tid)

    monkeypatch.setattr(procfs, "threads", lambda pid: [*threads(pid), *workers])
    monkeypatch.setattr(procfs, "stat", stat_of)
    with victim("keep = [os.open('/dev/null', 0) for _ in range(2)]\nfor fd in (0, 2): os.close(fd)") as pid:
        like = stat(pid)
        for flags, comm, count, harmless in (
            (0, "", 0, False),
            (procfs.PF_USER_WORKER, f"vhost-{pid}", 1, False),
            (procfs.PF_USER_WORKER, f"vhost-{pid}", 2, True),
            (0, f"vhost-{pid}", 2, False),
            (procfs.PF_USER_WORKER, "kvm-nx-lpage-re", 2, False),
        ):
            workers.clear()
            workers.update({1 - tid: like._replace(flags=flags, comm=comm) for tid in range(2, 2 + count)})
            told = reason(pid)
            assert (told is None) == harmless, told
            assert harmless or "uses vhost" in str(told)
        assert reason(pid, direct_io=True) is None


def test_descriptors_that_only_one_thread_has():
    code = (
        "import threading\ndef run():\n"
        "  assert libc.unshare(0x400) == 0\n"
        "  keep = os.open(sys.executable, os.O_RDONLY | os.O_DIRECT); done.set(); time.sleep(600)\n"
        "done = threading.Event(); threading.Thread(target=run, daemon=True).start(); done.wait()"
    )
    with victim(code) as pid:
        assert "descriptor" in str(reason(pid))
        assert reason(pid, direct_io=True) is None


@pytest.mark.parametrize("ending", [True, False])
def test_a_thread_that_ends_just_then(ending, monkeypatch):
    """An agent whose guard has died, say: an ordinary user may not look at it any more."""
    numbers, stat = procfs.fd_numbers, procfs.stat

    def fd_numbers(tid):
        if tid == 4:
            raise NotPermitted("process 4 may not be inspected by this user")
        return numbers(tid)

    def stat_of(tid):
        return stat(os.getpid())._replace(flags=procfs.PF_EXITING * ending) if tid == 4 else stat(tid)

    with victim("") as pid:
        monkeypatch.setattr(procfs, "threads", lambda _pid: [pid, 4])
        monkeypatch.setattr(procfs, "fd_numbers", fd_numbers)
        monkeypatch.setattr(procfs, "stat", stat_of)
        if ending:
            assert writers.pinning_reason(pid, writers.NOTHING) is None
        else:
            with pytest.raises(NotPermitted):
                writers.pinning_reason(pid, writers.NOTHING)


@pytest.mark.parametrize("name", ["libmpi.so.40.30.1", "libuct_cma.so.0", "mca_smsc_cma.so"])
def test_processes_whose_peers_may_write_to_them(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(4096))
    code = f"file = open({str(tmp_path / name)!r}, 'rb')\n"
    code += "keep = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)"
    with victim(code) as pid:
        assert name in str(reason(pid))
        assert "--allow-peer-writes" in str(reason(pid))
        assert reason(pid, peer_writes=True) is None
    (tmp_path / f"{name}.txt").write_bytes(bytes(4096))
    with victim(code.replace(name, f"{name}.txt")) as pid:
        assert reason(pid) is None


def test_users_of_userfaultfd_are_left_alone():
    with victim("assert libc.syscall(323, 1) > 0") as pid:
        assert "userfaultfd" in str(reason(pid, direct_io=True))


REGIONS = """
A = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
base = libc.mmap; base.restype = ctypes.c_long; base.argtypes = [ctypes.c_long] * 6
at = 0x500000000000
def area(name, prot=3, flags=A, advice=None, fd=-1):
    global at
    address = base(at, 8 * 4096, prot, flags | 0x100000, fd, 0)
    assert address == at, (name, address)
    if prot & 2: ctypes.memset(address, 7, 8 * 4096)
    if advice is not None: assert libc.madvise(ctypes.c_long(address), 8 * 4096, advice) == 0, name
    print(name, hex(address), flush=True)
    at += 64 * 4096
    return address
area("plain"); read_only = area("readonly"); libc.mprotect(ctypes.c_long(read_only), 8 * 4096, 1)
none = area("none"); libc.mprotect(ctypes.c_long(none), 8 * 4096, 0)
area("shared", flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
backing = os.memfd_create("y"); os.ftruncate(backing, 65536)
area("file-backed", flags=mmap.MAP_PRIVATE, fd=backing)
area("executable", prot=7); area("wipe-on-fork", advice=18); area("dont-dump", advice=16)
area("dont-fork", advice=10); area("stack", flags=A | 0x100)
locked = area("locked"); assert libc.mlock(ctypes.c_long(locked), 8 * 4096) == 0
"""


@pytest.fixture(scope="module")
def kinds():
    child = subprocess.Popen(
        [sys.executable, "-c", f"{PRELUDE}{REGIONS}\nprint('end 0', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    places = {}
    while (line := child.stdout.readline().split())[0] != "end":
        places[line[0]] = int(line[1], 16)
    yield child.pid, places
    child.kill()
    child.wait()


def test_each_kind_of_vma_has_its_reason(kinds):
    pid, places = kinds
    for name, address in places.items():
        found, skipped = eligibility.regions(pid, [(address, address + 8 * PAGE)])
        prot = {"plain": 3, "dont-fork": 3, "readonly": 1, "none": 0}.get(name)
        if prot is not None:
            assert found == [(address, address + 8 * PAGE, prot)], name
            assert skipped == {}
        else:
            assert found == [], name
            assert skipped == {name: 8}, name


def test_what_children_miss_is_merged_unless_devices_are_let_in(kinds):
    pid, places = kinds
    address = places["dont-fork"]
    wanted = [(address, address + 8 * PAGE)]
    assert eligibility.regions(pid, wanted) == ([(*wanted[0], 3)], {})
    allowed = writers.Allowed(direct_io=True)
    assert eligibility.regions(pid, wanted, allowed=allowed) == ([], {"dont-fork": 8})


def test_ranges_are_cut_to_their_page_aligned_inside(kinds):
    pid, places = kinds
    at = places["plain"]
    ask = [
        (at + 1, at + 3 * PAGE - 1),
        (at + 2 * PAGE, at + 4 * PAGE),
        (at + 6 * PAGE + 1, at + 7 * PAGE + 5),
    ]
    found, _ = eligibility.regions(pid, ask)
    assert found == [(at + PAGE, at + 4 * PAGE, 3)]


def test_a_whole_process(kinds):
    pid, places = kinds
    found, skipped = eligibility.regions(pid)
    assert (places["plain"], places["plain"] + 8 * PAGE, 3) in found
    assert {"file-backed", "stack", "locked"} <= set(skipped)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("flags", "path", "key", "tracked", "told"),
    [
        ("rd wr mr mw me ac", "", 0, False, None),
        ("rd wr mr mw me ac", "[heap]", 0, False, None),
        ("rd wr mr mw me ac", "[anon:jit]", 0, False, None),
        ("rd wr mr mw me ac", "", 4, False, "protection key"),
        ("rd wr mr mw me ac uw", "", 0, False, "userfaultfd"),
        ("rd wr mr mw me ac uw", "", 0, True, None),
        ("rd wr mr mw me ac um", "", 0, True, "userfaultfd"),
        ("rd wr mr mw me ac ht", "", 0, False, "hugetlb"),
        ("rd wr mr mw me io", "", 0, False, "device"),
        ("rd wr mr mw me ac sl", "", 0, False, "sealed"),
        ("rd wr mr mw me ac", "/memfd:gpuksm:store (deleted)", 0, True, "merged"),
        ("rd mr", "[vvar_vclock]", 0, False, "kernel"),
    ],
)
def test_flags(flags, path, key, tracked, told):
    vma = Vma(0x1000, 0x2000, "rw-p", 0, "00:00", 0, path)
    entry = SmapsVma(vma, frozenset(flags.split()), 4096, 4096, 0, key)
    assert eligibility.vma_reason(entry, tracked=tracked) == told


def test_registered_ranges_of_this_process():
    area = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = b"x" * len(area)
    start = vm.address_of(area)
    assert eligibility.regions(os.getpid(), [(start, start + 4 * PAGE)])[0] == [(start, start + 4 * PAGE, 3)]
