"""Somewhere to try things: helper processes whose memory is known, and a guard of their own for them.

What must hold: however it is left, by an exception or a signal too, helpers, guard,
keeper and folder are gone afterwards, and no helper has read a wrong byte.  What runs
in a folder of its own never meets the guard that this user may have.  Killed by
SIGKILL it leaves the folder only: helpers end with their input, the guard when idle.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gpuksm.client import GuardClient
from gpuksm.errors import GpuksmError, GuardError
from gpuksm.linux import procfs
from gpuksm.linux.descriptors import await_readable
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.types import TargetRequest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]

# Two areas: one that is the same in every helper, and one whose pages come in the opposite
# order in all but the first.  The guard reaches helpers under Yama because they let it.
_HELPER = """\
import hashlib, mmap, random, sys
sys.path.append(sys.argv[1])
from gpuksm.linux import personality, vm
personality.allow_any_tracer()
number, *sizes = map(int, sys.argv[2:])
areas = [mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for size in sizes]
for seed, area in enumerate(areas):
    content = random.Random(seed)
    for at in range(0, len(area), 1 << 20):
        area[at : at + (1 << 20)] = content.randbytes(min(1 << 20, len(area) - at))
if number:
    pages = [areas[1][at : at + 4096] for at in range(0, sizes[1], 4096)]
    areas[1][:] = b"".join(reversed(pages))
def digests():
    return [hashlib.blake2b(area).digest() for area in areas]
expected = digests()
print(*(vm.address_of(area) for area in areas), flush=True)
for line in sys.stdin:
    print("right" if digests() == expected else "wrong", flush=True)
"""


class Area(NamedTuple):
    """Where an area of a helper lies: bytes [start, end)."""

    start: int
    end: int


class Helper:
    """A process with two areas of `sizes` bytes of random pages."""

    def __init__(self, number: int, sizes: tuple[int, int]) -> None:
        words = [sys.executable, "-I", "-c", _HELPER, str(_ROOT), str(number), *map(str, sizes)]
        # A session of its own: the terminal's Ctrl-C is for us.
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self._sizes = sizes
        self.straight = self.turned = Area(0, 0)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def request(self) -> TargetRequest:
        """Both areas, and nothing else of it."""
        return TargetRequest(self.pid, True, tuple(sorted((self.straight, self.turned))))

    def wait_ready(self) -> None:
        """Wait until it has filled its memory."""
        places = [int(word) for word in self._answer().split()]
        if len(places) != len(self._sizes):
            raise GpuksmError(f"helper process {self.pid} did not start: is there enough memory?")
        self.straight, self.turned = (
            Area(at, at + size) for at, size in zip(places, self._sizes, strict=True)
        )

    def check(self) -> None:
        """Have it check all its bytes; a wrong one is an internal error."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("check\n")
            self._process.stdin.flush()
        answer = self._answer().strip()
        if answer != "right":
            raise RuntimeError(f"helper process {self.pid} says {answer or 'nothing'!r} of its memory")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP wait until they are `allowed`; the first then raises, later ones do nothing.

    KeyboardInterrupt for SIGINT, SystemExit(128 + N) for the others.  Once is enough: what
    takes things down afterwards is not disturbed.  For the main thread.
    """

    def __init__(self) -> None:
        self._allowed = self._raised = False
        self._arrived: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._raise()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """They raise in the block."""
        self._allowed = True
        try:
            self._raise()
            yield
        finally:
            self._allowed = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._arrived is None:
            self._arrived = number
            if self._allowed:
                self._raise()

    def _raise(self) -> None:
        if self._arrived is not None and not self._raised:
            self._raised = True
            raise KeyboardInterrupt if self._arrived == signal.SIGINT else SystemExit(128 + self._arrived)


class Trial(NamedTuple):
    """Helpers that are ready, and a connection to the guard that is there for them alone."""

    helpers: list[Helper]
    guard: GuardClient


@contextlib.contextmanager
def trial(count: int, straight_bytes: int, turned_bytes: int) -> Iterator[Trial]:
    """`count` helpers and a guard; left without an exception, every byte has been checked.

    Raises GuardError, GpuksmError.
    """
    sizes = (straight_bytes // PAGE_BYTES * PAGE_BYTES, turned_bytes // PAGE_BYTES * PAGE_BYTES)
    with Interrupts() as interrupts:
        helpers: list[Helper] = []
        folder = Path(tempfile.mkdtemp(prefix="gpuksm-bench-"))
        try:
            helpers.extend(Helper(number, sizes) for number in range(count))
            with GuardClient.connect(start=True, folder=folder) as guard, interrupts.allowed():
                for helper in helpers:
                    helper.wait_ready()
                yield Trial(helpers, guard)
                for helper in helpers:
                    helper.check()
        finally:
            for helper in helpers:
                helper.kill()
            _end_guard(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _end_guard(folder: Path) -> None:
    """Tell the guard of `folder` to end and wait until it and its keeper have; kill what does not."""
    deadline = time.monotonic() + _END_SECONDS
    known: dict[int, int] = {}  # pid: pidfd
    try:
        while (guard := _found(folder)) is not None and time.monotonic() < deadline:
            # Refused as long as it has not noticed that the helpers are gone.
            with guard, contextlib.suppress(GpuksmError, OSError):
                pid = int(guard.request("hello")[0]["pid"])
                for each in (procfs.stat(pid).ppid, pid):
                    if each not in known:
                        known[each] = os.pidfd_open(each)
                guard.request("shutdown", force=False)
            _wait(known, 0.1)
        if not _wait(known, deadline - time.monotonic()):
            # In this order: a keeper would start a successor.
            for handle in known.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        for handle in known.values():
            os.close(handle)


def _found(folder: Path) -> GuardClient | None:
    with contextlib.suppress(GuardError):
        return GuardClient.find(folder)
    return None


def _wait(known: dict[int, int], seconds: float) -> bool:
    """Wait for the end of processes, by their pidfds; whether all have ended."""
    deadline = time.monotonic() + seconds
    left = set(known.values())
    while left:
        ended = await_readable(left, max(0.0, deadline - time.monotonic()))
        if not ended:
            return False
        left -= ended
    return True
