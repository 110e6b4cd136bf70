"""`python -m gpuksm` is `gpuksm`."""

from __future__ import annotations

import sys
from typing import NoReturn

# They start a guard, most likely, and have much to load before they ask it something.
_WITH_A_GUARD = ("scan", "daemon")
_WITHOUT = {"--dry-run", "--help", "-h"}


def main() -> NoReturn:
    """The command `gpuksm`."""
    # No descriptor of ours may get the number of a standard stream that is closed.
    streams = None not in (sys.stdin, sys.stdout, sys.stderr)
    if (
        streams
        and sys.argv[1:2] in [[verb] for verb in _WITH_A_GUARD]
        and not _WITHOUT.intersection(sys.argv)
    ):
        from gpuksm import client

        client.start_ahead()
    from gpuksm.cli import run

    run()


if __name__ == "__main__":
    main()
