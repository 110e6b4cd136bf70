"""The one catch point: what users see and scripts get when something is wrong."""

from __future__ import annotations

import subprocess
import sys
import time

import click
import pytest

from gpuksm import cli, errors
from gpuksm.cli import _options, main


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "--batch", "0"],
        ["scan", "--batch", "-1"],
        ["scan", "--batch", str(10**12)],
        ["scan", "--batch", "many"],
        ["scan", "--batch"],
        ["scan", "--passes", "0"],
        ["scan", "--max-pause", "0"],
        ["scan", "--max-pause", "5 parsec"],
        ["scan", "--settle", "-1s"],
        ["scan", "--backend", "abacus"],
        ["scan", "--pid", "0"],
        ["scan", "--pid", "12,x"],
        ["scan", "--pid", str(10**12)],
        ["scan", "12"],
        ["scan", "--no-such-option"],
        ["no-such-verb"],
        ["unmerge", "--all", "--pid", "1"],
        ["register"],
        ["unregister"],
        ["exec"],
        ["exec", "-n", "0", "--", "true"],
        ["bench", "--size", "1M"],
        ["bench", "--size", "much"],
        ["bench", "--processes", "1"],
        ["bench", "--threads", "-1"],
        ["bench", "--backend", "abacus"],
        ["bench", "12"],
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpuksm: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_is_there_for_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "Usage: gpuksm" in capsys.readouterr().out


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr(cli._LazyGroup, "get_command", lambda _self, _ctx, _name: command)


@pytest.mark.parametrize("kind", errors.GpuksmError.__subclasses__())
def test_errors_become_a_line_and_their_exit_code(
    kind: type[errors.GpuksmError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _raising(monkeypatch, kind("what is wrong;\nwhat to do"))
    assert main(["scan"]) == kind.exit_code
    assert capsys.readouterr() == ("", "gpuksm: what is wrong; what to do\n")


def test_an_interrupt_ends_with_130_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _raising(monkeypatch, KeyboardInterrupt())
    assert main(["scan"]) == 130
    assert capsys.readouterr() == ("", "")


def test_an_internal_error_is_one_line_and_its_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _raising(monkeypatch, IndexError("list index"))
    assert main(["scan"]) == 70
    error = capsys.readouterr().err
    assert error == "gpuksm: internal error: IndexError: list index (GPUKSM_DEBUG=1 shows the details)\n"
    monkeypatch.setenv("GPUKSM_DEBUG", "1")
    assert main(["scan"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuksm", "doctor", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.parametrize("words", [["status"], ["doctor", "--json"], ["--help"], []], ids=" ".join)
def test_an_output_that_cannot_be_written_is_told(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpuksm", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 74
    line = "gpuksm: cannot write to standard output (No space left on device); what was done stays done\n"
    assert done.stderr == line


def test_an_output_that_is_closed_is_not_wanted() -> None:
    command = f"exec {sys.executable} -m gpuksm status >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = "import sys; from gpuksm.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    started = time.monotonic()
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    seconds = time.monotonic() - started
    assert {"numpy", "numba", "rich", "psutil"}.isdisjoint(loaded.split())
    # 0.08 s on an idle core; the limit leaves room for a busy machine.
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5ms", 0.005), ("0.2s", 0.2), ("200us", 2e-4), ("1", 1.0), (".5", 0.5), ("1m", 60.0), ("3 s", 3.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert _options.Duration(0, 100).convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "1h", "-1", "1e3", "nan", "1..2", "٣.x"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter):
        _options.Duration(0, 100).convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512M", 512 << 20), ("2g", 2 << 30), ("1 GiB", 1 << 30), ("64kb", 65536)],
)
def test_sizes(text: str, size: int) -> None:
    assert _options.Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "0G", "-1", "1.5G", "1X", "G", "٣M"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        _options.Size().convert(text, None, None)


def test_several_pids_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @click.command()
    @_options.targets
    def command(selection: object) -> None:
        seen.append(selection)

    monkeypatch.setattr(cli._LazyGroup, "get_command", lambda _self, _ctx, _name: command)
    for words in (["--pid", "5", "6", "7"], ["--pid", "5,6,7"], ["--pid", "5", "--pid", "6", "--pid", "7"]):
        assert main(["scan", *words]) == 0
    assert {selection.pids for selection in seen} == {(5, 6, 7)}
