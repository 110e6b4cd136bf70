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
A successor finds what was mapped in /proc/PID/maps.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpuksm.guard import faults
from gpuksm.guard.agent import Table
from gpuksm.guard.batch import Batch
from gpuksm.guard.journal import BORDER, Journal
from gpuksm.guard.pace import Pace
from gpuksm.guard.restore import FrozenContext, RestoreFailed, fill_hole, restore_piece
from gpuksm.guard.runs import Run
from gpuksm.guard.store import Store
from gpuksm.guard.target import PROT_EXEC, Target, protection
from gpuksm.guard.verify import Piece
from gpuksm.linux import census, mappings, pagemap
from gpuksm.linux._libc import PAGE_SIZE

_CALM = pagemap.PAGE_IS_WPALLOWED | pagemap.PAGE_IS_PRESENT
_NOT = pagemap.PAGE_IS_WRITTEN | pagemap.PAGE_IS_FILE | pagemap.PAGE_IS_PFNZERO | pagemap.PAGE_IS_SWAPPED
MAX_SLICE_RUNS = 900
ENTRY_WEIGHT, PAGE_WEIGHT = 20.0, 0.5  # microseconds, first guesses; pace.py corrects them


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

    def add(self, other: Outcome) -> None:
        """Have what `other` did in here as well."""
        for record, pages in other.merged.items():
            self.merged[record] = self.merged.get(record, 0) + pages
        self.mapped_pages += other.mapped_pages
        self.remerged_pages += other.remerged_pages
        self.zero_pages += other.zero_pages
        self.runs += other.runs
        for reason, pages in other.skipped.items():
            self.skip(reason, pages)
        self.pauses_us += other.pauses_us

    def skip(self, reason: str, pages: int) -> None:
        if pages:
            self.skipped[reason] = self.skipped.get(reason, 0) + pages

    def done(self, piece: Piece) -> None:
        if piece.slot is None:
            self.merged[piece.record] = self.merged.get(piece.record, 0) + piece.pages
            self.zero_pages += piece.pages
            self.runs += 1
        else:
            self.mapped(piece.record, piece.pages, 1)

    def mapped(self, record: int, pages: int, runs: int) -> None:
        self.merged[record] = self.merged.get(record, 0) + pages
        self.mapped_pages += pages
        self.runs += runs


