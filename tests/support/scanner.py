"""A scanner that speaks the control protocol by hand, for tests of what a wrong one can do."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from gpuksm import wire
from tests.support.victims import Victim
from tests.support.world import World


class Scanner:
    """A connection to the guard that holds the scan lock over `victims`."""

    def __init__(self, world: World, victims: list[Victim]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(world.folder / "guard.sock"))
        wanted = [{"pid": victim.pid, "named": True, "ranges": None} for victim in victims]
        reply = self.ask("attach", targets=wanted, options={"max_pause_us": 5000})
        self.targets = [target["target"] for target in reply["targets"]]
        assert None not in self.targets, reply
        for _ in range(2):
            for target in self.targets:
                self.ask("arm", target=target)
            time.sleep(0.05)

    def ask(self, op: str, payload: bytes = b"", **fields: Any) -> dict[str, Any]:
        """One request; an error reply is returned as it is."""
        wire.send(self._socket, {"op": op, **fields}, payload)
        return wire.receive(self._socket)[0]

    def commit(
        self,
        extents: list[int],
        plan: list[tuple[int, ...]],
        column: Sequence[int] = (),
        node: int = 0,
        max_pause_us: int = 5000,
    ) -> dict[str, Any]:
        """Commit plan records (op, flags, reserved, target, addr, pages, extent, slot, digest, column_at).

        `node`: the NUMA node + 1 of all extents.
        """
        payload = b"".join(wire.EXTENT_RECORD.pack(slots, node, 0) for slots in extents)
        payload += b"".join(wire.PLAN_RECORD.pack(*record) for record in plan) + struct.pack(
            f"<{len(column)}Q", *column
        )
        return self.ask("commit", payload, extents=len(extents), records=len(plan), max_pause_us=max_pause_us)

    def close(self) -> None:
        self._socket.close()
