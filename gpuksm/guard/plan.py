"""Carrying out a commit plan: fill the new extents, verify every record, commit target by target.

A plan may be of any size; it is carried out in portions of some 64 MiB of new slots,
so that the store never gets far ahead of the memory that is freed.

The plan comes from the scanner, which is not trusted: every number in it is
checked here, and every page is compared before it is mapped.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gpuksm import eligibility, wire
from gpuksm.errors import NotPermitted, TargetGone, UsageError
from gpuksm.guard import faults, headroom, journal, verify
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.commit import Committer, Outcome, Pace
from gpuksm.guard.freeze import FreezeFailed
from gpuksm.guard.restore import FrozenContext, RestoreFailed, fix_ends, is_loose
from gpuksm.guard.store import NOBODY, Store
from gpuksm.guard.target import Target
from gpuksm.guard.verify import Piece
from gpuksm.linux import numa
from gpuksm.linux._libc import PAGE_SIZE

_MAX_PAGES = 1 << 20
_WINDOW_PAGES = 1 << 14
_SHORT_PAGES, _SHORT_RUNS = 16, 1 << 15

_FILLS = (wire.OP_FILL, wire.OP_FILL_REPLICA)
_REPLACES = (wire.OP_FILL, wire.OP_MAP, wire.OP_ZERO)


class Host(Protocol):
    """What a commit needs of the guard."""

    store: Store
    journal: journal.Journal
    pace: Pace
    targets: dict[int, Target]
    pauses_us: list[int]

    @property
    def frozen(self) -> FrozenContext: ...
    def breathe(self) -> None: ...
    def drop(self, target: Target) -> None: ...


class Planned(NamedTuple):
    """One plan record with its slots resolved."""

    record: int
    op: int
    target: int
    addr: int
    pages: int
    slot: int
    extent: int | None
    digest: int
    digest_at: int
    continued: bool = False

    @property
    def end(self) -> int:
        return self.addr + self.pages * PAGE_SIZE


@dataclass
class Result:
    """Outcome of a commit and pages merged per plan record (`<u4` column)."""

    outcome: Outcome
    column: bytes
    vmas: dict[int, int]


def execute(host: Host, extents: int, records: int, payload: bytes | bytearray, max_pause_us: int) -> Result:
    """Carry out a plan; UsageError when it is malformed (nothing was done then)."""
    new, plan, digests = _parse(extents, records, payload)
    starts, unplaced = _allocate(host, new, plan)
    planned = [_resolve(record, index, starts) for index, record in enumerate(plan)]
    _remember(host, planned, digests)
    outcome = Outcome()
    spans: dict[int, tuple[int, int]] = {}  # of each target: where something of it may have changed
    cut = _cut_to_windows(planned)
    continued = {(part.target, part.end) for part in cut if part.continued}
    for portion in _portions(cut):
        pieces: dict[int, list[Piece]] = {}
        _fill(host, portion, pieces, unplaced, outcome)
        _verify(host, portion, pieces, outcome)
        for number, mine in pieces.items():
            low, high = spans.get(number, (1 << 64, 0))
            low = min([low, *(piece.addr for piece in mine)])
            spans[number] = low, max([high, *(piece.end for piece in mine)])
            going_on = {end for target, end in continued if target == number}
            _commit(host, number, mine, going_on, max_pause_us, outcome)
    _settle(host, spans)
    host.pauses_us.extend(outcome.pauses_us)
    del host.pauses_us[:-100_000]
    column = struct.pack(f"<{len(planned)}I", *(outcome.merged.get(i, 0) for i in range(len(planned))))
    vmas = {number: len(host.targets[number].runs) for number in spans if number in host.targets}
    return Result(outcome, column, vmas)


def _parse(
    extents: int, count: int, payload: bytes | bytearray
) -> tuple[list[tuple[int, int]], list[tuple[int, ...]], bytes]:
    """(slots and node of each extent, plan records, digest column)."""
    at = extents * wire.EXTENT_RECORD.size
    end = at + count * wire.PLAN_RECORD.size
    if not (0 <= extents <= _MAX_PAGES and 0 <= count <= 4 * _MAX_PAGES and end <= len(payload)):
        raise UsageError("malformed plan: extents and records do not fit the payload")
    if (len(payload) - end) % 8:
        raise UsageError("malformed plan: the digest column is no multiple of 8 bytes")
    new = [(slots, node) for slots, node, _ in wire.EXTENT_RECORD.iter_unpack(payload[:at])]
    if any(not 0 < slots <= _MAX_PAGES for slots, _ in new):
        raise UsageError("malformed plan: extent size out of range")
    if any(node > numa.MAX_NODES for _, node in new):
        raise UsageError("malformed plan: there is no such NUMA node")
    records = list(wire.PLAN_RECORD.iter_unpack(payload[at:end]))
    for op, flags, _, _, addr, pages, extent, slot, _, _ in records:
        if not wire.OP_FILL <= op <= wire.OP_FILL_REPLICA or not 0 < pages <= _MAX_PAGES or addr % PAGE_SIZE:
            raise UsageError("malformed plan: record out of range")
        if flags & wire.FLAG_NEW_EXTENT:
            if extent >= len(new) or slot + pages > new[extent][0]:
                raise UsageError("malformed plan: record outside its extent")
        elif op in _FILLS:
            raise UsageError("malformed plan: only new extents are filled")
    _check_disjoint(records)
    return new, records, bytes(payload[end:])


def _check_disjoint(records: list[tuple[int, ...]]) -> None:
    """No page is replaced twice; no slot is filled twice, or the second content showed where the first is."""
    filled = sorted((record[6], record[7], record[5]) for record in records if record[0] in _FILLS)
    for (extent, slot, pages), (next_extent, next_slot, _) in itertools.pairwise(filled):
        if extent == next_extent and next_slot < slot + pages:
            raise UsageError("malformed plan: a slot is filled twice")
    replaced = sorted((record[3], record[4], record[5]) for record in records if record[0] in _REPLACES)
    for (target, addr, pages), (next_target, next_addr, _) in itertools.pairwise(replaced):
        if target == next_target and next_addr < addr + pages * PAGE_SIZE:
            raise UsageError("malformed plan: a page is in two records")


def _allocate(
    host: Host, new: list[tuple[int, int]], records: list[tuple[int, ...]]
) -> tuple[list[int], set[int]]:
    """First slots of the new extents, and of those whose memory cannot be taken from their node.

    Each belongs to the user whose process fills it first.
    """
    users: dict[int, int] = {}
    pages: dict[int, int] = {}
    for op, flags, _, target, addr, _, extent, slot, *_ in records:
        if op in _FILLS and flags & wire.FLAG_NEW_EXTENT and target in host.targets:
            users.setdefault(extent, host.targets[target].user)
            pages.setdefault(extent, addr // PAGE_SIZE - slot)
    starts = []
    for index, (count, node) in enumerate(new):
        user = users.get(index, NOBODY)
        start = host.store.allocate(count, user, pages.get(index, 0), node)
        host.journal.append(journal.EXTENT, node, start, count, user)
        starts.append(start)
    return starts, host.store.place(starts) if any(node for _, node in new) else set()


def _resolve(record: tuple[int, ...], index: int, starts: list[int]) -> Planned:
    op, flags, _, target, addr, pages, extent, slot, digest, digest_at = record
    new = bool(flags & wire.FLAG_NEW_EXTENT)
    first = starts[extent] if new else 0
    return Planned(index, op, target, addr, pages, first + slot, first if new else None, digest, digest_at)


def _remember(host: Host, planned: list[Planned], digests: bytes) -> None:
    """Keep the digests of new slots for the next scanner's stable tree; nothing else relies on them."""
    columns: dict[int, bytearray] = {}
    for item in planned:
        if item.op not in _FILLS or item.extent is None:
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


