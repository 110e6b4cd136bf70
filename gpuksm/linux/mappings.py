"""What lies where in a process's address space: /proc/PID/maps, smaps, and PROCMAP_QUERY.

A process may have tens of thousands of mappings: what asks for few of them has the others skipped.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpuksm.errors import TargetGone
from gpuksm.linux._libc import supported
from gpuksm.linux.procfs import errors_of, pieces, read, text

_ANY_PERMS, _ANY_INODE = "[r-][w-][x-][sp]", r"\d+"


@functools.lru_cache(16)
def _maps_line(perms: str, inode: str) -> re.Pattern[bytes]:
    line = rf"^([0-9a-f]+)-([0-9a-f]+) ({perms}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ({inode}) *(.*)$"
    return re.compile(line.encode(), re.MULTILINE)


_MAPS_LINE = _maps_line(_ANY_PERMS, _ANY_INODE)
_MAPS_RANGE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_SMAPS_BYTES = 512  # no VMA's lines are fewer
_HUGETLB = (b"\nPrivate_Hugetlb:", b"\nShared_Hugetlb:")
# struct procmap_query, include/uapi/linux/fs.h, since Linux 6.11 (ed5d583a88a9).
_QUERY = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY = 0xC0686611
_QUERY_COVERING_OR_NEXT, _QUERY_FILE_BACKED = 0x10, 0x20
QUERY_READ, QUERY_WRITE, QUERY_EXEC, QUERY_SHARED = 1, 2, 4, 8


class Vma(NamedTuple):
    """One line of /proc/PID/maps; `start`, `end`, `offset` in bytes."""

    start: int
    end: int
    perms: str
    offset: int
    dev: str
    inode: int
    path: str


class SmapsVma(NamedTuple):
    """One VMA of /proc/PID/smaps; sizes in bytes."""

    vma: Vma
    flags: frozenset[str]
    rss: int
    anonymous: int
    hugetlb: int
    protection_key: int


class VmaQuery(NamedTuple):
    """What PROCMAP_QUERY says of one VMA; `flags` are QUERY_* bits, `offset` in bytes."""

    start: int
    end: int
    flags: int
    offset: int
    inode: int


def _vma(start: bytes, end: bytes, perms: bytes, offset: bytes, dev: bytes, inode: bytes, path: bytes) -> Vma:
    # The kernel writes a newline within a path as the four characters \\012.
    name = text(path.replace(b"\\012", b"\n")) if path else ""
    return Vma(int(start, 16), int(end, 16), perms.decode(), int(offset, 16), dev.decode(), int(inode), name)


def parse_maps(data: bytes) -> list[Vma]:
    """The VMAs of a maps file, in address order; lines of another shape are left out."""
    return [_vma(*fields) for fields in _MAPS_LINE.findall(data)]


def maps(pid: int, *, perms: str = _ANY_PERMS, inode: int | None = None) -> list[Vma]:
    """The VMAs of process `pid`, in address order; empty for kernel threads and zombies.

    Those whose permissions match the regular expression `perms`, and of the file `inode` (0: of none),
    where given.  There may be tens of thousands: to ask for few of them takes a fraction of the time.
    """
    line = _maps_line(perms, _ANY_INODE if inode is None else str(inode))
    return [_vma(*fields) for fields in line.findall(read(pid, "maps"))]


@functools.lru_cache(4)
def _file_line(inode: int, path: str) -> re.Pattern[bytes]:
    line = rf"^([0-9a-f]+)-([0-9a-f]+) .... ([0-9a-f]+) \S+ {inode} +{re.escape(path)}"
    return re.compile(line.encode(), re.MULTILINE)


def file_mappings(pid: int, inode: int, path: str) -> list[tuple[int, int, int]]:
    """(start, end, offset in bytes) of each VMA of the file `inode`, whose path begins with `path`."""
    return parse_file_mappings(read(pid, "maps"), inode, path)


def parse_file_mappings(lines: bytes, inode: int, path: str) -> list[tuple[int, int, int]]:
    """The same of `lines` of /proc/PID/maps."""
    found = _file_line(inode, path).findall(lines)
    return [(int(start, 16), int(end, 16), int(offset, 16)) for start, end, offset in found]


def maps_file(pid: int, inode: int, path: str) -> bool:
    """Whether `file_mappings` has any; reads no further than to the first."""
    line = _file_line(inode, path)
    return any(line.search(piece) is not None for piece in pieces(pid, "maps"))


def mapped(pid: int) -> list[tuple[int, int]]:
    """Where process `pid` has anything mapped, in address order, neighbouring VMAs as one."""
    stretches: list[tuple[int, int]] = []
    first = last = b""
    for start, end in _MAPS_RANGE.findall(read(pid, "maps")):
        if start != last:
            if first:
                stretches.append((int(first, 16), int(last, 16)))
            first = start
        last = end
    if first:
        stretches.append((int(first, 16), int(last, 16)))
    return stretches


def maps_mention(pid: int, name: str) -> bool:
    """Whether a mapping of process `pid` is of a file whose path contains `name`; nothing is parsed."""
    return name.encode() in read(pid, "maps")


def maps_match(pid: int, pattern: re.Pattern[bytes]) -> str | None:
    """The first group of `pattern` where a line of /proc/PID/maps matches, or None; nothing is parsed."""
    found = pattern.search(read(pid, "maps"))
    return None if found is None else text(found[1])


def parse_smaps(data: bytes) -> list[SmapsVma]:
    """The VMAs of a smaps file, in address order and disjoint; a VMA without its VmFlags line is left out.

    Cut at the line each VMA ends with, as there may be 60,000 of twenty-five lines each.
    """
    known: dict[bytes, frozenset[str]] = {}
    result: list[SmapsVma] = []
    blocks = (b"\n" + data).split(b"\nVmFlags:")
    for block, behind in itertools.pairwise(blocks):
        # What a block begins with is the rest of the flags before it.
        head = _MAPS_LINE.search(block, block.find(b"\n") + 1)
        if head is None:
            continue
        flags = behind.partition(b"\n")[0]
        if flags not in known:
            known[flags] = frozenset(text(flags).split())
        huge = "ht" in known[flags]
        vma = _vma(*head.groups())
        _cut_off(result, vma.start)
        result.append(
            SmapsVma(
                vma,
                known[flags],
                _smaps_number(block, b"\nRss:") * 1024,
                _smaps_number(block, b"\nAnonymous:") * 1024,
                sum(_smaps_number(block, name) for name in _HUGETLB) * 1024 if huge else 0,
                _smaps_number(block, b"\nProtectionKey:"),
            )
        )
    return result


def _cut_off(entries: list[SmapsVma], start: int) -> None:
    """What was told of memory from `start` on is told anew.

    Between two reads a mapping may have grown or been joined with the next: the kernel goes on with the one
    that covers the place that it had come to, from that one's start.
    """
    while entries and entries[-1].vma.end > start:
        last = entries.pop()
        if last.vma.start < start:
            entries.append(last._replace(vma=last.vma._replace(end=start)))


def _smaps_number(block: bytes, name: bytes) -> int:
    at = block.find(name)
    if at < 0:
        return 0
    word = block[at + len(name) : at + len(name) + 32].split(None, 1)
    return int(word[0]) if word and word[0].isdigit() else 0


def smaps(pid: int, between: Callable[[], None] = lambda: None) -> list[SmapsVma]:
    """Every VMA of process `pid` with what smaps adds; `between` two of them that is called.

    The kernel walks all its page tables for this, and holds the lock of the address space for as long as one
    VMA takes, 9 ms a GiB (docs/hazards.md, 59).
    """
    found = []
    for piece in pieces(pid, "smaps", one_by_one=_SMAPS_BYTES):
        found.append(piece)
        between()
    return parse_smaps(b"".join(found))


def locked_kib(pid: int) -> int:
    """How much memory of process `pid` is locked (mlock), in KiB."""
    return _smaps_number(read(pid, "status"), b"\nVmLck:")


def smaps_flags(pid: int) -> dict[int, frozenset[str]]:
    """{VMA start: its VmFlags, two letters each} of process `pid`; costs as much as `smaps`."""
    return {entry.vma.start: entry.flags for entry in smaps(pid)}


def smaps_rollup(pid: int) -> dict[str, int]:
    """Sums over all VMAs of process `pid` in bytes, under the kernel's names (Rss, Pss_Anon...)."""
    result = {}
    for line in read(pid, "smaps_rollup").split(b"\n")[1:]:
        name, _, value = line.partition(b":")
        words = value.split()
        if len(words) == 2 and words[1] == b"kB" and words[0].isdigit():
            result[text(name)] = int(words[0]) * 1024
    return result


