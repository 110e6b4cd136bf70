"""What the memory of one puppet must contain: the meaning of mmap(2) and its relatives, page by page.

Nothing here looks at a process.  A page has one or several *alternatives*: what it may
be after an operation that failed half-way.  A report of the puppet must agree with one
of them, and leaves only those that agree.  MADV_FREE makes a page *lazy*: it may turn
into zeros at any time until it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

ARENA, AWAY, HEAP = 64, 32, 16
PAGES = ARENA + AWAY + HEAP
AWAY_AT, HEAP_AT = ARENA, ARENA + AWAY
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
DONTNEED, FREE, MERGEABLE, DONTNEED_LOCKED = 4, 8, 12, 24
ENOMEM, EFAULT, EINVAL, EAGAIN = 12, 14, 22, 11
_MASK = (1 << 64) - 1
_TOKEN = 9


class Wrong(AssertionError):
    """Memory, or the result of a call, is not what it must be."""


class Page(NamedTuple):
    """A mapped page: `access` is n, r or w; `lock` 0, 1 or 2 (may be locked or not).

    `mergeable` says that it was once advised to be.
    """

    access: str
    key: int
    lock: int = 0
    lazy: bool = False
    mergeable: bool = False


Alternatives = tuple[Page | None, ...]
_GONE: Alternatives = (None,)


@cache
def digest(key: int) -> str:
    """The hash that tests/victims/puppet.c reports for a page of content `key`."""
    mixed = (key + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    mixed ^= mixed >> 31
    value = 0
    for word in range(512):
        content = (mixed + word * 0xD6E8FEB86659FD93) & _MASK if key else 0
        value = ((value ^ content) * 0x9E3779B97F4A7C15) & _MASK
        value ^= value >> 29
    return f"{value >> 32:08x}"


@cache
def _token(page: Page | None) -> str:
    if page is None:
        return "--------u"
    return digest(page.key) + ("n" if page.access == "n" else "r")


def _agreeing(page: Page | None, token: str) -> Page | bool | None:
    """The page as `token` shows it, or False."""
    if _token(page) == token:
        return page
    if page is not None and page.lazy:
        zeros = page._replace(key=0, lazy=False)
        if _token(zeros) == token:
            return zeros
    return False


class Memory:
    """The pages of one puppet."""

    def __init__(self) -> None:
        self.pages: list[Alternatives] = [_GONE] * PAGES
        self.hot: dict[int, int] = {}  # page: first of the two keys that a thread writes there

    def copy(self) -> Memory:
        other = Memory()
        other.pages = list(self.pages)
        return other

    @property
    def away_is_free(self) -> bool:
        return all(page == _GONE for page in self.pages[AWAY_AT:HEAP_AT])

    def mapped(self, first: int, count: int) -> bool:
        """Whether all of these pages are mapped for certain."""
        return first + count <= PAGES and all(None not in page for page in self.pages[first : first + count])

    def linux_may_lose(self, first: int, count: int, flags: int) -> bool:
        """Whether Linux itself may lose memory in such a move (tests/model/linux_loses_memory.c)."""
        behind = self.pages[first + 1 : first + count]
        return bool(flags & DONTUNMAP) and any(page and page.mergeable for one in behind for page in one)

    def _change(self, first: int, count: int, change: Callable[[Page], Page | None]) -> None:
        for at in range(first, first + count):
            self.pages[at] = tuple(dict.fromkeys(page and change(page) for page in self.pages[at]))

    # -- reports -----------------------------------------------------------------

    def check(self, report: str, what: str = "memory") -> None:
        """Compare with a report; Wrong names the first page that is none of its alternatives."""
        if len(report) != PAGES * _TOKEN:
            raise Wrong(f"{what}: malformed report of {len(report)} characters")
        for at, alternatives in enumerate(self.pages):
            token = report[at * _TOKEN : (at + 1) * _TOKEN]
            if len(alternatives) == 1 and _token(alternatives[0]) == token:
                continue
            if at in self.hot or (alternatives == _GONE and AWAY_AT <= at < HEAP_AT):
                continue  # written all the time; or where the kernel may have put anything
            agreeing = [_agreeing(page, token) for page in alternatives]
            left = tuple(page for page in agreeing if page is not False)
            if not left:
                raise Wrong(f"{what}: page {at} is {_spelled(token)}, must be one of {alternatives}")
            self.pages[at] = left  # type: ignore[assignment]

    # -- operations --------------------------------------------------------------

    def apply(self, name: str, a: Sequence[int], result: int, error: int) -> None:
        """What command `name` of the puppet with arguments `a` has done, given its result."""
        method = getattr(self, f"_do_{name}", None)
        if method is not None:
            method(a, result, error)

    def _do_m(self, a: Sequence[int], result: int, error: int) -> None:
        _demand(result == 0, "mmap", a, error)
        access = {0: "n", 1: "r", 3: "w"}[a[2]]
        self.pages[a[0] : a[0] + a[1]] = [(Page(access, 0),)] * a[1]

    def _do_u(self, a: Sequence[int], result: int, error: int) -> None:
        _demand(result == 0, "munmap", a, error)
        self.pages[a[0] : a[0] + a[1]] = [_GONE] * a[1]

    def _do_w(self, a: Sequence[int], result: int, error: int) -> None:
        first, count, key, same = a
        for index in range(count):
            writable = not result >> index & 1
            page = self.pages[first + index]
            left = tuple(one for one in page if (one is not None and one.access == "w") == writable)
            if not left:
                raise Wrong(f"writing page {first + index}: {'worked' if writable else 'refused'}: {page}")
            if writable:
                content = key if same else key + index
                left = tuple(one and one._replace(key=content, lazy=False) for one in left)
            self.pages[first + index] = left

    def _do_p(self, a: Sequence[int], result: int, error: int) -> None:
        first, count, prot = a
        whole = self.mapped(first, count)
        _demand(result == 0 if whole else error == ENOMEM, "mprotect", a, error)
        access = {0: "n", 1: "r", 3: "w"}[prot]
        for at in range(first, first + count):
            if self.pages[at] == _GONE:
                return  # mprotect stops at the first hole
            self._change(at, 1, lambda page: page._replace(access=access))

    def _do_a(self, a: Sequence[int], result: int, error: int) -> None:
        first, count, advice = a
        if advice in (DONTNEED, DONTNEED_LOCKED):
            _demand(result == 0 or error in (ENOMEM, EINVAL), "madvise", a, error)
            self._purge(first, count, advice, error)
        elif advice == FREE:
            # Also when it failed: it stops at merged memory, having discarded some.
            self._change(first, count, lambda page: page._replace(lazy=bool(page.key)))
        elif advice == MERGEABLE:
            self._change(first, count, lambda page: page._replace(mergeable=True))

    def _purge(self, first: int, count: int, advice: int, error: int) -> None:
        may_have_stopped = False
        for at in range(first, first + count):
            locks = {page.lock for page in self.pages[at] if page is not None}
            if locks == {1} and advice == DONTNEED and error != EINVAL:
                raise Wrong(f"madvise of locked page {at} was not refused")
            if error == EINVAL and advice == DONTNEED:
                if locks == {1}:
                    return  # madvise stops at the first locked mapping
                may_have_stopped |= bool(locks - {0})
                if may_have_stopped:
                    both = [page and page._replace(key=0, lazy=False) for page in self.pages[at]]
                    self.pages[at] = tuple(dict.fromkeys((*self.pages[at], *both)))
                    continue
            self._change(at, 1, lambda page: page._replace(key=0, lazy=False))
        if error == EINVAL and not any(
            page and page.lock for at in range(first, first + count) for page in self.pages[at]
        ):
            raise Wrong(f"madvise of pages {first}+{count}: EINVAL, and none is locked")

    def _do_l(self, a: Sequence[int], result: int, error: int) -> None:
        self._change(a[0], a[1], lambda page: page._replace(lock=1 if result == 0 else 2))

    def _do_k(self, a: Sequence[int], result: int, error: int) -> None:
        self._change(a[0], a[1], lambda page: page._replace(lock=0 if result == 0 else 2 if page.lock else 0))

    def _do_b(self, a: Sequence[int], result: int, error: int) -> None:
        if result:
            _demand(error == ENOMEM, "brk", a, error)
            return
        for at in range(HEAP):
            if at >= a[0]:
                self.pages[HEAP_AT + at] = _GONE
            elif self.pages[HEAP_AT + at] == _GONE and all(
                page == _GONE for page in self.pages[HEAP_AT + at : HEAP_AT + HEAP]
            ):
                self.pages[HEAP_AT + at] = (Page("w", 0),)

    def _do_g(self, a: Sequence[int], result: int, error: int) -> None:
        self.pages[AWAY_AT:HEAP_AT] = [_GONE] * AWAY

    def _do_t(self, a: Sequence[int], result: int, error: int) -> None:
        self.hot[a[1]] = a[2]

    def writer_stopped(self, page: int, wrong: int) -> None:
        """The thread that wrote to `page` has ended; the last content it wrote stays."""
        key = self.hot.pop(page)
        if wrong:
            raise Wrong(f"page {page}: a thread did not read what it had written")
        before = self.pages[page]
        self.pages[page] = tuple(
            one._replace(key=content, lazy=False)
            for one in before
            if one is not None
            for content in (key, key + 1)
        ) + tuple(one for one in before if one is not None)

    def _do_r(self, a: Sequence[int], result: int, error: int) -> None:
        first, old, new, flags, to = a
        target = to if flags & FIXED else result
        if result == -1:
            _demand(error in (ENOMEM, EFAULT, EINVAL, EAGAIN), "mremap", a, error)
            self._failed_move(first, old, new, flags, to)
            return
        if flags & DONTUNMAP:
            self._maybe_unlocked()
        source = self.pages[first : first + old]
        kept = source[: min(old, new)]
        # Grown memory has the protection and the lock of what it continues.
        zeros = tuple(dict.fromkeys(page and page._replace(key=0, lazy=False) for page in source[-1]))
        if target != first:
            left = [
                tuple(page and page._replace(key=0, lock=0, lazy=False) for page in one) for one in source
            ]
            self.pages[first : first + old] = left if flags & DONTUNMAP else [_GONE] * old
        elif new < old:
            self.pages[first + new : first + old] = [_GONE] * (old - new)
        there = self.pages[target : target + new]
        self.pages[target : target + new] = [*kept, *[zeros] * (new - old)]
        for at, (page, before) in enumerate(zip(kept, there, strict=False), target):
            if None in page and target != first:  # what stood where a hole moves to may stay (Linux 6.17)
                self.pages[at] = tuple(dict.fromkeys((*page, *before)))

    def _maybe_unlocked(self) -> None:
        """With MREMAP_DONTUNMAP Linux unlocks all of the mapping that a part of is moved."""
        self._change(0, PAGES, lambda page: page._replace(lock=2 if page.lock else 0))

    def _failed_move(self, first: int, old: int, new: int, flags: int, to: int) -> None:
        """Unmapped, in part: the place to move to, what was to be cut off; or a part has moved."""
        if flags & DONTUNMAP:
            self._maybe_unlocked()
        before = list(self.pages)

        def may_be(at: int, *others: Page | None) -> None:
            self.pages[at] = tuple(dict.fromkeys((*self.pages[at], *others)))

        if flags & FIXED:
            for at in range(new):
                may_be(to + at, None, *(before[first + at] if at < old else ()))
            for at in range(first, first + old):
                left = [page and page._replace(key=0, lock=0, lazy=False) for page in before[at]]
                may_be(at, *(left if flags & DONTUNMAP else (None,)))
        else:
            for at in range(new, old):
                may_be(first + at, None)


def _demand(condition: bool, call: str, a: Sequence[int], error: int) -> None:
    if not condition:
        raise Wrong(f"{call}{tuple(a)}: errno {error}")


@cache
def _known() -> dict[str, int]:
    return {digest(key): key for key in range(1024)}


def _spelled(token: str) -> str:
    key = _known().get(token[:8])
    return f"{token}" + ("" if key is None else f" (content {key})")
