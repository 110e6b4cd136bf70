"""Reports for people: rich tables made from the objects that `--json` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpuksm.report.plain import printable

PAGE_BYTES = 4096
_PAUSE_EDGES_US = (100, 200, 500, 1000, 2000, 5000, 10000)
_BAR_CELLS = 40


def scan(found: Mapping[str, Any]) -> RenderableType:
    """What `gpuksm scan` did."""
    shared, sharing = found["pages_shared"], found["pages_sharing"]
    summary = _pairs(
        ("saved by this scan", f"{size(found['bytes_saved'])}, measured"),
        ("saved in all", f"{size(found['general_profit'])}, costs subtracted"),
        ("stable pages", f"{shared:,}, each kept once and mapped {sharing:,} more times"),
        ("zero pages given back", f"{found['zero_pages']:,}"),
        ("different", _pages(found["pages_unshared"])),
        ("written meanwhile", _pages(found["pages_volatile"])),
        ("left out", _pages(found["pages_skipped"])),
        *_how(found),
        ("longest pause", f"{found['max_pause_ms']:.2f} ms"),
    )
    parts = [_targets(found["targets"], "pages_merged"), summary]
    if found["pauses_us"]:
        parts.append(pauses(found["pauses_us"]))
    return Group(*parts, *_skipped(found["skipped"]), *_errors(found["targets"]))


def estimate(found: Mapping[str, Any]) -> RenderableType:
    """What a scan would save."""
    summary = [
        ("a scan would save", size(found["bytes_saved"])),
        ("pages that would merge", _pages(found["pages_mergeable"])),
        ("pages full of zeros", _pages(found["zero_pages"])),
        ("different", _pages(found["pages_unshared"])),
        ("left out", _pages(found["pages_skipped"])),
    ]
    if found["same_layout_bytes"] is not None:
        text = f"{size(found['same_layout_bytes'])} more (see `gpuksm exec --same-layout`)"
        summary.append(("with equal address layouts", text))
    table = _targets(found["targets"], "pages_mergeable")
    rest = (*_skipped(found["skipped"]), *_errors(found["targets"]))
    return Group(table, _pairs(*summary, *_how(found)), *rest)


def unmerge(found: Mapping[str, Any]) -> RenderableType:
    """What `gpuksm unmerge` gave back."""
    if not found["pages"]:
        return Text("nothing was merged")
    line = Text(f"{found['pages']:,} pages ({size(found['pages'] * PAGE_BYTES)}) are private memory again")
    return Group(line, pauses(found["pauses_us"])) if found["pauses_us"] else line


def status(found: Mapping[str, Any]) -> RenderableType:
    """What the guard holds."""
    if not found["running"]:
        return Text("no guard is running: nothing is registered or merged")
    table = _table("pid", "name", "merged", "runs", "VMA budget")
    for target in found["targets"]:
        merged = size(target["merged_pages"] * PAGE_BYTES)
        _add(
            table,
            str(target["pid"]),
            target["name"],
            merged,
            f"{target['runs']:,}",
            f"{target['vma_budget']:,}",
        )
    registered = Text("registered: " + (_registered(found["registered"]) or "nothing"))
    slots, stored = found["store_slots"], size(found["store_bytes"])
    parts: list[RenderableType] = [Text(f"store: {slots:,} pages, {stored} in use"), registered]
    if found["targets"]:
        parts.insert(0, table)
    if found.get("daemon") is not None:
        parts.append(_daemon(found["daemon"]))
    if found["pauses_us"]:
        parts.append(pauses(found["pauses_us"]))
    return Group(*parts)


def _daemon(numbers: Mapping[str, int]) -> RenderableType:
    """What the running daemon has done."""
    states = {0: "paused", 1: "running", 2: "everything unmerged, and paused"}
    rounds = f"{numbers['full_scans']:,} rounds, {numbers['plans']:,} planned"
    return _pairs(
        ("daemon", f"{states[numbers['run']]}; {rounds}"),
        ("next round after", f"{numbers['interval_millisecs'] / 1000:g} s"),
        ("CPU time of the daemon", f"{numbers['cpu_millisecs'] / 1000:.2f} s"),
        ("scanned in all", _pages(numbers["pages_scanned"])),
        ("merged in all", _pages(numbers["pages_merged"])),
        ("different", _pages(numbers["pages_unshared"])),
        ("volatile", _pages(numbers["pages_volatile"])),
        ("saved now", f"{size(numbers['general_profit'])}, costs subtracted"),
    )


def doctor(found: Mapping[str, Any]) -> RenderableType:
    """Checks of the machine, then of each process asked about."""
    styles = {"ok": "green", "note": "yellow", "missing": "red"}
    table = _table("check", "", "found", "what to do", left=4)
    for check in found["checks"]:
        mark = Text(check["state"], style=styles[check["state"]])
        _add(table, check["name"], mark, check["found"], check["advice"])
    parts: list[RenderableType] = [table]
    for target in found["targets"]:
        head = f"process {target['pid']} ({target['name'] or 'unknown'}): "
        if target["message"]:
            parts.append(Text(printable(head + target["message"]), style="red"))
        if target["regions"]:
            parts.append(
                Text(f"{head}{size(target['bytes'])} in {target['regions']:,} regions can be merged")
            )
        parts += _skipped(target["skipped"])
    return Group(*parts)


def bench(found: Mapping[str, Any]) -> RenderableType:
    """What the stages of a scan reach."""
    table = _table("stage", "of what", "amount", "time", "rate")
    for stage in found["stages"]:
        amount, unit = stage["amount"], stage["unit"]
        shown = size(amount) if unit == "bytes" else f"{amount:,} {unit}"
        _add(table, stage["stage"], stage["what"], shown, f"{stage['seconds'] * 1000:.1f} ms", _rate(stage))
    memory = f"{found['processes']} processes of {size(found['bytes_each'])}"
    how = f"{found['seconds']:.1f} s, medians of {found['repeats']}"
    backend = f"{found['backend']} ({found['backend_reason']}), {found['threads']} threads"
    return Group(table, _pairs(("measured", f"{memory}, in {how}"), ("backend", backend)))


def _rate(stage: Mapping[str, Any]) -> str:
    rate, unit = stage["per_second"], stage["unit"]
    if unit == "bytes":
        return f"{rate / 1e9:.2f} GB/s"
    return f"{rate / 1e6:.2f} M {unit}/s" if rate >= 1e6 else f"{rate / 1e3:.1f} k {unit}/s"


def pauses(durations_us: Sequence[float] | Mapping[str, int]) -> RenderableType:
    """A histogram of how long processes were stopped; durations in microseconds, or counts by bucket."""
    if isinstance(durations_us, Mapping):
        rows = [(str(bucket), count) for bucket, count in durations_us.items()]
    else:
        rows = _buckets(durations_us)
    most = max((count for _, count in rows), default=1)
    table = _table("pause", "times", "", left=1)
    for name, count in rows:
        _add(table, name, f"{count:,}", "█" * -(-count * _BAR_CELLS // most))
    table.columns[-1].justify = "left"
    return table


def size(number: float) -> str:
    """Bytes as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _buckets(durations_us: Sequence[float]) -> list[tuple[str, int]]:
    rows, low = [], 0
    for edge in (*_PAUSE_EDGES_US, None):
        count = sum(1 for value in durations_us if value >= low and (edge is None or value < edge))
        name = f"< {edge / 1000:g} ms" if edge is not None else f">= {low / 1000:g} ms"
        if count:
            rows.append((name, count))
        low = edge or low
    return rows


