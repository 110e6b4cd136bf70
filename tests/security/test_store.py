"""What a target, or another user, can do to the store and to the agent (docs/security.md)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests import requirements_env
from tests.support import processes
from tests.support.merging import perform_all, scan_until_merged
from tests.support.victims import Victim
from tests.support.world import User, World

# Looks at everything a process may try on the agent's descriptor of the store: pidfd_getfd of its
# own thread, which no mode of a file can forbid.  Says what of it worked, and reads all that is there.
_OWN_AGENT = """
import ctypes, fcntl, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
array = mmap.mmap(-1, 256 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(256):
    array[page << 12 : (page + 1) << 12] = (b"mine %10d " % page) * 256
print("READY", flush=True)
sys.stdin.readline()

def store_of_the_agent():
    for tid in os.listdir("/proc/self/task"):
        for name in os.listdir(f"/proc/self/task/{tid}/fd"):
            try:
                if "memfd:gpuksm" not in os.readlink(f"/proc/self/task/{tid}/fd/{name}"):
                    continue
            except OSError:
                continue
            thread = libc.syscall(434, int(tid), 0o200)  # pidfd_open, PIDFD_THREAD
            return libc.syscall(438, thread, int(name), 0), f"/proc/self/task/{tid}/fd/{name}"
    return -1, ""

def works(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return 0
    except ValueError:
        return 0
    return 1

fd, path = store_of_the_agent()
secret, at, read = sys.argv[1].encode(), 0, 0
while fd >= 0:
    try:
        at = os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        break
    data = os.pread(fd, 1 << 16, at)
    read += secret in data
    at += len(data)
print(
    "OK fd=%d read=%d" % (fd >= 0, read),
    "write=%d" % works(os.pwrite, fd, b"x", 512 << 12),
    "truncate=%d" % works(os.ftruncate, fd, 0),
    "seal=%d" % works(fcntl.fcntl, fd, 1033, 8),
    "punch=%d" % (libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(1 << 40)) == 0),
    "map=%d" % works(lambda: mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE)),
    "reopen=%d" % works(os.open, path, os.O_RDWR),
    flush=True,
)
sys.stdin.readline()
"""
SECRET = "secret of another user"


def _as(world: World, user: User, script: str, *arguments: str) -> Victim:
    command = [*user.python_prefix, sys.executable, "-c", script, *arguments]
    victim = Victim(command, world.env)
    world.victims.append(victim)
    return victim


def _agent(pid: int) -> int:
    return next(
        int(task.name)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if (task / "comm").read_text() == "gpuksm-agent\n"
    )


@pytest.fixture
def pair(world: World) -> list[Victim]:
    victims = [world.victim("ksm", 256, 1) for _ in range(2)]
    perform_all(victims, "ramp 5000")
    scan_until_merged(world, victims, ["memory"])
    return victims


def test_a_target_can_change_nothing_in_the_store(user_world: World) -> None:
    """Its own user's store: readable, as the memory of one's own processes is; never writable or smaller."""
    victims = [user_world.python(_OWN_AGENT, SECRET) for _ in range(2)]
    user_world.scan(*victims)
    assert processes.merged_pages(victims[0].pid) > 200
    answer = victims[0].ask("go")
    refused = {name: answer[name] for name in ("write", "truncate", "seal", "punch", "map", "reopen")}
    assert refused == dict.fromkeys(refused, "0")
    victims[1].ask("go")


@pytest.mark.parametrize("hostile_first", [True, False])
def test_another_users_target_reads_nothing_of_the_store(
    world: World, nobody: User, hostile_first: bool
) -> None:
    """Root's guard takes the processes of one user at a time: each target can read the whole store."""
    requirements_env.need("root")
    hostile = [_as(world, nobody, _OWN_AGENT, SECRET) for _ in range(2)]
    holding = (
        "import sys\nsecret = bytearray(b'%s' * 100000)\nprint('READY', flush=True)\nsys.stdin.readline()\n"
    )
    trusting = [world.python(holding % SECRET) for _ in range(2)]
    for some in (hostile, trusting) if hostile_first else (trusting, hostile):
        world.gpuksm("scan", *(part for victim in some for part in ("--pid", victim.pid)))
    merged = [processes.merged_pages(some[0].pid) > 0 for some in (hostile, trusting)]
    assert sorted(merged) == [False, True], merged
    assert hostile[0].ask("go")["read"] == "0"


