"""gpuksm: merges identical memory pages of running Linux processes from user space.

The functions of the Python API live in `gpuksm.api` and are loaded when first
used: the guard imports this package too, and must stay small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuksm.api import register, register_process, registered, stats, unregister

__version__ = "0.1.0"
__all__ = ["register", "register_process", "registered", "stats", "unregister"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpuksm import api

    return getattr(api, name)
