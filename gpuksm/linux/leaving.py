"""How a process ends that something else would keep for ever."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def leave_for_ever(*held: object) -> None:
    """Keep what a hung device may still use until this process has ended, and let it end.

    A driver waits for its device when a module or a context of it is freed, and once more in what it
    has the C library run at exit.  So nothing in `held` is freed, not by the interpreter's own end
    either, and the process leaves before the drivers' turn, with the exit code it was to have.  What else
    was registered with the C library before that (buffers of its files too) has no turn either.
    """
    for one in held:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
    with suppress(AttributeError):  # a C library without it
        library = ctypes.CDLL(None)
        # The last one registered is called first, with the exit code: _exit(code).
        library.on_exit(library._exit, None)
