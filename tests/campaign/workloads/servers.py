"""Two servers of a kind, their data checked over and over: python servers.py KIND SECONDS MIB.

KIND is redis, memcached or postgres.  Everything lives in a folder that is
removed at the end; servers listen on sockets in it, on no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NOBODY = 65534
VALUE = 6000  # bytes, of which the most fill a page without anything of the server's own


class Corrupt(Exception):
    """What is wrong with the data."""


def value(number: int, version: int) -> bytes:
    """What key `number` must hold in `version`."""
    return hashlib.shake_128(f"{number} {version}".encode()).digest(VALUE // 2).hex().encode()


def connect(path: Path) -> socket.socket:
    """A connection to a server that is just starting."""
    deadline = time.monotonic() + 30
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        try:
            client.connect(str(path))
            return client
        except OSError:
            client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class Redis:
    """One redis server (jemalloc), by its own protocol."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        command = [
            "redis-server",
            "--port",
            "0",
            "--unixsocket",
            str(folder / "socket"),
            "--dir",
            str(folder),
        ]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", str(folder / "log")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.reader = connect(folder / "socket").makefile("rwb")

    def ask(self, *words: bytes) -> bytes | None:
        """One command and its reply; arrays are not needed."""
        self.reader.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
        self.reader.flush()
        line = self.reader.readline()
        if line[:1] == b"$":
            size = int(line[1:])
            return None if size < 0 else self.reader.read(size + 2)[:-2]
        if line[:1] == b"-":
            raise Corrupt(f"redis: {line!r}")
        return line[1:-2]

    def set(self, key: bytes, data: bytes) -> None:
        """Store a value."""
        self.ask(b"SET", key, data)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        return self.ask(b"GET", key)

    def delete(self, key: bytes) -> None:
        """Remove a key."""
        self.ask(b"DEL", key)

    def between(self, turn: int) -> None:
        """Purge what the allocator holds; write a snapshot by a forked child and have it checked."""
        if turn % 3 == 0:
            self.ask(b"MEMORY", b"PURGE")
        if turn % 20 == 10:
            self.ask(b"BGSAVE")
            while b"rdb_bgsave_in_progress:1" in (self.ask(b"INFO", b"persistence") or b""):
                time.sleep(0.05)
            status = self.ask(b"INFO", b"persistence") or b""
            if b"rdb_last_bgsave_status:ok" not in status:
                raise Corrupt("redis: BGSAVE failed")
            checked = subprocess.run(
                ["redis-check-rdb", str(self.folder / "dump.rdb")], capture_output=True, check=False
            )
            if checked.returncode:
                raise Corrupt(f"redis-check-rdb: {checked.stdout[-300:]!r}")


