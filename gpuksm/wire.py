"""Frames of the guard's control socket: two lengths, a JSON object, a payload.

See "The control protocol" in docs/architecture.md.  Stdlib only; both ends use
these functions, and a malformed frame raises `WireError` at once, so that
neither end can be made to allocate more than `MAX_JSON` + `MAX_PAYLOAD`.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

HEADER = struct.Struct("<II")
MAX_JSON = 16 << 20
MAX_PAYLOAD = 512 << 20

PLAN_RECORD = struct.Struct("<BBHIQIIQQQ")
EXTENT_RECORD = struct.Struct("<IIQ")  # slots, NUMA node + 1 (0: any), reserved
SLOTS_RECORD = struct.Struct("<QII")  # first slot, slots, NUMA node + 1 (0: any)
OP_FILL, OP_MAP, OP_ZERO, OP_FILL_REPLICA, OP_MAP_EACH = 1, 2, 3, 4, 5
FLAG_NEW_EXTENT = 1
# In the column of a MAP_EACH: a slot of the store, or this bit, the index of a new extent from bit 32 on, and
# the slot within it.
EACH_NEW_EXTENT = 1 << 63
EACH_EXTENT_SHIFT = 32


class WireError(Exception):
    """The other end sent something that is no frame, or went away inside one."""


def encode(message: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> bytes:
    """One frame: `message` as JSON, then `payload`.  Raises WireError over the limits."""
    text = json.dumps(message, separators=(",", ":")).encode()
    size = memoryview(payload).nbytes
    if len(text) > MAX_JSON or size > MAX_PAYLOAD:
        raise WireError(f"frame too large: {len(text)} + {size} bytes")
    return b"".join((HEADER.pack(len(text), size), text, payload))


def parse_header(header: bytes) -> tuple[int, int]:
    """(JSON bytes, payload bytes) of a frame whose first 8 bytes are `header`."""
    json_bytes, payload_bytes = HEADER.unpack(header)
    if json_bytes > MAX_JSON or payload_bytes > MAX_PAYLOAD:
        raise WireError(f"frame too large: {json_bytes} + {payload_bytes} bytes")
    return json_bytes, payload_bytes


def parse_json(text: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a frame; anything but an object raises WireError."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise WireError("a frame's JSON must be an object")
    return message


def send(sock: socket.socket, message: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> None:
    """Send one frame over a blocking socket."""
    sock.sendall(encode(message, payload))


def receive(sock: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """Receive one frame over a blocking socket; EOF raises WireError."""
    json_bytes, payload_bytes = parse_header(bytes(_exactly(sock, HEADER.size)))
    return parse_json(_exactly(sock, json_bytes)), _exactly(sock, payload_bytes)


def _exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise WireError("the connection ended inside a frame")
        view = view[got:]
    return data
