"""Steps and how they are drawn: plain lists, so that a sequence can be written down and replayed.

`["op", puppet, name, arguments, quiet]` is a command of tests/victims/puppet.c; every
other step begins with what is done to gpuksm.  A sequence is drawn without looking at
the model and every step of it has a meaning in any state, so that a part of a failing
sequence is a sequence again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tests.model.memory import ARENA, AWAY, AWAY_AT, DONTNEED, DONTNEED_LOCKED, FREE, HEAP, HEAP_AT

Step = list[Any]
PUPPETS = 3
_OTHER_ADVICE = (12, 13, 14, 15, 20, 21, 23, 25)  # (UN)MERGEABLE, (NO)HUGEPAGE, COLD, PAGEOUT, ...
_COMMANDS = {
    "w": 26, "m": 6, "mw": 10, "u": 5, "r": 18, "p": 9, "a": 20, "l": 1, "k": 2, "b": 4, "f": 2,
    "t": 1, "s": 1, "i": 1, "P": 0.5, "Q": 0.7, "x": 0.2, "g": 1.5, "v": 3, "all": 2,
}  # fmt: skip
_GUARD = {
    "scan": 30, "scan-die": 4, "unmerge": 3, "unmerge-one": 2, "kill": 1, "kill-soon": 1.5, "keeper": 0.3,
    "scan-held": 12, "grow": 5, "both": 0.5,
}  # fmt: skip
_GUARD_EVERY = 24  # commands, on average


def draw(seed: str, count: int) -> Iterator[Step]:
    """`count` steps of the sequence that belongs to `seed`."""
    chance = random.Random(seed)
    left = count
    for puppet in range(PUPPETS):
        yield from _refill(chance, puppet, 0, ARENA)
        left -= 2
    yield ["scan"]
    left -= 1
    while left > 0:
        if chance.random() * _GUARD_EVERY < 1:
            step: Step = [_pick(chance, _GUARD)]
            if step[0] == "grow":
                grown = list(_grow(chance))
                left -= len(grown)
                yield from grown
                continue
            if step[0] in ("scan-held", "both"):
                step.append([each for _ in range(chance.randint(1, 6)) for each in _held(chance)])
            if step[0] in ("scan-die", "kill-soon", "unmerge-one"):
                step.append(chance.randrange(12) if step[0] != "unmerge-one" else chance.randrange(PUPPETS))
            steps = [step]
        else:
            steps = list(_command(chance, chance.randrange(PUPPETS)))
        left -= len(steps)
        yield from steps


def _pick(chance: random.Random, weights: dict[str, float]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def _refill(chance: random.Random, puppet: int, first: int, count: int) -> list[Step]:
    return [["op", puppet, "m", [first, count, 3], True], _write(chance, puppet, first, count)]


def _write(chance: random.Random, puppet: int, first: int, count: int) -> Step:
    """Mostly the content that other puppets have at the same place, or shifted by some pages."""
    base = 1 + 128 * chance.choice((0, 0, 0, 1))
    style = chance.random()
    if style < 0.65:
        return ["op", puppet, "w", [first, count, base + first, 0], False]
    if style < 0.8:
        return ["op", puppet, "w", [first, count, base + chance.randrange(ARENA), 0], False]
    return ["op", puppet, "w", [first, count, chance.choice((0, 0, 300, 301)), 1], chance.random() < 0.2]


def _range(chance: random.Random, first: int, size: int, most: int = 24) -> tuple[int, int]:
    """Pages [at, at + count) within [first, first + size): often short, often at a round number."""
    count = chance.choice((1, 1, 2, 3, 4, 8, chance.randint(1, most)))
    count = min(count, size, most)
    at = chance.randrange(size - count + 1)
    if chance.random() < 0.4:
        at &= ~7
    return first + at, count


def _segment(chance: random.Random) -> tuple[int, int]:
    return chance.choices(((0, ARENA), (AWAY_AT, AWAY), (HEAP_AT, HEAP)), (10, 2, 2))[0]


def _command(chance: random.Random, puppet: int) -> Iterator[Step]:
    name = _pick(chance, _COMMANDS)
    quiet = chance.random() < 0.25
    at, count = _range(chance, *_segment(chance))
    arena_at, arena_count = _range(chance, 0, ARENA)
    if name == "w":
        yield _write(chance, puppet, at, count)
    elif name == "m":
        yield ["op", puppet, "m", [arena_at, arena_count, chance.choice((0, 1, 3, 3))], quiet]
    elif name == "mw":
        yield from _refill(chance, puppet, arena_at, arena_count)
    elif name == "all":
        yield from _refill(chance, puppet, 0, ARENA)
    elif name == "u":
        if at >= HEAP_AT:
            at, count = arena_at, arena_count
        yield ["op", puppet, "u", [at, count], quiet]
    elif name == "r":
        yield ["op", puppet, "r", _remap(chance), False]
    elif name == "p":
        yield ["op", puppet, "p", [at, count, chance.choice((0, 1, 3, 3))], quiet]
    elif name == "a":
        kind = chance.choice((DONTNEED, DONTNEED, DONTNEED, FREE, DONTNEED_LOCKED, 0))
        yield ["op", puppet, "a", [at, count, kind or chance.choice(_OTHER_ADVICE)], quiet]
    elif name in "lk":
        yield ["op", puppet, name, [at, count], quiet]
    elif name == "b":
        yield ["op", puppet, "b", [chance.randrange(HEAP + 1)], False]
    elif name == "f":
        yield ["op", puppet, "f", [arena_at, chance.choice((0, arena_count))], False]
    elif name == "t":
        yield ["op", puppet, "t", [chance.randrange(2), arena_at, 400 + 2 * chance.randrange(4)], False]
    elif name in "si":
        yield ["op", puppet, name, [chance.randrange(2)], False]
    else:
        yield ["op", puppet, name, [], False]


def _held(chance: random.Random) -> Iterator[Step]:
    """A command while the guard has compared a plan and has not carried it out: of the arena, and quick."""
    puppet = chance.randrange(PUPPETS)
    at, count = _range(chance, 0, ARENA)
    name = chance.choice("wwwwmuara")
    if name == "w":
        yield _write(chance, puppet, at, count)
    elif name == "m":
        yield from _refill(chance, puppet, at, count)
    elif name == "u":
        yield ["op", puppet, "u", [at, count], False]
    elif name == "a":
        yield ["op", puppet, "a", [at, count, DONTNEED], False]
    else:
        other = chance.randrange(ARENA - count + 1)
        yield ["op", puppet, "r", [at, count, count, 3, other], False]


def _grow(chance: random.Random) -> Iterator[Step]:
    """One puppet has the beginning of what the others have, merged with it; its end grows in place."""
    whole = chance.choice((8, 12, 16, 24))
    at = chance.randrange(0, ARENA - whole - 1)
    short = chance.randrange(whole)
    part = chance.randint(1, whole - 2)
    for puppet in range(PUPPETS):
        yield ["op", puppet, "m", [at, whole, 3], True]
        yield ["op", puppet, "w", [at, whole, 500 + at, 0], True]
    puppet = short % PUPPETS
    yield ["op", puppet, "u", [at + part, whole + 1 - part], True]
    yield ["scan"]
    old = chance.choice((1, 1, min(2, part), part))
    more = chance.randint(1, whole - part)
    yield ["op", puppet, "r", [at + part - old, old, old + more, 0, 0], False]


def _remap(chance: random.Random) -> list[int]:
    kind = chance.choice(("in-place", "in-place", "shrink", "away", "back", "fixed", "fixed", "dontunmap"))
    at, old = _range(chance, 0, ARENA, 16)
    room = ARENA - at
    if kind == "in-place":
        return [at, old, min(room, old + chance.choice((1, 1, 2, 8))), 0, 0]
    if kind == "shrink":
        return [at, old, chance.randint(1, old), chance.choice((0, 1)), 0]
    if kind == "away":
        return [at, old, min(AWAY, old + chance.choice((0, 1, 4, 12))), 1, 0]
    if kind == "back":
        old = chance.choice((1, 2, 4, 8, 16))
        new = max(1, min(ARENA, old + chance.choice((-1, 0, 0, 0, 1, 4))))
        return [AWAY_AT + chance.choice((0, 0, 1, 3)), old, new, 3, chance.randrange(ARENA - new + 1)]
    new = old if kind == "dontunmap" else max(1, old + chance.choice((-2, 0, 0, 0, 1, 5)))
    flags = 7 if kind == "dontunmap" else 3
    return [at, old, new, flags, chance.randrange(ARENA - new + 1)]
