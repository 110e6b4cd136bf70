"""`gpuksm bench`: what the stages of a scan reach on this machine."""

from __future__ import annotations

from typing import Any

import click

from gpuksm.cli import _options, _output, _scanning

_LEAST_BYTES = 4 << 20


class _HelperSize(_options.Size):
    """A size of a few MiB at the least."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size = super().convert(value, param, ctx)
        if size < _LEAST_BYTES:
            self.fail(f"{value} is less than {_LEAST_BYTES >> 20}M", param, ctx)
        return size


@click.command()
@click.option(
    "--size",
    type=_HelperSize(),
    default="64M",
    show_default=True,
    metavar="SIZE",
    help="Memory of each helper process, 4M or more.",
)
@click.option(
    "--processes",
    type=_options.Count(2, 256),
    default=3,
    show_default=True,
    metavar="N",
    help="Helper processes that are started.",
)
@_scanning.hashing
@_options.json_flag
def command(size: int, processes: int, as_json: bool, **hashing: Any) -> None:
    """Measure what the stages of a scan reach here: read, hash, sort, fill, compare, commit, unmerge.

    Starts helper processes with memory that is equal in all of them, and a guard of
    its own for them; other processes are left alone, and nothing is left behind.
    """
    from gpuksm.report import json, progress, text
    from gpuksm.scan import run_bench

    options = _scanning.scan_options({"batch": 65536, **hashing})
    with progress.bar() as bar:
        result = run_bench(processes, size, options, bar)
    _output.show(json.as_object(result), text.bench, as_json)