class Budget:
    """How many more VMAs a target may get; counted anew when what is known of it does not suffice."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._left = 0

    def room(self, need: int) -> int:
        """What is left, as far as it matters to who would like `need` of it."""
        if need > self._left:
            self._left = vma_budget(self._pid)
        return self._left

    def spend(self, count: int) -> None:
        self._left -= count


@dataclass
class Committer:
    """Commits the pieces of one target."""

    store: Store
    journal: Journal
    frozen: FrozenContext
    pace: Pace
    budget: Budget
    max_pause_us: int
    outcome: Outcome
    continued: set[int]  # ends of pieces whose run goes on in a later portion of the plan

    def steps(self, target: Target, pieces: list[Piece]) -> Iterator[float]:
        """Commit `pieces` (verified, any order) of `target`, a slice each step; fills `outcome`.

        Yields how many seconds the target stood.
        """
        pieces = sorted(pieces, key=lambda piece: piece.addr)
        while pieces:
            chosen, pieces = self._slice(pieces)
            fitting = self._within_budget(chosen)
            if fitting:
                yield self.commit_slice(target, fitting, pieces[0] if pieces else None)

    def _slice(self, pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
        """As many pieces as one pause allows, the last cut where needed; and the rest."""
        left = self.pace.limit(self.max_pause_us)
        for index, piece in enumerate(pieces):
            left -= ENTRY_WEIGHT
            weight = piece.pages * PAGE_WEIGHT
            if weight > left:
                pages = int(left / PAGE_WEIGHT)
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
            if index + 1 == MAX_SLICE_RUNS:
                return pieces[: index + 1], pieces[index + 1 :]
        return pieces, []

    def _within_budget(self, pieces: list[Piece]) -> list[Piece]:
        mapped = [piece for piece in pieces if piece.slot is not None]
        # What is behind it, and perhaps a border page, are paid for once for pieces side by side.
        ends = sum(piece.end != after.addr for piece, after in itertools.pairwise(mapped)) + bool(mapped)
        need = len(mapped) + 2 * ends
        room = self.budget.room(need)
        if need <= room:
            self.budget.spend(need)
            return pieces
        # Longest first; what is left over is said.
        mapped.sort(key=lambda piece: -piece.pages)
        keep = set(mapped[: max(0, room) // 3])
        self.outcome.skip("vma-budget", sum(p.pages for p in mapped if p not in keep))
        self.budget.spend(3 * len(keep))
        return [p for p in pieces if p.slot is None or p in keep]

    def commit_slice(self, target: Target, pieces: list[Piece], following: Piece | None) -> float:
        """Commit `pieces`, ascending, in one freeze; `following` will be mapped next.  Seconds it took."""
        with self.paused(
            target, ENTRY_WEIGHT * len(pieces) + PAGE_WEIGHT * sum(piece.pages for piece in pieces)
        ):
            valid = self.validated(target, pieces)
            faults.point("commit-validated")
            self.map(target, valid, following)
            faults.point("commit-mapped")
        return self.outcome.pauses_us[-1] / 1e6

    @contextlib.contextmanager
    def paused(self, target: Target, weight: float) -> Iterator[None]:
        """A freeze of `target` for work of `weight` guessed microseconds, whose pause is noted."""
        started = time.monotonic_ns()
        with self.frozen(target) as freeze:
            stopped = time.monotonic_ns()
            yield
            worked = time.monotonic_ns()
        # Not by now: as soon as we come first no more, others may have had the processor for milliseconds.
        pause_us = (freeze.thawed_ns - started) // 1000
        self.pace.learn_work(weight, (worked - stopped) / 1000)
        self.pace.learn_stop(pause_us - (worked - stopped) / 1000)
        self.outcome.pauses_us.append(pause_us)
        target.pauses_us.append(pause_us)
        faults.point("commit-thawed")

    # -- inside the freeze -------------------------------------------------------

    def locked_anew(self, target: Target) -> bool:
        """What is locked must stay so, and which it is takes too long to ask in a freeze."""
        return mappings.locked_kib(target.pid) != target.known_locked_kib

    def calm(self, target: Target, start: int, end: int) -> list[tuple[int, int]]:
        """Ranges in [start, end) of pages that may be replaced, by what the kernel says of each."""
        calm = pagemap.scan(
            target.pagemap, start, end, inverted=_NOT, mask=_CALM | _NOT, ret=pagemap.PAGE_IS_PRESENT
        )
        return [(low, high) for low, high, _ in calm]

    def validated(self, target: Target, pieces: list[Piece]) -> list[tuple[Piece, int]]:
        """The parts of `pieces` that may be replaced now, each with its protection."""
        if self.locked_anew(target):
            self.outcome.skip("locked", sum(piece.pages for piece in pieces))
            return []
        parts = intersect(pieces, self.calm(target, pieces[0].addr, pieces[-1].end))
        self.outcome.skip("written", sum(p.pages for p in pieces) - sum(p.pages for p in parts))
        valid: list[tuple[Piece, int]] = []
        vma: mappings.VmaQuery | None = None
        for part in parts:
            at = part
            while True:
                if vma is None or not vma.start <= at.addr < vma.end:
                    vma = target.query(at.addr)
                pages = at.pages if vma is None else min(at.pages, (vma.end - at.addr) // PAGE_SIZE)
                head = at if pages == at.pages else at._replace(pages=pages)
                reason = self.refusal(target, head, vma)
                if vma is None or reason is not None:
                    self.outcome.skip(reason or "unmapped", pages)
                else:
                    valid.append((head, protection(vma)))
                if pages == at.pages:
                    break
                slot = None if at.slot is None else at.slot + pages
                at = Piece(at.record, at.addr + pages * PAGE_SIZE, at.pages - pages, slot)
        return valid

    def refusal(self, target: Target, piece: Piece, vma: mappings.VmaQuery | None) -> str | None:
        if vma is None:
            return "unmapped"
        merged = target.runs.overlapping(piece.addr, piece.end)
        if vma.flags & mappings.QUERY_SHARED or (vma.inode and not self._is_run(piece, vma, merged)):
            return "not-anonymous"
        if vma.flags & PROT_EXEC:
            return "executable"
        if merged and not vma.inode:
            return "merged-already"
        if merged and piece.slot is None:
            return "zeros-in-merged"
        if target.has_border_in(piece.addr, piece.end):
            return "border-page"
        if target.tainted and any(low < piece.end and piece.addr < high for low, high in target.tainted):
            return "moved"
        return None

    def _is_run(self, piece: Piece, vma: mappings.VmaQuery, merged: list[Run]) -> bool:
        """True when all of `piece` is one merged run by our books and by the kernel's."""
        if vma.inode != self.store.inode or len(merged) != 1 or merged[0].pages != piece.pages:
            return False
        return merged[0].slot * PAGE_SIZE - vma.offset == merged[0].start - vma.start

    def map(self, target: Target, valid: list[tuple[Piece, int]], following: Piece | None) -> None:
        batch = Batch(target)
        for index, (piece, prot) in enumerate(valid):
            if not batch.room():
                self._perform(target, batch)
                batch = Batch(target)
            if piece.slot is None:
                batch.add_zeros(piece)
                continue
            behind = valid[index + 1][0] if index + 1 < len(valid) else following
            merged = bool(target.runs.overlapping(piece.addr, piece.end))
            if self.needs_border(target, piece, behind):
                piece = self._with_border(batch, piece, merged)
            if piece.pages:
                batch.add_run(piece, prot, merged)
        self._perform(target, batch)

    def needs_border(self, target: Target, piece: Piece, behind: Piece | None) -> bool:
        """Whether growth of `piece` would show other slots, or foreign memory behind it."""
        assert piece.slot is not None
        if piece.end in self.continued:
            return False
        if behind is not None and behind.addr == piece.end and behind.slot is not None:
            # Mapped next, in this slice or (the same run, cut for its length) in the following one.
            return False
        if self.store.ends_at_hole(piece.slot + piece.pages):
            return False
        return not target.is_watched_behind(piece.end)

    def _with_border(self, batch: Batch, piece: Piece, merged: bool) -> Piece:
        """`piece` without its last page, which becomes a border page."""
        self.outcome.skip("border-page", 1)
        if not merged:
            border = piece.end - PAGE_SIZE
            batch.add_border(border)
            batch.target.borders.add(border)
            self.journal.append(BORDER, batch.target.id, border)
        # What is merged keeps its last page in the run that it is in, which is watched and ends well.
        return piece._replace(pages=piece.pages - 1)

    def _perform(self, target: Target, batch: Batch) -> None:
        batch.close()
        runs = [Run(p.addr, p.end, p.slot) for p, _, _ in batch.runs if p.slot is not None]
        before = {
            p.addr: target.runs.overlapping(p.addr, p.end) for p, _, _ in batch.runs if p.addr in batch.merged
        }
        target.runs.add_all(runs)
        if runs:
            target.keep_in_core_dumps(self.journal)
        faults.point("commit-intent")
        results = target.link.agent.perform(batch.table)
        for piece, index in batch.zeros:
            if results[index] == 0:
                self.outcome.done(piece)
            else:
                self.outcome.skip("madvise-failed", piece.pages)
        failed = []
        for (piece, prot, index), watched in zip(batch.runs, batch.watched, strict=True):
            if results[index] == piece.addr and results[watched] == 0:
                self.outcome.done(piece)
                self.outcome.remerged_pages += piece.pages if piece.addr in before else 0
            else:
                failed.append((piece, prot))
        for piece, prot in failed:
            self.cure(target, piece, prot, before.get(piece.addr, []))

    def cure(self, target: Target, piece: Piece, prot: int, before: list[Run]) -> None:
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
                    restore_piece(target, self.journal, part.start, part.end)
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


def intersect(pieces: list[Piece], ranges: list[tuple[int, int]]) -> list[Piece]:
    """The parts of sorted `pieces` inside sorted, disjoint `ranges`."""
    parts: list[Piece] = []
    index = 0
    for piece in pieces:
        end = piece.end
        while index < len(ranges) and ranges[index][1] <= piece.addr:
            index += 1
        if index < len(ranges) and ranges[index][0] <= piece.addr and end <= ranges[index][1]:
            parts.append(piece)
            continue
        at = index
        while at < len(ranges) and ranges[at][0] < end:
            low, high = max(piece.addr, ranges[at][0]), min(end, ranges[at][1])
            skipped = (low - piece.addr) // PAGE_SIZE
            slot = None if piece.slot is None else piece.slot + skipped
            parts.append(Piece(piece.record, low, (high - low) // PAGE_SIZE, slot))
            at += 1
    return parts
