"""What a campaign makes of what it has seen; the campaigns themselves are `make nightly` and `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpuksm
from tests.campaign import faults, removals


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("victim purge 1 (7): CORRUPT span: page 3", "lost write"),
        ("victim forks (7): FAILED drops: child ended with 9", "lost write"),
        ("victim purge 1 (7) said nothing for 20 s: {7: 't'}", "hangs"),
        ("purge 1: threads [7] stay stopped", "hangs"),
        ("victim purge 1 ended with -11 instead of answering", "dead"),
        ("scan, tried 5 times: GuardError()", "does not work"),
    ],
)
def test_what_a_run_shows(said: str, kind: str) -> None:
    assert faults.classify(AssertionError(said)) == kind


def test_the_table_of_faults() -> None:
    runs = [faults.Run("p", "kill", 1, fired=True), faults.Run("p", "kill", 2, fired=True, wrong="hangs")]
    runs += [faults.Run("p", "error", 1), faults.Run("q", "error", 1, fired=True)]
    assert faults.table(runs).splitlines()[2:] == ["| p | 2 1 hangs | 0/1 |", "| q |  | 1 |"]


@pytest.mark.parametrize("removal", removals.REMOVALS, ids=lambda removal: removal.name)
def test_what_is_to_be_removed_is_there(removal: removals.Removal) -> None:
    root = Path(gpuksm.__file__).parent.parent
    text = (root / removal.file).read_text()
    assert [text.count(old) for old, _ in removal.changes] == [1] * len(removal.changes)
    assert (root / removal.tests.split("::")[0]).is_file()
