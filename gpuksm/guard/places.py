"""Where in a target's address space memory of ours may lie: far from everything that the program has.

A program may unmap memory and map something at the same place, by MAP_FIXED, later: nobody else maps in a
process with one thread.  The kernel's own choice for new memory is just such a hole (hazard 51).
"""

from __future__ import annotations

import itertools
import random

from gpuksm.errors import TargetGone
from gpuksm.linux import procfs
from gpuksm.linux._libc import PAGE_SIZE

HIGHEST = 1 << 47  # of x86-64 without asking for more


def far_place(pid: int) -> int:
    """Address of a page somewhere in the largest gap of a process's address space; TargetGone.

    By chance: nobody else, who asks for an address there, has the same.
    """
    vmas = [vma for vma in procfs.maps(pid) if vma.end <= HIGHEST]
    if len(vmas) < 2:
        raise TargetGone(f"process {pid} has exited")
    gap, end = max((high.start - low.end, high.start) for low, high in itertools.pairwise(vmas))
    offset = (gap // 4 + random.SystemRandom().randrange(max(1, gap // 2))) // PAGE_SIZE * PAGE_SIZE
    return end - gap + offset
