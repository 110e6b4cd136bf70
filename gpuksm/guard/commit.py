"""Commit: verified pieces become mappings of the store, slice by slice, under a freeze.

What must hold (docs/hazards.md 4, 5, 6, 9, 12):
- A page is replaced only if, with every thread that could write it frozen, the
  kernel says: present, tracked, anonymous, not written since before it was
  compared.  Selected positively, never by "not written" alone.  That also holds for a
  page of merged memory that was written and is merged again: the userfaultfd that
  watches it tracks its writes, and a copied page of a private mapping is anonymous.
- Merged memory is unwatched before it is mapped over (linked: both or neither), since
  the agent would wait for us with an UNMAP event; it is never given to MADV_DONTNEED.
- Its protection is the one its VMA has inside the freeze.
- Merged memory raises events before the first thread goes on.
- No run ends inside its extent without a watched page behind it.
- The target is thawed only when every claimed entry of the agent is done.

If we die: before the agent is told, nothing has happened; while it works, it
performs no entry after our socket has closed, which is before any thread of the
target runs again; a replaced run is registered in any case (linked entries).
The intent stands in the journal, so the successor finds what was mapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gpuksm.guard import arch, faults
from gpuksm.guard.agent import Table
from gpuksm.guard.journal import BORDER, MAP, Journal
from gpuksm.guard.restore import FrozenContext, RestoreFailed, fill_hole, restore_piece
from gpuksm.guard.runs import Run
from gpuksm.guard.store import Store
from gpuksm.guard.target import MADV_DONTNEED, PROT_EXEC, Target, protection
from gpuksm.guard.verify import Piece
from gpuksm.linux import census, pagemap, procfs
from gpuksm.linux._libc import PAGE_SIZE

_CALM = pagemap.PAGE_IS_WPALLOWED | pagemap.PAGE_IS_PRESENT
_NOT = pagemap.PAGE_IS_WRITTEN | pagemap.PAGE_IS_FILE | pagemap.PAGE_IS_PFNZERO | pagemap.PAGE_IS_SWAPPED
_MAX_SLICE_PIECES = 900
_ENTRY_WEIGHT, _PAGE_WEIGHT = 20.0, 0.5  # microseconds, first guesses; `Pace` corrects them


@dataclass
class Pace:
    """How much fits into one pause: a running ratio of measured to guessed microseconds."""

    ratio: float = 1.0

    def limit(self, max_pause_us: int) -> float:
        return max(50.0, 0.6 * max_pause_us / self.ratio)

    def learn(self, weight: float, pause_us: float) -> None:
        if weight > 200:
            self.ratio = min(20.0, max(0.2, 0.7 * self.ratio + 0.3 * pause_us / weight))


@dataclass
class Outcome:
    """What a commit did: pages per plan record, counts, reasons, pauses in microseconds."""

    merged: dict[int, int] = field(default_factory=dict)
    mapped_pages: int = 0
    remerged_pages: int = 0  # of those: what had been merged, to other slots or these, before
    zero_pages: int = 0
    runs: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    pauses_us: list[int] = field(default_factory=list)

    @property
    def accounted(self) -> int:
        """Pages of which it is known what became of them."""
        return self.mapped_pages + self.zero_pages + sum(self.skipped.values())

    def skip(self, reason: str, pages: int) -> None:
        if pages:
            self.skipped[reason] = self.skipped.get(reason, 0) + pages

    def done(self, piece: Piece, pages: int) -> None:
        self.merged[piece.record] = self.merged.get(piece.record, 0) + pages
        if piece.slot is None:
            self.zero_pages += pages
        else:
            self.mapped_pages += pages
        self.runs += 1


@dataclass
class Committer:
    """Commits the pieces of one target."""

    store: Store
    journal: Journal
    frozen: FrozenContext
    pace: Pace
    max_pause_us: int
    breathe: Callable[[], None]
    outcome: Outcome
    continued: set[int]  # ends of pieces whose run goes on in a later portion of the plan

    def run(self, target: Target, pieces: list[Piece]) -> None:
        """Commit `pieces` (verified, any order) of `target` in slices; fills `outcome`."""
        pieces = sorted(pieces, key=lambda piece: piece.addr)
        room = vma_budget(target.pid)
        while pieces:
            chosen, pieces = self._slice(pieces)
            fitting, room = self._within_budget(target, chosen, room)
            if fitting:
                self._commit_slice(target, fitting, pieces[0] if pieces else None)
            self.breathe()

    def _slice(self, pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
        """As many pieces as one pause allows, the last cut where needed; and the rest."""
        left = self.pace.limit(self.max_pause_us)
        for index, piece in enumerate(pieces):
            left -= _ENTRY_WEIGHT
            weight = piece.pages * _PAGE_WEIGHT
            if weight > left:
                pages = int(left / _PAGE_WEIGHT)
                if pages < 1 and index:
                    return pieces[:index], pieces[index:]
                pages = max(1, min(pages, piece.pages))
                head = piece._replace(pages=pages)
                rest = pieces[index + 1 :]
                if pages < piece.pages:
                    slot = None if piece.slot is None else piece.slot + pages
                    rest.insert(0, Piece(piece.record, head.end, piece.pages - pages, slot))
                return [*pieces[:index], head], rest
            left -= weight
            if index + 1 == _MAX_SLICE_PIECES:
                return pieces[: index + 1], pieces[index + 1 :]
        return pieces, []

    def _within_budget(self, target: Target, pieces: list[Piece], room: int) -> tuple[list[Piece], int]:
        need = 3 * sum(piece.slot is not None for piece in pieces)
        if need > room:
            room = vma_budget(target.pid)
        if need <= room:
            return pieces, room - need
        # Longest first; what is left over is said.
        mapped = sorted((p for p in pieces if p.slot is not None), key=lambda p: -p.pages)
        keep = set(mapped[: max(0, room) // 3])
        self.outcome.skip("vma-budget", sum(p.pages for p in mapped if p not in keep))
        return [p for p in pieces if p.slot is None or p in keep], room - 3 * len(keep)

    def _commit_slice(self, target: Target, pieces: list[Piece], following: Piece | None) -> None:
        weight = _ENTRY_WEIGHT * len(pieces) + _PAGE_WEIGHT * sum(piece.pages for piece in pieces)
        started = time.monotonic_ns()
        with self.frozen(target):
            valid = self._validated(target, pieces)
            faults.point("commit-validated")
            self._map(target, valid, following)
            faults.point("commit-mapped")
        pause_us = (time.monotonic_ns() - started) // 1000
        self.pace.learn(weight, pause_us)
        self.outcome.pauses_us.append(pause_us)
        target.pauses_us.append(pause_us)
        faults.point("commit-thawed")

    # -- inside the freeze -------------------------------------------------------

    def _validated(self, target: Target, pieces: list[Piece]) -> list[tuple[Piece, int]]:
        """The parts of `pieces` that may be replaced now, each with its protection."""
        if procfs.locked_kib(target.pid) != target.known_locked_kib:
            # What is locked must stay so, and which it is takes too long to ask in a freeze.
            self.outcome.skip("locked", sum(piece.pages for piece in pieces))
            return []
        calm = pagemap.scan(
            target.pagemap,
            pieces[0].addr,
            max(piece.end for piece in pieces),
            inverted=_NOT,
            mask=_CALM | _NOT,
            ret=pagemap.PAGE_IS_PRESENT,
        )
        parts = list(_intersect(pieces, [(start, end) for start, end, _ in calm]))
        self.outcome.skip("written", sum(p.pages for p in pieces) - sum(p.pages for p in parts))
        valid: list[tuple[Piece, int]] = []
        vma: procfs.VmaQuery | None = None
        for part in parts:
            at = part
            while True:
                if vma is None or not vma.start <= at.addr < vma.end:
                    vma = target.query(at.addr)
                pages = at.pages if vma is None else min(at.pages, (vma.end - at.addr) // PAGE_SIZE)
                head = at._replace(pages=pages)
                reason = self._refusal(target, head, vma)
                if vma is None or reason is not None:
                    self.outcome.skip(reason or "unmapped", pages)
                else:
                    valid.append((head, protection(vma)))
                if pages == at.pages:
                    break
                slot = None if at.slot is None else at.slot + pages
                at = Piece(at.record, at.addr + pages * PAGE_SIZE, at.pages - pages, slot)
        return valid

    def _refusal(self, target: Target, piece: Piece, vma: procfs.VmaQuery | None) -> str | None:
        if vma is None:
            return "unmapped"
        merged = target.runs.overlapping(piece.addr, piece.end)
        if vma.flags & procfs.QUERY_SHARED or (vma.inode and not self._is_run(piece, vma, merged)):
            return "not-anonymous"
        if vma.flags & PROT_EXEC:
            return "executable"
        if merged and not vma.inode:
            return "merged-already"
        if merged and piece.slot is None:
            return "zeros-in-merged"
        if target.has_border_in(piece.addr, piece.end):
            return "border-page"
        if any(low < piece.end and piece.addr < high for low, high in target.tainted):
            return "moved"
        return None

    def _is_run(self, piece: Piece, vma: procfs.VmaQuery, merged: list[Run]) -> bool:
        """True when all of `piece` is one merged run by our books and by the kernel's."""
        if vma.inode != self.store.inode or len(merged) != 1 or merged[0].pages != piece.pages:
            return False
        return merged[0].slot * PAGE_SIZE - vma.offset == merged[0].start - vma.start

    def _map(self, target: Target, valid: list[tuple[Piece, int]], following: Piece | None) -> None:
        table = Table()
        entries: list[tuple[int, Piece, int]] = []
        for index, (piece, prot) in enumerate(valid):
            if not table.room(6, 160):
                self._perform(target, table, entries)
                table, entries = Table(), []
            if piece.slot is None:
                self._add_zero(target, table, entries, piece, prot)
                continue
            behind = valid[index + 1][0] if index + 1 < len(valid) else following
            merged = bool(target.runs.overlapping(piece.addr, piece.end))
            piece = self._with_border(target, table, piece, behind, merged)
            if piece.pages:
                size, slot = piece.pages * PAGE_SIZE, piece.slot or 0
                index = target.add_map_store(table, piece.addr, size, prot, slot, merged=merged)
                entries.append((index, piece, prot))
        self._perform(target, table, entries)

    def _add_zero(
        self, target: Target, table: Table, entries: list[tuple[int, Piece, int]], piece: Piece, prot: int
    ) -> None:
        size = piece.pages * PAGE_SIZE
        index = table.add(arch.current().NR.MADVISE, piece.addr, size, MADV_DONTNEED)
        entries.append((index, piece, prot))

    def _with_border(
        self, target: Target, table: Table, piece: Piece, behind: Piece | None, merged: bool
    ) -> Piece:
        """`piece`, without its last page when that has to be a border page."""
        assert piece.slot is not None
        slot_end = piece.slot + piece.pages
        if self.store.ends_at_hole(slot_end) or target.is_watched_behind(piece.end):
            return piece
        if piece.end in self.continued:
            return piece
        if behind is not None and behind.addr == piece.end and behind.slot is not None:
            # Mapped next, in this slice or (the same run, cut for its length) in the following one.
            return piece
        if merged:
            # Its last page stays in the run that it is in, which is watched and ends well already.
            self.outcome.skip("border-page", 1)
            return piece._replace(pages=piece.pages - 1)
        border = piece.end - PAGE_SIZE
        target.add_border(table, border)
        target.borders.add(border)
        self.journal.append(BORDER, target.id, border)
        self.outcome.skip("border-page", 1)
        return piece._replace(pages=piece.pages - 1)

    def _perform(self, target: Target, table: Table, entries: list[tuple[int, Piece, int]]) -> None:
        runs = [Run(p.addr, p.end, p.slot) for _, p, _ in entries if p.slot is not None]
        before = {run.start: target.runs.overlapping(run.start, run.end) for run in runs}
        self.journal.append_runs(MAP, target.id, [(run.start, run.end, run.slot) for run in runs])
        for run in runs:
            target.runs.add(run)
        if runs:
            target.keep_in_core_dumps(self.journal)
        faults.point("commit-intent")
        results = target.link.agent.perform(table)
        for index, piece, prot in entries:
            if piece.slot is None:
                if results[index] == 0:
                    self.outcome.done(piece, piece.pages)
                else:
                    self.outcome.skip("madvise-failed", piece.pages)
            elif results[index] == piece.addr and results[index + 1] == 0:
                self.outcome.done(piece, piece.pages)
                self.outcome.remerged_pages += piece.pages if before[piece.addr] else 0
            else:
                self._cure(target, piece, prot, before[piece.addr])

    def _cure(self, target: Target, piece: Piece, prot: int, before: list[Run]) -> None:
        """A mapping failed, or could not be watched: make the memory right again (hazard 12).

        `before` is what was merged in its place.
        """
        self.outcome.skip("map-failed", piece.pages)
        vma = target.query(piece.addr)
        if before and vma is not None and self._is_run(piece, vma, before):
            # Nothing was replaced; it may have been unwatched, and watching twice does no harm.
            target.runs.add(before[0])
            table = Table()
            target.add_register(table, piece.addr, piece.pages * PAGE_SIZE)
            if target.link.agent.perform(table)[0] != 0:
                self.outcome.skip("unwatched", piece.pages)
            return
        if vma is not None and not vma.inode:
            target.runs.remove(piece.addr, piece.end)  # nothing was replaced
            return
        if vma is None:
            put_back(target, self.store, piece, prot)
            return
        try:
            for low in range(piece.addr, piece.end, 512 * PAGE_SIZE):
                run = target.runs.overlapping(low, min(low + 512 * PAGE_SIZE, piece.end))
                for part in run:
                    restore_piece(target, self.journal, part)
        except RestoreFailed:
            # Stays merged and right; without events only a later MADV_DONTNEED would show old bytes.
            self.outcome.skip("unwatched", piece.pages)


