"""Memory that devices may write to unseen, in processes that were harmless when attached (hazard 8)."""

from __future__ import annotations

import pytest

from gpuksm import wire
from tests import requirements_env
from tests.support.merging import scan_until_merged
from tests.support.scanner import Scanner
from tests.support.world import World

PAGES = 64

# `ring`: an io_uring with `late` as registered buffer; `aio`: a context; `direct`: a file by O_DIRECT.
_PINNING = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
void, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = void
libc.mmap.argtypes = [void, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [void, size, ctypes.c_int]
PAGES = 64
def area():
    at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
    assert libc.mprotect(at, PAGES * 4096, 3) == 0
    return at
def content(page):
    return (1000 + page).to_bytes(8, "little") * 512
early, late = area(), area()
for page in range(PAGES):
    ctypes.memmove(early + page * 4096, content(page), 4096)
print("READY early=%#x:%d late=%#x:%d" % (early, PAGES, late, PAGES), flush=True)
filled, kept = False, []
for line in sys.stdin:
    word = line.strip()
    if word == "quit":
        break
    if word == "fill":
        filled = True
        for page in range(PAGES):
            ctypes.memmove(late + page * 4096, content(page), 4096)
    if word == "ring":
        ring = libc.syscall(425, 8, ctypes.create_string_buffer(120))
        assert ring > 0, ctypes.get_errno()
        buffer = (ctypes.c_uint64 * 2)(late, PAGES * 4096)
        assert libc.syscall(427, ring, 0, ctypes.byref(buffer), 1) == 0, ctypes.get_errno()
    if word == "aio":
        kept.append(ctypes.c_ulong())
        assert libc.syscall(206, 8, ctypes.byref(kept[-1])) == 0, ctypes.get_errno()
    if word == "direct":
        kept.append(os.open(sys.executable, os.O_RDONLY | os.O_DIRECT))
    areas = [early, late] if filled else [early]
    pages = [(at + page * 4096, page) for at in areas for page in range(PAGES)]
    right = all(ctypes.string_at(at, 4096) == content(page) for at, page in pages)
    print("OK" if right else "CORRUPT", flush=True)
"""


@pytest.mark.parametrize("kind", ["ring", "aio", "direct"])
def test_a_target_begins_direct_io_after_its_attach(world: World, kind: str) -> None:
    if kind == "ring":
        requirements_env.need("root")  # else RLIMIT_MEMLOCK may be too small for the buffer
    victims = [world.python(_PINNING) for _ in range(2)]
    scan_until_merged(world, victims, ["early"])
    for victim in victims:
        victim.ask("fill")
    scanner = Scanner(world, victims)
    one, two = scanner.targets
    victims[0].ask(kind)
    try:
        # Attached and armed it is; only the commit can tell.
        (first, _), (second, _) = (victim.area("late") for victim in victims)
        plan = [
            (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, one, first, PAGES, 0, 0, 0, 0),
            (wire.OP_MAP, wire.FLAG_NEW_EXTENT, 0, two, second, PAGES, 0, 0, 0, 0),
        ]
        reply = scanner.commit([PAGES], plan)
        assert reply["skipped"]["direct-io"] == PAGES, reply
        assert reply["mapped_pages"] == PAGES, reply
    finally:
        scanner.close()
    result = world.scan(*victims)
    found = [target for target in result["targets"] if target["pid"] == victims[0].pid]
    assert "--allow-direct-io" in found[0]["error"], found
    assert victims[0].merged_pages("late") == 0
    assert victims[0].merged_pages("early") >= PAGES - 1
    for victim in victims:
        victim.verify()
