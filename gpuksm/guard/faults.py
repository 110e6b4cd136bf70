"""Named points at which tests kill, fail, delay or stop the guard: GPUKSM_FAULT=point[:nth][:action].

`nth` is the turn at which it happens, 1 if not told; "*" stands for every turn.
`action` is "kill" (SIGKILL to ourselves, the default), "error" (OSError EIO),
"enomem", a delay such as "20ms", or "stop" (SIGSTOP to ourselves: who continues us
decides how long).  Without the variable a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
import time

_SPEC = os.environ.get("GPUKSM_FAULT", "")
_POINT, _, _rest = _SPEC.partition(":")
_words = _rest.split(":") if _rest else []
_NTH = _words.pop(0) if _words and (_words[0].isdigit() or _words[0] == "*") else "1"
_ACTION = _words[0] if _words else "kill"
_seen = 0


def point(name: str) -> None:
    """Do what GPUKSM_FAULT asks for when this is its point and its turn."""
    if name != _POINT:
        return
    global _seen
    _seen += 1
    if _NTH not in ("*", str(_seen)):
        return
    if _ACTION == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _ACTION == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif _ACTION == "error":
        raise OSError(errno.EIO, f"fault injected at {name}")
    elif _ACTION == "enomem":
        raise OSError(errno.ENOMEM, f"fault injected at {name}")
    elif _ACTION.endswith("ms"):
        time.sleep(float(_ACTION[:-2]) / 1000)
