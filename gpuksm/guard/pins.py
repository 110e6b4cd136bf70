"""Pages of a target that somebody else holds, and would go on writing to where they no longer are.

What must hold (docs/hazards.md, 8): no page is replaced that a device, a pipe or the kernel itself writes to
past the page tables.  Who takes hold of a page in order to write to it has it made writable first, and that
is a write like any other: the page is not "unwritten" any more.  So it is enough to look once, after the page
was armed: who does not hold it then has finished writing, and who takes hold of it later is seen by the
commit, inside the freeze.  What is compared, and what a slot is filled from, is read after that look, or it
could be what the device had not written yet.  A page that is to be given back is looked at while the target
is frozen: no thread of it, the kernel's own in it among them, can take hold of it then.

Only processes that may have such pages are looked at so, and only by root (page_references.py).  Who may
write without holding a page, as devices with page tables of their own do, is told by descriptors
(writers.py), and such a process is left out.

If we die: nothing was changed here.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable

from gpuksm import writers
from gpuksm.errors import FeatureMissing, NotPermitted, TargetGone
from gpuksm.guard.runs import marked
from gpuksm.guard.target import Review, Target
from gpuksm.guard.verify import Piece
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.page_references import ANY_COPY, FREE, HELD, PageReferences

_REVIEW_SECONDS = 0.2


class Pins:
    """Whether and how pages that are held can be told here; that is tried when it is asked for first."""

    def __init__(self) -> None:
        self._references: PageReferences | None = None
        self._tried = False

    def can_look(self) -> bool:
        """Whether held pages can be told from others."""
        if not self._tried:
            self._tried = True
            with contextlib.suppress(FeatureMissing):  # `gpuksm doctor` tells why
                self._references = PageReferences()
        return self._references is not None

    def prepare(self, pid: int) -> None:
        """Have tried whether one can look, if a review of this process will ask: that takes 40 ms."""
        with contextlib.suppress(NotPermitted, TargetGone, OSError):
            if writers.pinning_reason(pid, writers.NOTHING, self.can_look) is not None:
                self.can_look()

    def review(self, target: Target, *, anew: bool = False) -> str | None:
        """See whether pages of `target` may be held; why nothing of it may be replaced, or None.

        What was found holds for a while, unless the target was armed since or it is to be found `anew`: the
        commit sees who takes hold of an armed page later.  Once pages may have been held they are looked at
        for good: what holds them may have been closed since.  Where nobody can look, each copy that it has of
        a merged page is believed to be held, while it may be.
        """
        review = target.reviewed
        if review is None or anew or time.monotonic() > review.at + _REVIEW_SECONDS:
            review = target.reviewed = Review(time.monotonic(), self._refusal(target))
        return review.refusal

    def _refusal(self, target: Target) -> str | None:
        asked = False

        def can_look() -> bool:
            nonlocal asked
            asked = True
            return self.can_look()

        try:
            refused = writers.pinning_reason(target.pid, target.allowed, can_look) is not None
        except (NotPermitted, OSError):
            refused = True
        except TargetGone:
            return None  # the commit finds that out
        if (refused or asked) and self.can_look():
            target.references = self._references
        elif refused:
            target.references = ANY_COPY
        elif target.references is ANY_COPY:
            target.references = None
        return "direct-io" if refused else None


def _why(target: Target) -> str:
    """Why pages that are found held are left out: who cannot look leaves such a process alone."""
    return "direct-io" if target.references is ANY_COPY else "pinned"


def free_parts(target: Target, piece: Piece, skip: Callable[[str, int], None]) -> list[Piece]:
    """The parts of `piece` that nobody holds; `skip` is told how many pages of it are held."""
    found = target.held(piece.addr, piece.pages)
    if found is None:
        return [piece]
    skip(_why(target), found.count(HELD))
    return [
        Piece(
            piece.record,
            piece.addr + at * PAGE_SIZE,
            end - at,
            None if piece.slot is None else piece.slot + at,
        )
        for at, end in marked(found, FREE)
    ]


def free_pages(
    target: Target,
    addr: int,
    count: int,
    numbers: array[int],
    slots: array[int],
    skip: Callable[[str, int], None],
) -> tuple[array[int], array[int]]:
    """Those of pages `numbers` (counted from `addr`, below `count`) that nobody holds, and their `slots`."""
    found = target.held(addr, count)
    if found is None or HELD not in found:
        return numbers, slots
    free = [at for at, number in enumerate(numbers) if found[number] == FREE]
    skip(_why(target), len(numbers) - len(free))
    return array("I", [numbers[at] for at in free]), array("Q", [slots[at] for at in free])
