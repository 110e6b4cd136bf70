"""What differs between processor architectures, one module each: code, registers, call numbers."""

from __future__ import annotations

import functools
import os
from types import ModuleType

from gpuksm.errors import FeatureMissing


@functools.cache
def current() -> ModuleType:
    """The module of this machine's architecture; FeatureMissing where there is none yet."""
    machine = os.uname().machine
    if machine != "x86_64":
        raise FeatureMissing(f"gpuksm attaches on x86_64 only, this machine is {machine}")
    from gpuksm.guard.arch import x86_64

    return x86_64
