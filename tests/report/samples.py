"""Results for the tests of the reports."""

from __future__ import annotations

from gpuksm.scan import ScanResult, TargetReport


def sample_scan() -> ScanResult:
    """A result with every kind of content."""
    good = TargetReport(12, "simulate", 40000, 30000, 12, 20, {"file-backed": 7}, None)
    bad = TargetReport(13, "other", 0, 0, 0, 0, {}, "process 13 is traced by process 5 (a debugger?)")
    return ScanResult(
        pages_scanned=40000,
        pages_merged=30000,
        pages_shared=15000,
        pages_sharing=14000,
        pages_unshared=5000,
        pages_volatile=4000,
        pages_skipped=7,
        zero_pages=1000,
        full_scans=2,
        general_profit=50 << 20,
        bytes_saved=55 << 20,
        seconds=0.5,
        cpu_seconds=0.75,
        max_pause_ms=1.25,
        backend="cpu",
        backend_reason="no GPU here",
        skipped={"file-backed": 7},
        pauses_us=(90, 400, 450, 1250),
        targets=(good, bad),
    )
