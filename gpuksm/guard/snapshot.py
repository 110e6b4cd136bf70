"""What still holds of all that the journal was told, for writing it anew.

What must hold: a successor that replays this knows what it would know from all that was ever
appended.  Where that cannot be said in a few records (a process is being taken over, a target is
parked or has memory to be wiped) the journal stays as it is until it can.  What is merged where is not
in it: a successor looks at that itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpuksm.guard.journal import (
    ADVICE,
    BORDER,
    COREDUMP,
    DIGESTS,
    EXTENT,
    FILTERS,
    NEXT,
    REGISTER,
    TARGET,
    Record,
)

if TYPE_CHECKING:
    from gpuksm.guard.guard import Guard

_BREATHE_BYTES = 4 << 20


def renew(guard: Guard) -> None:
    """Write ledger and private log anew where they have grown; between two requests.

    Where memory is short they stay as they are.
    """
    journal = guard.journal
    with contextlib.suppress(OSError):
        if journal.ledger_has_grown and _is_plain(guard):
            journal.renew_ledger(_ledger(guard))
        if journal.private_has_grown:
            journal.renew_private(_private(guard))


def _is_plain(guard: Guard) -> bool:
    targets = guard.targets.values()
    return not guard.orphans and not any(target.parked or target.unwiped for target in targets)


def _ledger(guard: Guard) -> Iterator[Record]:
    for start, slots, user, node in guard.store.owners():
        yield Record(EXTENT, node, start, slots, user)
    # Behind the extents, of which the last may be gone: its slots are not used again.
    yield Record(NEXT, 0, guard.store.next_slot, 0, 0)
    for target in guard.targets.values():
        yield Record(TARGET, target.id, target.pid, target.start_time, target.link.code)
        if target.coredump_filter is not None:
            yield Record(COREDUMP, target.id, target.coredump_filter, 0, 0)
        if target.link.agent.filters:
            yield Record(FILTERS, target.id, target.link.agent.filters, 0, 0)
        for start, end, bits in target.advice:
            yield Record(ADVICE, target.id, start, end, bits)
        for page in target.borders:
            yield Record(BORDER, target.id, page, 0, 0)


def _private(guard: Guard) -> Iterator[Record]:
    for pid, start, end in guard.registry.entries():
        yield Record(REGISTER, 0, pid, start, end)
    written = 0
    extents = guard.store.extents()
    for (start, slots, digests), following in itertools.zip_longest(extents, extents[1:]):
        yield Record(DIGESTS, 0, start, slots, 0, digests)
        written += len(digests)
        if written > _BREATHE_BYTES and following is not None:
            written = 0
            guard.breathe()  # serves events, of which nothing private is told
