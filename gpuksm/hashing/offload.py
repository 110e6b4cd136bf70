"""A hasher over compute devices, with the CPU backend behind it.

The same for CUDA and OpenCL, which only say how devices are opened.  Whatever
goes wrong on a device (no memory, a failed launch, a device that is gone or
hangs, another process that wants an idle device back), the work that was on it
is done by the devices left and at last by the CPU backend, with one warning
and the same result.  Devices that nobody has used for a while are given back,
context and all, and opened again when needed.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Timer
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import BackendUnavailable, UsageError
from gpuksm.hashing import selftest
from gpuksm.hashing.crew import usable_cpus
from gpuksm.hashing.device import DeviceFailed, DeviceHung, MemoryCapReached
from gpuksm.hashing.protocol import Hasher, PageSource
from gpuksm.hashing.ring import SLOT_PAGE_BYTES, SLOT_PAGES, Ring, slots_for
from gpuksm.hashing.sort import match_sorted, radix_sort
from gpuksm.hashing.source import ArraySource, part_of
from gpuksm.hashing.tables import Candidates, Tables, candidates_of, room_for

if TYPE_CHECKING:
    from gpuksm.hashing.device import Device

LOG = logging.getLogger(__name__)
IDLE_SECONDS = 10.0
# The ring may take this share of the memory cap; the rest is for sorting.
_RING_SHARE = 0.5
_MIN_SLOT_PAGES = 64
# More readers only wait for each other's memory traffic, and for the bus (docs/gpu.md).
READERS = 8

T = TypeVar("T")
Open = Callable[[], Sequence["Device"]]
Fallback = Callable[[int, int], Hasher]


def _cpu_hasher(seed: int, threads: int) -> Hasher:
    from gpuksm.hashing.cpu import CpuHasher

    return CpuHasher(seed, threads)


class OffloadHasher:
    """`Hasher` on the devices that `open_devices` gives, plus matching against a resident table.

    `threads` read pages (0: one per usable CPU, at most 8) into `slots` of each
    device (0: as many as they keep busy).  Raises BackendUnavailable when no device passes
    the self-test.  `digest` and the methods on digests may be called from two
    threads at once and then overlap.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        open_devices: Open,
        threads: int = 0,
        slots: int = 0,
        slot_pages: int = SLOT_PAGES,
        idle_seconds: float = IDLE_SECONDS,
        fallback: Fallback = _cpu_hasher,
    ) -> None:
        self.name, self.seed = name, seed
        self._open, self._make_fallback = open_devices, fallback
        self._threads = threads or min(usable_cpus(), READERS)
        self._shape = slots or slots_for(self._threads), slot_pages
        self._idle_seconds = idle_seconds
        self._busy, self._sorting = Lock(), Lock()  # taken in this order
        self._devices: list[Device] = []
        self._doomed: dict[int, Exception] = {}  # id of a device: why it must go
        self._ring: Ring | None = None
        self._tables: Tables | None = None
        self._table: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._cpu: Hasher | None = None
        self._given_up = False
        self._started = False
        self._last_loss = "none was found"
        self._closed = False
        self._last_used = time.monotonic()
        self._timer: Timer | None = None
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="gpuksm-read")
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        self._started = True

    @property
    def devices(self) -> list[str]:
        """Names of the devices open now."""
        return [device.name for device in self._devices]

    def digest(self, source: PageSource, digests: NDArray[np.uint64], kinds: NDArray[np.uint8]) -> None:
        """See `Hasher.digest`."""
        pages = source.pages
        if len(digests) < pages or len(kinds) < pages:
            raise ValueError(f"{pages} pages need as many digests and kinds")
        with self._busy:
            self._resume()
            left = [(0, pages)]
            if self._ring is not None and self._ring.slots:
                left = self._ring.run(self._readers, source, self.seed, digests, kinds)
            for first, end in left:
                cpu = self._fallback()
                cpu.digest(part_of(source, first, end), digests[first:end], kinds[first:end])
        self._used()

    def sort(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """See `Hasher.sort`."""
        return self._try(lambda tables: tables.sort(digests), lambda: radix_sort(digests), digests.size)

    def set_table(self, sorted_table: NDArray[np.uint64]) -> None:
        """Make this ascending column, the stable tree's digests, the one that `match` looks into."""
        with self._sorting:
            self._table = np.ascontiguousarray(sorted_table, np.uint64)
            if self._tables is not None:
                self._tables.set_table(None)

    def match(self, sorted_digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each digest (ascending) the index of the first equal entry of the table, or -1."""
        return self._try(
            lambda tables: tables.match(sorted_digests),
            lambda: match_sorted(sorted_digests, self._table),
            sorted_digests.size,
        )

    def candidates(self, digests: NDArray[np.uint64]) -> Candidates:
        """The pages of a batch or a round that may have an equal: sorted, matched and marked."""

        def on_cpu() -> Candidates:
            if not digests.size:
                return room_for(0)
            ordered, order = radix_sort(digests)
            return candidates_of(ordered, order, match_sorted(ordered, self._table))

        return self._try(lambda tables: tables.candidates(digests), on_cpu, digests.size)

    def batches(
        self,
        source: PageSource,
        digests: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        batch_pages: int = 65536,
    ) -> Iterator[Candidates]:
        """`digest` and then `candidates` for each batch in turn (order counts from the source's start).

        While a batch is sorted and matched, the next is read, copied and hashed.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="gpuksm-sort") as sorter:
            before = None
            for first in range(0, source.pages, batch_pages):
                end = min(first + batch_pages, source.pages)
                self.digest(part_of(source, first, end), digests[first:end], kinds[first:end])
                if before is not None:
                    yield before.result()
                before = sorter.submit(self._batch_candidates, digests, first, end)
            if before is not None:
                yield before.result()

    def release(self) -> None:
        """Give every device back until the next call."""
        with self._busy, self._sorting:
            self._release()

    def leave(self, cpus: int) -> None:
        """See `Hasher.leave`: the device does the work."""

    def close(self) -> None:
        """Give everything back; the hasher cannot be used any more."""
        with self._busy, self._sorting:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._release()
            if self._cpu is not None:
                self._cpu.close()
        self._readers.shutdown()

    def _batch_candidates(self, digests: NDArray[np.uint64], first: int, end: int) -> Candidates:
        found = self.candidates(digests[first:end])
        return found._replace(order=found.order + np.uint32(first))

    # Devices come and go below; callers hold _busy, or _busy and _sorting.

    def _start(self) -> None:
        """Open the devices and let each hash the known pages; raises BackendUnavailable."""
        try:
            self._devices = list(self._open())
        except DeviceFailed as error:
            raise BackendUnavailable(f"the {self.name} backend cannot start: {error}") from error
        slots, slot_pages = self._fitting_shape()
        self._ring = Ring(self._devices, slots, slot_pages, self._lost, self._why_doomed)
        selftest.check(self.name, self._hash_known)
        first = self._devices[0]
        try:
            self._tables = Tables(first)
        except first.failures as error:
            self._release()
            raise BackendUnavailable(f"no {self.name} device could be used: {error}") from error

    def _fitting_shape(self) -> tuple[int, int]:
        """Slots and pages of a slot that keep to the ring's share of the smallest memory cap."""
        slots, slot_pages = self._shape
        if not self._devices:
            return slots, slot_pages
        room = min(device.budget.left_bytes for device in self._devices) * _RING_SHARE
        while slot_pages > _MIN_SLOT_PAGES and slots * slot_pages * SLOT_PAGE_BYTES > room:
            slot_pages //= 2
        if slots * slot_pages * SLOT_PAGE_BYTES > room:
            least = int(slots * slot_pages * SLOT_PAGE_BYTES / _RING_SHARE)
            raise UsageError(f"a GPU memory cap below {least} bytes is too little to work with")
        return slots, slot_pages

    def _hash_known(
        self, pages: NDArray[np.uint8], seed: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Digests and kinds of a few pages, hashed once by every slot; the first that differs is given."""
        assert self._ring is not None
        slots, known = self._ring.slots, len(pages)
        source = ArraySource(np.tile(pages, (slots, 1)))
        digests, kinds = np.zeros(source.pages, np.uint64), np.zeros(source.pages, np.uint8)
        if not slots or self._ring.run(self._readers, source, seed, digests, kinds, step=known):
            raise BackendUnavailable(f"no {self.name} device could be used: {self._last_loss}")
        each, each_kind = digests.reshape(slots, known), kinds.reshape(slots, known)
        odd = np.flatnonzero((each != each[0]).any(1) | (each_kind != each_kind[0]).any(1))
        at = int(odd[0]) if odd.size else 0
        return each[at], each_kind[at]

    def _resume(self) -> None:
        """Open the devices again after a release; without success the CPU does the work."""
        if self._closed:
            raise ValueError("the hasher is closed")
        if self._given_up or self._devices:
            return
        try:
            with self._sorting:
                self._start()
        except (BackendUnavailable, UsageError) as error:
            self._warn(str(error))

    def _why_doomed(self, device: Device) -> Exception | None:
        if id(device) in self._doomed:
            return self._doomed.pop(id(device))
        if device.wanted():
            return DeviceFailed("another process wants it back")
        return None

    def _lost(self, device: Device, error: Exception) -> None:
        """Called by the ring, under _busy, when a device cannot go on."""
        LOG.info("%s is dropped: %s", device.name, error)
        self._last_loss = f"{device.name}: {error}"
        if isinstance(error, DeviceHung):
            device.abandon()
        # A sort that is still on it ends first; that too gives up on a device that hangs.
        if self._tables is not None and self._tables.device is device:
            with self._sorting:
                self._tables = None
        self._devices.remove(device)
        # Streams in the locals of frames that failed must not outlive the device's context.
        traceback.clear_frames(error.__traceback__)
        device.close()
        if not self._devices:
            self._warn(self._last_loss)

    def _warn(self, why: str) -> None:
        if not self._given_up and self._started:
            LOG.warning("the %s backend gave up (%s); the CPU does its work from here on", self.name, why)
        self._given_up = True

    def _fallback(self) -> Hasher:
        if self._cpu is None:
            self._cpu = self._make_fallback(self.seed, self._threads)
        return self._cpu

    def _try(self, on_device: Callable[[Tables], T], on_cpu: Callable[[], T], size: int) -> T:
        """Work on digests: on a device, or on the CPU where there is none, no room, or nothing to do."""
        if not self._devices and not self._given_up and size:
            with self._busy:
                self._resume()
        with self._sorting:
            tables = self._tables
            if tables is None or not size:
                return on_cpu()
            try:
                if not tables.has_table and self._table.size:
                    tables.set_table(self._table)
                result = on_device(tables)
            except MemoryCapReached as error:
                LOG.info("left to the CPU: %s", error)
                return on_cpu()
            except tables.device.failures as error:
                if isinstance(error, DeviceHung):
                    tables.device.abandon()
                self._doomed[id(tables.device)] = error
                self._tables = None
                failed: Device | None = tables.device
            else:
                failed = None
        if failed is None:
            self._used()
            return result
        self._drop_doomed(failed)
        return on_cpu()

    def _drop_doomed(self, device: Device) -> None:
        """Drop a device that failed in a sort now, unless `digest` is at work and will."""
        if self._busy.acquire(blocking=False):
            try:
                if error := self._doomed.pop(id(device), None):
                    self._lost(device, error)
                    if self._ring is not None:
                        self._ring.remove(device)
            finally:
                self._busy.release()

    def _release(self) -> None:
        self._tables, self._ring = None, None
        for device in self._devices:
            device.close()
        self._devices = []
        self._doomed = {}

    def _used(self) -> None:
        self._last_used = time.monotonic()
        if self._idle_seconds > 0 and self._timer is None and not self._closed:
            self._start_timer(self._idle_seconds)

    def _start_timer(self, seconds: float) -> None:
        self._timer = Timer(seconds, self._idle)
        self._timer.daemon = True
        self._timer.start()

    def _idle(self) -> None:
        left = self._last_used + self._idle_seconds - time.monotonic()
        if self._closed:
            return
        if left > 0 or not self._busy.acquire(blocking=False):
            self._start_timer(max(left, self._idle_seconds / 10))
            return
        try:
            with self._sorting:
                self._timer = None
                self._release()
        finally:
            self._busy.release()
