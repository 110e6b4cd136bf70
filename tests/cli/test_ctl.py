"""ctl, metrics and daemon as a user types them, wrongly or without a daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuksm.cli import main
from tests.report.test_metrics import parse


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def _fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(list(words)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_without_a_daemon(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for words in (["get"], ["get", "run"], ["set", "run", "0"]):
        assert "no daemon is running" in _fails(capsys, 7, "ctl", *words)
    assert main(["metrics"]) == 0
    assert parse(capsys.readouterr().out) == {"gpuksm_guard_up": 0, "gpuksm_daemon_up": 0}
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["get", "ksm"], "no knob 'ksm'"),
        (["set", "pages_shared", "1"], "cannot be set"),
        (["set", "run", "3"], "0 to 2"),
        (["set", "run", "on"], "0 to 2"),
        (["set", "run"], "VALUE"),
    ],
)
def test_wrong_names_and_values(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in _fails(capsys, 2, "ctl", *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("interval = ", "no TOML"),
        ('intervall = "1s"', "no setting intervall"),
        ("[targets]\nprocess = 1", "no setting targets.process"),
        ("targets = 3", "must be a table"),
        ('interval = "soon"', "not a duration"),
        ('max-cpu = "half"', "not a percentage"),
        ("batch = 0", "--batch"),
    ],
)
def test_wrong_configurations(text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "gpuksm.toml"
    path.write_text(text)
    assert said in _fails(capsys, 2, "daemon", "--config", str(path))


def test_wrong_arguments_of_the_daemon(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read" in _fails(capsys, 2, "daemon", "--config", str(folder / "none.toml"))
    assert "--max-cpu" in _fails(capsys, 2, "daemon", "--max-cpu", "much")
    _fails(capsys, 4, "daemon", "--pid", "2147483647")
    _fails(capsys, 6, "daemon", "--pid", "1")
