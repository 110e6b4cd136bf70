"""What a daemon and those who talk to it leave with the guard for each other.

The daemon publishes its numbers and fetches what was set; `gpuksm ctl` sets and
reads.  The guard only keeps it: nothing that it does depends on any of it.
"""

from __future__ import annotations

from typing import Any

from gpuksm import knobs
from gpuksm.errors import GuardError


class Exchange:
    """The numbers of the one daemon that may run, and what it has not fetched yet.

    `serial` goes up when a daemon should look: something was set or registered.
    """

    def __init__(self) -> None:
        self.serial = 0
        self._numbers: dict[str, int] | None = None
        self._wanted: dict[str, int] = {}

    def publish(self, numbers: dict[str, Any]) -> dict[str, int]:
        """Keep the daemon's numbers; what was set since it last asked."""
        self._numbers = {name: int(numbers[name]) for name in knobs.TABLE if name in numbers}
        wanted, self._wanted = self._wanted, {}
        return wanted

    def set(self, values: dict[str, Any], merged_pages: int) -> None:
        """Keep `values` for the daemon; UsageError, GuardError when none runs.

        GuardError also for what KSM does not change, either, while something is merged.
        """
        checked = {str(name): knobs.checked(str(name), value) for name, value in values.items()}
        if self._numbers is None:
            raise GuardError("no daemon is running; start one with `gpuksm daemon`")
        name = "merge_across_nodes"
        if merged_pages and name in checked and checked[name] != (self._numbers | self._wanted).get(name):
            raise GuardError(
                f"{merged_pages} pages are merged; set run to 2 first, or run `gpuksm unmerge --all`"
            )
        self._wanted |= checked

    def told(self) -> dict[str, Any]:
        """What `gpuksm ctl get` and `gpuksm status` show; `daemon` is None when none runs."""
        return {"daemon": self._numbers, "wanted": self._wanted}

    def forget(self) -> None:
        """The daemon is gone."""
        self._numbers = None
        self._wanted = {}
