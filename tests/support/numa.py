"""What the kernel and the guard say of NUMA nodes."""

from __future__ import annotations

import ctypes
import re
import socket
from pathlib import Path

from gpuksm import wire
from gpuksm.linux._libc import syscall_function
from tests.support.world import World

DEFAULT, PREFERRED = 0, 1
_MPOL_F_ADDR = 2
_get_mempolicy = syscall_function(
    "get_mempolicy", 239, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong
)


def nodes() -> set[int]:
    """The nodes of this machine."""
    return {int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")}


def policy(address: int) -> int:
    """The mode of the memory policy that holds at one of our addresses."""
    mode = ctypes.c_int(-1)
    _get_mempolicy(ctypes.addressof(mode), None, 0, address, _MPOL_F_ADDR)
    return mode.value


def store_policies(pid: int) -> set[str]:
    """The policies of all mappings of the store in a process, as /proc/PID/numa_maps names them."""
    shown = Path(f"/proc/{pid}/numa_maps").read_text()
    return set(re.findall(r"^[0-9a-f]+ (\S+) file=/memfd:gpuksm-store", shown, re.MULTILINE))


def extents(world: World) -> list[tuple[int, int, int]]:
    """(first slot, slots, NUMA node + 1) of each of the store's extents, as `slots` replies."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(world.folder / "guard.sock"))
        wire.send(connection, {"op": "slots"})
        reply, payload = wire.receive(connection)
    size = int(reply["extents"]) * wire.SLOTS_RECORD.size
    return list(wire.SLOTS_RECORD.iter_unpack(payload[:size]))
