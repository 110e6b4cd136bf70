"""The documentation points at files that exist, and names verbs and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from gpuksm.cli import VERBS, cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_exist(page: Path) -> None:
    options = {
        verb: {text for row in _command(verb).params for text in (*row.opts, *row.secondary_opts)}
        for verb in VERBS
    }
    commands = re.findall(r"`gpuksm ([a-z]+)([^`\n]*)`", page.read_text())
    unknown = [verb for verb, _ in commands if verb not in VERBS]
    for verb, words in commands:
        given = set(re.findall(r"--[a-z][a-z-]*", words.split(" -- ")[0]))
        unknown += [
            f"{verb} {option}" for option in given if option not in options.get(verb, set()) | {"--help"}
        ]
    assert unknown == []


def test_every_option_of_scan_is_in_the_settings() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    options = [text for row in _command("scan").params for text in row.opts if text.startswith("--")]
    assert [option for option in options if f"`{option}" not in page] == []


def _command(verb: str) -> click.Command:
    command = cli.get_command(cli.make_context("gpuksm", [verb]), verb)
    assert command is not None
    return command
