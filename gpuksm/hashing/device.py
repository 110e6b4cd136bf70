"""What a compute device must offer; CUDA and OpenCL each implement it in one file.

Everything above (the ring, sorting, matching, falling back) is written once
against these two protocols.  Work of one queue is done in order and after the
call returns; queues of a device run beside each other, and two threads may use
different queues of a device at once.  Host arrays given to `upload` and
`download` stay untouched until the queue has passed them; only arrays from
`Device.pinned` are copied beside other work.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A slot takes milliseconds; a device that needs this long has hung.
WAIT_SECONDS = 30.0
_NAP_SECONDS = 50e-6


class DeviceFailed(Exception):
    """A device cannot go on, or must not."""


class DeviceHung(DeviceFailed):
    """A device does not answer; whatever waits for it would wait for ever."""


class MemoryCapReached(Exception):
    """The next buffer would exceed the cap on device memory; the device itself is well."""


class Queue(Protocol):
    """An ordered stream of work on one device."""

    def upload(self, target: Any, source: NDArray[Any]) -> None:
        """Copy all of a pinned array to the start of a buffer."""

    def download(self, target: NDArray[Any], source: Any) -> None:
        """Fill a pinned array from the start of a buffer."""

    def launch(self, kernel: str, groups: int, *arguments: Any) -> None:
        """Run a kernel over `groups` groups; arguments are buffers and numpy scalars of the right width."""

    def mark(self) -> Any:
        """A point in this queue, for `done`."""

    def done(self, mark: Any) -> bool:
        """True when the queue has passed the mark; raises what went wrong before it."""


class Device(Protocol):
    """One device, ready for work."""

    name: str
    failures: tuple[type[Exception], ...]  # what calls raise when the device cannot go on
    budget: Budget

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of host memory that the device can copy from and to by itself."""

    def buffer(self, size: int) -> Any:
        """`size` bytes of device memory; given back when the last reference goes."""

    def queue(self) -> Queue:
        """A new queue, of low priority where the device knows priorities."""

    def wanted(self) -> bool:
        """True when another process has begun to use a device that was picked because it was idle."""

    def close(self) -> None:
        """Give everything back, the device's context included; never raises."""

    def abandon(self) -> None:
        """Forget a hung device without another call to its driver."""


def wait(queue: Queue, mark: Any, seconds: float = WAIT_SECONDS) -> None:
    """Sleep until `queue` has passed `mark`; raises DeviceHung after `seconds`.

    Short naps cost less CPU time than the driver's spinning, and a hung device cannot hang us.
    """
    deadline = time.monotonic() + seconds
    while not queue.done(mark):
        if time.monotonic() > deadline:
            raise DeviceHung(f"no answer for {seconds:.0f} seconds")
        time.sleep(_NAP_SECONDS)


class Budget:
    """Counts device memory against a cap in bytes; safe to use from several threads."""

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self._used_bytes = 0
        self._lock = Lock()

    @property
    def left_bytes(self) -> int:
        return self.cap_bytes - self._used_bytes

    def take(self, size: int) -> None:
        """Count `size` bytes; raises MemoryCapReached."""
        with self._lock:
            if size > self.left_bytes:
                raise MemoryCapReached(
                    f"{size} more bytes of device memory would exceed the cap of {self.cap_bytes}"
                )
            self._used_bytes += size

    def give_back(self, size: int) -> None:
        """Count `size` bytes no longer."""
        with self._lock:
            self._used_bytes -= size
