"""Runs the self-checking victims of tests/victims over their line protocol.

A victim prints `READY name=value ...`, then answers each command with one line
that begins with OK, CORRUPT or FAILED; everything but OK is an AssertionError.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support import processes

SOURCES = Path(__file__).parent.parent / "victims"


def build(folder: Path, names: Sequence[str] = ("*",)) -> None:
    """Compile victims (all, if not told which) into `folder` with gcc; a warning is an error."""
    for source in sorted(path for name in names for path in SOURCES.glob(f"{name}.c")):
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(folder / source.stem), str(source)]
        subprocess.run([*command, "-lpthread"], check=True, timeout=120)


class Victim:
    """A running victim; `values` holds what its READY line said."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        program: str | None = None,
        timeout: float = 60,
        ready: bool = True,
    ) -> None:
        # Which victim it is, whoever starts it: `name` may begin with setpriv.
        self.program = program or Path(command[0]).name
        self.name = " ".join([Path(command[0]).name, *command[1:]])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=None if env is None else dict(env)
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input = self.process.stdin.fileno()
        self._output = self.process.stdout.fileno()
        self._pending = b""
        # The pid that answers: an orphan takes the place of its parent.
        self.pid = self.process.pid
        self.values: dict[str, str] = {}
        self.expect_status: int | None = 0
        if ready:
            self.values = self.answer(timeout, "READY")

    def send(self, command: str) -> None:
        """Send one command without waiting for its answer."""
        os.write(self._input, command.encode() + b"\n")

    def answer(self, timeout: float = 60, verdict: str = "OK") -> dict[str, str]:
        """The values of the next line, which must begin with `verdict`."""
        line = self.line(timeout)
        word, *rest = line.split()
        assert word == verdict, f"victim {self.name} ({self.pid}): {line}"
        return dict(part.split("=", 1) for part in rest)

    def ask(self, command: str, timeout: float = 60) -> dict[str, str]:
        """Send one command and return the values of its OK line."""
        self.send(command)
        return self.answer(timeout)

    def verify(self, timeout: float = 120) -> None:
        """Let the victim look at all its bytes."""
        self.ask("verify", timeout)

    def area(self, name: str) -> tuple[int, int]:
        """(start, end) in bytes of an area that READY named, as `address:pages` or with `NAME_pages`."""
        at, _, pages = self.values[name].partition(":")
        start = int(at, 16)
        return start, start + 4096 * int(pages or self.values[f"{name}_pages"])

    def merged_pages(self, area: str) -> int:
        """How many pages of an area are mapped from the store."""
        return processes.merged_pages(self.pid, *self.area(area))

    @property
    def output(self) -> int:
        """The descriptor that its lines are read from."""
        return self._output

    def line(self, timeout: float) -> str:
        """The next line, whatever it says."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    states = processes.thread_states(self.pid)
                    raise AssertionError(
                        f"victim {self.name} ({self.pid}) said nothing for {timeout} s: {states}"
                    )
                data = os.read(self._output, 65536)
                if not data:
                    raise AssertionError(
                        f"victim {self.name} ended with {self.process.wait(10)} instead of answering"
                    )
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def last_words(self) -> str:
        """What it has said that nobody has read."""
        if self.process.stdout is None or self.process.stdout.closed:
            return ""
        os.set_blocking(self._output, False)
        with contextlib.suppress(BlockingIOError):
            self._pending += os.read(self._output, 65536)
        return self._pending.decode(errors="replace")

    def stop(self, timeout: float = 20) -> None:
        """End the victim; a status it should not have is an AssertionError."""
        if self.process.stdin is None or self.process.stdin.closed:
            return
        deadline = time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self.send("quit")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            while self._running():
                states = processes.thread_states(self.pid)
                assert time.monotonic() < deadline, f"victim {self.name} ({self.pid}) does not end: {states}"
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # what it was started by ends after it
        finally:
            self.kill()
        if self.expect_status is not None:
            status = self.process.returncode
            assert status == self.expect_status, f"victim {self.name} ended with {status}"

    def _running(self) -> bool:
        """A process whose first thread has ended looks like a zombie: its parent knows better."""
        if self.pid == self.process.pid:
            return self.process.poll() is None
        return processes.alive(self.pid)

    def kill(self) -> None:
        """End the victim whatever it does."""
        for pid in {self.pid, self.process.pid}:
            if pid == self.process.pid and self.process.poll() is not None:
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
