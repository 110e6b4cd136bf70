"""Where compiled kernels are kept between processes: one file for each module of kernels.

A file holds machine code that is loaded unseen, so it lies in `NUMBA_CACHE_DIR`
or else in a folder of the user's own cache that nobody else can write to, never
in the installation.  Where there is no such folder, nothing is kept and all else
is the same.  A file that is cut short or damaged counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

_MAGIC = b"gpuksm kernels 1\n"


def _ours(folder: Path) -> bool:
    """True for a folder, not a link to one, that belongs to this user."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def private_folder(base: Path) -> Path | None:
    """`base`/gpuksm/kernels, made where it is missing; None unless it is ours and closed to others.

    As root with the HOME of another user, that user could otherwise have code run as root.
    """
    folder = base / "gpuksm" / "kernels"
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


def folder() -> Path | None:
    """Where compiled kernels are kept; None when there is no safe place."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return private_folder(base) if base.is_absolute() else None


def read(name: str, key: str) -> bytes | None:
    """What was written as `name` under `key`; None when there is nothing, or something broken."""
    place = folder()
    if place is None:
        return None
    try:
        data = (place / f"{name}-{key}").read_bytes()
    except OSError:
        return None
    at = len(_MAGIC) + hashlib.sha256().digest_size
    content = data[at:]
    return content if data[:at] == _MAGIC + hashlib.sha256(content).digest() else None


def write(name: str, key: str, content: bytes) -> None:
    """Keep `content`; what does not work is left, for it only costs time."""
    place = folder()
    if place is None:
        return
    import tempfile  # once for each version that is installed

    # A reader sees the old file or the new one, never a part.
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=f".{name}-", dir=place)
        try:
            with open(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(content).digest() + content)
            os.replace(path, place / f"{name}-{key}")
        except BaseException:
            os.unlink(path)
            raise
