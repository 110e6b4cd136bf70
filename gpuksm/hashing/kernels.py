"""Finds the kernels that go with this package and puts them together into one source.

An installed wheel carries them as `gpuksm/_kernels`; in a checkout they are in
`kernels/` beside the package.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

BLOCK = 128  # threads of a group
LANES = 8  # threads that work on one page
SORT_KEYS = 16  # keys of a thread in the sort, as in sort.cu
DIGIT_BITS = 4  # of the keys, sorted by in one pass

# In the order in which they are put together: group_scan of sort.cu is used by candidates.cu.
FILES = ("platform.h", "pages.cu", "sort.cu", "candidates.cu")


def folder() -> Traversable:
    """The folder that holds FILES."""
    package = files("gpuksm")
    shipped = package / "_kernels"
    return shipped if shipped.is_dir() else package / ".." / "kernels"


def source() -> str:
    """All kernels as one translation unit, for NVRTC and for OpenCL alike.

    #line makes compilers name the file and line of the file that was written.
    """
    here = folder()
    parts = []
    for name in FILES:
        text = (here / name).read_text(encoding="utf-8").replace('#include "platform.h"', "")
        parts.append(f'#line 1 "{name}"\n{text}')
    return "\n".join(parts)
