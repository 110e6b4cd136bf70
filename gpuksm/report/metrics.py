"""What `gpuksm metrics` prints: the text format of Prometheus (exposition format 0.0.4).

Names are those of `gpuksm.knobs` with `gpuksm_` in front; counters end in `_total`,
times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpuksm import knobs

_MILLISECS = "_millisecs"


def render(found: Mapping[str, Any]) -> str:
    """The metrics of what `gpuksm status --json` shows."""
    numbers = found.get("daemon")
    lines = _family("guard_up", "1 while a guard runs", "gauge", int(found["running"]))
    lines += _family("daemon_up", "1 while a daemon runs", "gauge", int(numbers is not None))
    if found["running"]:
        targets = found["targets"]
        pauses = found["pauses_us"]
        lines += _family("store_bytes", "memory that the store takes", "gauge", found["store_bytes"])
        lines += _family("merged_targets", "processes attached to", "gauge", len(targets))
        lines += _family(
            "merged_pages", "pages mapped from the store", "gauge", sum(t["merged_pages"] for t in targets)
        )
        longest = max(pauses, default=0) / 1e6
        lines += _family("longest_pause_seconds", "longest of the last pauses of a process", "gauge", longest)
    for name, knob in knobs.TABLE.items():
        if numbers is None or name not in numbers:
            continue
        value: float = numbers[name]
        shown = name
        if name.endswith(_MILLISECS):
            shown, value = name.removesuffix(_MILLISECS) + "_seconds", value / 1000
        if name == "general_profit":
            shown += "_bytes"
        lines += _family(shown + "_total" * (knob.kind == "counter"), knob.meaning, knob.kind, value)
    return "".join(line + "\n" for line in lines)


def _family(name: str, meaning: str, kind: str, value: float) -> list[str]:
    return [
        f"# HELP gpuksm_{name} {meaning}",
        f"# TYPE gpuksm_{name} {kind}",
        f"gpuksm_{name} {value:.6f}" if isinstance(value, float) else f"gpuksm_{name} {value}",
    ]