def test_writes_through_a_mapping_only_copy(world: World, pair: list[Victim]) -> None:
    """mprotect and a write, a write by /proc/PID/mem and by its owner: the other keeps its bytes."""
    pair[0].ask("none")
    pair[0].ask("rw")
    pair[0].ask("poke 3 77")
    for page in range(10, 20):
        pair[0].ask(f"byte {page}")
    pair[0].ask("fill 78")
    perform_all(pair, "verify")


def test_others_cannot_open_the_store(world: World, pair: list[Victim], nobody: User) -> None:
    script = (
        "import os, sys\n"
        "def works(path, flags):\n"
        "    try: os.close(os.open(path, flags))\n"
        "    except OSError: return 0\n"
        "    return 1\n"
        "opened = [works(path, flags) for path in sys.argv[1:] for flags in (os.O_RDONLY, os.O_RDWR)]\n"
        "print('READY opened=%d' % sum(opened), flush=True)\nsys.stdin.readline()\n"
    )
    guard, agent = world.guard_pid(), _agent(pair[0].pid)
    mapping = processes.store_mappings(pair[0].pid)[0]
    paths = [f"/proc/{pair[0].pid}/map_files/{mapping.start:x}-{mapping.end:x}"]
    for owner in (guard, agent):
        for name in os.listdir(f"/proc/{owner}/fd"):
            if "memfd:gpuksm" in os.readlink(f"/proc/{owner}/fd/{name}"):
                paths.append(f"/proc/{owner}/fd/{name}")
    assert len(paths) >= 3
    assert _as(world, nobody, script, *paths).values["opened"] == "0"


def test_nothing_of_the_store_is_left_after_unmerge(world: World, pair: list[Victim]) -> None:
    assert world.request("status")["store_bytes"] >= 200 * 4096
    world.unmerge()
    deadline = time.monotonic() + 5
    while world.request("status")["store_bytes"]:
        assert time.monotonic() < deadline, world.request("status")
        time.sleep(0.1)


def test_the_agent_has_no_rights(each_world: World) -> None:
    """No capabilities, all signals blocked, no descriptors but ours; its code cannot be written."""
    victims = [each_world.victim("ksm", 256, 1) for _ in range(2)]
    each_world.scan(*victims)
    pid = victims[0].pid
    task = Path(f"/proc/{pid}/task/{_agent(pid)}")
    status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int(status[name], 16) == 0, (name, status[name])
    blocked = int(status["SigBlk"], 16)
    assert blocked | 1 << 8 | 1 << 18 | 3 << 31 >= (1 << 64) - 1, hex(blocked)  # KILL, STOP; glibc's two
    links = sorted(os.readlink(task / "fd" / name).split(":")[0] for name in os.listdir(task / "fd"))
    assert not [link for link in links if link not in ("socket", "anon_inode", "/memfd")], links
    code = [
        mapping
        for mapping in processes.mappings(pid)
        if "x" in mapping.perms and (not mapping.path or "gpuksm" in mapping.path)
    ]
    assert code
    assert {mapping.perms for mapping in code} <= {"r-xp"}


def test_a_set_user_id_program_is_not_attached_by_its_caller(user_world: World, tmp_path: Path) -> None:
    """The kernel lets nobody trace it, and nothing of it is merged."""
    requirements_env.need("root")
    program = user_world.folder.parent / f"gpuksm-setuid-{os.getpid()}"
    program.write_bytes((user_world.victims_folder / "ksm").read_bytes())
    program.chmod(0o4755)
    try:
        command = [*user_world.user.prefix, str(program), "64", "5"]
        victim = Victim(command, user_world.env, program="ksm")
        user_world.victims.append(victim)
        result = user_world.gpuksm("scan", "--pid", victim.pid)
        assert result.code == 5, result
        assert processes.store_mappings(victim.pid) == []
        victim.verify()
    finally:
        program.unlink()
