"""A thread that has targets measured, attached to and armed, one after the other, for a scan to read them.

Each of these takes some ten milliseconds for a GiB, and the guard does one thing at a time; what a scan
needs for itself, numpy above all, takes a tenth of a second to load.  So this is asked for before, where
nothing can come up then that keeps the scan from taking place, and the time in which memory has to settle
begins.  Stdlib only.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuksm.linux import procfs
from gpuksm.scan import asking, measure
from gpuksm.scan.types import ScanOptions, TargetRequest

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

_END_SECONDS = 1.0


class Armed(NamedTuple):
    """One target: what it held before (None: it was gone), the guard's reply to `attach`, when it was armed.

    That is a time of the monotonic clock; None where the guard has refused it or it has exited.
    """

    request: TargetRequest
    held: measure.Held | None
    reply: dict[str, Any]
    at: float | None


class Attaching:
    """Asks the guard about `wanted`; what it answers are the items, in order, each as it is there.

    What is said of guard and store is from before.  The connection is this one's alone until all have come.
    """

    def __init__(self, client: GuardClient, wanted: Sequence[TargetRequest], options: ScanOptions) -> None:
        self.wanted = wanted
        self.began, self.cpu_began = time.monotonic(), time.process_time()
        hello, _ = client.request("hello")
        self.guard, self.seed = int(hello["pid"]), int(hello.get("seed", 0))
        self.guard_cpu = measure.cpu_seconds(self.guard)
        self.store_bytes = int(client.request("status", budgets=[])[0]["store_bytes"])
        self.work_bytes = procfs.resident_bytes([request.pid for request in wanted])
        self._client, self._options = client, options
        self._done: queue.SimpleQueue[Armed | BaseException | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._labour, name="gpuksm-attach", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Armed]:
        """Each of `wanted` as soon as it is armed or refused; raises what asking for it raised."""
        self.start()
        while (found := self._done.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def _labour(self) -> None:
        last: BaseException | None = None
        measuring = ThreadPoolExecutor(1)  # ahead of the guard's attaching, which adds an agent to it
        try:
            if not self.wanted:
                asking.attach(self._client, self._options, [])  # it takes the scan lock all the same
            held = [measuring.submit(measure.held, request.pid) for request in self.wanted]
            for request, holds in zip(self.wanted, held, strict=True):
                if self._stopped:
                    break
                self._done.put(self._arm(request, holds.result()))
        except BaseException as error:
            last = error
        finally:
            measuring.shutdown(cancel_futures=True)
        self._done.put(last)

    def _arm(self, request: TargetRequest, held: measure.Held | None) -> Armed:
        reply = asking.attach(self._client, self._options, [request], self.work_bytes)
        (item,) = reply["targets"]
        settle = self._options.settle_seconds
        armed = (
            item["target"] is not None and asking.arm(self._client, int(item["target"]), settle) is not None
        )
        return Armed(request, held, reply, time.monotonic() if armed else None)

    def end(self) -> None:
        """Ask for no more; what is being asked has an end with the connection, if not before."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join(_END_SECONDS)


@contextlib.contextmanager
def attaching(
    client: GuardClient, wanted: Sequence[TargetRequest], options: ScanOptions
) -> Iterator[Attaching]:
    """An `Attaching` that ends with what it is for; when that fails the connection is closed."""
    begun = Attaching(client, wanted, options)
    try:
        yield begun
    except BaseException:
        client.close()
        raise
    finally:
        begun.end()
