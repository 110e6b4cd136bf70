"""The Python API, reached as `gpuksm.register(...)` and so on.

A program registers its own memory; what is registered is merged when somebody
runs `gpuksm scan`.  Every call is one short conversation with the guard of this
user (the registering calls start one when none runs).  Registration also lets
processes of this user trace this one where Yama would forbid it, because that is
how the guard attaches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpuksm.client import GuardClient
from gpuksm.errors import UsageError
from gpuksm.linux import buffers, personality


def register(buffer: Any) -> int:
    """Register the whole pages inside of `buffer` (any object with the buffer protocol).

    Returns how many bytes that are.  Writing to the buffer stays as allowed as
    before: a page that is written gets its own copy again.  Raises TypeError
    (no buffer), UsageError (not contiguous, or no whole page), GuardError.
    """
    start, end = _pages(buffer)
    personality.allow_any_tracer()
    _ask("register", [[start, end]])
    return end - start


@contextmanager
def registered(buffer: Any) -> Iterator[None]:
    """Register `buffer` for the length of a `with` block."""
    register(buffer)
    try:
        yield
    finally:
        unregister(buffer)


def register_process() -> None:
    """Register all memory of this process, present and future."""
    personality.allow_any_tracer()
    _ask("register", None)


def unregister(buffer: Any = None) -> None:
    """Take back `register(buffer)`, or without argument everything this process registered.

    What is merged stays merged, and correct; `gpuksm unmerge` undoes it.
    """
    if buffer is None:
        _ask("unregister", None)
    else:
        _ask("unregister", [list(_pages(buffer))])


def stats() -> dict[str, Any]:
    """What the guard holds, as `gpuksm status --json` prints it; GuardError where none runs."""
    with GuardClient.connect(start=False) as guard:
        reply, _ = guard.request("status")
    del reply["ok"]
    return reply


def _ask(op: str, ranges: list[list[int]] | None) -> None:
    with GuardClient.connect(start=op == "register") as guard:
        guard.request(op, pid=os.getpid(), ranges=ranges)


def _pages(buffer: Any) -> tuple[int, int]:
    try:
        start, end = buffers.whole_pages(buffer)
    except (BufferError, ValueError) as error:
        raise UsageError(f"only contiguous memory can be registered: {error}") from None
    if start == end:
        raise UsageError("no whole page lies inside of this buffer: register larger ones")
    return start, end
