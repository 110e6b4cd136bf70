"""One test's own gpuksm: a runtime folder, its guard, the victims, and a clean end.

Everything a test starts, it starts through a `World`, as one user.  `close` takes
all of it down and fails the test when something stays behind: a stopped thread, a
victim, a guard or a keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuksm import wire
from tests.support import processes
from tests.support.victims import Victim

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class User:
    """Who runs things: `prefix` starts a program as this user, `python_prefix` a Python one."""

    uid: int
    prefix: tuple[str, ...] = ()
    python_prefix: tuple[str, ...] = ()
    home: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a finished `gpuksm` command left."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; the command must have succeeded."""
        assert self.code == 0, f"exit code {self.code}: {self.err}"
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass
class World:
    """See the module's head; `folder` is the runtime folder, `victims_folder` has the compiled victims."""

    folder: Path
    victims_folder: Path
    user: User
    victims: list[Victim] = field(default_factory=list)
    commands: list[subprocess.Popen[str]] = field(default_factory=list)
    extra_env: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """The environment of everything that is started here."""
        env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("GPUKSM_", "XDG_")) or key.startswith("GPUKSM_COMPARER")
        }
        env |= {
            "GPUKSM_RUNTIME_DIR": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GPUKSM_JOURNAL_BYTES": "256",  # written anew all the time
        }
        if self.user.home is not None:
            env["HOME"] = str(self.user.home)
            env["NUMBA_CACHE_DIR"] = str(self.user.home / "numba")
        return env | self.extra_env

    def victim(self, name: str, *arguments: object, wrapper: Sequence[str] = (), **options: Any) -> Victim:
        """Start tests/victims/NAME.c, by the program `wrapper` where given, and wait for READY."""
        command = [*self.user.prefix, *wrapper, str(self.victims_folder / name), *map(str, arguments)]
        return self._keep(Victim(command, self.env, program=name, **options))

    def python(self, script: str, *arguments: object, **options: Any) -> Victim:
        """A victim written in Python: `script` follows the line protocol."""
        command = [*self.user.python_prefix, sys.executable, "-c", script, *map(str, arguments)]
        return self._keep(Victim(command, self.env, **options))

    def _keep(self, victim: Victim) -> Victim:
        self.victims.append(victim)
        return victim

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """`python -m gpuksm ARGUMENTS` in the background, both outputs piped."""
        command = [*self.user.python_prefix, sys.executable, "-m", "gpuksm", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=self.env,
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        self.commands.append(process)
        return process

    def gpuksm(self, *arguments: object, timeout: float = 120) -> Result:
        """`python -m gpuksm ARGUMENTS`, to its end and to the end of its output."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"gpuksm {arguments} took more than {timeout} s") from None
        assert "Traceback" not in err, err
        return Result(process.returncode, out, err)

    def scan(
        self, *targets: Victim | int, options: Sequence[object] = (), timeout: float = 120
    ) -> dict[str, Any]:
        """`gpuksm scan --json` over targets by pid; its JSON object."""
        pids = [target.pid if isinstance(target, Victim) else target for target in targets]
        named = [part for pid in pids for part in ("--pid", pid)]
        return self.gpuksm("scan", "--json", *named, *options, timeout=timeout).json()

    def unmerge(self, *arguments: object, seconds: float = 60) -> None:
        """`gpuksm unmerge ARGUMENTS`; without any of everything, which the guard is asked for directly."""
        if arguments:
            result = self.gpuksm("unmerge", *arguments)
            assert result.code == 0, result.err
            return
        deadline = time.monotonic() + seconds
        while failed := self._unmerged(seconds):
            assert time.monotonic() < deadline, f"still merged: {failed}"
            time.sleep(0.1)
        merged = {target["pid"]: target["merged_pages"] for target in self.request("status")["targets"]}
        assert not any(merged.values()), f"still merged after unmerge: {merged}"

    def _unmerged(self, seconds: float) -> Any:
        """Ask for everything to be unmerged, of the command where there may be no guard; {pid: why not}."""
        try:
            return self.request("unmerge", timeout=seconds, pids=None, max_pause_us=5000)["failed"]
        except (OSError, wire.WireError):
            result = self.gpuksm("unmerge", "--all")  # which starts one where all were killed
            assert result.code == 0, result.err
            return {}

    def request(self, op: str, timeout: float = 20, **fields: Any) -> dict[str, Any]:
        """One request to the guard over its socket; an error reply is an AssertionError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self.folder / "guard.sock"))
            wire.send(connection, {"op": op, **fields})
            reply, _ = wire.receive(connection)
        assert reply.get("ok"), reply
        return reply

    def guard_pid(self) -> int:
        """The pid of the guard that answers; waits a little for a successor."""
        deadline = time.monotonic() + 15
        while True:
            try:
                return int(self.request("hello")["pid"])
            except (OSError, wire.WireError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def guard_processes(self) -> list[int]:
        """Guard, keeper and whatever else uses the runtime folder, by pid."""
        known = {victim.pid for victim in self.victims} | {victim.process.pid for victim in self.victims}
        known |= {process.pid for process in self.commands if process.poll() is None}
        return [pid for pid in self._users_of_folder() if pid not in known]

    def keepers(self) -> list[int]:
        """Keepers by pid; normally there is one, also one that has not come so far as to name itself."""
        return [pid for pid in self.guard_processes() if _is_keeper(pid)]

    def kill_guard_and_keeper(self, seconds: float = 10) -> None:
        """kill -9 of both, and of those that were just being started; returns when all have ended."""
        killed: set[int] = set()
        deadline = time.monotonic() + seconds
        # One that dies has no environment any more, by which it is known, and its sockets still.
        while left := {*self.guard_processes(), *filter(processes.alive, killed)}:
            assert time.monotonic() < deadline, f"{left} do not end"
            for pid in (*self.keepers(), *left):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= left
            time.sleep(0.002)

    def await_other_keeper(self, killed: int, seconds: float = 15) -> None:
        """Wait until the guard has put another keeper in the place of one that was killed."""
        deadline = time.monotonic() + seconds
        while not set(self.keepers()) - {killed}:
            assert time.monotonic() < deadline, "no new keeper"
            time.sleep(0.005)

    def _users_of_folder(self) -> list[int]:
        marks = (f"GPUKSM_RUNTIME_DIR={self.folder}\0".encode(), str(self.folder).encode())
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                texts = (entry / "environ").read_bytes() + b"\0", (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if self._belongs_to_a_victim(entry):
                continue
            if any(mark in text for mark, text in zip(marks, texts, strict=True)) and processes.alive(
                int(entry.name)
            ):
                found.append(int(entry.name))
        return found

    def _belongs_to_a_victim(self, entry: Path) -> bool:
        """True for the children of victims, which inherit our environment."""
        try:
            program = os.readlink(entry / "exe")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return True  # gone
        own = {victim.pid for victim in self.victims}
        return program.startswith(str(self.victims_folder)) or parent in own

    def shut_down(self) -> None:
        """Unmerge everything and end guard and keeper."""
        if not (self.folder / "guard.sock").exists():
            return
        self.unmerge()
        self.request("shutdown", force=False)
        deadline = time.monotonic() + 10
        while self.guard_processes():
            assert time.monotonic() < deadline, f"still running after shutdown: {self.guard_processes()}"
            time.sleep(0.01)

    def ended_victims(self) -> str:
        """Each victim that has ended, with its status and what it said last."""
        return "".join(
            f"\n{victim.name} ({victim.pid}) ended with {victim.process.returncode}: {victim.last_words()}"
            for victim in self.victims
            if victim.process.poll() is not None
        )

    def check_nothing_stopped(self) -> None:
        """No thread of a victim may be stopped or traced for longer than a freeze lasts."""
        for victim in self.victims:
            deadline = time.monotonic() + 5
            while stopped := processes.stopped_threads(victim.pid):
                assert time.monotonic() < deadline, f"{victim.name}: threads {stopped} stay stopped"
                time.sleep(0.01)

    def close(self) -> None:
        """Take everything down; what should not have stayed behind is an AssertionError."""
        problems: list[str] = []
        steps = [self.check_nothing_stopped, self.shut_down, *(victim.stop for victim in self.victims)]
        for step in steps:
            try:
                step()
            except (AssertionError, OSError, wire.WireError) as error:
                problems.append(f"{getattr(step, '__name__', step)}: {error!r}")
        for victim in self.victims:
            victim.kill()
        for process in self.commands:
            process.kill()
            process.communicate()
        problems += self._kill_guards()
        assert not problems, "\n".join(problems)

    def _kill_guards(self) -> list[str]:
        deadline = time.monotonic() + 5
        while (left := self.guard_processes()) and time.monotonic() < deadline:
            time.sleep(0.01)  # one that a test has told to end may still be at it
        # The keeper first, or it would start a successor for the guard.
        for pid in sorted(left):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return [f"processes {left} had to be killed"] if left else []


def _is_keeper(pid: int) -> bool:
    try:
        return b"keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
