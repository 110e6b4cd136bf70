"""asking: what a scan asks the guard for."""

from __future__ import annotations

from typing import Any

import pytest

from gpuksm.scan import asking
from gpuksm.scan.types import ScanOptions, TargetRequest

MUCH, LITTLE = 600 << 20, 500 << 20


class _Client:
    """Notes how many comparers it was asked for."""

    comparers = -1

    def request(self, op: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
        assert op == "attach"
        self.comparers = fields["options"]["comparers"]
        return {"targets": []}, b""


@pytest.mark.parametrize(
    ("cpus", "threads", "resident", "wanted"),
    [
        (1, 0, MUCH, 0),
        (4, 0, MUCH, 0),
        (7, 0, MUCH, 0),
        (8, 0, MUCH, 2),
        (16, 0, MUCH, 4),
        (64, 0, MUCH, 4),
        (16, 2, MUCH, 0),
        (2, 12, MUCH, 3),
        (16, 0, LITTLE, 0),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_comparers_where_there_are_processors_and_work_for_them(
    monkeypatch: pytest.MonkeyPatch, cpus: int, threads: int, resident: int, wanted: int, known: bool
) -> None:
    """`known`: as in a scan, which says what all targets hold; a daemon attaches to those that come."""
    monkeypatch.setattr(asking, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(asking.procfs, "resident_bytes", lambda pids: 0 if known else resident)
    client: Any = _Client()
    options = ScanOptions(backend="cpu", threads=threads)
    asking.attach(client, options, [TargetRequest(1)], resident if known else None)
    assert client.comparers == wanted