def open_maps(pid: int) -> int:
    """A descriptor of /proc/PID/maps for `query_vma`; the caller closes it."""
    with errors_of(pid):
        return os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)


def query_vma(fd: int, address: int, *, or_next: bool = True, wanted: int = 0) -> VmaQuery | None:
    """The VMA that covers `address`, or with `or_next` the first one above it; None where there is none.

    Of those only that have all of the flags `wanted`.

    `fd` is a descriptor of /proc/PID/maps.  Raises TargetGone when the process
    is gone and OSError(ENOTTY) on kernels that do not know PROCMAP_QUERY.
    """
    flags = wanted | (_QUERY_COVERING_OR_NEXT if or_next else 0)
    argument = bytearray(_QUERY.pack(_QUERY.size, flags, address, *([0] * 12)))
    try:
        fcntl.ioctl(fd, _PROCMAP_QUERY, argument)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        if error.errno == errno.ESRCH:
            raise TargetGone("the process is gone") from None
        raise
    _, _, _, start, end, vma_flags, _, offset, inode, *_ = _QUERY.unpack(argument)
    return VmaQuery(start, end, vma_flags, offset, inode)


def private_code(pid: int) -> Iterator[int]:
    """Where each private executable mapping of a file ends, and that of the vdso; in a process that stands.

    Mappings of other kinds, of which there may be tens of thousands, cost next to nothing.
    """
    fd = open_maps(pid)
    try:
        at = 0
        while (vma := query_vma(fd, at, wanted=QUERY_EXEC | _QUERY_FILE_BACKED)) is not None:
            if not vma.flags & QUERY_SHARED:
                yield vma.end
            at = vma.end
    except OSError:  # a kernel that does not answer such questions
        yield from (vma.end for vma in maps(pid, perms="..xp") if vma.inode)
    finally:
        os.close(fd)
    yield from (vma.end for vma in maps(pid, perms="..xp") if vma.path == "[vdso]")


def has_query_vma() -> bool:
    """Whether this kernel answers PROCMAP_QUERY."""
    fd = open_maps(os.getpid())
    try:
        return supported(lambda: query_vma(fd, 0))
    finally:
        os.close(fd)
