"""The ring: pinned buffers that are read into, copied, hashed and read back, all at once.

Each device has a few slots with a queue of their own, so that one slot's copy
runs beside another's hash, while reader threads fill a third.  Pages travel
`slot_pages` at a time, in order over all devices in turn.  A device that fails
is dropped with its slots, and its pages go to whoever is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.device import MemoryCapReached, wait
from gpuksm.hashing.kernels import BLOCK, LANES
from gpuksm.hashing.protocol import KIND_UNREADABLE, PAGE_BYTES, PageSource
from gpuksm.hashing.source import Read, reader_of

if TYPE_CHECKING:
    from gpuksm.hashing.device import Device, Queue

SLOT_PAGES = 8192
# Readers of one slot.  Every piece of work given to a thread costs the interpreter some 50 us, which
# is as long as a slot of 32 MiB takes on the bus if there are a dozen; more slots at a time do better.
READS = 4
_MIN_READ_PAGES = 256
# Bytes of device memory a page of a slot takes: the page, its digest, its kind.
SLOT_PAGE_BYTES = PAGE_BYTES + 8 + 1

Range = tuple[int, int]


def slots_for(threads: int) -> int:
    """Slots of a device: enough for so many readers, and four to wait, copy and hash, but at most 8."""
    return min(threads // READS + 4, 8)


class Slot:
    """One place of the ring: pinned host memory, device memory and a queue."""

    def __init__(self, device: Device, pages: int) -> None:
        self.device, self.pages = device, pages
        self.queue: Queue = device.queue()
        self.staging = device.pinned(pages * PAGE_BYTES)
        self.digests = device.pinned(pages * 8).view(np.uint64)
        self.kinds = device.pinned(pages)
        self.ok = np.empty(pages, np.bool_)
        self._content = device.buffer(pages * PAGE_BYTES)
        self._digests = device.buffer(pages * 8)
        self._kinds = device.buffer(pages)
        self.range: Range = (0, 0)
        self.reads: list[Future[None]] = []
        self._mark: Any = None

    def read(self, readers: Executor, read: Read, span: Range) -> None:
        """Let the readers fill the staging buffer with pages span[0] to span[1] - 1."""
        self.range = span
        first, end = span
        step = max(-(-(end - first) // READS), _MIN_READ_PAGES)
        self.reads = [
            readers.submit(
                read,
                at,
                min(step, end - at),
                self.staging[(at - first) * PAGE_BYTES : (at - first + step) * PAGE_BYTES],
                self.ok[at - first : at - first + step],
            )
            for at in range(first, end, step)
        ]

    def hash(self, seed: int) -> None:
        """Queue the copy, the hash and the way back of what was read."""
        count = self.range[1] - self.range[0]
        self.queue.upload(self._content, self.staging[: count * PAGE_BYTES])
        groups = -(-count // (BLOCK // LANES))
        arguments = (self._content, np.uint64(seed), np.uint32(count), self._digests, self._kinds)
        self.queue.launch("hash_pages", groups, *arguments)
        self.queue.download(self.digests[:count], self._digests)
        self.queue.download(self.kinds[:count], self._kinds)
        self._mark = self.queue.mark()

    def settle(self) -> None:
        """Wait until the device is done with the slot's buffers."""
        wait(self.queue, self._mark)

    def done(self) -> bool:
        """True when the results are there."""
        return self.queue.done(self._mark)

    def collect(self, digests: NDArray[np.uint64], kinds: NDArray[np.uint8]) -> None:
        """Wait for the results and put them into their place of the columns."""
        self.settle()
        first, end = self.range
        count = end - first
        digests[first:end] = self.digests[:count]
        kinds[first:end] = self.kinds[:count]
        gone = ~self.ok[:count]
        if gone.any():
            digests[first:end][gone] = 0
            kinds[first:end][gone] = KIND_UNREADABLE


Lost = Callable[["Device", Exception], None]


