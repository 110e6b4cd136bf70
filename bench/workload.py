"""The processes of a benchmark's workload (bench/workloads/pages.c), which check all their bytes."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gpuksm.linux import mappings, procfs

SOURCE = Path(__file__).parent / "workloads" / "pages.c"
READERS = SOURCE.with_name("readers.c")
PAGES_PER_MB = 256
# Most mappings of one page of KSM's, /sys/kernel/mm/ksm/max_page_sharing.
KSM_SHARING = 256


@dataclass(frozen=True)
class Workload:
    """How many processes, and what is in them; sizes in MiB; `rate` of writes a second, None: no writers.

    `aio`: they could do asynchronous I/O, so that devices may hold pages of theirs.
    """

    name: str
    kind: str
    processes: int
    shared_mb: int
    own_mb: int
    rate: int | None = None
    aio: bool = False

    @property
    def expected_pages(self) -> int:
        """Pages that KSM can save."""
        pages = self.shared_mb * PAGES_PER_MB
        if self.kind in ("zeros", "constant"):
            every = pages * self.processes
            return every - -(-every // KSM_SHARING)
        return pages * (self.processes - 1)

    @property
    def bytes(self) -> int:
        """All its memory."""
        return self.processes * (self.shared_mb + self.own_mb) << 20


def build(folder: Path, source: Path = SOURCE) -> Path:
    """Compile the process, or another `source`, with gcc into `folder`; returns the program."""
    program = folder / source.stem
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source), "-lpthread"]
    subprocess.run(command, check=True, timeout=120)
    return program


class Answering:
    """A process of a workload that answers each word it is sent with a line, READY first."""

    def __init__(self, program: Path, *arguments: object) -> None:
        pipe = subprocess.PIPE
        command = [str(program), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, word: str) -> str:
        """Send a word; the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """The next line; SystemExit where it says that a byte is wrong, and where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line or line == "CORRUPT":
            raise SystemExit("a byte is wrong" if line else "a process has ended")
        return line

    def ms(self, word: str) -> list[float]:
        """The answer to a word, which is microseconds."""
        return [int(number) / 1000 for number in self.ask(word).split()]

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


class Running:
    """Processes that a benchmark has started; killed when left."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._running]

    def kill(self) -> None:
        """End all of them."""
        for process in self._running:
            process.kill()
        for process in self._running:
            process.communicate()

    def held_bytes(self) -> int:
        """Sum of PSS without that of shared memory, of which gpuksm's store is some."""
        rows = [mappings.smaps_rollup(pid) for pid in self.pids]
        return sum(row["Pss"] + row.get("SwapPss", 0) - row.get("Pss_Shmem", 0) for row in rows)

    def send(self, command: str) -> None:
        """Give all of them a command."""
        for process in self._running:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()


class Processes(Running):
    """The running processes of a workload."""

    def __init__(self, program: Path, workload: Workload) -> None:
        pages = [str(size * PAGES_PER_MB) for size in (workload.shared_mb, workload.own_mb)]
        super().__init__()
        try:
            for index in range(workload.processes):
                words = [str(program), workload.kind, *pages, str(index)]
                pipe = subprocess.PIPE
                self._running.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True))
            # Where the memory of each begins.
            self.places = [int(row["memory"]) for row in self._answers()]
            if workload.aio:
                self.ask("aio")
        except BaseException:
            self.kill()
            raise

    def ask(self, command: str) -> list[dict[str, float]]:
        """Give all of them a command; the numbers they answer with.  A wrong byte ends the benchmark."""
        self.send(command)
        return self._answers()

    def _answers(self) -> list[dict[str, float]]:
        found = []
        for process in self._running:
            assert process.stdout is not None
            word, *values = process.stdout.readline().split() or ["nothing"]
            if word not in ("READY", "OK"):
                raise SystemExit(f"process {process.pid} of the workload says: {word} {' '.join(values)}")
            found.append({name: float(text) for name, _, text in (value.partition("=") for value in values)})
        return found

    def table_bytes(self) -> int:
        """Sum of their page tables."""
        return sum(int(procfs.status(pid)["VmPTE"].split()[0]) << 10 for pid in self.pids)
