"""What earlier agents of a process have left in it: threads that are just ending, and their code pages.

A thread cannot unmap the code that it runs, so the next agent does it.  What must hold: nothing but a
page with an agent's code is unmapped, and none that an agent may still run.  If we die: it stays
for the agent after.
"""

from __future__ import annotations

import os

from gpuksm.guard import arch
from gpuksm.guard.agent import Table
from gpuksm.guard.equipment import Attachment
from gpuksm.linux import mappings, procfs, uffd

_MOST_LEFTOVERS = 256
_ALL_SIGNALS = "fffffffffffbfeff"  # but SIGKILL and SIGSTOP, in /proc/PID/status


def unmap_leftovers(attachment: Attachment, memory: int) -> None:
    """Unmap code pages that earlier agents of this process left behind (a thread cannot unmap its own)."""
    x86 = arch.current()
    pid, mine = attachment.agent.pid, attachment.agent.tid
    if older_agents(pid, mine):
        return
    for vma in mappings.maps(pid, perms="r-xp", inode=0):
        # Pages of several agents that lie side by side are one mapping.
        if vma.end - vma.start > _MOST_LEFTOVERS * x86.CODE_BYTES:
            continue
        for page in range(vma.start, vma.end, x86.CODE_BYTES):
            if page != attachment.code and os.pread(memory, len(x86.AGENT), page) == x86.AGENT:
                _unmap_unwatched(attachment, page)


def _unmap_unwatched(attachment: Attachment, page: int) -> None:
    """Unmap a code page; watched, as whatever lay there before may have been, it would wait for us."""
    x86, agent, table = arch.current(), attachment.agent, Table()
    place = agent.aux_address(table, uffd.range_argument(page, x86.CODE_BYTES))
    table.add(x86.NR.IOCTL, attachment.agent_event, uffd.UFFDIO_UNREGISTER, place)
    table.add(x86.NR.MUNMAP, page, x86.CODE_BYTES, after_success=True)
    agent.perform(table)


def older_agents(pid: int, mine: int = 0) -> bool:
    """True while an older agent than the thread `mine` has not quite ended, or a bootstrap left alone."""
    return any(_blocks_all_signals(tid) for tid in procfs.threads(pid) if tid != mine)


def _blocks_all_signals(tid: int) -> bool:
    """True for agents and for a thread within the bootstrap; the C library never blocks two of its own.

    Threads of the kernel in the process (vhost, KVM) do, too.
    """
    worker = procfs.stat(tid).flags & procfs.PF_USER_WORKER
    return not worker and procfs.status(tid)["SigBlk"] == _ALL_SIGNALS
