"""What the kernel and the guard say of NUMA nodes."""

from __future__ import annotations

import ctypes
import re
import socket
import sys
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


def store_nodes(pid: int) -> set[int]:
    """The nodes on which the store's pages lie that a process has looked at."""
    shown = Path(f"/proc/{pid}/numa_maps").read_text()
    lines = re.findall(r"^[0-9a-f]+ \S+ file=/memfd:gpuksm-store.*", shown, re.MULTILINE)
    return {int(node) for line in lines for node in re.findall(r" N(\d+)=", line)}


def on_node(node: int) -> list[str]:
    """What starts a program whose memory all lies on `node`, in front of it."""
    code = (
        "import ctypes, os, sys\n"
        "mask = ctypes.c_uint64(1 << int(sys.argv[1]))\n"
        "assert ctypes.CDLL(None).syscall(238, 2, ctypes.byref(mask), 65) == 0\n"  # set_mempolicy, MPOL_BIND
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    return [sys.executable, "-c", code, str(node)]


def extents(world: World) -> list[tuple[int, int, int]]:
    """(first slot, slots, NUMA node + 1) of each of the store's extents, as `slots` replies."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(world.folder / "guard.sock"))
        wire.send(connection, {"op": "slots"})
        reply, payload = wire.receive(connection)
    size = int(reply["extents"]) * wire.SLOTS_RECORD.size
    return list(wire.SLOTS_RECORD.iter_unpack(payload[:size]))