def _cut_to_windows(planned: list[Planned]) -> list[Planned]:
    """Records of new extents cut at multiples of the window within their extent."""
    parts: list[Planned] = []
    for item in planned:
        if item.extent is None or item.op == wire.OP_FILL_REPLICA:
            parts.append(item)
            continue
        if (item.slot - item.extent) % _WINDOW_PAGES + item.pages <= _WINDOW_PAGES:
            parts.append(item)
            continue
        at = 0
        while at < item.pages:
            in_window = _WINDOW_PAGES - (item.slot + at - item.extent) % _WINDOW_PAGES
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


def _portions(parts: list[Planned]) -> Iterator[list[Planned]]:
    """Groups of parts to be carried out one after the other; what is filled comes before what maps it.

    Short runs that have only such neighbours come last, by address: they are then mapped
    together, however far apart their slots are, and none of them has to end in a border page.
    """
    short = _short_chains(parts)
    ordered = sorted(
        (part for part in parts if part.record not in short),
        key=lambda part: (_window(part), part.op not in _FILLS),
    )
    portion: list[Planned] = []
    filled = 0
    for index, part in enumerate(ordered):
        portion.append(part)
        filled += part.pages if part.op in _FILLS else 0
        last = index + 1 == len(ordered)
        if last or (filled >= _WINDOW_PAGES and _window(ordered[index + 1]) != _window(part)):
            yield portion
            portion, filled = [], 0
    last_ones = sorted((part for part in parts if part.record in short), key=_place)
    for at in range(0, len(last_ones), _SHORT_RUNS):
        yield last_ones[at : at + _SHORT_RUNS]


