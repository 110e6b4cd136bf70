"""Turns a plan into commit requests, as docs/architecture.md lays them out.

Requests are small (some 256 MiB of new slots, some hundred thousand records), so that
progress can be seen and others get their turn; but not so small that neighbours in
a target's memory are often in two of them, for between requests a run must end in
safety.  An extent is never torn apart, since a run inside one extent is one mapping.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpuksm import wire
from gpuksm.scan.columns import I64, PAGE_BYTES, U64, ranges_within
from gpuksm.scan.nodes import apart, taken
from gpuksm.scan.planner import Plan
from gpuksm.scan.runs import Runs

PLAN_DTYPE = np.dtype(
    [
        ("op", "u1"),
        ("flags", "u1"),
        ("reserved", "<u2"),
        ("target", "<u4"),
        ("addr", "<u8"),
        ("pages", "<u4"),
        ("extent", "<u4"),
        ("slot", "<u8"),
        ("digest", "<u8"),
        ("column_at", "<u8"),
    ]
)
EXTENT_DTYPE = np.dtype([("slots", "<u4"), ("node", "<u4"), ("reserved", "<u8")])
assert PLAN_DTYPE.itemsize == wire.PLAN_RECORD.size
assert EXTENT_DTYPE.itemsize == wire.EXTENT_RECORD.size

# What counts as much as one new slot when requests are cut.
_PAGES_PER_SLOT = 8
_RECORDS_PER_REQUEST = 1 << 17
_SLOTS_PER_REQUEST = 1 << 16
# Shorter runs behind each other go as one record, of about so many pages at most.
_LONG_PAGES = 64
_CHAIN_PAGES = 1 << 13


@dataclass(frozen=True)
class Request:
    """One commit: `extents` EXTENT_DTYPE, `records` PLAN_DTYPE, `column` u8; `runs` i64: runs of each record.

    In the records `target` is the plan's index; `ids` turn it into the guard's.
    """

    extents: NDArray[np.void]
    records: NDArray[np.void]
    column: U64
    runs: I64

    def only(self, chosen: NDArray[np.bool_]) -> Request:
        """The same with the `chosen` records alone."""
        return replace(self, records=self.records[chosen], runs=self.runs[chosen])

    @property
    def zero(self) -> NDArray[np.bool_]:
        """Which records are about zero pages."""
        return np.asarray(self.records["op"] == wire.OP_ZERO)

    @property
    def merging_pages(self) -> int:
        """Pages that would be merged if nothing was written meanwhile."""
        return int(self.records["pages"][self.records["op"] != wire.OP_FILL_REPLICA].sum())

    def payload(self, ids: I64) -> bytes:
        """The payload of `commit`; `ids` are the guard's ids of the plan's targets."""
        records = self.records.copy()
        records["target"] = ids[records["target"]]
        return self.extents.tobytes() + records.tobytes() + self.column.astype("<u8").tobytes()


def requests(plan: Plan) -> Iterator[Request]:
    """The requests of `plan`: zero pages first, for they cost nothing and free memory."""
    yield from _zero_parts(plan)
    runs_of = np.bincount(plan.lot, minlength=len(plan.lot_pages))
    pages_of = np.bincount(plan.lot, plan.runs.pages, len(plan.lot_pages))
    weight = np.maximum(
        np.maximum(plan.lot_pages, pages_of / _PAGES_PER_SLOT),
        runs_of * _SLOTS_PER_REQUEST / _RECORDS_PER_REQUEST,
    )
    request_of = ((np.cumsum(weight) - weight) // _SLOTS_PER_REQUEST).astype(np.int64)
    by_lot = np.argsort(plan.lot, kind="stable")
    lots = np.flatnonzero(np.diff(request_of, prepend=-1))
    run_ends = np.cumsum(runs_of)
    for first, end in itertools.pairwise([*lots.tolist(), len(request_of)]):
        begin = int(run_ends[first] - runs_of[first])
        yield _encode(plan, first, end, by_lot[begin : int(run_ends[end - 1])])


def _zero_parts(plan: Plan) -> Iterator[Request]:
    step = np.cumsum(plan.zeros.pages) // (_SLOTS_PER_REQUEST * _PAGES_PER_SLOT)
    step = np.maximum(step, np.arange(len(step)) // _RECORDS_PER_REQUEST)
    cuts = np.flatnonzero(np.diff(step, prepend=-1))
    for first, end in itertools.pairwise([*cuts.tolist(), len(step)]):
        records = _records(plan, plan.zeros.take(np.arange(first, end)), wire.OP_ZERO)
        ones = np.ones(len(records), np.int64)
        yield Request(np.zeros(0, EXTENT_DTYPE), records, np.empty(0, np.uint64), ones)


def _records(plan: Plan, runs: Runs, op: int) -> NDArray[np.void]:
    records = np.zeros(len(runs), PLAN_DTYPE)
    records["op"] = op
    records["target"] = plan.pages.target[runs.first]
    records["addr"] = plan.pages.address[runs.first]
    records["pages"] = runs.pages
    return records


def _digests(plan: Plan, index: I64) -> U64:
    """The digests of pages as the store is to remember them: the same on every node."""
    return apart(plan.pages.digest[index], taken(plan.pages.node, index))


def _encode(plan: Plan, first: int, end: int, index: I64) -> Request:
    """The request for lots first .. end-1, whose runs are `index`."""
    new = plan.lot_pages[first:end] > 0
    extent_of = np.cumsum(new) - 1
    extents = np.zeros(int(new.sum()), EXTENT_DTYPE)
    extents["slots"] = plan.lot_pages[first:end][new]
    if len(plan.pages.node):
        extents["node"] = plan.pages.node[plan.runs.first[plan.lot_filler[first:end][new]]]

    runs, lot = plan.runs.take(index), plan.lot[index] - first
    records = _records(plan, runs, wire.OP_MAP)
    is_new = new[lot]
    records["flags"][is_new] = wire.FLAG_NEW_EXTENT
    records["extent"][is_new] = extent_of[lot[is_new]]
    records["slot"][is_new] = runs.slot[is_new] - plan.lot_slot[first:end][lot[is_new]]
    if not is_new.all():
        records["slot"][~is_new] = plan.stable.slot[runs.slot[~is_new]]

    replica = plan.lot_replica[first:end]
    fills = (plan.lot_filler[plan.lot[index]] == index) & ~replica[lot]
    records["op"][fills] = wire.OP_FILL
    filled = runs.take(fills)
    at = np.repeat(filled.first, filled.pages) + ranges_within(filled.pages)
    digests = _digests(plan, at)
    records["column_at"][fills] = np.cumsum(filled.pages) - filled.pages
    single = runs.pages == 1
    records["digest"][single] = _digests(plan, runs.first[single])

    copied = np.flatnonzero(replica)
    source = plan.runs.take(plan.lot_filler[first:end][copied])
    replicas = _records(plan, source, wire.OP_FILL_REPLICA)
    replicas["flags"] = wire.FLAG_NEW_EXTENT
    replicas["pages"] = plan.lot_pages[first:end][copied]
    replicas["extent"] = extent_of[copied]
    replicas["digest"] = _digests(plan, source.first)

    # Fills first: what is mapped must have been filled.
    rest = records[~fills]
    rest = rest[np.lexsort((rest["addr"], rest["target"]))]
    rest, slots, runs_of = _chained(rest, len(digests))
    fixed = np.concatenate((replicas, records[fills]))
    return Request(
        extents,
        np.concatenate((fixed, rest)),
        np.concatenate((digests, slots)),
        np.concatenate((np.ones(len(fixed), np.int64), runs_of)),
    )


def _chained(records: NDArray[np.void], column_at: int) -> tuple[NDArray[np.void], U64, I64]:
    """MAP records by target and address; short ones behind each other as one MAP_EACH.

    Returns the records, the slots for the column from `column_at` on, and how many runs each record has.
    """
    pages = records["pages"].astype(np.int64)
    short = pages < _LONG_PAGES
    before = np.cumsum(pages * short) - pages * short
    ends = records["addr"] + pages.astype(np.uint64) * np.uint64(PAGE_BYTES)
    goes_on = np.zeros(len(records), np.bool_)
    goes_on[1:] = (
        (short[1:] & short[:-1])
        & (records["target"][1:] == records["target"][:-1])
        & (records["addr"][1:] == ends[:-1])
        & (before[1:] // _CHAIN_PAGES == before[:-1] // _CHAIN_PAGES)
    )
    first = np.flatnonzero(~goes_on)
    runs = np.diff(np.append(first, len(records)))
    chained = np.repeat(runs > 1, runs)

    out = records[first]
    chains = out[runs > 1]
    total = np.add.reduceat(pages, first)[runs > 1] if len(first) else pages
    chains["op"], chains["flags"], chains["pages"] = wire.OP_MAP_EACH, 0, total
    chains["extent"], chains["slot"], chains["digest"] = 0, 0, 0
    chains["column_at"] = column_at + np.cumsum(total) - total
    out[runs > 1] = chains

    of, counts = records[chained], pages[chained]
    slot = of["slot"] | of["extent"].astype(np.uint64) << np.uint64(wire.EACH_EXTENT_SHIFT)
    slot |= np.where(of["flags"] & wire.FLAG_NEW_EXTENT, np.uint64(wire.EACH_NEW_EXTENT), np.uint64(0))
    return out, np.repeat(slot, counts) + ranges_within(counts).astype(np.uint64), runs
