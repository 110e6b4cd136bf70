"""`gpuksm unmerge` goes on with what could not be stopped at first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuksm.cli import main, unmerge
from tests.wire_server import listening

Reply = dict[str, Any]


@pytest.fixture
def answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Reply, str, list[Any]]]:
    """Runs `unmerge --all` against these answers; (exit code, its object, stderr, the pids asked for)."""
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(unmerge, "RETRY_EVERY_SECONDS", 0.01)

    def run(*replies: Reply) -> tuple[int, Reply, str, list[Any]]:
        left, asked = list(replies), []

        def answer(message: Reply, _payload: bytearray) -> tuple[Reply, bytes]:
            asked.append(message["pids"])
            return left.pop(0) if len(left) > 1 else left[0], b""

        with listening(tmp_path / "run", answer):
            code = main(["unmerge", "--all", "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err, asked

    return run


def _reply(pages: int, **failed: str) -> Reply:
    return {
        "ok": True,
        "pages": pages,
        "pauses_us": [pages],
        "failed": {name[1:]: why for name, why in failed.items()},
    }


def test_what_could_not_be_stopped_is_tried_again(answers: Any) -> None:
    code, found, err, asked = answers(
        _reply(5, p7="busy", p8="busy"), _reply(2), _reply(1, p8="busy"), _reply(3)
    )
    assert (code, err) == (0, "")
    assert found == {"pages": 11, "pauses_us": [5, 2, 1, 3], "failed": {}}
    assert asked == [None, [7], [8], [8]]


def test_what_exits_meanwhile_is_no_error(answers: Any) -> None:
    gone = {"error": "NoSuchProcess", "message": "there is no process 7"}
    code, found, _, asked = answers(_reply(5, p7="busy"), gone)
    assert (code, found["pages"], found["failed"], asked) == (0, 5, {}, [None, [7]])


def test_what_never_stops_is_said_and_is_an_error(answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unmerge, "RETRY_SECONDS", 0.1)
    code, found, err, _ = answers(_reply(0, p7="a thread did not stop"))
    assert code == 7
    assert found["failed"] == {"7": "a thread did not stop"}
    assert err == "gpuksm: process 7 is still merged: a thread did not stop\n"
