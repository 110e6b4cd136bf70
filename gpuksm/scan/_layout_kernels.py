"""The planner's sequential loops, compiled: giving slots to pages, and spending VMA budgets.

Each is one pass over columns the planner has prepared; what they decide and why
is told in gpuksm/scan/planner.py.
"""

from __future__ import annotations

from typing import Any

from gpuksm.hashing._jit import kernel

# How many slots of one content are looked at for the one that goes on best.
_PROBES = 16
# Pages of a match that are counted when a match is weighed against a copy.
_LOOK_AHEAD = 64


@kernel(
    "int64(int64[::1], boolean[::1], int64[::1], float64, int64, int64, int64[::1], boolean[::1], "
    "int64[::1], int64[::1], int64[::1], int64[::1])"
)
def assign_slots(
    content: Any,
    joins: Any,
    pair_count: Any,
    vma_pages: Any,
    max_copies: Any,
    first_new: Any,
    slot_content: Any,
    slot_last: Any,
    first_slot: Any,
    next_slot: Any,
    copies: Any,
    page_slot: Any,
) -> Any:
    """Give every page with a content a slot; returns the number of slots then in use.

    Pages come in order of target and address; joins[g]: page g follows page g-1
    in the same region.  Slots below `first_new` exist already.  `first_slot`
    (by content) and `next_slot` (by slot) chain the slots of a content.
    """
    top = first_new
    previous = -1
    made_previous = False
    pages = len(content)
    for g in range(pages):
        c = content[g]
        if not joins[g]:
            previous = -1
        if c < 0:
            page_slot[g] = -1
            previous = -1
            continue
        at = -1
        make = False
        if previous >= 0 and not slot_last[previous] and slot_content[previous + 1] == c:
            at = previous + 1
        elif first_slot[c] < 0:
            make = True
        else:
            best_length = 0
            probe = first_slot[c]
            for _ in range(_PROBES):
                length = 1
                while (
                    length < _LOOK_AHEAD
                    and g + length < pages
                    and joins[g + length]
                    and not slot_last[probe + length - 1]
                    and slot_content[probe + length] == content[g + length]
                ):
                    length += 1
                if length > best_length:
                    best_length = length
                    at = probe
                probe = next_slot[probe]
                if probe < 0 or best_length >= _LOOK_AHEAD:
                    break
            # A copy in line costs its pages once; breaking the run costs every
            # process that has the same pair of pages two mappings.
            make = (
                previous == top - 1
                and previous >= 0
                and made_previous
                and copies[c] < max_copies
                and best_length < pair_count[g] * 2.0 * vma_pages
            )
        if make:
            at = top
            top += 1
            slot_content[at] = c
            slot_last[at] = True
            next_slot[at] = first_slot[c]
            first_slot[c] = at
            copies[c] += 1
            if previous == at - 1 and previous >= first_new and made_previous:
                slot_last[previous] = False
        page_slot[g] = at
        previous = at
        made_previous = make
    return top


@kernel(
    "void(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, boolean[::1], float64, "
    "int64[::1], boolean[::1], int64[::1], int64[::1])"
)
def spend_budgets(
    lot_first: Any,
    lot_pages: Any,
    run_target: Any,
    run_pages: Any,
    run_useful: Any,
    vmas_per_run: Any,
    lot_replica: Any,
    vma_pages: Any,
    budget: Any,
    kept: Any,
    filler: Any,
    refused: Any,
) -> None:
    """Decide lot by lot (in this order) which runs are made.

    Runs lot_first[i] .. lot_first[i+1]-1 belong to lot i, whose new extent has
    lot_pages[i] slots (0: its slots exist already).  A run is kept while its
    target has budget; a lot when somebody fills it and it saves more than it
    costs.  Writes kept[run], filler[lot] (a run, or -1) and refused[run]: 1
    where the budget did not allow it, 2 where it would not have paid.
    """
    for lot in range(len(lot_pages)):
        first, end = lot_first[lot], lot_first[lot + 1]
        needed = lot_pages[lot]
        fill = -1
        gain = -float(needed)
        short = False
        for run in range(first, end):
            if vmas_per_run > budget[run_target[run]]:
                refused[run] = 1
                short = True
                continue
            if run_useful[run] <= 0:
                refused[run] = 2
                continue
            kept[run] = True
            budget[run_target[run]] -= vmas_per_run
            gain += run_useful[run] - vma_pages * vmas_per_run
            if fill < 0 and (run_pages[run] == needed or lot_replica[lot]):
                fill = run
        if gain <= 0 or (needed > 0 and fill < 0):
            for run in range(first, end):
                if kept[run]:
                    kept[run] = False
                    budget[run_target[run]] += vmas_per_run
                    refused[run] = 1 if short else 2
            fill = -1
        filler[lot] = fill