def _how(found: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    scanned = size(found["pages_scanned"] * PAGE_BYTES)
    return (
        ("scanned", f"{scanned} in {found['seconds']:.2f} s, {found['cpu_seconds']:.2f} s of CPU time"),
        ("backend", f"{found['backend']} ({found['backend_reason']})"),
    )


def _targets(targets: Sequence[Mapping[str, Any]], merged: str) -> RenderableType:
    """One row per target; with PSS where the caller has measured it."""
    has_pss = any("pss_before" in target for target in targets)
    heads = ("scanned", "equal" if merged == "pages_mergeable" else "merged", "runs", "VMAs")
    table = _table("pid", "name", *heads, *(["PSS before", "after"] * has_pss))
    for target in targets:
        if target["error"] is not None:
            continue
        cells = [size(target[key] * PAGE_BYTES) for key in ("pages_scanned", merged)]
        cells += [f"{target[key]:,}" for key in ("runs", "vmas")]
        if has_pss:
            cells += [size(target[key]) for key in ("pss_before", "pss_after")]
        _add(table, str(target["pid"]), target["name"], *cells)
    return table if table.row_count else Text("no process was scanned")


def _skipped(skipped: Mapping[str, int]) -> list[RenderableType]:
    if not skipped:
        return []
    table = _table("left out because", "pages", "size", left=1)
    for reason, pages in sorted(skipped.items(), key=lambda row: -row[1]):
        _add(table, reason, f"{pages:,}", size(pages * PAGE_BYTES))
    return [table]


def _errors(targets: Iterable[Mapping[str, Any]]) -> list[RenderableType]:
    failed = [target for target in targets if target.get("error")]
    return [Text(printable(row["error"]), style="red") for row in failed]


def _registered(targets: Iterable[Mapping[str, Any]]) -> str:
    words = []
    for target in targets:
        ranges = target["ranges"]
        part = "" if ranges is None else f" ({size(sum(end - start for start, end in ranges))})"
        words.append(f"{target['pid']}{part}")
    return ", ".join(words)


def _pages(pages: int) -> str:
    return f"{pages:,} pages ({size(pages * PAGE_BYTES)})"


def _pairs(*rows: tuple[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        _add(table, name, value)
    return table


def _table(*columns: str, left: int = 2) -> Table:
    """A table whose first `left` columns are text, the others numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Add a row; strings are text that somebody else chose, and never markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells))
