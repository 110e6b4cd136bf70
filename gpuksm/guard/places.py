"""Where in a target's address space memory of ours may lie: far from everything that the program has.

A program may unmap memory and map something at the same place, by MAP_FIXED, later: nobody else maps in a
process with one thread.  The kernel's own choice for new memory is just such a hole (hazard 51).
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from gpuksm.errors import TargetGone
from gpuksm.linux import mappings
from gpuksm.linux._libc import PAGE_SIZE

HIGHEST = 1 << 47  # of x86-64 without asking for more


class Gap(NamedTuple):
    """Addresses where a process has nothing."""

    start: int
    end: int

    def place(self) -> int:
        """Address of a page far within, by chance: nobody else who asks for one there has the same."""
        size = self.end - self.start
        offset = (size // 4 + random.SystemRandom().randrange(max(1, size // 2))) // PAGE_SIZE * PAGE_SIZE
        return self.start + offset


def largest_gap(pid: int) -> Gap:
    """The largest gap of a process's address space; TargetGone.

    Takes 15 ms where a process has 30,000 mappings: not to be asked for while it stands still.
    """
    stretches = [stretch for stretch in mappings.mapped(pid) if stretch[1] <= HIGHEST]
    if len(stretches) < 2:
        raise TargetGone(f"process {pid} has exited")
    return max(
        (Gap(low[1], high[0]) for low, high in itertools.pairwise(stretches)),
        key=lambda gap: gap.end - gap.start,
    )