def _short_chains(parts: list[Planned]) -> set[int]:
    """Records of runs that only map few pages, as do all that follow each other around them."""
    found: set[int] = set()
    chain: list[Planned] = []
    for part in sorted((part for part in parts if part.op in _REPLACES), key=_place):
        if chain and (chain[-1].target, chain[-1].end) != (part.target, part.addr):
            found.update(_if_short(chain))
            chain = []
        chain.append(part)
    return found.union(_if_short(chain))


def _if_short(chain: list[Planned]) -> list[int]:
    short = all(part.op == wire.OP_MAP and part.pages < _SHORT_PAGES for part in chain)
    return [part.record for part in chain] if short else []


def _place(part: Planned) -> tuple[int, int]:
    return part.target, part.addr


def _window(part: Planned) -> tuple[int, int]:
    if part.extent is None:
        return (-1, 0)
    return (part.extent, (part.slot - part.extent) // _WINDOW_PAGES)


def _fill(
    host: Host, portion: list[Planned], pieces: dict[int, list[Piece]], unplaced: set[int], outcome: Outcome
) -> None:
    filled, extents, before = 0, set[int](), host.store.used_bytes()
    room = headroom.store_pages()
    empty: list[Planned] = []
    for item in portion:
        if item.op not in _FILLS:
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
        done = 0
        try:
            if item.op == wire.OP_FILL_REPLICA:
                done = verify.fill_replica(host.store, tid, item.addr, item.pages, item.slot)
            else:
                done = verify.fill(host.store, tid, item.addr, item.pages, item.slot, host.breathe)
        except ProcessLookupError:
            host.drop(target)
        filled += done
        if done < item.pages:
            empty.append(item._replace(slot=item.slot + done, pages=item.pages - done))
        if item.op == wire.OP_FILL_REPLICA:
            continue
        if done:
            pieces.setdefault(item.target, []).append(Piece(item.record, item.addr, done, item.slot))
        outcome.skip("unreadable", item.pages - done)
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
    column = digests[item.digest_at * 8 : (item.digest_at + item.pages) * 8]
    return column if len(column) == item.pages * 8 else bytes(item.pages * 8)


def _verify(host: Host, portion: list[Planned], pieces: dict[int, list[Piece]], outcome: Outcome) -> None:
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
    tids: dict[int, int] = {}
    for number in list(wanted):
        target = host.targets.get(number)
        if target is None:
            outcome.skip("gone", sum(piece.pages for piece in wanted.pop(number)))
        else:
            tids[number] = target.link.agent.tid
    for number, equal in verify.verify(host.store, tids, wanted, host.breathe).items():
        if equal is None:
            if number in host.targets:
                host.drop(host.targets[number])
            continue
        outcome.skip("differs", sum(p.pages for p in wanted[number]) - sum(p.pages for p in equal))
        pieces.setdefault(number, []).extend(_joined(sorted(equal, key=lambda piece: piece.addr)))
    faults.point("verified")


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


def _commit(
    host: Host, number: int, mine: list[Piece], continued: set[int], max_pause_us: int, outcome: Outcome
) -> None:
    target = host.targets.get(number)
    pages = sum(piece.pages for piece in mine)
    before = outcome.accounted
    if target is None:
        outcome.skip("gone", pages)
        return
    if _may_be_pinned(target):
        outcome.skip("direct-io", pages)
        return
    if target.link.agent.muzzled():
        outcome.skip("seccomp", pages)
        return
    committer = Committer(
        host.store, host.journal, host.frozen, host.pace, max_pause_us, host.breathe, outcome, continued
    )
    reason = _reason(host, target, lambda: committer.run(target, mine))
    if reason is not None:
        outcome.skip(reason, max(0, pages - (outcome.accounted - before)))


def _may_be_pinned(target: Target) -> bool:
    """True when devices may write to the target's memory unseen since it was attached (hazard 8)."""
    try:
        return eligibility.pinning_reason(target.pid, target.allow_direct_io) is not None
    except NotPermitted:
        return True
    except TargetGone:
        return False  # the commit finds that out


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
        fix_ends(target, host.store, host.journal, loose)


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
