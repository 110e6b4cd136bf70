"""The /proc parsers over text that a process may choose: only documented errors, and no confusion."""

from __future__ import annotations

import contextlib
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.linux import mappings, procfs

_FUZZ = settings(deadline=None, max_examples=150)
# What the kernel prints of a name: any bytes but NUL; in paths a newline comes as \012.
HOSTILE = st.one_of(
    st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b"?")),
    st.lists(
        st.sampled_from(
            [b") R 1 (", b"VmFlags: io", b" ", b"\xff", b"\\012", b"Uid:\t0", b"rw-p 0 0:0 0", b"(deleted)"]
        ),
        max_size=5,
    ).map(b"".join),
)
PATHS = HOSTILE.map(lambda raw: raw.replace(b"\n", b"\\012").lstrip(b" "))
LINES = st.lists(
    st.tuples(
        st.integers(1, 1 << 40), st.integers(1, 1 << 20), st.sampled_from(["rw-p", "---s", "r-xp"]), PATHS
    ),
    max_size=6,
)
NOISE = st.lists(
    st.sampled_from(
        [b"VmFlags:", b" rd", b"\n", b"Rss:", b" 4 kB", b"10-20 rw-p 0 0:0 0 x", b"(", b")", b" 1", b"\xff"]
    ),
    max_size=40,
).map(b"".join)


def _line(start: int, pages: int, perms: str, path: bytes) -> bytes:
    return b"%x-%x %s 00000000 00:00 0 %s\n" % (
        start * 4096,
        (start + pages) * 4096,
        perms.encode(),
        b" " * 10 + path,
    )


@_FUZZ
@given(LINES)
def test_every_mapping_is_found_whatever_its_name(lines: list[tuple[int, int, str, bytes]]) -> None:
    got = mappings.parse_maps(b"".join(_line(*line) for line in lines))
    assert [(vma.start, vma.end, vma.perms) for vma in got] == [
        (start * 4096, (start + pages) * 4096, perms) for start, pages, perms, _ in lines
    ]
    for vma, (*_, path) in zip(got, lines, strict=True):
        assert vma.path.encode("utf-8", "surrogateescape") == path.replace(b"\\012", b"\n")


@_FUZZ
@given(LINES)
def test_a_name_never_changes_the_flags_of_a_mapping(lines: list[tuple[int, int, str, bytes]]) -> None:
    # In order, one behind the other: what lies where something was told of takes its place.
    starts = list(itertools.accumulate((pages for _, pages, *_ in lines), initial=1))
    placed = [(start, *rest) for start, (_, *rest) in zip(starts, lines, strict=False)]
    text = b"".join(_line(*line) + b"Rss: 8 kB\nAnonymous: 4 kB\nVmFlags: rd wr mr\n" for line in placed)
    got = mappings.parse_smaps(text)
    assert [entry.vma.start for entry in got] == [start * 4096 for start, *_ in placed]
    assert all(entry.flags == {"rd", "wr", "mr"} and entry.rss == 8192 for entry in got)


@_FUZZ
@given(HOSTILE)
def test_a_name_never_changes_the_fields_of_stat(name: bytes) -> None:
    fields = [b"S", *(b"%d" % number for number in range(4, 60))]
    got = procfs.parse_stat(b"17 (" + name + b") " + b" ".join(fields))
    assert got.comm.encode("utf-8", "surrogateescape") == name
    assert (got.pid, got.state, got.ppid, got.num_threads, got.start_time) == (17, "S", 4, 20, 22)


@_FUZZ
@given(HOSTILE)
def test_a_name_never_changes_the_fields_of_status(name: bytes) -> None:
    """The kernel writes a newline of a name as \\n there, in two characters."""
    text = b"Name:\t" + name.replace(b"\n", b"\\n") + b"\nUid:\t7\t7\t7\t7\nSeccomp:\t2\n"
    got = procfs._parse_status(text)
    assert (got["Uid"], got["Seccomp"]) == ("7\t7\t7\t7", "2")


@_FUZZ
@given(st.one_of(NOISE, st.binary(max_size=200)))
def test_noise_raises_nothing_but_what_is_documented(data: bytes) -> None:
    mappings.parse_maps(data)
    mappings.parse_smaps(data)
    procfs._parse_status(data)
    with contextlib.suppress(ValueError):
        procfs.parse_stat(data)
