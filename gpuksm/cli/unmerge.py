"""`gpuksm unmerge`: every merged page becomes private anonymous memory again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from gpuksm import errors
from gpuksm.cli import _options, _output
from gpuksm.linux import numa
from gpuksm.targets import Selection

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

RETRY_SECONDS = 20.0
RETRY_EVERY_SECONDS = 0.2


@click.command()
@_options.targets
@click.option("--all", "everything", is_flag=True, help="Everything that is merged.")
@_options.max_pause
@_options.json_flag
def command(selection: Selection, everything: bool, max_pause: float, as_json: bool) -> int:
    """Give the merged pages of the TARGETS back as private memory.

    Refuses (exit 10) when there is too little free memory for the copies;
    nothing is changed then. Ends with 7 when a process could not be given its
    pages back: it could not be stopped, not even at later tries, has got a
    seccomp filter that does not let it map memory, or a device holds some of
    them (direct I/O, io_uring); the others are given back then.
    """
    from gpuksm import targets
    from gpuksm.client import GuardClient
    from gpuksm.report import text

    if everything and not selection.empty:
        raise click.UsageError("--all and TARGETS exclude each other")
    pids = None if everything else [request.pid for request in targets.resolve(selection)]
    with GuardClient.connect(start=False) as guard:
        found = _unmerge(guard, pids, round(max_pause * 1e6))
    _output.show(found, text.unmerge, as_json)
    for pid, reason in found["failed"].items():
        _output.note(f"process {pid} is still merged: {reason}")
    return errors.GuardError.exit_code if found["failed"] else 0


def _unmerge(guard: GuardClient, pids: list[int] | None, max_pause_us: int) -> dict[str, Any]:
    """Unmerge; what could not be stopped in time (on a busy machine, say) is tried again for a while."""
    found: dict[str, Any] = {"pages": 0, "pauses_us": [], "failed": {}}
    deadline = time.monotonic() + RETRY_SECONDS
    waiting: list[list[int] | None] = [pids]
    lasting: dict[str, str] = {}
    while waiting:
        found["failed"] = dict(lasting)
        numa.drain_lists()  # or pages seem held
        for chosen in waiting:
            try:
                reply, _ = guard.request("unmerge", pids=chosen, max_pause_us=max_pause_us)
            except errors.NoSuchProcess:
                if chosen is pids:
                    raise
                continue  # it has exited since the last try
            found["pages"] += reply["pages"]
            found["pauses_us"] += reply["pauses_us"]
            found["failed"] |= reply["failed"]
            lasting |= {pid: reply["failed"][pid] for pid in reply.get("lasting", ())}
        if time.monotonic() > deadline:
            break
        waiting = [[int(pid)] for pid in found["failed"] if pid not in lasting]
        time.sleep(RETRY_EVERY_SECONDS if waiting else 0)
    return found
