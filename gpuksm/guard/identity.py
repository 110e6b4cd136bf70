"""Which process a userfaultfd watches: shown by the kernel, not guessed.

A userfaultfd that came with a fork event, or from the keeper, says nothing of whose
memory it watches.  Served as another's, its events would be answered in the wrong
process: zeros over memory that is in use in one, old bytes in the other.

So before anything is done through it, a page of plain private memory of the process,
watched by nobody, is registered with it and looked for in the process's own page
tables (PAGE_IS_WPALLOWED).  That shows only where it is the same memory, as only we
register memory, one step at a time.  Unlike write protection, which the kernel refuses
while an event waits, that is possible at any time, and while the process runs.

What must hold: merged memory is never unregistered here; what is taken back was seen
to be unregistered before.  If we die in between, or it was another process, one page
more raises events, which are answered like all others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.linux import mappings, pagemap, uffd
from gpuksm.linux._libc import PAGE_SIZE

_TRIES = 16
_UNLIKE = 3  # pages that are here and not there: it is not the same memory


def watches(uffd_event: int, pid: int) -> bool | None:
    """Whether `uffd_event` watches the memory of process `pid`; None when that cannot be told."""
    try:
        table = pagemap.open_pagemap(pid)
    except (TargetGone, NotPermitted):
        return None
    try:
        unlike = 0
        for page in _plain_pages(pid, table):
            try:
                uffd.register(uffd_event, page, PAGE_SIZE)
            except OSError as error:
                # Nothing of the kind there; ENOMEM may also be for want of a mapping more.
                unlike += error.errno in (errno.EINVAL, errno.EBUSY) and _is_plain(pid, page)
                if unlike == _UNLIKE:
                    return False
                continue
            if not _registered(table, page):
                return False
            uffd.unregister(uffd_event, page, PAGE_SIZE)
            return True
    except (OSError, TargetGone, NotPermitted):
        pass  # it has ended, or its memory changes under our hands
    finally:
        os.close(table)
    return None


def _plain_pages(pid: int, table: int) -> Iterator[int]:
    """Some first pages of plain writable memory that no userfaultfd has, of the smallest mappings first."""
    plain = [vma for vma in mappings.maps(pid, perms="rw-p", inode=0) if vma.path in ("", "[heap]")]
    left = _TRIES
    for vma in sorted(plain, key=lambda vma: vma.end - vma.start):
        if not _registered(table, vma.start):
            yield vma.start
            left -= 1
            if not left:
                return


def _is_plain(pid: int, page: int) -> bool:
    return any(vma.start <= page < vma.end for vma in mappings.maps(pid, inode=0))


def _registered(table: int, page: int) -> bool:
    allowed = pagemap.PAGE_IS_WPALLOWED
    return bool(pagemap.scan(table, page, page + PAGE_SIZE, mask=allowed, ret=allowed))
