"""The table of system calls by which a slice of a commit is mapped, in groups that are watched together.

Nothing is done here: see `commit.py` and `agent.py`.
"""

from __future__ import annotations

from gpuksm.guard import arch
from gpuksm.guard.agent import Table
from gpuksm.guard.target import MADV_DONTNEED, Target
from gpuksm.guard.verify import Piece
from gpuksm.linux._libc import PAGE_SIZE

_GROUP = 64  # runs that are watched by one entry at most: the agent is not stopped within


class Batch:
    """What the agent is to do in one go.

    Runs that lie behind each other are mapped one by one, each only while we are there, and
    what was mapped is then watched by one entry, whatever has become of us.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.table = Table()
        self.runs: list[tuple[Piece, int, int]] = []  # with protection, and index of the mmap
        self.watched: list[int] = []  # for each of them the index of the entry that watches it
        self.zeros: list[tuple[Piece, int]] = []
        self.merged: set[int] = set()  # addresses of those that replace merged memory
        self._first = 0  # of `runs`: where the open group begins

    def room(self) -> bool:
        """Whether a run with a border page still fits, and what closes the group."""
        return self.table.room(9, 192)

    def add_zeros(self, piece: Piece) -> None:
        """Give the pages of `piece` back."""
        self.close()
        size = piece.pages * PAGE_SIZE
        self.zeros.append((piece, self.table.add(arch.current().NR.MADVISE, piece.addr, size, MADV_DONTNEED)))

    def add_border(self, page: int) -> None:
        """Watch the private page at `page`."""
        self.close()
        self.target.add_border(self.table, page)

    def add_run(self, piece: Piece, prot: int, merged: bool) -> None:
        """Map the slots of `piece` over it; what is `merged` there already is unwatched first."""
        group = self.runs[self._first :]
        joins = bool(group) and self._continues(group[-1][0], piece) and len(group) < _GROUP and not merged
        if not joins:
            self.close()
        index = self.target.add_map_store(
            self.table,
            piece.addr,
            piece.pages * PAGE_SIZE,
            prot,
            piece.slot or 0,
            merged=merged,
            joins=joins,
        )
        self.runs.append((piece, prot, index))
        if merged:
            self.merged.add(piece.addr)
            self.close()

    def _continues(self, before: Piece, piece: Piece) -> bool:
        """Whether `piece` lies behind the one before it, in memory of the same advice."""
        advice = self.target.advice
        return before.end == piece.addr and advice.at(before.addr) == advice.at(piece.addr)

    def close(self) -> None:
        """Watch what was mapped since the last time."""
        count = len(self.runs) - self._first
        if count:
            start, end = self.runs[self._first][0].addr, self.runs[-1][0].end
            index = self.target.add_register(self.table, start, end - start)
            self.target.add_unforked(self.table, start, end - start)
            self.watched += [index] * count
            self._first += count
