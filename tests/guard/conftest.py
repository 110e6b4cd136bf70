"""What tests of the guard's parts, by themselves, have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gpuksm.guard.store import Store


@pytest.fixture
def store() -> Iterator[Store]:
    """A store of its own, without a guard."""
    made = Store()
    yield made
    for fd in (made.fd, made.read_only):
        os.close(fd)
