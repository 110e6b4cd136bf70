"""Named points at which tests kill, fail, delay or stop the guard: GPUKSM_FAULT=point[:nth][:action].

| action | what happens at the `nth` time that the point is passed (the first when left out; "*": each time) |
|---|---|
| kill | SIGKILL to ourselves; what is done when no action is named |
| stop | SIGSTOP to ourselves: who continues us decides how long |
| error, enomem, eagain, esrch | OSError with EIO, ENOMEM, EAGAIN, ESRCH |
| short | what was just read counts as half of that, at points that read memory; elsewhere nothing |
| 20ms | a delay |
| SIGUSR1@PID | a signal to process PID, and a millisecond in which it may be delivered |

By a signal a test makes a target exit, fork or call exec at the point: at once where it
runs, as it is let go where it is frozen.  What is done is said on stderr first, so that
a test knows that it was.  Without the variable a point costs one comparison.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time

_ERRORS = {"error": errno.EIO, "enomem": errno.ENOMEM, "eagain": errno.EAGAIN, "esrch": errno.ESRCH}
_SPEC = os.environ.get("GPUKSM_FAULT", "")
_POINT, _, _rest = _SPEC.partition(":")
_words = _rest.split(":") if _rest else []
_NTH = _words.pop(0) if _words and (_words[0].isdigit() or _words[0] == "*") else "1"
_ACTION = _words[0] if _words else "kill"
_seen = 0


def disarm() -> None:
    """No point does anything any more, in this process and those that it forks."""
    global _POINT
    _POINT = ""


def point(name: str) -> None:
    """Do what GPUKSM_FAULT asks for when this is its point and its turn."""
    if name == _POINT:
        _pass(name)


def read(name: str, got: int) -> int:
    """The same behind a read of `got` bytes; how many bytes shall count as read."""
    if name == _POINT and _pass(name) and _ACTION == "short":
        return got // 2
    return got


def _pass(name: str) -> bool:
    """True when it was the point's turn and we live on."""
    global _seen
    _seen += 1
    if _NTH not in ("*", str(_seen)):
        return False
    os.write(2, f"fault injected: {_SPEC}\n".encode())
    if _ACTION == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _ACTION == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif _ACTION in _ERRORS:
        raise OSError(_ERRORS[_ACTION], f"fault injected at {name}")
    elif _ACTION.endswith("ms"):
        time.sleep(float(_ACTION[:-2]) / 1000)
    elif "@" in _ACTION:
        number, _, pid = _ACTION.partition("@")
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.Signals[number])
        time.sleep(0.001)
    return True
