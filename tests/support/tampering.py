"""Changing what one thread's system calls do, by ptrace: failures that no limit brings about."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from gpuksm.linux import ptrace

# Called at the entry of a system call with its registers, which it may change; a number
# that it returns becomes the result of the call, None leaves that alone.
Change = Callable[[ptrace.Registers], int | None]


def agent_of(pid: int) -> int:
    """The thread id of the agent in process `pid`."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text() == "gpuksm-agent\n":
            return int(task.name)
    raise AssertionError(f"no agent in process {pid}")


class Tampering:
    """While open, thread `tid` is traced from a thread of ours and `change` sees all its calls."""

    def __init__(self, tid: int, change: Change) -> None:
        self._tid = tid
        self._change = change
        self._stop = threading.Event()
        self._traced = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.calls = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._traced.wait(20), f"thread {self._tid} cannot be traced"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        ptrace.seize(self._tid, ptrace.O_TRACESYSGOOD)
        ptrace.interrupt(self._tid)
        inside, result = False, None
        interrupted = False
        while True:
            stop = ptrace.peek_stop(self._tid)
            if stop is None:
                if self._stop.wait(0.0002) and not interrupted:
                    ptrace.interrupt(self._tid)
                    interrupted = True
                continue
            if stop.kind == "gone":
                ptrace.reap(self._tid)
                self._traced.set()
                return
            if stop.kind == "syscall":
                registers = ptrace.get_registers(self._tid)
                if inside:
                    if result is not None:
                        registers.rax = result & (1 << 64) - 1
                        ptrace.set_registers(self._tid, registers)
                else:
                    self.calls += 1
                    result = self._change(registers)
                    if result is not None:
                        ptrace.set_registers(self._tid, registers)
            # A stop of another kind ends a call as far as we see: a new entry restarts it.
            inside = stop.kind == "syscall" and not inside
            if self._stop.is_set() and not inside:
                ptrace.detach(self._tid)
                return
            ptrace.cont_to_syscall(self._tid)
            self._traced.set()
