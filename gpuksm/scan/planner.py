"""Decides which page goes to which slot; pure logic over columns, no system calls.

What a plan is after: few mappings.  Every run that is mapped costs its target
one or two VMAs, and VMAs are a budget.

1. Zero pages need no slot.  Stretches of one content repeated are mapped,
   piece by piece, to a *replica*: an extent that holds that content many times.
   With r slots, t pages take t / r mappings: r = sqrt(t) balances the two.
2. All other pages are walked in order of target and address.  A page goes to
   the slot behind its predecessor's where that holds its content: so an equal
   run stays one run.  The first page with a content makes a slot behind its
   predecessor's: the first process's order is the layout.  Where a content comes
   back within a run, a copy in line is weighed against breaking the run.
3. A run that ends inside an extent could grow into foreign slots, so the guard
   gives up its last page unless merged memory lies behind it.  Extents are cut
   where more is won by that than the runs that go across lose in mappings.
4. Lots (an extent and its runs) are taken longest first while budgets last, and
   only when they save more than they cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.protocol import KIND_ZERO
from gpuksm.hashing.sort import radix_sort
from gpuksm.scan.columns import I64
from gpuksm.scan.layout import lay_out
from gpuksm.scan.lots import Decided, decide
from gpuksm.scan.nodes import taken
from gpuksm.scan.runs import Pages, Runs, cut_long, stretches_in
from gpuksm.scan.trees import Contents, Sort, StableTree, join


@dataclass(frozen=True)
class Plan:
    """What to commit.

    `runs` with their `lot`; lots in order of their first page: `lot_slot` (dense
    number of its first slot), `lot_pages` (new slots, 0: they exist),
    `lot_filler` (index into runs of the run that fills it), `lot_replica`.
    `zeros` are runs of zero pages.  `skipped` counts pages left out by reason, one dictionary
    for each target; `unshared` i8 those of each target that equal no other.
    """

    pages: Pages
    stable: StableTree
    runs: Runs
    lot: I64
    lot_slot: I64
    lot_pages: I64
    lot_filler: I64
    lot_replica: NDArray[np.bool_]
    zeros: Runs
    skipped: list[dict[str, int]]
    unshared: I64


def make_plan(pages: Pages, stable: StableTree, budgets: I64, sort: Sort = radix_sort) -> Plan:
    """Plan one round.  `budgets` int64: VMAs each target may gain."""
    zero = pages.kind == KIND_ZERO
    if zero.any():
        contents = join(pages.digest[~zero], pages.target[~zero], stable, sort)
        content = np.full(len(zero), -1, np.int64)
        content[~zero] = contents.page
    else:
        contents = join(pages.digest, pages.target, stable, sort)
        content = contents.page
    decided = _planned_runs(pages, content, contents, stable, budgets)
    zeros = cut_long(stretches_in(zero, pages.joins & zero))
    unshared = np.bincount(pages.target[(content < 0) & ~zero], minlength=len(budgets))
    return Plan(pages, stable, *decided[:-1], zeros, decided[-1], unshared)


def _planned_runs(
    pages: Pages, content: I64, contents: Contents, stable: StableTree, budgets: I64
) -> Decided:
    """What `decide` says of all pages, from those alone that have an equal."""
    index = np.flatnonzero(content >= 0)
    if 4 * len(index) > 3 * len(content):
        return decide(pages, *lay_out(pages, content, contents, stable), budgets)
    some = _take(pages, index)
    decided = decide(some, *lay_out(some, content[index], contents, stable), budgets)
    runs = decided[0]
    # A run has no gaps: its first page alone tells where it is among all of them.
    return Runs(index[runs.first], runs.pages, runs.slot), *decided[1:]


def _take(pages: Pages, index: I64) -> Pages:
    """The pages `index`, ascending; neighbours are those that were."""
    joins = pages.joins[index]
    joins[1:] &= np.diff(index) == 1
    joins[:1] = False
    return Pages(
        pages.target[index],
        pages.address[index],
        pages.digest[index],
        pages.kind[index],
        joins,
        pages.watched[index],
        taken(pages.node, index),
    )
