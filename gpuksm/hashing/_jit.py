"""How kernels are compiled: ahead of the first call, without the GIL, and kept on disk where that is safe.

Importing this module imports numba, so only modules that are loaded when a
hasher is created may do so.  Compiled code is kept in `NUMBA_CACHE_DIR`, else
in the user's own cache folder, never in the installation, which may be
read-only or another user's.  Where no such folder can be written, kernels are
compiled anew in every process and all else is the same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config

# numba fills its settings in at run time, out of a type checker's sight.
numba_config: Any = config


def _ours(folder: Path) -> bool:
    """True for a folder, not a link to one, that belongs to this user."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def private_folder(base: Path) -> Path | None:
    """`base`/gpuksm/numba, made where it is missing; None unless all of it is ours and nobody else may write.

    The cache holds machine code that is loaded unseen: as root with the HOME of
    another user, that user could otherwise have code run as root.
    """
    folder = base / "gpuksm" / "numba"
    try:
        if not base.exists():
            base.mkdir(mode=0o700, parents=True)
        if not _ours(base):
            return None
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, exist_ok=True)
            if not _ours(part) or part.lstat().st_mode & 0o022:
                return None
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None when there is no safe place."""
    if numba_config.CACHE_DIR:
        return Path(numba_config.CACHE_DIR)
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return private_folder(base) if base.is_absolute() else None


def kernel(*signatures: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for exactly these signatures, releasing the GIL, cached on disk if possible."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        folder = cache_folder()
        if folder is not None:
            before = numba_config.CACHE_DIR
            numba_config.CACHE_DIR = str(folder)
            try:
                return numba.njit(list(signatures), nogil=True, cache=True)(function)
            except Exception:
                # A full disk, a truncated or foreign cache file: every way that
                # a cache can break means the same.  What the kernel itself has
                # wrong shows again below, where nothing catches it.
                pass
            finally:
                numba_config.CACHE_DIR = before
        return numba.njit(list(signatures), nogil=True)(function)

    return compiled
