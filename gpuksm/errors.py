"""Every error a user can meet, and the exit code it ends with.

One class per kind of trouble; the message is one line that says what is wrong
and what to do about it.  `gpuksm.cli` is the only place that catches
`GpuksmError` and turns it into a line on stderr and an exit code.  Exit code 2
is click's own for bad usage; `UsageError` shares it for bad values that only a
later check can find.  Stdlib only: the guard imports this module.
"""

from __future__ import annotations


class GpuksmError(Exception):
    """Base of all errors a user can cause; never shown with a traceback."""

    exit_code = 1


class UsageError(GpuksmError):
    """An option or argument that makes no sense."""

    exit_code = 2


class NoTargets(GpuksmError):
    """Nothing to do: no target was named and none is registered."""

    exit_code = 3


class NoSuchProcess(GpuksmError):
    """A process that was named does not exist."""

    exit_code = 4


class NotPermitted(GpuksmError):
    """The kernel does not let this user trace that process."""

    exit_code = 5


class Unsupported(GpuksmError):
    """A named process that is never merged (kernel thread, pid 1, itself, traced...)."""

    exit_code = 6


class GuardError(GpuksmError):
    """The guard cannot be reached, started, or is busy with another scanner."""

    exit_code = 7


class FeatureMissing(GpuksmError):
    """The kernel lacks something gpuksm cannot do without."""

    exit_code = 8


class BackendUnavailable(GpuksmError):
    """The hashing backend asked for is not to be had here."""

    exit_code = 9


class NotEnoughMemory(GpuksmError):
    """Too little free memory to unmerge safely, or for what a benchmark needs; nothing was changed."""

    exit_code = 10


class TargetGone(GpuksmError):
    """A target exited in mid-call: a normal outcome, never an error of a scan."""

    exit_code = 4
