"""TARGETS with real processes: what each way of naming finds, and each error apart from the others."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuksm import errors, targets
from gpuksm.linux import procfs
from gpuksm.targets import Finder, Selection, resolve
from tests.wire_server import listening

NOBODY = 65534
_SLEEP = "import sys, time; sys.stdout.write('x'); sys.stdout.flush(); time.sleep(60)"
_PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_SLEEP!r}])"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def started() -> Iterator[Any]:
    running: list[subprocess.Popen[bytes]] = []

    def start(code: str = _SLEEP, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **options))
        assert running[-1].stdout is not None
        assert running[-1].stdout.read(1) == b"x"
        return running[-1]

    yield start
    for process in running:
        os.killpg(process.pid, 9)
        process.wait()


def _pids(selection: Selection) -> list[int]:
    return [request.pid for request in resolve(selection)]


def test_named_processes_once_each_in_order(started: Any) -> None:
    first, second = started().pid, started().pid
    found = resolve(Selection(pids=(second, first, second)))
    assert [(request.pid, request.named, request.ranges) for request in found] == [
        (second, True, None),
        (first, True, None),
    ]


def test_a_tree_is_the_process_and_all_below_it(started: Any) -> None:
    root = started(_PARENT).pid
    (child,) = procfs.children(root)
    found = resolve(Selection(trees=(root,)))
    assert [(request.pid, request.named) for request in found] == [(root, True), (child, True)]


def test_patterns_narrow_each_other_down_and_name_nobody(started: Any) -> None:
    name = f"job-{os.getpid()}"
    copy = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0); {_SLEEP}"
    first, second = started(copy).pid, started(copy).pid
    other = started().pid
    found = resolve(Selection(name=f"^{name}$"))
    assert {request.pid for request in found} == {first, second}
    assert not any(request.named for request in found)
    uid = str(os.geteuid())
    assert set(_pids(Selection(name=name, user=uid))) == {first, second}
    assert set(_pids(Selection(pids=(other,), name=name))) == {first, second, other}
    with pytest.raises(errors.NoTargets, match="no process matches --name"):
        resolve(Selection(name=name, user="65533"))


def test_a_user_by_name_or_uid_without_what_can_never_be_a_target() -> None:
    name = pwd.getpwuid(os.geteuid()).pw_name
    for _ in range(20):  # processes come and go
        found = set(_pids(Selection(user=name)))
        if found == set(_pids(Selection(user=str(os.geteuid())))):
            break
    else:
        pytest.fail("other processes by name than by number")
    assert not {1, 2, os.getpid()} & found
    assert not any(
        procfs.stat(pid).flags & procfs.PF_KTHREAD for pid in found if Path(f"/proc/{pid}").exists()
    )


def test_a_cgroup(started: Any, tmp_path: Path) -> None:
    pid = started().pid
    (tmp_path / "cgroup.procs").write_text(f"{pid}\n1\n999999\n")
    assert _pids(Selection(cgroup=str(tmp_path))) == [pid]
    with pytest.raises(errors.UsageError, match="no cgroup"):
        resolve(Selection(cgroup="/no/such/group"))


@pytest.mark.parametrize(
    ("selection", "kind", "text"),
    [
        (Selection(pids=(1,)), errors.Unsupported, "init"),
        (Selection(pids=(os.getpid(),)), errors.Unsupported, "gpuksm itself"),
        (Selection(trees=(1 << 22,)), errors.NoSuchProcess, "no process"),
        (Selection(pids=(1 << 22,)), errors.NoSuchProcess, "no process"),
        (Selection(name="("), errors.UsageError, "regular expression"),
        (Selection(user="no-such-user"), errors.UsageError, "no user"),
        (Selection(name="no such process name"), errors.NoTargets, "no process matches"),
        (Selection(), errors.NoTargets, "gpuksm register --pid"),
        (Selection(registered=True), errors.NoTargets, "nothing is registered"),
    ],
)
def test_each_error_is_told_apart(selection: Selection, kind: type[errors.GpuksmError], text: str) -> None:
    with pytest.raises(errors.GpuksmError, match=text) as info:
        resolve(selection)
    assert type(info.value) is kind
    assert "\n" not in str(info.value)


@pytest.mark.skipif(not Path("/proc/2/comm").exists(), reason="kernel threads cannot be seen from here")
def test_a_kernel_thread_is_unsupported() -> None:
    with pytest.raises(errors.Unsupported, match="kernel thread"):
        resolve(Selection(pids=(2,)))


def test_a_thread_is_no_process() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        with pytest.raises(errors.NoSuchProcess, match=f"thread of process {os.getpid()}"):
            targets.check_named(thread.native_id)
    finally:
        release.set()
        thread.join()


def test_a_zombie_has_ended() -> None:
    process = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while procfs.stat(process.pid).state != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(errors.Unsupported, match="has ended"):
        resolve(Selection(pids=(process.pid,)))
    process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_users_process_is_not_permitted() -> None:
    code = f"""
import os, sys
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
from gpuksm import errors, targets
try:
    targets.resolve(targets.Selection(pids=({os.getppid()},)))
except errors.NotPermitted as error:
    print(error)
"""
    environment = {**os.environ, "GPUKSM_RUNTIME_DIR": "/nonexistent"}
    # Everything is imported before the change of user: the interpreter may lie where that user cannot look.
    code = "import gpuksm.targets, gpuksm.scan\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "belongs to another user" in done.stdout, done.stderr


def test_what_is_registered_is_the_default(folder: Path, started: Any) -> None:
    pid = started().pid
    reply = {
        "ok": True,
        "targets": [{"pid": pid, "ranges": [[4096, 8192]]}, {"pid": pid + 1, "ranges": None}],
    }
    with listening(folder, lambda _message, _payload: (reply, b"")):
        found = resolve(Selection())
        assert [(request.pid, request.named) for request in found] == [(pid, True), (pid + 1, True)]
        assert [request.ranges for request in found] == [((4096, 8192),), None]
        assert [request.ranges for request in resolve(Selection(pids=(pid,), registered=True))] == [
            None,
            None,
        ]


def test_a_finder_lets_go_what_has_exited(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = started(), started()
    find = Finder(Selection(pids=(first.pid, second.pid)))
    assert [request.pid for request in find()] == [first.pid, second.pid]
    first.kill()  # and not reaped
    deadline = time.monotonic() + 10
    while procfs.stat(first.pid).state != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [request.pid for request in find()] == [second.pid]
    # Another process with the pid of one that was named is not that one.
    monkeypatch.setattr(targets, "_start_time", lambda pid: 1)
    assert find() == []


def test_a_finder_says_at_first_what_is_wrong_and_then_waits(started: Any, folder: Path) -> None:
    with pytest.raises(errors.NoSuchProcess):
        Finder(Selection(pids=(2**31 - 1,)))()
    with pytest.raises(errors.UsageError):
        Finder(Selection(name="("))()
    find = Finder(Selection())
    assert find() == []
    assert find() == []
    parent = started(_PARENT)
    find = Finder(Selection(trees=(parent.pid,)))
    assert parent.pid in [request.pid for request in find()]
    parent.kill()
    parent.wait()
    assert find() == []
