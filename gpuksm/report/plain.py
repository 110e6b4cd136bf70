"""Text that processes choose (their names, paths), made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` in one line; what a terminal could take for a command, or cannot show, becomes `?`."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
