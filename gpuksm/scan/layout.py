"""Gives every page that has an equal a slot and gathers runs (steps 1 to 3 of the planner); drops nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.compiled import library
from gpuksm.hashing.sort import radix_sort
from gpuksm.scan.columns import I64, ranges_within
from gpuksm.scan.runs import (
    KERNELS,
    MAX_COPIES,
    MAX_EXTENT_PAGES,
    TRADE_PAGES,
    Layout,
    Pages,
    Runs,
    ends_well,
    stretches_in,
)
from gpuksm.scan.trees import Contents, StableTree

MIN_STRETCH = 4  # shorter repetitions are not worth a replica


def lay_out(pages: Pages, content: I64, contents: Contents, stable: StableTree) -> tuple[Layout, Runs]:
    """Give every page with a content a slot, and gather the runs; nothing is dropped yet."""
    first_new = len(stable.slot)
    joined = np.zeros(len(content), np.bool_)
    joined[1:] = pages.joins[1:] & (content[1:] == content[:-1]) & (content[1:] >= 0)
    stretch = stretches_in(content >= 0, joined)
    stretch = stretch.take(stretch.pages >= MIN_STRETCH)
    replica_size, replica_end, replica_content = _replicas(content, contents, stretch, stable)
    first_cuttable = first_new + int(replica_size[replica_end >= first_new].sum())

    walked = content.copy()
    walked[np.repeat(stretch.first, stretch.pages) + ranges_within(stretch.pages)] = -1
    room = first_cuttable + int((walked >= 0).sum())
    slot_content = np.full(room, -1, np.int64)
    slot_last = np.zeros(room, np.bool_)
    first_slot = np.full(contents.count, -1, np.int64)
    next_slot = np.full(room, -1, np.int64)
    copies = np.zeros(contents.count, np.int64)

    slot_content[:first_new], slot_last[:first_new] = contents.slot, stable.last
    _chain_stable(contents.slot, stable.last, first_slot, next_slot, copies)
    new = np.flatnonzero(replica_end >= first_new)
    of_new = np.repeat(new, replica_size[new])
    slot_content[first_new:first_cuttable] = replica_content[of_new]
    slot_last[replica_end[new]] = True
    # A single page of a replicated content goes to the replica's last slot: its run ends with the extent.
    next_slot[replica_end[new]] = first_slot[replica_content[new]]
    first_slot[replica_content] = replica_end
    copies[replica_content] = replica_size

    page_slot = np.empty(len(content), np.int64)
    top = library(KERNELS).assign_slots(
        walked,
        pages.joins,
        _pair_counts(walked, pages.joins, contents),
        TRADE_PAGES,
        MAX_COPIES,
        first_cuttable,
        slot_content,
        slot_last,
        first_slot,
        next_slot,
        copies,
        page_slot,
    )
    layout = Layout(slot_last[:top].copy(), first_new, first_cuttable)
    follows = np.zeros(len(content), np.bool_)
    before = page_slot[:-1]
    ended = np.append(layout.last, True)[before]  # -1, no slot, picks the one appended
    follows[1:] = pages.joins[1:] & ~ended & (page_slot[1:] == before + 1)
    runs = stretches_in(page_slot >= 0, follows)
    runs = Runs(runs.first, runs.pages, page_slot[runs.first])
    size_of = np.zeros(contents.count, np.int64)
    end_of = np.zeros(contents.count, np.int64)
    size_of[replica_content], end_of[replica_content] = replica_size, replica_end
    chunks = _replica_runs(stretch, size_of[content[stretch.first]], end_of[content[stretch.first]])
    runs = Runs(
        np.concatenate((runs.first, chunks.first)),
        np.concatenate((runs.pages, chunks.pages)),
        np.concatenate((runs.slot, chunks.slot)),
    )
    return layout, _cut_extents(layout, runs, ends_well(runs, pages))


def _replicas(content: I64, contents: Contents, stretch: Runs, stable: StableTree) -> tuple[I64, I64, I64]:
    """(slots, dense number of the last slot, content) of the replica of every content with stretches.

    New replicas are numbered behind the stable slots, in order of content.
    """
    of = content[stretch.first]
    total = np.bincount(of, stretch.pages, contents.count).astype(np.int64)
    longest = np.zeros(contents.count, np.int64)
    np.maximum.at(longest, of, stretch.pages)
    used = np.flatnonzero(total)
    wanted = np.ceil(np.sqrt(total[used])).astype(np.int64)
    size = np.minimum(np.minimum(wanted, longest[used]), MAX_COPIES)

    # A replica of an earlier round: equal stable slots up to the end of their extent.
    same = np.zeros(len(contents.slot), np.bool_)
    same[1:] = (contents.slot[1:] == contents.slot[:-1]) & ~stable.last[:-1]
    held = stretches_in(contents.slot >= 0, same)
    held_end = held.first + held.pages - 1
    whole = stable.last[held_end] if len(held) else np.zeros(0, np.bool_)
    old_size = np.zeros(contents.count, np.int64)
    old_end = np.zeros(contents.count, np.int64)
    order = np.flatnonzero(whole)[np.argsort(held.pages[whole], kind="stable")]
    old_size[contents.slot[held_end[order]]] = held.pages[order]
    old_end[contents.slot[held_end[order]]] = held_end[order]

    take_old = 2 * old_size[used] >= size
    new_size = np.where(take_old, 0, size)
    end = np.where(take_old, old_end[used], len(stable.slot) + np.cumsum(new_size) - 1)
    return np.where(take_old, old_size[used], size), end, used


def _replica_runs(stretch: Runs, size: I64, end: I64) -> Runs:
    """Cut stretches into runs of the replica's size, the shorter one first; each ends at its end."""
    rest = stretch.pages % size
    counts = stretch.pages // size + (rest > 0)
    number = ranges_within(counts)
    rest, size, end = np.repeat(rest, counts), np.repeat(size, counts), np.repeat(end, counts)
    short = (number == 0) & (rest > 0)
    pages = np.where(short, rest, size)
    first = np.repeat(stretch.first, counts) + np.where(short, 0, rest + (number - (rest > 0)) * size)
    return Runs(first, pages, end - pages + 1)


