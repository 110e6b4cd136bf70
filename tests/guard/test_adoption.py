"""A process that cannot be taken over now stays on the list, whatever the reason is."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.errors import NotPermitted, Unsupported
from gpuksm.guard import adoption
from gpuksm.guard.children import Orphan
from gpuksm.guard.freeze import FreezeFailed


@pytest.mark.parametrize(
    "error", [NotPermitted("no"), Unsupported("no"), FreezeFailed("no"), OSError("no")], ids=repr
)
def test_a_takeover_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def attach(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(adoption, "attach", attach)
    monkeypatch.setattr(adoption, "maps_store", lambda *_: True)
    orphan = Orphan(0, None, 7, os.getpid())
    guard: Any = SimpleNamespace(
        orphans=[orphan], gifts=tuple, census=None, privileged=True, targets={}, attic=None
    )
    adoption.adopt_orphans(guard)
    assert guard.orphans == [orphan]
    assert orphan.tries == 1
    assert orphan.pid == os.getpid()
