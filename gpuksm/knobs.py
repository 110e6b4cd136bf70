"""The knobs and counters of a running daemon, with the names of /sys/kernel/mm/ksm where KSM has them.

The guard checks what is set against this table, the daemon obeys it, `gpuksm ctl`
and `gpuksm metrics` show it.  Stdlib only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gpuksm.errors import UsageError

RUN_PAUSED, RUN_ON, RUN_UNMERGED = 0, 1, 2


class Knob(NamedTuple):
    """One whole number; `lowest` is None for what cannot be set.

    `kind` is what Prometheus calls it: a counter only grows while the daemon runs.
    """

    meaning: str
    lowest: int | None = None
    highest: int = 0
    kind: str = "gauge"


TABLE: dict[str, Knob] = {
    "run": Knob("1: rounds go on, 0: paused, 2: everything unmerged and paused", 0, 2),
    "pages_to_scan": Knob("pages that are read, hashed and sorted together", 1, 1 << 22),
    "sleep_millisecs": Knob("shortest time between two rounds", 10, 3_600_000),
    "max_sleep_millisecs": Knob("longest time between two rounds when nothing changes", 10, 86_400_000),
    "max_cpu_percent": Knob("most CPU time of the daemon, in percent of one CPU; 0: no limit", 0, 100_000),
    "use_zero_pages": Knob("1: pages full of zeros are given back, 0: left alone", 0, 1),
    "smart_scan": Knob("1: memory that keeps being written is looked at less often", 0, 1),
    "max_page_sharing": Knob("most mappings of one stable page; 0: there is no limit"),
    "merge_across_nodes": Knob(
        "1: pages of all NUMA nodes are merged with each other, 0: only those of one node; "
        "set while nothing is merged",
        0,
        1,
    ),
    "pages_shared": Knob("stable pages in use"),
    "pages_sharing": Knob("further mappings of stable pages"),
    "pages_unshared": Knob("calm pages that equal no other"),
    "pages_volatile": Knob("pages that were written between the last two looks at them"),
    "pages_skipped": Knob("candidates left out when they were last planned"),
    "zero_pages": Knob("pages full of zeros given back", kind="counter"),
    "full_scans": Knob("rounds so far", kind="counter"),
    "general_profit": Knob("bytes saved by merged pages, costs subtracted"),
    "pages_scanned": Knob("pages read and hashed", kind="counter"),
    "pages_merged": Knob("pages merged, those of zeros included", kind="counter"),
    "plans": Knob("rounds in which a candidate was new and had an equal", kind="counter"),
    "regions_skipped": Knob("pieces of regions that the last round passed over as volatile"),
    "targets": Knob("processes attached"),
    "interval_millisecs": Knob("time from the last round to the next"),
    "cpu_millisecs": Knob("CPU time of the daemon", kind="counter"),
}


def checked(name: str, value: Any) -> int:
    """`value` as knob `name` takes it; UsageError says what is wrong with it."""
    knob = TABLE.get(name)
    if knob is None:
        raise UsageError(f"there is no knob {name!r}; `gpuksm ctl get` lists them")
    if knob.lowest is None:
        raise UsageError(f"{name} cannot be set")
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = knob.lowest - 1
    if not knob.lowest <= number <= knob.highest:
        raise UsageError(f"{name} takes whole numbers from {knob.lowest} to {knob.highest}, not {value!r}")
    return number
