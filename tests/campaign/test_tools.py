"""What a campaign makes of what it has seen; the campaigns themselves are `make nightly` and `make soak`."""

from __future__ import annotations

import pytest

from tests.campaign import faults, load


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
    runs += [faults.Run("p", "error", 1), faults.Run("q", "error", 1, fired=True, block_stays=True)]
    assert faults.table(runs).splitlines()[2:] == ["| p | 2 1 hangs | 0/1 |", "| q |  | 1 1 block stays |"]


def test_only_a_control_block_may_stay() -> None:
    assert load.is_control_block("mapping new: 0x7f0000000000-0x7f0000050000 rw-p ")
    assert not load.is_control_block("mapping new: 0x7f0000000000-0x7f0000051000 rw-p ")
    assert not load.is_control_block("threads: 1 -> 2")
