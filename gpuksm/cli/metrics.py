"""`gpuksm metrics`: counters for Prometheus."""

from __future__ import annotations

import sys

import click

from gpuksm.cli import status
from gpuksm.report import metrics


@click.command()
def command() -> None:
    """Print counters of guard and daemon in the text format of Prometheus.

    For the textfile collector of node_exporter, say:
    `gpuksm metrics > /var/lib/node_exporter/gpuksm.prom`.
    """
    sys.stdout.write(metrics.render(status.found()))
