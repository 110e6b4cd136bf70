"""A job as on a simulation node: large tables that are the same in every copy, and its own events.

Every copy computes the same magnetic field map and the same geometry by itself,
from the same formulas; nothing is inherited or shared when it starts.  Then it
simulates: tracks step through the field, hits go to event buffers of its own,
counters move.  All the while it checks itself: the tables against the checksums
they had when they were made, the event buffers against a mirror of their
checksums, zeroed memory for zeros.

Lines on stdin are commands, each answered by one JSON object on stdout:
`report`, `calibrate I` (write to piece I of the field map, as a calibration
would, and from then on expect the new content), `stop`.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import time
import zlib

import numpy as np
from numpy.typing import NDArray

import gpuksm

PIECE_BYTES = 1 << 20
EVENT_BYTES = 64 << 10
STEPS = 2000


def field_map(megabytes: int) -> NDArray[np.float32]:
    """Field of a solenoid with fringe, in tesla, float32 [cell, component] on a cubic grid."""
    cells = round((megabytes * (1 << 20) / 12) ** (1 / 3))
    axis = np.linspace(-1, 1, cells, dtype=np.float32)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    inside = 1 / (1 + np.exp(8 * (np.abs(z) - 0.7)))
    field = np.empty((cells, cells, cells, 3), np.float32)
    field[..., 0] = x * inside * (1 - inside) * (3 + y)
    field[..., 1] = y * inside * (1 - inside) * (3 + x)
    field[..., 2] = inside * (4 - 0.3 * (x * x + y * y))
    return field.reshape(-1, 3)


def geometry(megabytes: int) -> NDArray[np.float64]:
    """Placements of volumes: float64 [volume, 12], a rotation and a translation each."""
    number = np.arange(megabytes * (1 << 20) // 96, dtype=np.float64)
    table = np.zeros((len(number), 12))
    angle = number * 0.01
    table[:, 0], table[:, 1], table[:, 3] = np.cos(angle), -np.sin(angle), np.sin(angle)
    table[:, 4], table[:, 8] = np.cos(angle), 1
    table[:, 9], table[:, 10], table[:, 11] = number % 30 * 5, number // 30 % 30 * 5, number // 900 * 5
    return table


def pieces_of(table: NDArray[np.float32] | NDArray[np.float64]) -> list[NDArray[np.uint8]]:
    """Views of the table, PIECE_BYTES each."""
    flat = table.reshape(-1).view(np.uint8)
    return [flat[start : start + PIECE_BYTES] for start in range(0, flat.size, PIECE_BYTES)]


class Job:
    """The state of one copy, and the checks on it."""

    def __init__(self, seed: int, shared_mb: int, own_mb: int) -> None:
        self.random = np.random.default_rng(seed)
        self.field = field_map(shared_mb * 4 // 5)
        self.geometry = geometry(shared_mb // 5)
        self.events = self.random.integers(0, 256, (own_mb * (1 << 20) // EVENT_BYTES, EVENT_BYTES), np.uint8)
        self.scratch = np.full(4 << 20, 1, np.uint8)
        self.scratch[:] = 0  # written, so that these are pages full of zeros and no holes
        self.pieces = [*pieces_of(self.field), *pieces_of(self.geometry)]
        self.sums = [zlib.crc32(piece.data) for piece in self.pieces]
        self.event_sums = [zlib.crc32(event.data) for event in self.events]
        self.done = self.checks = self.wrong = 0
        self.slowest_event_s = 0.0

    def event(self) -> None:
        """Simulate one event: steps through field and geometry, hits into this event's buffer."""
        started = time.perf_counter()
        cells = self.random.integers(0, len(self.field), STEPS)
        volumes = self.random.integers(0, len(self.geometry), STEPS)
        bend = self.field[cells, 2] * self.geometry[volumes, 0]
        index = self.done % len(self.events)
        self.events[index, : STEPS * 4] = bend.astype(np.float32).view(np.uint8)
        self.event_sums[index] = zlib.crc32(self.events[index].data)
        self.done += 1
        self.slowest_event_s = max(self.slowest_event_s, time.perf_counter() - started)

    def check(self) -> None:
        """Check the next piece of every kind of memory."""
        piece, event = self.checks % len(self.pieces), self.checks % len(self.events)
        self.wrong += zlib.crc32(self.pieces[piece].data) != self.sums[piece]
        self.wrong += zlib.crc32(self.events[event].data) != self.event_sums[event]
        self.wrong += bool(self.scratch.any())
        self.checks += 1

    def calibrate(self, index: int) -> None:
        """Change one value in piece `index`: from now on this copy differs there."""
        index %= len(self.pieces)
        self.pieces[index][100] ^= 0xFF
        self.sums[index] = zlib.crc32(self.pieces[index].data)

    def report(self) -> dict[str, float]:
        """Check everything once, then say how it went since the last report."""
        for _ in range(max(len(self.pieces), len(self.events))):
            self.check()
        slowest, self.slowest_event_s = self.slowest_event_s, 0.0
        return {
            "pid": os.getpid(),
            "events": self.done,
            "checks": self.checks,
            "wrong": self.wrong,
            "slowest_event_ms": slowest * 1e3,
        }


def main() -> None:
    """Build, report as a sign of being ready, then simulate and obey until stdin ends."""
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--shared-mb", type=int, default=120)
    options.add_argument("--own-mb", type=int, default=30)
    chosen = options.parse_args()
    job = Job(chosen.seed, chosen.shared_mb, chosen.own_mb)
    gpuksm.register_process()
    print(json.dumps(job.report()), flush=True)
    while True:
        if select.select([sys.stdin], [], [], 0.002)[0]:  # a nap: the copies share few cores with the scan
            words = sys.stdin.readline().split()
            if not words or words[0] == "stop":
                return
            if words[0] == "calibrate":
                job.calibrate(int(words[1]))
            print(json.dumps(job.report()), flush=True)
        job.event()
        job.check()


if __name__ == "__main__":
    main()
