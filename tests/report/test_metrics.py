"""What `gpuksm metrics` prints is what Prometheus reads, with names that are documented."""

from __future__ import annotations

import re
from pathlib import Path

from gpuksm import knobs
from gpuksm.report import metrics

SETTINGS = Path(__file__).parents[2] / "docs" / "settings.md"
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*) (-?[0-9.]+)")


def parse(text: str) -> dict[str, float]:
    """Samples by name; every family must have its HELP and TYPE lines before it, once."""
    samples: dict[str, float] = {}
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in helped
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert kind in ("gauge", "counter")
            assert name.endswith("_total") == (kind == "counter")
            kinds[name] = kind
        else:
            match = _SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1] in kinds
            assert match[1] in helped
            assert match[1] not in samples
            samples[match[1]] = float(match[2])
    return samples


def test_without_a_guard() -> None:
    assert parse(metrics.render({"running": False})) == {"gpuksm_guard_up": 0, "gpuksm_daemon_up": 0}


def test_every_number_is_there_and_documented() -> None:
    numbers = {name: index for index, name in enumerate(knobs.TABLE)}
    status = {
        "running": True,
        "targets": [{"merged_pages": 3}, {"merged_pages": 4}],
        "store_bytes": 4096,
        "pauses_us": [100, 2500],
        "daemon": {**numbers, "cpu_millisecs": 1500},
    }
    found = parse(metrics.render(status))
    assert found["gpuksm_merged_pages"] == 7
    assert found["gpuksm_longest_pause_seconds"] == 0.0025
    assert found["gpuksm_cpu_seconds_total"] == 1.5
    assert found["gpuksm_pages_sharing"] == numbers["pages_sharing"]
    assert len(found) == 6 + len(knobs.TABLE)
    page = SETTINGS.read_text()
    assert [name for name in found if f"`{name}`" not in page] == []


def test_every_knob_is_documented() -> None:
    page = SETTINGS.read_text()
    assert [name for name in knobs.TABLE if f"`{name}`" not in page] == []