def put_back(target: Target, store: Store, piece: Piece, prot: int) -> None:
    """A failed mmap left a hole where `piece` was: anonymous memory with the slots' bytes."""
    fill_hole(target, store, Run(piece.addr, piece.end, piece.slot or 0), prot)
    target.runs.remove(piece.addr, piece.end)


def vma_budget(pid: int) -> int:
    """How many more VMAs the target may get: half of vm.max_map_count is its own."""
    with open("/proc/sys/vm/max_map_count") as file:
        limit = int(file.read())
    return limit // 2 - census.count_vmas(pid)


def _intersect(pieces: list[Piece], ranges: list[tuple[int, int]]) -> list[Piece]:
    """The parts of sorted `pieces` inside sorted, disjoint `ranges`."""
    parts: list[Piece] = []
    index = 0
    for piece in pieces:
        while index < len(ranges) and ranges[index][1] <= piece.addr:
            index += 1
        at = index
        while at < len(ranges) and ranges[at][0] < piece.end:
            low, high = max(piece.addr, ranges[at][0]), min(piece.end, ranges[at][1])
            skipped = (low - piece.addr) // PAGE_SIZE
            slot = None if piece.slot is None else piece.slot + skipped
            parts.append(Piece(piece.record, low, (high - low) // PAGE_SIZE, slot))
            at += 1
    return parts