class Memcached:
    """One memcached server, by its text protocol."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        command = ["memcached", "-s", str(folder / "socket"), "-m", "512", "-u", "root", "-t", "2"]
        self.process = subprocess.Popen(command)
        self.reader = connect(folder / "socket").makefile("rwb")

    def set(self, key: bytes, data: bytes) -> None:
        """Store a value."""
        self.reader.write(b"set %s 0 0 %d\r\n%s\r\n" % (key, len(data), data))
        self.reader.flush()
        if (line := self.reader.readline()) != b"STORED\r\n":
            raise Corrupt(f"memcached: {line!r}")

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        self.reader.write(b"get %s\r\n" % key)
        self.reader.flush()
        line = self.reader.readline()
        if line == b"END\r\n":
            return None
        data = self.reader.read(int(line.split()[3]) + 2)[:-2]
        self.reader.readline()
        return data

    def delete(self, key: bytes) -> None:
        """Remove a key."""
        self.reader.write(b"delete %s\r\n" % key)
        self.reader.flush()
        self.reader.readline()

    def between(self, turn: int) -> None:
        """Nothing."""


def key_values(make: Callable[[Path], Redis | Memcached], folder: Path, seconds: float, mib: int) -> str:
    """Two servers with the same data, some of which is written, removed and written again."""
    count = (mib << 20) // VALUE
    servers = [make(folder / str(number)) for number in range(2)]
    versions: list[int | None] = [0] * count
    for server in servers:
        for number in range(count):
            server.set(b"key:%d" % number, value(number, 0))
    print("READY", flush=True)
    chance = random.Random(1)
    end = time.monotonic() + seconds
    looks = turn = 0

    def check(numbers: range | list[int]) -> None:
        for server in servers:
            for number in numbers:
                version = versions[number]
                wanted = None if version is None else value(number, version)
                if server.get(b"key:%d" % number) != wanted:
                    raise Corrupt(f"key {number}")

    while time.monotonic() < end:
        chosen = [chance.randrange(count) for _ in range(300)]
        check(chosen)
        looks += 2 * len(chosen)
        for number in chosen[::8]:
            versions[number] = chance.randrange(3)
            for server in servers:
                server.set(b"key:%d" % number, value(number, versions[number] or 0))
        if turn % 10 == 5:  # a whole stretch goes and comes back
            first = chance.randrange(count // 2)
            stretch = range(first, first + count // 8)
            for number in stretch:
                versions[number] = None
                for server in servers:
                    server.delete(b"key:%d" % number)
            check(list(stretch)[::50])
            for number in stretch:
                versions[number] = 0
                for server in servers:
                    server.set(b"key:%d" % number, value(number, 0))
        for server in servers:
            server.between(turn)
        turn += 1
        time.sleep(0.05)
    check(range(count))
    for server in servers:
        server.process.terminate()
        if server.process.wait(60):
            raise Corrupt(f"the server ended with {server.process.returncode}")
    return f"looks={looks} rounds={turn}"


_SORT = "select sum(x) from (select x from generate_series(1, 60000) x order by md5(x::text)) as s;\n"
_SUMS = " and ".join(
    f"(select sum({table[0]}balance) from pgbench_{table})"
    " = (select coalesce(sum(delta), 0) from pgbench_history)"
    for table in ("accounts", "branches", "tellers")
)


def postgres(folder: Path, seconds: float, mib: int) -> str:
    """A cluster with data checksums under pgbench and sorts; sums, amcheck and checksums are the verdict."""
    tools = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    user: list[str] = []
    if os.getuid() == 0:
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        os.chown(folder, NOBODY, NOBODY)
    env = os.environ | {"PGHOST": str(folder), "PGUSER": "bench", "PGDATABASE": "postgres", "LC_ALL": "C"}

    def run(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [*user, str(tools / name), *arguments],
            env=env,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Corrupt(f"{name}: {(done.stdout + done.stderr)[-1000:]}")
        return done.stdout

    data = folder / "data"
    run("initdb", "-D", str(data), "-U", "bench", "--data-checksums", "-A", "trust", "--no-sync")
    settings = ("listen_addresses=", f"unix_socket_directories={folder}", "work_mem=32MB", "fsync=off")
    command = [*user, str(tools / "postgres"), "-D", str(data), *(f"-c{setting}" for setting in settings)]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    connect(folder / ".s.PGSQL.5432").close()
    while subprocess.run([str(tools / "pg_isready")], env=env, capture_output=True, check=False).returncode:
        time.sleep(0.1)
    run("pgbench", "-i", "-q", "-s", "5")
    run("psql", "-c", "create extension amcheck")
    (folder / "sort.sql").write_text(_SORT)
    load = [*user, str(tools / "pgbench"), "-c", "6", "-j", "1", "-n", "-T", str(int(seconds)), "-R", "60"]
    load += ["-b", "tpcb-like@3", "-f", f"{folder / 'sort.sql'}@1"]
    print("READY", flush=True)
    with open(folder / "pgbench.log", "w") as log:
        bench = subprocess.Popen(load, env=env, cwd=folder, stdout=log, stderr=log)
    checks = 0
    while bench.poll() is None:
        if run("psql", "-Atc", f"select {_SUMS}").split()[-1] != "t":
            raise Corrupt("the sums of accounts, branches, tellers and history differ")
        checks += 1
        time.sleep(2)
    if bench.returncode:
        raise Corrupt(f"pgbench ended with {bench.returncode}: {(folder / 'pgbench.log').read_text()[-500:]}")
    run("pg_amcheck", "--heapallindexed", "-d", "postgres")
    server.terminate()
    if server.wait(120):
        raise Corrupt(f"postgres ended with {server.returncode}")
    run("pg_checksums", "--check", "-D", str(data))
    if " PANIC:" in (folder / "log").read_text() or " terminated by signal" in (folder / "log").read_text():
        raise Corrupt((folder / "log").read_text()[-1000:])
    done = [
        line for line in (folder / "pgbench.log").read_text().splitlines() if "actually processed" in line
    ]
    return f"sums={checks} transactions={done[0].split()[-1].split('/')[0] if done else '?'}"


def main() -> int:
    """Print the verdict."""
    kind, seconds, mib = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-servers-"))
    try:
        if kind == "postgres":
            said = postgres(folder, seconds, mib)
        else:
            said = key_values(Redis if kind == "redis" else Memcached, folder, seconds, mib)
        print(f"OK {said}", flush=True)
        return 0
    except (Corrupt, OSError) as error:
        print(f"CORRUPT {error!r}".replace("\n", " "), flush=True)
        return 9
    finally:
        _end_children()
        shutil.rmtree(folder, ignore_errors=True)


def _end_children() -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for pid in map(int, children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 15)


if __name__ == "__main__":
    sys.exit(main())
