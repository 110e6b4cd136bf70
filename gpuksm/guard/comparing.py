"""What of a plan may be mapped: each page that equals its slot, as far as its user may have that slot.

Comparing is begun, and finished later: where there are comparers it goes on beside what the guard does
meanwhile with the portion before.  What must hold is what verify.py says, and that a page is compared only
once it is known that nobody else holds it (pins.py); nothing is changed here.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator
from typing import Protocol

from gpuksm import wire
from gpuksm.guard import chains, comparer, faults
from gpuksm.guard.chains import Chain
from gpuksm.guard.commit import Outcome
from gpuksm.guard.comparers import JOB_PAGES, Comparers, Job
from gpuksm.guard.pins import free_pages, free_parts
from gpuksm.guard.request import Planned
from gpuksm.guard.store import Store
from gpuksm.guard.target import Target
from gpuksm.guard.verify import CHUNK_PAGES, Piece
from gpuksm.linux._libc import PAGE_SIZE


class Host(Protocol):
    """What comparing needs of the guard."""

    store: Store
    targets: dict[int, Target]
    comparers: Comparers

    def breathe(self) -> None: ...
    def drop(self, target: Target) -> None: ...


def begin_pieces(
    host: Host, portion: list[Planned], filled: dict[int, list[Piece]], outcome: Outcome
) -> Callable[[], dict[int, list[Piece]]]:
    """Begin to compare what `portion` wants mapped; what is called for all that is equal, by target.

    What slots were `filled` from is equal to them.
    """
    wanted = _wanted(host, portion, outcome)
    tids: dict[int, int] = {}
    for number in list(wanted):
        target = host.targets.get(number)
        if target is None:
            outcome.skip("gone", sum(piece.pages for piece in wanted.pop(number)))
        else:
            tids[number] = target.link.agent.tid
    jobs = _jobs(tids, wanted) if len(host.comparers) else [Job(comparer.PIECES, tids, wanted)]
    if len(jobs) > 1:
        host.comparers.begin(jobs)

    def finish() -> dict[int, list[Piece]]:
        host.comparers.finish(jobs, host.breathe)
        for number, mine in wanted.items():
            found = [job.answer[number] for job in jobs if number in job.answer]
            if any(parts is None for parts in found):
                if number in host.targets:
                    host.drop(host.targets[number])
                continue
            equal = [piece for parts in found for piece in parts]
            outcome.skip("differs", sum(p.pages for p in mine) - sum(p.pages for p in equal))
            filled.setdefault(number, []).extend(_joined(sorted(equal, key=lambda piece: piece.addr)))
        faults.point("verified")
        return filled

    return finish


def begin_chains(
    host: Host, wanted: dict[int, list[Chain]], outcome: Outcome
) -> Callable[[], dict[int, list[Chain]]]:
    """Begin to compare the chains of each target; what is called for their equal parts."""
    todo: list[tuple[int, Chain, array[int]]] = []
    parts: list[comparer.Part] = []  # one or several for each of them
    for number, mine in wanted.items():
        target = host.targets.get(number)
        if target is None:
            outcome.skip("gone", sum(len(chain.slots) for chain in mine))
            continue
        for chain in mine:
            numbers, slots = chains.allowed(host.store, target.user, chain, outcome.skip)
            numbers, slots = free_pages(target, chain.addr, len(chain.slots), numbers, slots, outcome.skip)
            todo.append((number, chain, numbers))
            for low in range(0, len(numbers), JOB_PAGES):
                some = slice(low, low + JOB_PAGES)
                parts.append((target.link.agent.tid, chain.addr, numbers[some], slots[some]))
            host.breathe()
    jobs = [Job(comparer.PAGES, some) for some in _shares(parts)]
    if len(jobs) > 1:
        host.comparers.begin(jobs)

    def finish() -> dict[int, list[Chain]]:
        host.comparers.finish(jobs, host.breathe)
        answers = (answer for job in jobs for answer in job.answer)
        equal: dict[int, list[Chain]] = {number: [] for number, _, _ in todo}
        for number, chain, numbers in todo:
            found = list(itertools.islice(answers, -(-len(numbers) // JOB_PAGES)))
            if None in found:
                if number in host.targets:
                    host.drop(host.targets[number])
                equal.pop(number, None)
            if number not in equal:
                continue
            same = bytearray(len(chain.slots))
            for page, one in zip(numbers, b"".join(found), strict=True):
                same[page] = one
            outcome.skip("differs", len(numbers) - same.count(1))
            equal[number] += chain.parts(same)
        faults.point("verified")
        return equal

    return finish


def _shares(parts: list[comparer.Part]) -> Iterator[list[comparer.Part]]:
    """`parts` in their order, as many pages together as make a job."""
    share: list[comparer.Part] = []
    pages = 0
    for part in parts:
        share.append(part)
        pages += len(part[2])
        if pages >= JOB_PAGES:
            yield share
            share, pages = [], 0
    if share:
        yield share


def _wanted(host: Host, portion: list[Planned], outcome: Outcome) -> dict[int, list[Piece]]:
    """What is to be compared of `portion`, by target: with slots that it may have, or with zeros."""
    wanted: dict[int, list[Piece]] = {}
    first, end, user = 0, 0, None  # the extent of the record before
    for item in portion:
        if item.op == wire.OP_MAP:
            if not first <= item.slot < end:
                first, count = host.store.extent_of(item.slot) or (0, 0)
                end, user = first + count, host.store.user_of(item.slot)
            if item.slot + item.pages > end:
                outcome.skip("slot-freed", item.pages)  # its last mapping went after the plan was made
                continue
            target = host.targets.get(item.target)
            if target is not None and target.user != user:
                outcome.skip("other-user", item.pages)
                continue
            wanted.setdefault(item.target, []).append(Piece(item.record, item.addr, item.pages, item.slot))
        elif item.op == wire.OP_ZERO:
            wanted.setdefault(item.target, []).append(Piece(item.record, item.addr, item.pages, None))
    for number, pieces in wanted.items():
        target = host.targets.get(number)
        if target is not None and target.references is not None:
            wanted[number] = [part for piece in pieces for part in free_parts(target, piece, outcome.skip)]
    return wanted


def _jobs(tids: dict[int, int], wanted: dict[int, list[Piece]]) -> list[Job]:
    """Jobs of some pages each; all that wants one chunk of slots is in one, so that it is read once."""
    windows: dict[int, dict[int, list[Piece]]] = {}
    for number, pieces in wanted.items():
        for piece in pieces:
            for window, part in _cut(piece):
                windows.setdefault(window, {}).setdefault(number, []).append(part)
    jobs: list[Job] = []
    share: dict[int, list[Piece]] = {}
    pages = 0
    for window in sorted(windows):
        for number, parts in windows[window].items():
            share.setdefault(number, []).extend(parts)
            pages += sum(part.pages for part in parts)
        if pages >= JOB_PAGES:
            jobs.append(Job(comparer.PIECES, tids, share))
            share, pages = {}, 0
    return [*jobs, Job(comparer.PIECES, tids, share)]


def _cut(piece: Piece) -> Iterator[tuple[int, Piece]]:
    """Parts of `piece` by chunk of slots; of one that is to be zeros, by address, in numbers below 0."""
    at, pages_of = 0, CHUNK_PAGES if piece.slot is not None else JOB_PAGES
    first = piece.addr // PAGE_SIZE if piece.slot is None else piece.slot
    while at < piece.pages:
        window, behind = divmod(first + at, pages_of)
        count = min(pages_of - behind, piece.pages - at)
        slot = None if piece.slot is None else piece.slot + at
        part = Piece(piece.record, piece.addr + at * PAGE_SIZE, count, slot)
        yield (-1 - window if slot is None else window), part
        at += count


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring parts of one record as one piece again."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.record == piece.record
            and last.end == piece.addr
            and (piece.slot is None or (last.slot is not None and last.slot + last.pages == piece.slot))
        ):
            joined[-1] = last._replace(pages=last.pages + piece.pages)
        else:
            joined.append(piece)
    return joined
