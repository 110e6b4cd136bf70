"""Spends VMA budgets: which lots and which of their runs are made (step 4 of the planner)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.compiled import library
from gpuksm.scan.columns import I64, heads
from gpuksm.scan.runs import KERNELS, VMA_PAGES, Layout, Pages, Runs, ends_well, followed

VMAS_PER_RUN = 2
# Runs, and lots, slot, pages, filler, replica, skipped, as `Plan` has them.
Decided = tuple[Runs, I64, I64, I64, I64, NDArray[np.bool_], list[dict[str, int]]]


def decide(pages: Pages, layout: Layout, runs: Runs, budgets: I64) -> Decided:
    """Choose lots and runs within the budgets; see `Plan` for what comes out."""
    ends = np.flatnonzero(layout.last[layout.first_new :]) + layout.first_new
    begins = np.concatenate(([layout.first_new], ends[:-1] + 1)) if len(ends) else ends
    new = runs.slot >= layout.first_new
    lot = np.empty(len(runs), np.int64)
    lot[new] = np.searchsorted(ends, runs.slot[new])
    old = np.flatnonzero(~new)
    lot[old] = len(ends) + np.arange(len(old))
    slot = np.concatenate((begins, runs.slot[old]))
    size = np.concatenate((ends - begins + 1, np.zeros(len(old), np.int64)))
    length = np.concatenate((ends - begins + 1, runs.pages[old]))
    replica = np.concatenate((ends < layout.first_cuttable, np.zeros(len(old), np.bool_)))

    by_length = np.argsort(-length, kind="stable")
    rank = np.empty(len(by_length), np.int64)
    rank[by_length] = np.arange(len(by_length))
    order = np.lexsort((runs.first, rank[lot]))
    runs, lot_rank = runs.take(order), rank[lot[order]]
    target = pages.target[runs.first].astype(np.int64)
    lost = ~layout.last[runs.slot + runs.pages - 1] & ~ends_well(runs, pages)
    kept = np.zeros(len(runs), np.bool_)
    filler = np.full(len(length), -1, np.int64)
    refused = np.zeros(len(runs), np.int64)
    library(KERNELS).spend_budgets(
        np.searchsorted(lot_rank, np.arange(len(length) + 1)),
        size[by_length],
        target,
        runs.pages,
        runs.pages - lost,
        VMAS_PER_RUN,
        replica[by_length],
        VMA_PAGES,
        _to_spend(pages, runs, target, budgets),
        kept,
        filler,
        refused,
    )
    skipped = _count_refused(target, runs.pages, refused, len(budgets))

    # What is left, lots in the order of their first page: neighbours are committed together.
    keep = np.flatnonzero(kept)
    new_index = np.cumsum(kept) - 1
    ranks = lot_rank[keep]
    head = heads(ranks)
    alive = ranks[head]
    by_place = np.argsort(runs.first[keep][head], kind="stable")
    alive = alive[by_place]
    lot_of_rank = np.zeros(len(length), np.int64)
    lot_of_rank[alive] = np.arange(len(alive))
    chosen = by_length[alive]
    fill = filler[alive]
    return (
        runs.take(keep),
        lot_of_rank[ranks],
        slot[chosen],
        size[chosen],
        np.where(size[chosen] > 0, new_index[np.maximum(fill, 0)], -1),
        replica[chosen],
        skipped,
    )


def _to_spend(pages: Pages, runs: Runs, target: I64, budgets: I64) -> I64:
    """VMAs each target may spend: its budget, or without end where it can pay for all its runs.

    A run splits what it lies in: one VMA for itself and one for what is behind
    it, unless the next run is.  That is counted here; where the budget is short
    every run is taken to cost two, as its neighbours may not be made.
    """
    vmas = VMAS_PER_RUN - followed(runs, pages.joins).astype(np.int64)
    needed = np.bincount(target, vmas, len(budgets))
    return np.where(needed <= budgets, np.int64(1) << 60, budgets)


def _count_refused(target: I64, count: I64, refused: I64, targets: int) -> list[dict[str, int]]:
    skipped: list[dict[str, int]] = [{} for _ in range(targets)]
    for code, reason in ((1, "vma-budget"), (2, "unprofitable")):
        chosen = refused == code
        for index, total in enumerate(np.bincount(target[chosen], count[chosen], targets)):
            if total:
                skipped[index][reason] = int(total)
    return skipped
