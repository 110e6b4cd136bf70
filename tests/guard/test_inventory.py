"""What is looked at again is what was learned anew, whatever has changed in between."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.guard import inventory
from gpuksm.guard.inventory import Inventory
from gpuksm.linux import procfs
from gpuksm.linux._libc import PAGE_SIZE

INODE = 77
STORE = "/memfd:gpuksm-store (deleted)"


def _text(mapped: dict[int, int | None]) -> bytes:
    """/proc/PID/maps of {page: slot, or None for a page of another kind}."""
    lines = []
    for page, slot in sorted(mapped.items()):
        where = f"{page * PAGE_SIZE:08x}-{(page + 1) * PAGE_SIZE:08x}"
        if slot is None:
            lines.append(f"{where} rw-p 00000000 00:00 0 \n")
        else:
            lines.append(f"{where} rw-p {slot * PAGE_SIZE:08x} 00:01 {INODE}    {STORE}\n")
    return "".join(lines).encode()


def _expected(mapped: dict[int, int | None], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    monkeypatch.setattr(procfs, "read", lambda *_: _text(mapped))
    return list(Inventory(1, INODE).runs)


pages = st.dictionaries(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 90)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(pages, pages, st.integers(0, 60), st.integers(0, 60))
def test_it_is_as_if_all_had_been_read_for_the_first_time(
    before: dict[int, int | None], other: dict[int, int | None], low: int, high: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Another in the middle, as a few changes are, or all another way.
        now = {page: slot for page, slot in before.items() if not low <= page < high}
        now |= {page: slot for page, slot in other.items() if low <= page < high or low == high}
        expected = _expected(now, monkeypatch)
        monkeypatch.setattr(procfs, "read", lambda *_: _text(before))
        known = Inventory(1, INODE)
        monkeypatch.setattr(procfs, "read", lambda *_: _text(now))
        known.refresh()
        assert list(known.runs) == expected
        assert known.runs.pages == sum((end - start) // PAGE_SIZE for start, end, _ in expected)


def test_a_text_in_which_mappings_overlap_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first was joined to the second between two lines; then something below has changed as well."""

    def line(first: int, end: int, slot: int) -> str:
        where = f"{first * PAGE_SIZE:08x}-{end * PAGE_SIZE:08x}"
        return f"{where} rw-p {slot * PAGE_SIZE:08x} 00:01 {INODE}    {STORE}\n"

    texts = [line(1, 2, 90) + line(10, 20, 30) + line(10, 40, 30), line(1, 3, 90) + line(10, 40, 30)]
    monkeypatch.setattr(procfs, "read", lambda *_: texts.pop(0).encode())
    known = Inventory(1, INODE)
    known.refresh()
    assert list(known.runs) == [(PAGE_SIZE, 3 * PAGE_SIZE, 90), (10 * PAGE_SIZE, 40 * PAGE_SIZE, 30)]
    assert known.runs.pages == 32


def test_only_what_has_changed_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = list(range(3000))
    random.Random(1).shuffle(slots)
    mapped: dict[int, int | None] = {100 + at: slot for at, slot in enumerate(slots)}
    monkeypatch.setattr(procfs, "read", lambda *_: _text(mapped))
    known = Inventory(1, INODE)
    looked_at: list[int] = []
    parse = inventory.mappings.parse_file_mappings
    monkeypatch.setattr(
        inventory.mappings,
        "parse_file_mappings",
        lambda text, *more: (looked_at.append(text.count(b"\n")), parse(text, *more))[1],
    )
    mapped[5000] = mapped[5001] = None  # the agent's
    mapped[1700] = 4000
    known.refresh()
    assert sum(looked_at) < 2 * (3000 - 1500)
    assert list(known.runs) == _expected(mapped, monkeypatch)
