"""Carrying out a commit plan: fill the new extents, verify every record, commit target by target.

A plan may be of any size; it is carried out in portions of some 64 MiB of new slots,
so that the store never gets far ahead of the memory that is freed.  Where comparers help, portions are
smaller, and one is filled, and comparing it begun, before what was begun before it is mapped.

The plan comes from the scanner, which is not trusted: every number in it is
checked (request.py), and every page is compared before it is mapped.
"""

from __future__ import annotations

import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

from gpuksm import wire
from gpuksm.errors import TargetGone
from gpuksm.guard import chain_commit, comparing, faults, headroom, journal, request, verify
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.chains import Chain
from gpuksm.guard.commit import Budget, Committer, Outcome, intersect
from gpuksm.guard.freeze import FreezeFailed
from gpuksm.guard.pace import Pace
from gpuksm.guard.pins import Pins, free_parts
from gpuksm.guard.request import FILLS, Planned
from gpuksm.guard.restore import FrozenContext, RestoreFailed, block_growth, fix_ends, is_loose
from gpuksm.guard.store import NOBODY, Store
from gpuksm.guard.target import Target
from gpuksm.guard.turns import take_turns
from gpuksm.guard.verify import Piece
from gpuksm.linux._libc import PAGE_SIZE

_WINDOW_PAGES = 1 << 14
_WINDOW_BESIDE = 1 << 13  # where others compare meanwhile: what they compare is mapped, and the next filled
_CHAIN_PAGES = 1 << 13

_Item = TypeVar("_Item", bound=Piece | Chain)
_Equal = TypeVar("_Equal")
_Steps: TypeAlias = Callable[[Committer, Target, list[_Item]], Iterator[float]]


class Host(comparing.Host, Protocol):
    """What a commit needs of the guard."""

    journal: journal.Journal
    pace: Pace
    pins: Pins
    pauses_us: list[int]

    @property
    def frozen(self) -> FrozenContext: ...


@dataclass
class Result:
    """Outcome of a commit and pages merged per plan record (`<u4` column)."""

    outcome: Outcome
    column: bytes
    vmas: dict[int, int]


def execute(host: Host, extents: int, records: int, payload: bytes | bytearray, max_pause_us: int) -> Result:
    """Carry out a plan; UsageError when it is malformed (nothing was done then)."""
    new, plan, column = request.parse(extents, records, payload)
    starts, unplaced = _allocate(host, new, plan)
    planned, wanted = request.resolve(plan, starts, column)
    _remember(host, planned, column)
    window = _WINDOW_BESIDE if len(host.comparers) else _WINDOW_PAGES
    cut = _cut_to_windows(planned, window)
    commits = _Commits(host, max_pause_us, _going_on(cut, wanted), _looked_at(host, planned, wanted))
    outcome = commits.outcome
    try:
        for pieces in _finished(
            host, (_begin(host, some, unplaced, outcome) for some in _portions(cut, window))
        ):
            commits.of(pieces, Committer.steps)
        for equal in _finished(
            host, (comparing.begin_chains(host, some, outcome) for some in _chain_portions(wanted))
        ):
            commits.of(equal, chain_commit.steps)
    finally:  # what has been mapped ends well, whatever has come between
        _settle(host, commits.spans)
    host.pauses_us.extend(outcome.pauses_us)
    del host.pauses_us[:-100_000]
    merged = struct.pack(f"<{len(plan)}I", *(outcome.merged.get(i, 0) for i in range(len(plan))))
    vmas = {number: len(host.targets[number].runs) for number in commits.spans if number in host.targets}
    return Result(outcome, merged, vmas)


def _looked_at(host: Host, planned: list[Planned], wanted: list[tuple[int, Chain]]) -> set[int]:
    """Those targets of a plan of which each page is looked at whether somebody holds it."""
    numbers = {item.target for item in planned} | {number for number, _ in wanted}
    targets = [host.targets[number] for number in numbers if number in host.targets]
    for target in targets:
        host.pins.review(target)  # what may not be replaced at all is refused later
    return {target.id for target in targets if target.references is not None}


