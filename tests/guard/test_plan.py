"""Malformed plans are refused as a whole, before anything is done."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuksm import wire
from gpuksm.errors import UsageError
from gpuksm.guard import comparing, request
from gpuksm.guard.verify import Piece

EXTENT = wire.EXTENT_RECORD.pack(8, 0, 0)


def record(
    op: int = 1, flags: int = 1, addr: int = 4096, pages: int = 8, extent: int = 0, slot: int = 0
) -> bytes:
    return wire.PLAN_RECORD.pack(op, flags, 0, 1, addr, pages, extent, slot, 0, 0)


def test_a_sound_plan() -> None:
    for node in (0, 1, 1024):
        extent = wire.EXTENT_RECORD.pack(8, node, 0)
        new, records, digests = request.parse(1, 1, extent + record() + bytes(64))
        assert (new, len(records), len(digests)) == ([(8, node)], 1, 64)


@pytest.mark.parametrize(
    ("extents", "records", "payload"),
    [
        (2, 1, EXTENT + record()),
        (1, 2, EXTENT + record()),
        (-1, 1, EXTENT + record()),
        (1, -1, EXTENT),
        (1, 1, EXTENT + record() + b"x"),
        (1, 1, wire.EXTENT_RECORD.pack(0, 0, 0) + record()),
        (1, 1, wire.EXTENT_RECORD.pack(2**32 - 1, 0, 0) + record()),
        (1, 1, wire.EXTENT_RECORD.pack(8, 1025, 0) + record()),
        (1, 1, EXTENT + record(op=0)),
        (1, 1, EXTENT + record(op=5)),
        (1, 1, EXTENT + record(addr=4097)),
        (1, 1, EXTENT + record(pages=0)),
        (1, 1, EXTENT + record(pages=9)),
        (1, 1, EXTENT + record(slot=1)),
        (1, 1, EXTENT + record(extent=1)),
        (1, 1, EXTENT + record(flags=0)),  # FILL of an extent that exists
        (1, 1, EXTENT + record(op=4, flags=0)),
    ],
)
def test_refused(extents: int, records: int, payload: bytes) -> None:
    with pytest.raises(UsageError, match="malformed plan"):
        request.parse(extents, records, payload)


@given(st.binary(max_size=400), st.integers(-2, 5), st.integers(-2, 5))
def test_garbage_is_refused_or_well_formed(payload: bytes, extents: int, records: int) -> None:
    try:
        new, items, _ = request.parse(extents, records, payload)
    except (UsageError, struct.error):
        return
    assert len(new) == extents
    assert len(items) == records


def test_parts_of_one_record_join_again() -> None:
    parts = [Piece(0, 0, 2, 5), Piece(0, 8192, 1, 7), Piece(0, 16384, 1, 9), Piece(1, 20480, 1, 10)]
    assert comparing._joined(parts) == [Piece(0, 0, 3, 5), Piece(0, 16384, 1, 9), Piece(1, 20480, 1, 10)]
