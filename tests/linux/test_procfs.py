"""procfs: real processes with odd names, 60,000 VMAs, and hostile text."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.errors import TargetGone
from gpuksm.guard import places
from gpuksm.linux import mappings, procfs
from gpuksm.linux._libc import PAGE_SIZE as PAGE
from tests.support import processes


@pytest.fixture
def gone():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_maps_of_this_process_agree_with_a_naive_parser():
    got = mappings.maps(os.getpid())
    assert any(vma.path == "[stack]" for vma in got)
    assert all(a.end <= b.start for a, b in itertools.pairwise(got))
    with open("/proc/self/maps") as file:
        naive = [line.split(None, 5)[0] for line in file]
    mine = {f"{vma.start:08x}-{vma.end:08x}" for vma in got}
    assert len(mine & set(naive)) > len(naive) * 0.8


def test_records_are_asked_for_one_by_one_at_first(monkeypatch):
    """What the kernel could not fit into a page it would make twice."""
    read, asked = os.read, []

    def note(fd, size):
        asked.append(size)
        return read(fd, size)

    with processes.sleeping() as pid:
        monkeypatch.setattr(procfs.os, "read", note)
        got = mappings.smaps(pid)
        assert set(asked) == {mappings._SMAPS_BYTES}
        monkeypatch.setattr(procfs, "_FEW_READS", 10)
        del asked[:]
        assert mappings.smaps(pid) == got
        assert asked[:10] == [mappings._SMAPS_BYTES] * 10
        assert set(asked[10:]) == {procfs._READ_BYTES}
        records = procfs.read(pid, "smaps").split(b"VmFlags:")
    assert min(map(len, records[:-1])) > mappings._SMAPS_BYTES


def _record(low, high, rss=4):
    flags = b"Rss: %d kB\nVmFlags: rd wr \n" % rss
    return b"%08x-%08x rw-p 00000000 00:00 0 \n" % (low * PAGE, high * PAGE) + flags


def test_a_mapping_that_grows_between_two_reads_is_told_once():
    """The kernel goes on with the one that covers where it was, from that one's start."""
    told = [(0, 2), (4, 8), (4, 12), (12, 14), (16, 20), (18, 24), (30, 32), (33, 34), (29, 40)]
    found = mappings.parse_smaps(b"".join(_record(*each) for each in told))
    got = [(entry.vma.start // PAGE, entry.vma.end // PAGE) for entry in found]
    assert got == [(0, 2), (4, 12), (12, 14), (16, 18), (18, 24), (29, 40)]


def test_mappings_of_a_process_that_grows_are_disjoint():
    script = (
        "import ctypes, mmap, os\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]\n"
        "libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]\n"
        "arenas = [libc.mmap(None, 64 << 20, 0, 0x4022, -1, 0) for _ in range(16)]\n"
        "print(flush=True)\n"
        "for size in range(1, 1 << 13):\n"
        "    for arena in arenas:\n"
        "        libc.mprotect(arena, size * 4096, 3)\n"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        for _ in range(20):
            found = [entry.vma for entry in mappings.smaps(child.pid, lambda: time.sleep(0.0002))]
            assert all(one.end <= other.start for one, other in itertools.pairwise(found))
        child.kill()


@pytest.mark.parametrize(
    "name", ["with  two spaces", "new\nline", " (deleted)", "tail (deleted)", "back\\slash", "\udcff"]
)
def test_file_names_survive(tmp_path, name):
    path = tmp_path / ("x" + name)
    path.write_bytes(b"a" * 4096)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
        paths = [vma.path for vma in mappings.maps(os.getpid())]
    assert str(path) in paths


def test_maps_of_some_kind_are_those_of_all():
    code = "import sys; print(flush=True); sys.stdin.read()"  # this process has threads, which map and unmap
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        pid = child.pid
        every = mappings.maps(pid)
        inode = next(vma.inode for vma in every if vma.inode)
        assert mappings.maps(pid, perms="r-xp") == [vma for vma in every if vma.perms == "r-xp"]
        assert mappings.maps(pid, inode=inode) == [vma for vma in every if vma.inode == inode]
        plain = [vma for vma in every if vma.perms == "rw-p" and not vma.inode]
        assert mappings.maps(pid, perms="rw-p", inode=0) == plain
        child.stdin.close()


def test_what_is_mapped_is_told_without_seams():
    with mmap.mmap(-1, 64 * PAGE) as memory:
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        del view
        memory.madvise(mmap.MADV_DONTFORK, 16 * PAGE, 8 * PAGE)  # three mappings side by side
        pid = os.getpid()
        stretches = mappings.mapped(pid)
        assert any(low <= address and address + 64 * PAGE <= high for low, high in stretches)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(stretches))
        covered = sum(vma.end - vma.start for vma in mappings.maps(pid))
        assert abs(sum(high - low for low, high in stretches) - covered) < 64 << 20  # it lives on meanwhile
        gap = places.largest_gap(pid)
        assert not any(low < gap.end and gap.start < high for low, high in mappings.mapped(pid))
        assert gap.start < gap.place() < gap.end


def test_mappings_of_one_file():
    fd = os.memfd_create("gpuksm-test")
    try:
        os.ftruncate(fd, 4 * PAGE)
        with mmap.mmap(fd, 2 * PAGE, mmap.MAP_PRIVATE, offset=2 * PAGE):
            inode, pid = os.fstat(fd).st_ino, os.getpid()
            (found,) = mappings.file_mappings(pid, inode, "/memfd:gpuksm-te")
            assert found[1] - found[0] == 2 * PAGE
            assert found[2] == 2 * PAGE
            assert mappings.maps_file(pid, inode, "/memfd:gpuksm-test")
            assert not mappings.maps_file(pid, inode, "/memfd:else")
            assert not mappings.maps_file(pid, inode + 1, "/memfd:gpuksm-test")
        assert mappings.file_mappings(pid, inode, "/memfd:gpuksm-test") == []
    finally:
        os.close(fd)


def test_60000_vmas_are_parsed_quickly():
    line = b"%x-%x rw-p 00000000 00:00 0 \n"
    data = b"".join(line % (i * 8192, i * 8192 + 4096) for i in range(1, 60001))
    began = time.perf_counter()
    got = mappings.parse_maps(data)
    assert len(got) == 60000
    assert got[-1] == mappings.Vma(60000 * 8192, 60000 * 8192 + 4096, "rw-p", 0, "00:00", 0, "")
    assert time.perf_counter() - began < 5


def test_anonymous_names_and_deleted_files():
    data = (
        b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [anon:my heap (deleted)]\n"
        b"7f0000001000-7f0000002000 r--s 00001000 00:01 42                         /memfd:x (deleted)\n"
        b"garbage\n7f-zz rw-p 0 0 0\n"
    )
    first, second = mappings.parse_maps(data)
    assert first.path == "[anon:my heap (deleted)]"
    assert (second.offset, second.dev, second.inode, second.path) == (4096, "00:01", 42, "/memfd:x (deleted)")


@settings(deadline=None)
@given(st.binary())
def test_parsers_survive_any_bytes(data):
    mappings.parse_maps(data)
    mappings.parse_smaps(data)
    with contextlib.suppress(ValueError):
        procfs.parse_stat(data)


def test_smaps_flags_know_every_vma_of_maps():
    flags = mappings.smaps_flags(os.getpid())
    stack = next(vma for vma in mappings.maps(os.getpid()) if vma.path == "[stack]")
    assert "gd" in flags[stack.start]
    assert "mr" in flags[stack.start]


def test_smaps_names_that_look_like_attributes_change_nothing():
    data = (
        b"1000-2000 rw-p 00000000 00:00 5 /tmp/x\\012VmFlags: io\nRss: 4 kB\nProtectionKey: 3\n"
        b"VmFlags: rd wr mr\nVmFlags: io\n2000-3000 rw-p 00000000 00:00 0 \nVmFlags: rd\n"
    )
    first, second = mappings.parse_smaps(data)
    assert first.vma.path == "/tmp/x\nVmFlags: io"
    assert first.flags == {"rd", "wr", "mr"}
    assert (first.rss, first.protection_key) == (4096, 3)
    assert (second.vma.start, second.flags, second.rss) == (0x2000, {"rd"}, 0)


def test_rollup_is_in_bytes():
    rollup = mappings.smaps_rollup(os.getpid())
    assert rollup["Rss"] >= rollup["Pss"] > 1 << 20
    assert "Pss_Anon" in rollup


def test_stat_of_a_process_with_a_hostile_name():
    name = ") R 1 (x\n"
    rename = f"import ctypes,time; ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)"
    code = rename + "; print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child.stdout.read(1)
        stat = procfs.stat(child.pid)
        assert stat.comm == name
        assert (stat.pid, stat.ppid, stat.num_threads) == (child.pid, os.getpid(), 1)
        assert procfs.status(child.pid)["PPid"] == str(os.getpid())
        assert child.pid in procfs.children(os.getpid())
        assert child.pid in procfs._children_by_parent(os.getpid())
    finally:
        child.kill()
        child.wait()


def test_threads_syscall_and_wchan_of_a_sleeper():
    child = subprocess.Popen(["sleep", "60"])
    try:
        for _ in range(200):
            call = procfs.thread_syscall(child.pid, child.pid)
            if call and call[0] == 230:
                break
            time.sleep(0.01)
        assert procfs.threads(child.pid) == [child.pid]
        assert call is not None
        assert call[0] == 230  # clock_nanosleep on x86-64
        assert len(call[1]) == 6
        assert isinstance(procfs.wchan(child.pid, child.pid), str)
    finally:
        child.kill()
        child.wait()


def test_descriptors(tmp_path):
    with open(tmp_path / "f", "wb") as file:
        assert procfs.fd_targets(os.getpid())[file.fileno()] == str(tmp_path / "f")
        assert "flags:" in procfs.fdinfo(os.getpid(), file.fileno())
        assert procfs.fd_file(os.getpid(), file.fileno()).inode == os.fstat(file.fileno()).st_ino


def test_file_systems_by_their_devices():
    found = procfs.mounted(os.getpid())
    number = os.stat("/proc").st_dev
    assert found[os.major(number), os.minor(number)] == "proc"


@pytest.mark.parametrize(
    "call",
    [
        mappings.maps,
        mappings.smaps_flags,
        mappings.smaps_rollup,
        procfs.status,
        procfs.stat,
        procfs.threads,
        procfs.fd_targets,
    ],
)
def test_a_process_that_is_gone_has_a_type_of_its_own(gone, call):
    with pytest.raises(TargetGone):
        call(gone)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_other_peoples_processes_are_not_permitted():
    code = (
        "import os,sys; sys.path.insert(0, os.getcwd())\n"
        "from gpuksm.errors import NotPermitted\nfrom gpuksm.linux import procfs\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: procfs.fd_targets(1)\nexcept NotPermitted: sys.exit(42)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 42


@pytest.mark.skipif(not mappings.has_query_vma(), reason="no PROCMAP_QUERY in this kernel")
def test_query_vma():
    memory = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fd = mappings.open_maps(os.getpid())
    try:
        for vma in mappings.maps(os.getpid()):
            if vma.path == "[stack]":
                got = mappings.query_vma(fd, vma.end - 1)
                assert got.end == vma.end
                assert got.flags & mappings.QUERY_WRITE
        lowest = mappings.maps(os.getpid())[0]
        assert mappings.query_vma(fd, 0) == mappings.query_vma(fd, lowest.start)
        assert mappings.query_vma(fd, 0, or_next=False) is None
        assert mappings.query_vma(fd, (1 << 64) - 4096) is None
    finally:
        os.close(fd)
        memory.close()


@pytest.mark.parametrize("answers", [True, False])
def test_private_code_is_what_maps_says_it_is(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOTTY, "PROCMAP_QUERY")

    if not answers:
        monkeypatch.setattr(mappings, "query_vma", unanswered)
    libc = ctypes.CDLL(None).getpid  # something private and executable
    code = [vma for vma in mappings.maps(os.getpid()) if vma.perms[2:] == "xp" and vma.path != "[vsyscall]"]
    ends = list(mappings.private_code(os.getpid()))
    assert set(ends) == {vma.end for vma in code if vma.inode or vma.path == "[vdso]"}
    assert any(vma.start <= ctypes.cast(libc, ctypes.c_void_p).value < vma.end for vma in code)
    assert len(set(ends)) == len(ends) > 3


def test_some_memory_is_available() -> None:
    assert 0 < procfs.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
