"""`python -m gpuksm` is `gpuksm`."""

from gpuksm.cli import run

run()
