"""What Python scripts that act as victims have in common."""

from __future__ import annotations

# The C library's memory calls with their prototypes, as `libc`; `void` and `size` are its types.
LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
void, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = libc.mremap.restype = void
libc.mmap.argtypes = [void, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [void, size, size, ctypes.c_int, void]
libc.madvise.argtypes = libc.mprotect.argtypes = [void, size, ctypes.c_int]
libc.munmap.argtypes = [void, size]
"""


def area_script(pages: int) -> str:
    """LIBC, and an `area` of so many PAGES at `at`: the content that `expected` has the key of, page by page.

    `wrong()` lists the pages that are not as expected.  It ends with the READY line.
    """
    return (
        LIBC
        + f"""
PAGES = {pages}
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(at, PAGES * 4096, 3) == 0
def content(key):
    return key.to_bytes(8, "little") * 512
def wrong():
    return [p for p, key in enumerate(expected) if ctypes.string_at(at + p * 4096, 4096) != content(key)]
expected = [1 + page for page in range(PAGES)]
for page, key in enumerate(expected):
    ctypes.memmove(at + page * 4096, content(key), 4096)
print("READY area=%#x:%d" % (at, PAGES), flush=True)
"""
    )
