"""What is left of a plan where somebody else holds pages."""

from __future__ import annotations

import os
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm import wire, writers
from gpuksm.errors import FeatureMissing, NotPermitted, TargetGone, Unsupported
from gpuksm.guard import pins, plan, tracking, verify
from gpuksm.guard.commit import Outcome
from gpuksm.guard.pins import Pins, free_pages, free_parts
from gpuksm.guard.request import Planned
from gpuksm.guard.store import Store
from gpuksm.guard.target import Review
from gpuksm.guard.verify import Piece
from gpuksm.linux.page_references import ANY_COPY
from tests.support.comparing import Host, target


def _target(held: list[int] | None, pages: int = 8) -> Any:
    """A target of which these pages from address 0x1000 on are held; None: nobody may hold any."""

    def looked(start: int, count: int) -> bytearray | None:
        assert (start, count) == (0x1000, pages)
        return None if held is None else bytearray(page in held for page in range(pages))

    return SimpleNamespace(held=looked, pid=1, allowed=writers.NOTHING, references=None, reviewed=None)


@pytest.mark.parametrize(
    ("held", "left"),
    [
        (None, [(0, 8)]),
        ([], [(0, 8)]),
        ([0], [(1, 7)]),
        ([7], [(0, 7)]),
        ([2, 3, 5], [(0, 2), (4, 1), (6, 2)]),
        (list(range(8)), []),
    ],
)
def test_parts_that_nobody_holds(held: list[int] | None, left: list[tuple[int, int]]) -> None:
    skipped: dict[str, int] = {}
    for slot in (None, 100):
        parts = free_parts(_target(held), Piece(3, 0x1000, 8, slot), skipped.__setitem__)
        wanted = [
            Piece(3, 0x1000 + first * 4096, pages, None if slot is None else slot + first)
            for first, pages in left
        ]
        assert parts == wanted
    assert sum(skipped.values()) == len(held or [])
    numbers, slots = array("I", [6, 2, 0, 5]), array("Q", [10, 11, 12, 13])
    free = free_pages(_target(held), 0x1000, 8, numbers, slots, skipped.__setitem__)
    kept = [(n, s) for n, s in zip(numbers, slots, strict=True) if n not in (held or [])]
    assert list(zip(*free, strict=True)) == kept


def test_whether_pages_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where somebody may hold some; and for good once that was so."""
    answers: list[Any] = []

    def pinning_reason(pid: int, allowed: writers.Allowed, can_look: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer(can_look)

    monkeypatch.setattr(writers, "pinning_reason", pinning_reason)
    made: list[str] = []
    monkeypatch.setattr(pins, "PageReferences", lambda: made.append("references") or made[-1])
    target, tested = _target(None), Pins()
    answers += [lambda can_look: None, TargetGone("gone")]
    assert [tested.review(target, anew=True) for _ in range(2)] == [None, None]
    assert (target.references, made) == (None, [])
    answers += [lambda can_look: None if can_look() else Unsupported("x"), lambda can_look: None]
    assert [tested.review(target, anew=True) for _ in range(2)] == [None, None]
    assert (target.references, made) == ("references", ["references"])
    # What may not be merged is looked at when it is given back.
    for answer in (NotPermitted("no"), OSError("stale"), lambda can_look: Unsupported("x")):
        target.references = None
        answers.append(answer)
        assert tested.review(target, anew=True) == "direct-io"
        assert target.references == "references"


def test_what_was_found_holds_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once the target was armed anew: what it had held until then is not written to unseen any more."""
    looks: list[int] = []
    monkeypatch.setattr(writers, "pinning_reason", lambda pid, *_: looks.append(pid))
    target, tested = _target(None), Pins()
    for _ in range(3):
        assert tested.review(target) is None
    assert len(looks) == 1
    target.reviewed = None
    tested.review(target)
    assert len(looks) == 2
    monkeypatch.setattr(pins, "_REVIEW_SECONDS", -1)
    tested.review(target)
    assert len(looks) == 3


def test_arming_forgets_what_was_found() -> None:
    target: Any = SimpleNamespace(reviewed=Review(0.0, None), tainted=[], regions=[], spans=[])
    tracking.arm(target, lambda: None)
    assert target.reviewed is None


def test_where_they_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy of a merged page may be held then, for as long as there is a reason."""
    tries = []

    def missing() -> None:
        tries.append(1)
        raise FeatureMissing("no")

    reasons: list[Any] = [Unsupported("x"), Unsupported("x"), None]
    monkeypatch.setattr(pins, "PageReferences", missing)
    monkeypatch.setattr(writers, "pinning_reason", lambda *_: reasons.pop(0))
    target, tested = _target(None), Pins()
    assert [tested.can_look() for _ in range(3)] == [False] * 3
    assert len(tries) == 1
    for told, references in (("direct-io", ANY_COPY), ("direct-io", ANY_COPY), (None, None)):
        assert (tested.review(target, anew=True), target.references) == (told, references)


@pytest.mark.parametrize("op", [wire.OP_FILL, wire.OP_MAP, wire.OP_ZERO])
def test_pages_are_looked_at_before_they_are_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, op: int
) -> None:
    """Else what a device writes in between would be neither read nor seen."""
    did: list[str] = []
    mine = target(os.getpid(), 7)
    mine.references = mine.held = lambda *_: did.append("look") or bytearray(4)
    slot = store.allocate(4, 7, 0)

    def read(*_: Any) -> int:
        did.append("read")
        return 4

    monkeypatch.setattr(verify, "fill", read)
    monkeypatch.setattr(verify, "_read", lambda *_: did.append("read") or 0)
    item = Planned(0, op, 1, 0x1000, 4, slot, slot if op == wire.OP_FILL else None, 0, 0)
    plan._begin(Host(store, {1: mine}), [item], set(), Outcome())()
    assert did[0] == "look"
    assert "read" in did


def test_a_process_that_begins_it_within_a_plan_is_left_alone(store: Store) -> None:
    mine = target(os.getpid(), 7)
    mine.id, mine.link.agent.muzzled = 1, lambda: False
    reasons: list[str | None] = []
    host: Any = Host(store, {1: mine})
    host.pins = SimpleNamespace(review=lambda _target: reasons.pop(0))
    commits = plan._Commits(host, 5000, {}, set())
    reasons += [None, "direct-io", None]
    assert [commits._hindrance(mine) for _ in range(2)] == [None, "direct-io"]
    mine.references = object()
    assert commits._hindrance(mine) == "direct-io"
    commits.looked_at.add(1)
    reasons.append(None)
    assert commits._hindrance(mine) is None
