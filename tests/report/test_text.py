"""Reports for people say what happened, in whatever width they are shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from gpuksm import knobs
from gpuksm.report import json, text
from gpuksm.scan import BenchResult, Stage
from tests.report.samples import sample_scan


def rendered(part: RenderableType, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_scan_shows_targets_sums_pauses_and_reasons() -> None:
    shown = rendered(text.scan(json.as_object(sample_scan())))
    for part in (
        "simulate",
        "55.0 MiB, measured",
        "1.25 ms",
        "file-backed",
        "no GPU here",
        "traced by process 5",
    ):
        assert part in shown
    assert "PSS" not in shown
    assert (
        max(len(line) for line in rendered(text.scan(json.as_object(sample_scan())), 60).splitlines()) <= 60
    )


def test_pss_is_shown_where_it_was_measured() -> None:
    found = json.as_object(sample_scan())
    found["targets"][0] |= {"pss_before": 200 << 20, "pss_after": 90 << 20}
    shown = rendered(text.scan(found))
    assert "PSS before" in shown
    assert "200.0 MiB 90.0 MiB" in " ".join(shown.split())


def test_the_histogram_counts_every_pause_once() -> None:
    shown = rendered(text.pauses([0, 99, 100, 4999, 5000, 10_000, 99_999]))
    rows = [line.split()[:4] for line in shown.splitlines()[1:]]
    assert [row[:4] for row in rows] == [
        ["<", "0.1", "ms", "2"],
        ["<", "0.2", "ms", "1"],
        ["<", "5", "ms", "1"],
        ["<", "10", "ms", "1"],
        [">=", "10", "ms", "2"],
    ]


def test_a_bench_shows_rates_in_their_units() -> None:
    stages = (
        Stage("read", "other processes' pages", 64 << 20, "bytes", 0.01, 6.7e9),
        Stage("sort", "random digests", 2 << 20, "digests", 0.1, 2.1e7),
        Stage("commit", "single pages", 2048, "pages", 0.02, 102_400.0),
    )
    found = json.as_object(BenchResult(3, 64 << 20, 3, 2, 5.0, "cpu", "asked for", stages))
    shown = " ".join(rendered(text.bench(found)).split())
    for part in ("64.0 MiB 10.0 ms 6.70 GB/s", "21.00 M digests/s", "102.4 k pages/s", "cpu (asked for)"):
        assert part in shown


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-(3 << 20), "-3.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (2 << 40, "2.0 TiB"),
    ],
)
def test_sizes(number: int, expected: str) -> None:
    assert text.size(number) == expected


def test_status_without_and_with_a_guard() -> None:
    assert "no guard is running" in rendered(text.status({"running": False}))
    target = {"pid": 5, "name": "sim", "target": 1, "merged_pages": 512, "runs": 3, "vma_budget": 4}
    found = {
        "running": True,
        "targets": [target],
        "store_slots": 256,
        "store_bytes": 1 << 20,
        "pauses_us": [],
    }
    shown = rendered(text.status({**found, "registered": [{"pid": 5, "ranges": [[0, 8192]]}]}))
    assert "2.0 MiB" in shown
    assert "registered: 5 (8.0 KiB)" in shown
    assert "daemon" not in shown
    numbers = dict.fromkeys(knobs.TABLE, 7) | {"run": 0, "general_profit": 3 << 20}
    shown = rendered(text.status({**found, "registered": [], "daemon": numbers}))
    assert "paused; 7 rounds, 7 planned" in shown
    assert "3.0 MiB, costs subtracted" in shown


def test_names_chosen_by_processes_are_only_text() -> None:
    target = {
        "pid": 5,
        "name": "[red]x[/]\x1b]0;\n\udc80",
        "target": 1,
        "merged_pages": 0,
        "runs": 0,
        "vma_budget": 0,
    }
    found = {
        "running": True,
        "targets": [target],
        "store_slots": 0,
        "store_bytes": 0,
        "registered": [],
        "pauses_us": [],
    }
    assert "[red]x[/]?]0; ?" in rendered(text.status(found))
