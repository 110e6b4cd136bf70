"""Memory that devices may write to unseen, in processes that were harmless when attached (hazard 8)."""

from __future__ import annotations

from gpuksm import wire
from tests import requirements_env
from tests.support.merging import scan_until_merged
from tests.support.scanner import Scanner
from tests.support.scripts import LIBC
from tests.support.world import World

PAGES = 64

# `ring`: an io_uring with `late` as registered buffer; `aio`: a context; `direct`: a file by O_DIRECT.
_PINNING = (
    LIBC
    + """
import os, sys
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
)


def test_targets_begin_direct_io_after_their_attach(world: World) -> None:
    requirements_env.need("root")  # else RLIMIT_MEMLOCK may be too small for the registered buffer
    kinds = ("ring", "aio", "direct")
    plain, *pinning = [world.python(_PINNING) for _ in range(4)]
    scan_until_merged(world, [plain, *pinning], ["early"])
    for victim in (plain, *pinning):
        victim.ask("fill")
    scanner = Scanner(world, [plain, *pinning])
    for victim, kind in zip(pinning, kinds, strict=True):
        victim.ask(kind)
    try:
        # Attached and armed they are; only the commit can tell.
        plan = [
            (op, wire.FLAG_NEW_EXTENT, 0, target, victim.area("late")[0], PAGES, 0, 0, 0, 0)
            for op, target, victim in zip(
                [wire.OP_FILL, *[wire.OP_MAP] * 3], scanner.targets, [plain, *pinning], strict=True
            )
        ]
        reply = scanner.commit([PAGES], plan)
        assert reply["skipped"]["direct-io"] == 3 * PAGES, reply
        assert reply["mapped_pages"] == PAGES, reply
    finally:
        scanner.close()
    result = world.scan(plain, *pinning)
    errors = {target["pid"]: target["error"] for target in result["targets"]}
    for victim in pinning:
        assert "--allow-direct-io" in errors[victim.pid], errors
        assert victim.merged_pages("late") == 0
        assert victim.merged_pages("early") >= PAGES - 1
    for victim in (plain, *pinning):
        victim.verify()
