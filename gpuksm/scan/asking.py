"""What is asked of the guard before anything can be read: attach to targets, arm them.

Stdlib only, so that it is asked while numpy is still being loaded (attaching.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpuksm import errors
from gpuksm.hashing.crew import usable_cpus
from gpuksm.linux import procfs
from gpuksm.scan.types import ScanOptions, TargetRequest

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

# Processes that the guard has compare for it at most, and one for how many threads of ours: it has more to do
# than comparing, and that more of them would be quicker was not seen.
_MOST_COMPARERS, _THREADS_FOR_ONE = 4, 4
_LEAST_THREADS = 8  # with four processors the guard alone was as quick
_MUCH_BYTES = 512 << 20  # of less the guard has compared all before others are there
# For so long the guard waits for memory to settle, and answers nobody else meanwhile.
MOST_GUARD_SECONDS = 0.2


def attach(
    client: GuardClient, options: ScanOptions, wanted: Sequence[TargetRequest], work_bytes: int | None = None
) -> dict[str, Any]:
    """The guard's reply to `attach`; takes the scan lock.  Raises GuardError when another has it.

    `work_bytes` is what all targets of a scan hold; None: what `wanted` do.
    """
    asked = {
        **options.allowed._asdict(),
        "max_pause_us": options.max_pause_us,
        "comparers": _comparers(options, wanted, work_bytes),
    }
    targets = [{"pid": each.pid, "named": each.named, "ranges": each.ranges} for each in wanted]
    return client.request("attach", targets=targets, options=asked)[0]


def _comparers(options: ScanOptions, wanted: Sequence[TargetRequest], work_bytes: int | None) -> int:
    """How many processes the guard may have compare beside it."""
    if work_bytes is None:
        work_bytes = procfs.resident_bytes([request.pid for request in wanted])
    if work_bytes < _MUCH_BYTES:
        return 0
    threads = options.threads or usable_cpus()
    return min(_MOST_COMPARERS, threads // _THREADS_FOR_ONE) if threads >= _LEAST_THREADS else 0


def arm(client: GuardClient, target: int, settle_seconds: float) -> bytearray | None:
    """Arm the guard's `target`; what was written since the last time, pairs of u64, or None: it has exited.

    The guard merges nothing of it before `settle_seconds` have passed, MOST_GUARD_SECONDS at most.
    """
    calm_us = round(min(settle_seconds, MOST_GUARD_SECONDS) * 1e6)
    try:
        return client.request("arm", target=target, calm_us=calm_us)[1]
    except (errors.TargetGone, errors.NoSuchProcess):
        return None
