"""There is one kernel KSM for all tests that run side by side."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

from bench import kernel_ksm

_NAMES = (*kernel_ksm.FULL_SPEED, "run")


def settings() -> dict[str, str]:
    """What KSM is set to."""
    return {name: kernel_ksm.setting(name) for name in _NAMES}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else's tests drive it meanwhile; afterwards it must be as it was."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = settings()
        yield
        assert settings() == before
