"""`gpuksm scan`: one or more rounds over the targets, then a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gpuksm.cli import _options, _output, _scanning, estimate
from gpuksm.targets import Selection

if TYPE_CHECKING:
    from gpuksm.scan import ScanOptions


@click.command()
@_options.targets
@_scanning.batch
@click.option(
    "--passes",
    type=_options.Count(1, 1000),
    default=2,
    show_default=True,
    metavar="N",
    help="Most rounds; one after the first looks at what was written meanwhile, if that is worth it.",
)
@click.option(
    "--settle",
    type=_options.Duration(0, 3600),
    default="0.2s",
    show_default=True,
    metavar="TIME",
    help="Time between two rounds, in which a page must not be written.",
)
@_scanning.hashing
@_scanning.across_nodes
@click.option("--dry-run", is_flag=True, help="Only say what would be merged, like `gpuksm estimate`.")
@_scanning.allowed
@_options.json_flag
def command(
    selection: Selection, passes: int, settle: float, dry_run: bool, as_json: bool, **scanning: Any
) -> None:
    """Find equal pages of the TARGETS and merge them into one shared, copy-on-write page each.

    TARGETS: --pid N... | --tree PID | --name REGEX | --user U | --cgroup PATH |
    --registered (the default). --name, --user and --cgroup narrow each other
    down; processes with capabilities are taken only when named by --pid, --tree
    or registration.
    """
    options = _scanning.scan_options(scanning, passes=passes, settle_seconds=settle)
    if dry_run:
        estimate.run(selection, options, as_json)
    else:
        _run(selection, options, as_json)


def _run(selection: Selection, options: ScanOptions, as_json: bool) -> None:
    from gpuksm import targets
    from gpuksm.client import GuardClient
    from gpuksm.report import json, progress
    from gpuksm.scan import run_scan

    requests = targets.resolve(selection)
    _scanning.load_meanwhile()
    with GuardClient.connect(start=True) as guard, progress.bar() as bar:
        _scanning.give_way()
        result = run_scan(guard, requests, options, bar)
    _output.show(json.as_object(result), _output.rendered("scan"), as_json)
