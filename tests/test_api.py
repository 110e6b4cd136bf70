"""The Python API: what it asks the guard for."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuksm
from gpuksm import errors
from gpuksm.linux import buffers
from gpuksm.linux._libc import PAGE_SIZE
from tests.wire_server import listening


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    def answer(message: dict[str, Any], _payload: bytearray) -> tuple[dict[str, Any], bytes]:
        seen.append(message)
        return {"ok": True, "targets": []}, b""

    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    with listening(tmp_path / "run", answer):
        yield seen


def test_register_names_whole_pages_of_this_process(asked: list[dict[str, Any]]) -> None:
    with mmap.mmap(-1, 3 * PAGE_SIZE) as mapped, memoryview(mapped)[10:] as part:
        address, _ = buffers.span(mapped)
        assert gpuksm.register(part) == 2 * PAGE_SIZE
    ranges = [[address + PAGE_SIZE, address + 3 * PAGE_SIZE]]
    assert asked == [{"op": "register", "pid": os.getpid(), "ranges": ranges}]


def test_registered_takes_it_back_even_after_an_error(asked: list[dict[str, Any]]) -> None:
    values = np.zeros(10 * PAGE_SIZE, dtype=np.uint8)
    with pytest.raises(ZeroDivisionError), gpuksm.registered(values):
        raise ZeroDivisionError
    assert [request["op"] for request in asked] == ["register", "unregister"]
    assert asked[0]["ranges"] == asked[1]["ranges"] == [list(buffers.whole_pages(values))]


def test_whole_processes_and_stats(asked: list[dict[str, Any]]) -> None:
    gpuksm.register_process()
    gpuksm.unregister()
    assert gpuksm.stats() == {"targets": []}
    pid = os.getpid()
    assert asked == [
        {"op": "register", "pid": pid, "ranges": None},
        {"op": "unregister", "pid": pid, "ranges": None},
        {"op": "status"},
    ]


def test_what_cannot_be_registered_is_said(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(errors.UsageError, match="no whole page"):
        gpuksm.register(bytearray(100))
    with pytest.raises(errors.UsageError, match="contiguous"):
        gpuksm.register(np.zeros((100, 4096))[:, ::2])
    with pytest.raises(TypeError):
        gpuksm.register(object())
    assert asked == []


def test_importing_the_package_loads_only_itself() -> None:
    code = "import sys; before = set(sys.modules); import gpuksm; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    heavy = ("gpuksm.", "numpy", "socket", "ctypes", "click", "rich")
    assert [name for name in loaded.split() if name.startswith(heavy)] == []


def test_names_that_do_not_exist() -> None:
    with pytest.raises(AttributeError):
        gpuksm.no_such_thing  # noqa: B018