@dataclass
class _Flow:
    """Where every slot and every range of one `run` is."""

    todo: deque[Range]
    free: deque[Slot]
    reading: deque[Slot] = field(default_factory=deque)
    running: deque[Slot] = field(default_factory=deque)

    def drop(self, device: Device) -> None:
        """Forget a device's slots; what they held is to do again, in order."""
        again = []
        for slots in (self.reading, self.running, self.free):
            for slot in [one for one in slots if one.device is device]:
                slots.remove(slot)
                wait_futures(slot.reads)
                if slots is not self.free:
                    again.append(slot.range)
        self.todo = deque(sorted([*again, *self.todo]))


class Ring:
    """The slots of all devices.

    `lost` is called once for each device that is dropped; `doomed` says of a
    device that gave its results why it must go all the same, or None.
    """

    def __init__(
        self,
        devices: Iterable[Device],
        slots: int,
        slot_pages: int,
        lost: Lost,
        doomed: Callable[[Device], Exception | None],
    ) -> None:
        self.slot_pages = slot_pages
        self._lost, self._doomed = lost, doomed
        self._slots: list[Slot] = []
        usable = list(devices)
        # Slot by slot over the devices, so that they take turns.
        for _ in range(slots):
            for device in list(usable):
                failures: tuple[type[Exception], ...] = (*device.failures, MemoryCapReached)
                try:
                    self._slots.append(Slot(device, slot_pages))
                except failures as error:
                    usable.remove(device)
                    if not any(slot.device is device for slot in self._slots):
                        lost(device, error)

    @property
    def slots(self) -> int:
        return len(self._slots)

    def run(
        self,
        readers: Executor,
        source: PageSource,
        seed: int,
        digests: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        step: int = 0,
    ) -> list[Range]:
        """Hash every page; returns the ranges nobody could, because all devices were lost.

        `step` pages go into a slot at a time; 0 means as many as fit.  What
        `source.read` raises comes through, after all work has ended.
        """
        pages, step = source.pages, step or self.slot_pages
        read = reader_of(source)
        spans = ((at, min(at + step, pages)) for at in range(0, pages, step))
        flow = _Flow(deque(spans), deque(self._slots))
        try:
            while flow.reading or flow.running or (flow.todo and flow.free):
                while flow.todo and flow.free:
                    slot = flow.free.popleft()
                    slot.read(readers, read, flow.todo.popleft())
                    flow.reading.append(slot)
                if flow.reading:
                    self._launch(flow, seed)
                if flow.running:
                    self._collect(flow, digests, kinds, block=not flow.reading)
        finally:
            self._drain(flow)
        return list(flow.todo)

    def remove(self, device: Device) -> None:
        """Forget a device's slots, between two runs."""
        self._slots = [slot for slot in self._slots if slot.device is not device]

    def _launch(self, flow: _Flow, seed: int) -> None:
        """Wait for the oldest slot's pages and send them off."""
        slot = flow.reading[0]
        for read in slot.reads:
            read.result()
        try:
            slot.hash(seed)
        except slot.device.failures as error:
            self._drop(flow, slot.device, error)
        else:
            flow.running.append(flow.reading.popleft())

    def _collect(
        self, flow: _Flow, digests: NDArray[np.uint64], kinds: NDArray[np.uint8], block: bool
    ) -> None:
        """Take the oldest slot's results if they are there, or wait for them."""
        slot = flow.running[0]
        try:
            if not block and not slot.done():
                return
            slot.collect(digests, kinds)
        except slot.device.failures as error:
            self._drop(flow, slot.device, error)
            return
        flow.free.append(flow.running.popleft())
        if reason := self._doomed(slot.device):
            self._drop(flow, slot.device, reason)

    def _drop(self, flow: _Flow, device: Device, error: Exception) -> None:
        # First of all: once it is closed or abandoned, what goes with the slots is not freed a second
        # time, and on a hung device freeing would wait for ever.
        self._lost(device, error)
        flow.drop(device)
        self.remove(device)

    def _drain(self, flow: _Flow) -> None:
        """Leave no reader and no copy behind that still uses a buffer."""
        for slot in flow.reading:
            wait_futures(slot.reads)
        while flow.running:
            slot = flow.running[0]
            try:
                slot.settle()
                flow.running.popleft()
            except slot.device.failures as error:
                self._drop(flow, slot.device, error)