def _chain_stable(
    slot_content: I64, last: NDArray[np.bool_], first_slot: I64, next_slot: I64, copies: I64
) -> None:
    """Chain the stable slots of each content; those that end an extent come first."""
    held = np.flatnonzero(slot_content >= 0)
    if not len(held):
        return
    held = held[np.lexsort((~last[held], slot_content[held]))]
    what = slot_content[held]
    same = what[1:] == what[:-1]
    next_slot[held[:-1][same]] = held[1:][same]
    heads = np.concatenate(([True], ~same))
    first_slot[what[heads]] = held[heads]
    np.add.at(copies, what, 1)


def _pair_counts(content: I64, joins: NDArray[np.bool_], contents: Contents) -> I64:
    """For pages whose content comes back in a target: how often the pair (predecessor, page) occurs."""
    result = np.zeros(len(content), np.int64)
    asked = np.zeros(len(content), np.bool_)
    asked[1:] = joins[1:] & (content[1:] >= 0) & (content[:-1] >= 0)
    asked[asked] = contents.repeats[content[asked]]
    at = np.flatnonzero(asked)
    if len(at):
        # Fewer than 2^32 pages, so fewer contents: a pair fits in 64 bits.
        pair = (content[at - 1].astype(np.uint64) << np.uint64(32)) | content[at].astype(np.uint64)
        ordered, order = radix_sort(pair)
        new = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        sizes = np.diff(np.append(new, len(ordered)))
        result[at[order]] = np.repeat(sizes, sizes)
    return result


def _cut_extents(layout: Layout, runs: Runs, safe: NDArray[np.bool_]) -> Runs:
    """End extents where runs end, where that pays, and at MAX_EXTENT_PAGES; returns the runs cut alike.

    The end of a `safe` run costs nothing, as merged memory lies behind it.
    """
    base = layout.first_cuttable
    slots = len(layout.last) - base
    mine = runs.slot >= base
    begin = runs.slot[mine] - base
    finish = begin + runs.pages[mine] - 1
    if slots:
        ends = np.bincount(finish, minlength=slots)
        across = np.cumsum(np.bincount(begin, minlength=slots) - ends)
        last = layout.last[base:]
        starts = np.concatenate(([True], last[:-1]))
        start_of = np.maximum.accumulate(np.where(starts, np.arange(slots), 0))
        too_long = (np.arange(slots) - start_of) % MAX_EXTENT_PAGES == MAX_EXTENT_PAGES - 1
        losses = np.bincount(finish[~safe[mine]], minlength=slots)
        last |= (losses > TRADE_PAGES * across) | too_long
    if not len(runs):
        return runs

    cuts = np.flatnonzero(layout.last)
    final = runs.slot + runs.pages - 1
    skip = np.searchsorted(cuts, runs.slot)
    counts = np.searchsorted(cuts, final) - skip + 1
    number = ranges_within(counts)
    at = np.repeat(skip, counts) + number
    whole_slot, whole_final = np.repeat(runs.slot, counts), np.repeat(final, counts)
    slot = np.where(number == 0, whole_slot, cuts[np.maximum(at - 1, 0)] + 1)
    stop = np.minimum(cuts[at], whole_final)
    first = np.repeat(runs.first, counts) + slot - whole_slot
    return Runs(first, stop - slot + 1, slot)
