"""seen: against Python's own set."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.scan.seen import Seen

digests = st.sets(st.integers(0, 300), max_size=40)


def column(values):
    return np.array(sorted(values), np.uint64)


@settings(deadline=None)
@given(digests, st.lists(digests, max_size=12))
def test_what_was_added_is_held_and_nothing_else(first, more):
    seen, model = Seen(), set(first)
    seen.replace(column(first))
    everything = column(range(301))
    for values in more:
        assert seen.holds(everything).tolist() == [value in model for value in range(301)]
        seen.add(column(values - model))
        model |= values
        assert len(seen) == len(model)
    assert seen.holds(everything).tolist() == [value in model for value in range(301)]
    assert seen.holds(column([])).tolist() == []


def test_little_is_moved_when_little_is_added():
    seen = Seen()
    seen.replace(np.arange(0, 100_000, 2, dtype=np.uint64))
    large = seen._large
    for value in range(1, 2001, 2):
        seen.add(column([value]))
    assert seen._large is large
    seen.add(np.arange(2001, 30_001, 2, dtype=np.uint64))
    assert seen._large is not large
    assert seen.holds(np.arange(30_001, dtype=np.uint64)).all()
