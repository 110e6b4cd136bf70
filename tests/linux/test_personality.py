"""ADDR_NO_RANDOMIZE really gives two runs of a program the same addresses."""

from __future__ import annotations

import subprocess
import sys

from gpuksm.linux import personality

_PRINT_HEAP = [sys.executable, "-c", "print(id(object()))"]


def _address(same_layout: bool) -> str:
    before = personality.disable_address_randomisation if same_layout else None
    return subprocess.run(_PRINT_HEAP, check=True, capture_output=True, text=True, preexec_fn=before).stdout


def test_same_layout_gives_the_same_addresses(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert _address(True) == _address(True)
    assert len({_address(False) for _ in range(4)}) > 1


def test_the_setting_stays_in_the_child() -> None:
    _address(True)
    assert not personality.address_randomisation_disabled()


def test_tracers_are_allowed_or_there_is_no_yama() -> None:
    assert personality.allow_any_tracer() in (True, False)