def _allocate(
    host: Host, new: list[tuple[int, int]], records: list[tuple[int, ...]]
) -> tuple[list[int], set[int]]:
    """First slots of the new extents, and of those whose memory cannot be taken from their node.

    Each belongs to the user whose process fills it first.
    """
    users: dict[int, int] = {}
    pages: dict[int, int] = {}
    for op, flags, _, target, addr, _, extent, slot, *_ in records:
        if op in FILLS and flags & wire.FLAG_NEW_EXTENT and target in host.targets:
            users.setdefault(extent, host.targets[target].user)
            pages.setdefault(extent, addr // PAGE_SIZE - slot)
    starts = []
    for index, (count, node) in enumerate(new):
        user = users.get(index, NOBODY)
        start = host.store.allocate(count, user, pages.get(index, 0), node)
        host.journal.append(journal.EXTENT, node, start, count, user)
        starts.append(start)
    return starts, host.store.place(starts) if any(node for _, node in new) else set()


def _remember(host: Host, planned: list[Planned], digests: bytes) -> None:
    """Keep the digests of new slots for the next scanner's stable tree; nothing else relies on them."""
    columns: dict[int, bytearray] = {}
    for item in planned:
        if item.op not in FILLS or item.extent is None:
            continue
        whole = columns.setdefault(item.extent, bytearray(host.store.digests_of(item.extent)))
        if item.op == wire.OP_FILL_REPLICA:
            column = struct.pack("<Q", item.digest) * item.pages
        else:
            column = _column(item, digests)
        at = (item.slot - item.extent) * 8
        whole[at : at + len(column)] = column
    for start, whole in columns.items():
        host.store.set_digests(start, 0, bytes(whole))
        host.journal.append(journal.DIGESTS, 0, start, len(whole) // 8, column=bytes(whole))


def _begin(
    host: Host, portion: list[Planned], unplaced: set[int], outcome: Outcome
) -> Callable[[], dict[int, list[Piece]]]:
    """Fill what `portion` fills and begin to compare the rest; what is called for all that is equal."""
    filled: dict[int, list[Piece]] = {}
    _fill(host, portion, filled, unplaced, outcome)
    return comparing.begin_pieces(host, portion, filled, outcome)


def _finished(host: Host, begun: Iterator[Callable[[], _Equal]]) -> Iterator[_Equal]:
    """What is `begun`, finished: at once, or, where others compare, when the next has begun as well."""
    waiting: deque[Callable[[], _Equal]] = deque()
    for finish in begun:
        waiting.append(finish)
        if len(waiting) > 1 or not len(host.comparers):
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _cut_to_windows(planned: list[Planned], window: int) -> list[Planned]:
    """Records of new extents cut at multiples of `window` pages within their extent."""
    parts: list[Planned] = []
    for item in planned:
        if item.extent is None or item.op == wire.OP_FILL_REPLICA:
            parts.append(item)
            continue
        if (item.slot - item.extent) % window + item.pages <= window:
            parts.append(item)
            continue
        at = 0
        while at < item.pages:
            in_window = window - (item.slot + at - item.extent) % window
            pages = min(in_window, item.pages - at)
            parts.append(
                item._replace(
                    addr=item.addr + at * PAGE_SIZE,
                    pages=pages,
                    slot=item.slot + at,
                    continued=at + pages < item.pages,
                )
            )
            at += pages
    return parts


def _portions(parts: list[Planned], window: int) -> Iterator[list[Planned]]:
    """Groups of parts to be carried out one after the other; what is filled comes before what maps it."""
    ordered = sorted(parts, key=lambda part: (_window(part, window), part.op not in FILLS))
    portion: list[Planned] = []
    filled = 0
    for index, part in enumerate(ordered):
        portion.append(part)
        filled += part.pages if part.op in FILLS else 0
        last = index + 1 == len(ordered)
        if last or (filled >= window and _window(ordered[index + 1], window) != _window(part, window)):
            yield portion
            portion, filled = [], 0


def _going_on(cut: list[Planned], wanted: list[tuple[int, Chain]]) -> dict[int, set[int]]:
    """For each target where pieces end behind which a later portion will map more."""
    ends: dict[int, set[int]] = {}
    for part in cut:
        if part.continued:
            ends.setdefault(part.target, set()).add(part.end)
    for number, chain in wanted:
        ends.setdefault(number, set()).add(chain.addr)
    return ends


def _chain_portions(wanted: list[tuple[int, Chain]]) -> Iterator[dict[int, list[Chain]]]:
    """The chains of all targets by address, some of each at a time: what is compared is soon mapped."""
    left: dict[int, list[Chain]] = {}
    for number, chain in sorted(wanted, key=lambda item: (item[0], -item[1].addr)):
        left.setdefault(number, []).append(chain)
    while left:
        portion: dict[int, list[Chain]] = {}
        for number, mine in list(left.items()):
            pages = 0
            while mine and pages < _CHAIN_PAGES:
                chain = mine.pop()
                pages += len(chain.slots)
                portion.setdefault(number, []).append(chain)
            if not mine:
                del left[number]
        yield portion


def _window(part: Planned, window: int) -> tuple[int, int]:
    if part.extent is None:
        return (-1, 0)
    return (part.extent, (part.slot - part.extent) // window)


def _fill(
    host: Host, portion: list[Planned], pieces: dict[int, list[Piece]], unplaced: set[int], outcome: Outcome
) -> None:
    filled, extents, before = 0, set[int](), host.store.used_bytes()
    room = headroom.store_pages()
    empty: list[Planned] = []
    for item in portion:
        if item.op not in FILLS:
            continue
        target = host.targets.get(item.target)
        if target is None or item.extent is None:
            empty.append(item)
            continue
        reason = _not_filled(host.store, item, target, room, unplaced)
        if reason is not None:
            outcome.skip(reason, item.pages)
            empty.append(item)
            continue
        room -= item.pages
        tid = target.link.agent.tid
        extents.add(item.extent)
        done, mine = 0, list[Piece]()
        try:
            if item.op == wire.OP_FILL_REPLICA:
                done = verify.fill_replica(host.store, tid, item.addr, item.pages, item.slot)
            else:
                whole = Piece(item.record, item.addr, item.pages, item.slot)
                mine = free_parts(target, whole, outcome.skip)  # before it is read
                done = verify.fill(host.store, tid, item.addr, item.pages, item.slot, host.breathe)
        except ProcessLookupError:
            host.drop(target)
        filled += done
        if done < item.pages:
            empty.append(item._replace(slot=item.slot + done, pages=item.pages - done))
        read = intersect(mine, [(item.addr, item.addr + done * PAGE_SIZE)])
        if read:
            pieces.setdefault(item.target, []).extend(read)
        outcome.skip("unreadable", sum(piece.pages for piece in mine) - sum(piece.pages for piece in read))
    _forget(host, empty)
    if host.store.used_bytes() - before > filled * PAGE_SIZE:
        host.store.trim(extents)
    faults.point("filled")


def _not_filled(store: Store, item: Planned, target: Target, room: int, unplaced: set[int]) -> str | None:
    if store.user_of(item.slot) != target.user:
        return "other-user"
    if item.extent in unplaced:
        return "numa-node"
    return "guard-memory-limit" if item.pages > room else None


def _forget(host: Host, empty: list[Planned]) -> None:
    """Take back what `_remember` says of slots that could not be filled: no later plan may count on them."""
    items: dict[int, list[Planned]] = {}
    for item in empty:
        if item.extent is not None:
            items.setdefault(item.extent, []).append(item)
    for number, (start, mine) in enumerate(items.items()):
        column = bytearray(host.store.digests_of(start))
        for item in mine:
            at = (item.slot - start) * 8
            column[at : at + item.pages * 8] = bytes(item.pages * 8)
        if number % 256 == 255:
            host.breathe()
        host.store.set_digests(start, 0, bytes(column))
        host.journal.append(journal.DIGESTS, 0, start, len(column) // 8, column=bytes(column))


def _column(item: Planned, digests: bytes) -> bytes:
    if item.pages == 1 and item.digest:
        return struct.pack("<Q", item.digest)
    column = digests[item.column_at * 8 : (item.column_at + item.pages) * 8]
    return column if len(column) == item.pages * 8 else bytes(item.pages * 8)


@dataclass
class _Commits:
    """What is committed of a plan: pieces or chains of some targets at a time, which take turns.

    `going_on`: see `_going_on`; `looked_at`: see `_looked_at`.  `spans`: of each target, where something of
    it may have changed.
    """

    host: Host
    max_pause_us: int
    going_on: dict[int, set[int]]
    looked_at: set[int]
    outcome: Outcome = field(default_factory=Outcome)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    budgets: dict[int, Budget] = field(default_factory=dict)

    def of(self, compared: dict[int, list[_Item]], steps: _Steps[_Item]) -> None:
        """Commit what was `compared` of each target, by `steps` of its committer."""
        work: dict[int, Iterator[float]] = {}
        due: dict[int, float] = {}
        for number, mine in compared.items():
            low, high = self.spans.get(number, (1 << 64, 0))
            self.spans[number] = (
                min([low, *(item.addr for item in mine)]),
                max([high, *(item.end for item in mine)]),
            )
            work[number] = self._steps(number, mine, steps)
            if (target := self.host.targets.get(number)) is not None:
                due[number] = target.calm_from
        take_turns(work, self.host.breathe, due=due)

    def _steps(self, number: int, mine: list[_Item], steps: _Steps[_Item]) -> Iterator[float]:
        host, outcome = self.host, Outcome()
        pages = sum(item.end - item.addr for item in mine) // PAGE_SIZE
        target = host.targets.get(number)
        reason = "gone" if target is None else self._hindrance(target)
        if target is not None and reason is None:
            committer = Committer(
                host.store,
                host.journal,
                host.frozen,
                host.pace,
                self.budgets.setdefault(number, Budget(target.pid)),
                self.max_pause_us,
                outcome,
                self.going_on.get(number, set()),
            )
            taken, stood = steps(committer, target, mine), list[float]()
            while reason is None:
                reason = _reason(host, target, lambda: stood.extend(itertools.islice(taken, 1)))
                if not stood:
                    break
                yield stood.pop()
        if reason is not None:
            outcome.skip(reason, max(0, pages - outcome.accounted))
        self.outcome.add(outcome)

    def _hindrance(self, target: Target) -> str | None:
        """Why nothing of `target` can be committed now, whatever it is."""
        reason = self.host.pins.review(target)
        if reason is None and target.references is not None and target.id not in self.looked_at:
            reason = "direct-io"  # begun since: the next plan looks at its pages
        return reason or ("seccomp" if target.link.agent.muzzled() else None)


def _settle(host: Host, spans: dict[int, tuple[int, int]]) -> None:
    """Border pages for runs whose continuation did not make it into a later slice or portion.

    Also for those in front of a piece that failed, which may have lost what was watched behind them.
    """
    for number, (low, high) in spans.items():
        target = host.targets.get(number)
        ends = [end for end in target.runs.loose_ends() if low <= end <= high] if target else []
        loose = [end for end in ends if target is not None and is_loose(target, host.store, end)]
        if target is not None and loose:
            _reason(host, target, lambda target=target, loose=loose: _fix(host, target, loose))  # type: ignore[misc]


def _fix(host: Host, target: Target, loose: list[int]) -> None:
    with host.frozen(target):
        try:
            fix_ends(target, host.store, host.journal, loose)
        except RestoreFailed:
            for end in loose:
                block_growth(target, host.store, host.journal, end)


def _reason(host: Host, target: Target, work: Callable[[], None]) -> str | None:
    """Do `work` on a target; why it could not be finished, or None."""
    try:
        work()
    except (TargetGone, ProcessLookupError):
        host.drop(target)
        return "gone"
    except FreezeFailed:
        return "busy"
    except AgentStuck:
        return "stopped"
    except RestoreFailed:
        return "no-memory-for-border"
    return None
