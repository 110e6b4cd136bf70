"""Others that write into a process's memory: MPI transports by process_vm_writev (hazard 7), network taps."""

from __future__ import annotations

import mmap

import pytest

from gpuksm import wire
from gpuksm.linux import vm
from tests import requirements_env
from tests.support import standstill
from tests.support.scanner import Scanner
from tests.support.scripts import LIBC, area_script
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 24  # so many that a plan does not put them off as short

# `into PID ADDRESS PAGE KEY`: write the content of KEY there; `expect PAGE KEY`: what is here from now on.
_PEER = (
    LIBC
    + """
import sys
class Segment(ctypes.Structure):
    _fields_ = [("base", void), ("length", size)]
PAGES = 24  # so many that a plan does not put them off as short
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(at, PAGES * 4096, 3) == 0
keys = [1000 + page for page in range(PAGES)]
def content(key):
    return key.to_bytes(8, "little") * 512
for page in range(PAGES):
    ctypes.memmove(at + page * 4096, content(keys[page]), 4096)
print("READY area=%#x:%d" % (at, PAGES), flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "quit":
        break
    numbers = list(map(int, numbers))
    if word == "expect":
        keys[numbers[0]] = numbers[1]
    if word == "into":
        pid, there, page, key = numbers
        data = ctypes.create_string_buffer(content(key), 4096)
        mine = Segment(ctypes.addressof(data), 4096)
        its = Segment(there + page * 4096, 4096)
        assert libc.process_vm_writev(pid, ctypes.byref(mine), 1, ctypes.byref(its), 1, 0) == 4096
        print("OK", flush=True)
        continue
    wrong = [page for page in range(PAGES) if ctypes.string_at(at + page * 4096, 4096) != content(keys[page])]
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""
)


def _plan(scanner: Scanner, victims: list[Victim]) -> list[tuple[int, ...]]:
    (one, _), (two, _) = (victim.area("area") for victim in victims)
    first, second = scanner.targets
    return [
        (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, first, one, PAGES, 0, 0, 0, 0),
        (wire.OP_MAP, wire.FLAG_NEW_EXTENT, 0, second, two, PAGES, 0, 0, 0, 0),
    ]


def test_a_peer_writes_after_the_comparison(world: World) -> None:
    """Write tracking sees it like a write of the process's own: the page is refused."""
    guard = standstill.start_standing_still(world, "verified", world.python(_PEER))
    victims = [world.python(_PEER) for _ in range(2)]
    scanner = Scanner(world, victims)
    try:

        def write_into_each_other() -> None:
            for victim, other in (victims, reversed(victims)):
                victim.ask(f"into {other.pid} {other.area('area')[0]} 3 7777")

        reply = standstill.while_it_stands(
            guard, lambda: scanner.commit([PAGES], _plan(scanner, victims)), write_into_each_other
        )
        assert reply["mapped_pages"] > 0, reply
        assert reply["skipped"]["written"] == 2, reply
        for victim in victims:
            victim.ask("expect 3 7777")
        # Of merged memory the writer's target gets a copy.
        for victim, other in (victims, reversed(victims)):
            victim.ask(f"into {other.pid} {other.area('area')[0]} 1 8888")
            other.ask("expect 1 8888")
        for victim in victims:
            victim.verify()
    finally:
        scanner.close()
        standstill.let_go(world.guard_processes())


def test_what_a_peer_writes_inside_the_freeze(world: World) -> None:
    """The window that is left, and that docs/hazards.md tells of: between the last look and the mapping.

    Who closes it changes this test.
    """
    guard = standstill.start_standing_still(world, "commit-validated", world.python(_PEER))
    victims = [world.python(_PEER) for _ in range(2)]
    scanner = Scanner(world, victims)
    start, _ = victims[0].area("area")
    data = mmap.mmap(-1, 4096)
    data[:] = (7777).to_bytes(8, "little") * 512
    try:
        reply = standstill.while_it_stands(
            guard,
            lambda: scanner.commit([PAGES], _plan(scanner, victims)),
            lambda: vm.writev(victims[0].pid, [(vm.address_of(data), 4096)], [(start, 4096)]),
        )
        assert reply["mapped_pages"] == 2 * PAGES, reply
        for victim in victims:
            victim.verify()  # the victim was written to, and does not know
        with pytest.raises(AssertionError, match="CORRUPT"):
            victims[0].ask("expect 0 7777")
        victims[0].ask("expect 0 1000")
    finally:
        scanner.close()
        standstill.let_go(world.guard_processes())


# `receive PAGE`: a frame of the tap that virtual machines use, read into that page by the kernel.
_TAPPED = (
    area_script(PAGES)
    + """
import fcntl, os, socket, struct, sys
assert libc.unshare(0x40000000) == 0  # CLONE_NEWNET
tap = os.open("/dev/net/tun", os.O_RDWR)
name = struct.pack("16sH22x", b"tap0", 0x1002)  # IFF_TAP | IFF_NO_PI
fcntl.ioctl(tap, 0x400454CA, name)
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
fcntl.ioctl(link, 0x8914, struct.pack("16sH22x", b"tap0", 0x41))  # IFF_UP | IFF_RUNNING
link.bind(("tap0", 0))
frame = b"\\xff" * 6 + bytes(6) + b"\\x88\\xb5" + b"gpuksm" * 200
received = {}
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "quit":
        break
    if word == "receive":
        page = int(numbers[0])
        link.send(frame)
        there = (ctypes.c_char * len(frame)).from_address(at + page * 4096)
        while os.readv(tap, [there]) != len(frame) or there.raw != frame:
            pass  # the kernel's own
        received[page] = frame
        expected[page] = 0
    bad = [page for page in wrong() if page not in received]
    bad += [page for page, data in received.items() if ctypes.string_at(at + page * 4096, len(data)) != data]
    print("CORRUPT pages %s" % bad if bad else "OK", flush=True)
"""
)


def test_a_tap_receives_after_the_comparison(world: World) -> None:
    """Its data is copied by way of the page tables, and tracked like a write of the process's own."""
    requirements_env.need("root", "tun")
    guard = standstill.start_standing_still(world, "verified", world.python(_TAPPED))
    victims = [world.python(_TAPPED) for _ in range(2)]
    scanner = Scanner(world, victims)
    try:
        reply = standstill.while_it_stands(
            guard,
            lambda: scanner.commit([PAGES], _plan(scanner, victims)),
            lambda: victims[0].ask("receive 3"),
        )
        assert reply["mapped_pages"] > 0, reply
        assert reply["skipped"]["written"] == 1, reply
        for victim in victims:
            victim.verify()
        victims[1].ask("receive 5")  # into merged memory
        for victim in victims:
            victim.verify()
    finally:
        scanner.close()
        standstill.let_go(world.guard_processes())
