"""docs/exit-codes.md lists every error class with its code, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from gpuksm import cli, errors

ROWS = re.findall(
    r"^\| (\d+) \|([^|]*)\|", (Path(__file__).parents[1] / "docs" / "exit-codes.md").read_text(), re.MULTILINE
)


def _classes(base: type[errors.GpuksmError]) -> list[type[errors.GpuksmError]]:
    return [base, *(found for kind in base.__subclasses__() for found in _classes(kind))]


def test_every_class_is_listed_under_its_code() -> None:
    documented = {name: int(code) for code, names in ROWS for name in re.findall(r"`(\w+)`", names)}
    assert documented == {kind.__name__: kind.exit_code for kind in _classes(errors.GpuksmError)}


def test_codes_are_unique_but_for_a_target_that_went_away() -> None:
    codes = [kind.exit_code for kind in _classes(errors.GpuksmError) if kind is not errors.TargetGone]
    assert len(codes) == len(set(codes))
    assert 0 not in codes


def test_the_codes_of_the_command_line_are_listed() -> None:
    listed = {int(code) for code, _ in ROWS}
    assert {
        0,
        cli.EXIT_USAGE,
        cli.EXIT_INTERNAL,
        cli.EXIT_OUTPUT,
        cli.EXIT_INTERRUPTED,
        cli.EXIT_BROKEN_PIPE,
    } <= listed
