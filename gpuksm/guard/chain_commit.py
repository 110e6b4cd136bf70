"""Commit of chains (chains.py): what commit.py does with pieces, for tens of thousands of short runs.

What must hold, and what happens if we die, is what commit.py says.  What is different: the agent's table is
made before the freeze, from columns.  Nothing of that is relied on.  Inside the freeze all is looked at
again: that the memory is plain anonymous mappings with the same protection, that each page is calm, that
nothing was locked, and who needs a border page.  Where anything is another way, the pieces go the long way.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gpuksm.guard import faults
from gpuksm.guard.agent import Table
from gpuksm.guard.chains import Chain, Columns
from gpuksm.guard.commit import ENTRY_WEIGHT, MAX_SLICE_RUNS, PAGE_WEIGHT, Committer, intersect
from gpuksm.guard.journal import BORDER
from gpuksm.guard.target import Target, protection
from gpuksm.guard.verify import Piece
from gpuksm.linux import mappings
from gpuksm.linux._libc import PAGE_SIZE

_GROUP = 64  # runs that are watched by one entry at most: the agent is not stopped within
_NEW_MAPPINGS = 2  # of a chain, beside one for each run: what is behind it, and a border page
_GAP_WEIGHT = 0.05  # microseconds, a first guess: what looking at a page between chains takes in the freeze


class _Part(NamedTuple):
    """Runs of one chain that are mapped in one slice; `behind` will be mapped next to them."""

    record: int
    runs: Columns
    behind: Piece | None

    def pieces(self) -> list[Piece]:
        return [
            Piece(self.record, start, (end - start) // PAGE_SIZE, slot)
            for start, end, slot in self.runs.each()
        ]

    def last(self) -> Piece:
        return _Part(self.record, self.runs.part(len(self.runs) - 1, len(self.runs)), None).pieces()[0]


class _Group(NamedTuple):
    """Runs of a part that are watched together: indices of the results of the first, and of the watching."""

    record: int
    runs: Columns
    first: int
    watched: int


class _Plain(NamedTuple):
    """Stretches of memory, each in one plain mapping, and the protection of all of them."""

    prot: int
    stretches: list[tuple[int, int]]


@dataclass
class _Slice:
    """What is to be mapped in one pause; `plain` where all of it lies in plain memory, else None."""

    parts: list[_Part] = field(default_factory=list)
    plain: _Plain | None = None
    weight: float = 0.0  # guessed microseconds

    def reach(self, start: int, end: int, vma: mappings.VmaQuery | None) -> None:
        """It goes on from `start`, in `vma`, to `end`; what goes beyond a mapping is not plain."""
        if self.plain is None:
            return
        stretches = self.plain.stretches
        if vma is None or end > vma.end:
            self.plain = None
        elif stretches and stretches[-1][0] >= vma.start:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))


@dataclass
class _Prepared:
    """A table for parts in plain memory; for each part whether it gives up its last page."""

    plain: _Plain
    table: Table = field(default_factory=Table)
    groups: list[_Group] = field(default_factory=list)
    borders: list[bool] = field(default_factory=list)


def steps(by_piece: Committer, target: Target, chains: list[Chain]) -> Iterator[float]:
    """What `Committer.steps` is for pieces, for `chains` (compared, any order)."""
    return _ChainCommitter(by_piece).steps(target, chains)


@dataclass
class _ChainCommitter:
    """Commits the chains of one target, by the means of a committer for pieces."""

    by_piece: Committer

    def steps(self, target: Target, chains: list[Chain]) -> Iterator[float]:
        todo = _Todo(sorted(chains, key=lambda chain: chain.addr))
        while todo:
            limit = self.by_piece.pace.limit(self.by_piece.max_pause_us)
            chosen = self._slice(target, todo, limit)
            parts = chosen.parts
            if len(parts) == 1 and len(parts[0].runs) == 1 and _weight(parts[0].runs) > limit:
                yield from self.by_piece.steps(target, parts[0].pieces())  # which cuts a long run
                continue
            need = _mappings(parts)
            room = self.by_piece.budget.room(need)
            if need > room:
                chosen.parts, left_out = _within(parts, room)
                self.by_piece.outcome.skip("vma-budget", left_out)
            self.by_piece.budget.spend(_mappings(chosen.parts))
            if chosen.parts:
                yield from self._commit(target, chosen)
            else:
                self.by_piece.outcome.skip("vma-budget", todo.drop())

    def _slice(self, target: Target, todo: _Todo, limit: float) -> _Slice:
        """Runs of a weight of `limit`, in plain memory of one protection if the first are in such memory."""
        chosen = _Slice()
        runs = 0
        vma: mappings.VmaQuery | None = None
        while todo and runs < MAX_SLICE_RUNS:
            start, end = todo.next_chain()
            weight = 0.0
            if not chosen.parts:
                vma = target.query(start)
                chosen.plain = self._plain_at(target, start, end, vma)
            elif chosen.plain is None or vma is None:
                break
            else:
                weight = (start - chosen.parts[-1].runs.ends[-1]) // PAGE_SIZE * _GAP_WEIGHT
                if start >= vma.end:
                    vma, weight = target.query(start), weight + ENTRY_WEIGHT
                    plain = self._plain_at(target, start, end, vma)
                    if vma is None or plain is None or plain.prot != chosen.plain.prot:
                        break
                if end > vma.end:
                    break
            left = limit - chosen.weight - weight
            part = todo.take(left, MAX_SLICE_RUNS - runs, at_least=not chosen.parts)
            if part is None:
                break
            chosen.parts.append(part)
            chosen.weight += weight + _weight(part.runs)
            runs += len(part.runs)
            chosen.reach(start, part.runs.ends[-1], vma)
        return chosen

    def _plain_at(self, target: Target, start: int, end: int, vma: mappings.VmaQuery | None) -> _Plain | None:
        """The protection of [start, end) as far as it lies in `vma`, if that is plain memory."""
        if vma is None or not self._is_plain(target, start, min(end, vma.end), vma):
            return None
        return _Plain(protection(vma), [])

    def _commit(self, target: Target, chosen: _Slice) -> Iterator[float]:
        parts = chosen.parts
        prepared = self._prepared(target, parts, chosen.plain) if chosen.plain is not None else None
        if prepared is None:
            for part in parts:
                yield self.by_piece.commit_slice(target, part.pieces(), part.behind)
            return
        with self.by_piece.paused(target, chosen.weight):
            if self._holds(target, parts, prepared):
                faults.point("commit-validated")
                self._perform(target, parts, prepared)
            else:
                pieces = [piece for part in parts for piece in part.pieces()]
                valid = self.by_piece.validated(target, pieces)
                faults.point("commit-validated")
                self.by_piece.map(target, valid, parts[-1].behind)
            faults.point("commit-mapped")
        yield self.by_piece.outcome.pauses_us[-1] / 1e6

    def _prepared(self, target: Target, parts: list[_Part], plain: _Plain) -> _Prepared | None:
        """What maps `parts` if all prove valid; None where it takes more."""
        prepared = _Prepared(plain)
        for part in parts:
            border = self.by_piece.needs_border(target, part.last(), part.behind)
            prepared.borders.append(border)
            runs = _without_last_page(part.runs) if border else part.runs
            for first in range(0, len(runs), _GROUP):
                group = runs.part(first, min(first + _GROUP, len(runs)))
                at = target.add_map_each(prepared.table, group.starts, group.ends, group.slots, plain.prot)
                start, size = group.starts[0], group.ends[-1] - group.starts[0]
                watched = target.add_register(prepared.table, start, size)
                target.add_unforked(prepared.table, start, size)
                prepared.groups.append(_Group(part.record, group, at, watched))
            if border:
                target.add_border(prepared.table, part.runs.ends[-1] - PAGE_SIZE)
            if not prepared.table.room(0, 0):
                return None
        faults.point("prepared")
        return prepared

    def _is_plain(self, target: Target, start: int, end: int, vma: mappings.VmaQuery) -> bool:
        """Whether [start, end) of `vma` is anonymous memory of which nothing else is known."""
        whole = Piece(0, start, (end - start) // PAGE_SIZE, None)
        return self.by_piece.refusal(target, whole, vma) is None and not vma.inode

    # -- inside the freeze -------------------------------------------------------

    def _holds(self, target: Target, parts: list[_Part], prepared: _Prepared) -> bool:
        """Whether all that was prepared is what is to be done."""
        for start, end in prepared.plain.stretches:
            vma = target.query(start)
            if vma is None or end > vma.end or protection(vma) != prepared.plain.prot:
                return False
            if not self._is_plain(target, start, end, vma):
                return False
        if self.by_piece.locked_anew(target):
            return False
        borders = [self.by_piece.needs_border(target, part.last(), part.behind) for part in parts]
        if borders != prepared.borders:
            return False
        wanted = [Piece(0, part.runs.starts[0], part.runs.pages, None) for part in parts]
        start, end = parts[0].runs.starts[0], parts[-1].runs.ends[-1]
        return intersect(wanted, self.by_piece.calm(target, start, end)) == wanted

    def _perform(self, target: Target, parts: list[_Part], prepared: _Prepared) -> None:
        for part, border in zip(parts, prepared.borders, strict=True):
            if border:
                self._note_border(target, part.runs.ends[-1] - PAGE_SIZE)
        for group in prepared.groups:
            target.runs.add_columns(group.runs.starts, group.runs.ends, group.runs.slots)
        if prepared.groups:
            target.keep_in_core_dumps(self.by_piece.journal)
        faults.point("commit-intent")
        results = target.link.agent.perform(prepared.table)
        failed: list[Piece] = []
        for group in prepared.groups:
            runs, watched = group.runs, results[group.watched] == 0
            mapped = results[group.first : group.first + len(runs)]
            if watched and mapped == runs.starts.tolist():
                self.by_piece.outcome.mapped(group.record, runs.pages, len(runs))
                continue
            for piece, result in zip(_Part(group.record, runs, None).pieces(), mapped, strict=True):
                if watched and result == piece.addr:
                    self.by_piece.outcome.done(piece)
                else:
                    failed.append(piece)
        for piece in failed:
            self.by_piece.cure(target, piece, prepared.plain.prot, [])

    def _note_border(self, target: Target, page: int) -> None:
        self.by_piece.outcome.skip("border-page", 1)
        target.borders.add(page)
        self.by_piece.journal.append(BORDER, target.id, page)


class _Todo:
    """What is left of chains, taken from the front."""

    def __init__(self, chains: list[Chain]) -> None:
        self._chains = iter(chains)
        self._record, self._runs, self._at = 0, Columns(array("Q"), array("Q"), array("Q")), 0
        self._advance()

    def __bool__(self) -> bool:
        return self._at < len(self._runs)

    def next_chain(self) -> tuple[int, int]:
        """Where what is left of the first chain lies."""
        return self._runs.starts[self._at], self._runs.ends[-1]

    def take(self, weight: float, most: int, *, at_least: bool) -> _Part | None:
        """Up to `most` of the first chain's runs, as `weight` allows; with `at_least` one in any case."""
        end = min(len(self._runs), self._at + min(most, int(weight / ENTRY_WEIGHT)))
        while end > self._at and _weight(self._runs.part(self._at, end)) > weight:
            end = self._at + (end - self._at) * 3 // 4
        end = max(end, self._at + at_least)
        if end == self._at:
            return None
        part = self._runs.part(self._at, end)
        behind = None
        if end < len(self._runs):
            behind = _Part(self._record, self._runs.part(end, end + 1), None).last()
        self._at = end
        taken = _Part(self._record, part, behind)
        if end == len(self._runs):
            self._advance()
        return taken

    def drop(self) -> int:
        """Give all up; how many pages that were."""
        pages = 0
        while self:
            pages += self._runs.part(self._at, len(self._runs)).pages
            self._advance()
        return pages

    def _advance(self) -> None:
        chain = next(self._chains, None)
        self._at = 0
        if chain is None:
            self._runs = self._runs.part(0, 0)
        else:
            self._record, self._runs = chain.record, chain.runs()


def _mappings(parts: list[_Part]) -> int:
    return sum(len(part.runs) + _NEW_MAPPINGS for part in parts)


def _weight(runs: Columns) -> float:
    return ENTRY_WEIGHT * len(runs) + PAGE_WEIGHT * runs.pages


def _without_last_page(runs: Columns) -> Columns:
    """`runs` less the page that becomes a border page."""
    last = len(runs) - 1
    if runs.ends[last] - runs.starts[last] == PAGE_SIZE:
        return runs.part(0, last)
    ends = runs.ends[:]
    ends[last] -= PAGE_SIZE
    return replace(runs, ends=ends)


def _within(parts: list[_Part], room: int) -> tuple[list[_Part], int]:
    """As much of `parts`, from the front, as `room` mappings allow; and the pages of the rest."""
    kept: list[_Part] = []
    left_out = 0
    for part in parts:
        fits = min(len(part.runs), max(0, room - _NEW_MAPPINGS))
        room -= fits + _NEW_MAPPINGS
        if fits:
            behind = part.behind if fits == len(part.runs) else None
            kept.append(_Part(part.record, part.runs.part(0, fits), behind))
        if fits < len(part.runs):
            left_out += part.runs.part(fits, len(part.runs)).pages
    return kept, left_out
