"""Makes pointers comparable between processes: see gpuksm/scan/same_layout.py."""

from __future__ import annotations

from typing import Any

from gpuksm.hashing._jit import kernel


@kernel("void(uint64[::1], uint64[::1], uint64[::1], uint64[::1], uint64[::1])")
def relocate(words: Any, starts: Any, ends: Any, tags: Any, bases: Any) -> None:
    """Replace every word that lies in a mapping [starts[i], ends[i]) by tags[i] + (word - bases[i]).

    Mappings ascend and are disjoint; arithmetic is modulo 2^64.
    """
    low, high = starts[0], ends[len(ends) - 1]
    for at in range(len(words)):
        word = words[at]
        if word < low or word >= high:
            continue
        first, last = 0, len(starts)
        while last - first > 1:
            middle = (first + last) >> 1
            if starts[middle] <= word:
                first = middle
            else:
                last = middle
        if word < ends[first]:
            words[at] = tags[first] + (word - bases[first])
