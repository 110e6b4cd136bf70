"""GuardClient against a small server that speaks gpuksm/wire.py, and its folder rules."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuksm import __main__ as command
from gpuksm import client, eligibility, errors, starting, writers
from gpuksm.client import GuardClient
from gpuksm.linux import procfs
from tests.support import processes
from tests.wire_server import Answer, listening

Serve = Callable[[Answer], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    runtime = tmp_path / "run"
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(runtime))
    yield runtime
    if starting._ahead is not None:
        starting._ahead.end()
        starting._ahead = None


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:
        yield lambda answer: stack.enter_context(listening(folder, answer))


def test_requests_carry_fields_and_payload_both_ways(serve: Serve) -> None:
    seen: list[tuple[dict[str, Any], bytes]] = []

    def answer(message: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        seen.append((message, bytes(payload)))
        return {"ok": True, "extents": 3}, b"slots"

    serve(answer)
    with GuardClient.connect(start=False) as guard:
        assert guard.request("hello") == ({"ok": True, "extents": 3}, bytearray(b"slots"))
        guard.request("commit", b"plan", extents=2, max_pause_us=5000)
    assert seen == [({"op": "hello"}, b""), ({"op": "commit", "extents": 2, "max_pause_us": 5000}, b"plan")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NotPermitted", errors.NotPermitted),
        ("TargetGone", errors.TargetGone),
        ("NotEnoughMemory", errors.NotEnoughMemory),
        ("SystemExit", errors.GuardError),
        ("annotations", errors.GuardError),
    ],
)
def test_a_named_error_is_raised_as_its_class(
    serve: Serve, name: str, kind: type[errors.GpuksmError]
) -> None:
    serve(lambda _message, _payload: ({"error": name, "message": "what to do"}, b""))
    with (
        GuardClient.connect(start=False) as guard,
        pytest.raises(errors.GpuksmError, match="what to do") as info,
    ):
        guard.request("attach")
    assert type(info.value) is kind


def test_a_guard_that_hangs_up_is_a_guard_error(serve: Serve) -> None:
    serve(lambda _message, _payload: None)
    with GuardClient.connect(start=False) as guard, pytest.raises(errors.GuardError, match="lost the guard"):
        guard.request("status")


def test_a_guard_that_never_answers_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REPLY_SECONDS", 0.1)
    release = threading.Event()

    def answer(_message: dict[str, Any], _payload: bytearray) -> None:
        release.wait(5)

    serve(answer)
    with GuardClient.connect(start=False) as guard, pytest.raises(errors.GuardError, match="did not answer"):
        guard.request("status")
    release.set()


def test_no_guard_is_said_plainly(folder: Path) -> None:
    with pytest.raises(errors.GuardError, match="no guard is running"):
        GuardClient.connect(start=False)
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    with pytest.raises(errors.GuardError, match="no guard is running"):
        GuardClient.connect(start=False)


def test_a_guard_that_was_killed_with_its_keeper_is_started_again(folder: Path) -> None:
    """Its socket is still there; processes may wait for it."""
    folder.mkdir(mode=0o700)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(folder / "guard.sock"))
    stale.close()
    with GuardClient.connect(start=False) as guard:
        assert guard.request("status")[0]["targets"] == []
        guard.request("shutdown")


@pytest.mark.parametrize("start", [False, True])
def test_a_symlinked_folder_is_refused(folder: Path, tmp_path: Path, start: bool) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.GuardError, match="symbolic link"):
        GuardClient.connect(start=start)


@pytest.mark.parametrize("start", [False, True])
def test_a_folder_others_can_write_to_is_refused(folder: Path, start: bool) -> None:
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(errors.GuardError, match="others can write"):
        GuardClient.connect(start=start)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_foreign_folder_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(errors.GuardError, match="belongs to uid 65534"):
        GuardClient.connect(start=True)


def test_a_file_in_the_place_of_the_folder_is_refused(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(errors.GuardError, match="not a directory"):
        GuardClient.connect(start=True)


def test_a_folder_is_created_for_this_user_only(folder: Path) -> None:
    client.ensure_runtime_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_path_too_long_for_a_socket_is_a_guard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir(mode=0o700)
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(deep))
    with pytest.raises(errors.GuardError, match="too long"):
        GuardClient.connect(start=True)


def test_where_the_runtime_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUKSM_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert client.runtime_dir() == tmp_path / "gpuksm"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert client.runtime_dir() == Path("/tmp/gpuksm-1234")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert client.runtime_dir() == Path("/tmp/gpuksm-1234")


def _processes(folder: Path) -> list[int]:
    """Pids of keeper and guard of this folder, by what they inherit."""
    found = []
    for pid in procfs.pids():
        try:
            if str(folder).encode() in Path(f"/proc/{pid}/environ").read_bytes() and pid != os.getpid():
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.fixture
def real(folder: Path) -> Iterator[Path]:
    """The folder of a real guard, which is told to end, and must."""
    yield folder
    guard = GuardClient.find()
    if guard is not None:
        with guard:
            guard.request("shutdown", force=False)
    deadline = time.monotonic() + 10
    while (left := _processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def test_a_guard_is_started_once_and_found_again(real: Path) -> None:
    with GuardClient.connect(start=True) as first, GuardClient.connect(start=True) as second:
        hello, _ = first.request("hello")
        assert second.request("hello")[0] == hello
        assert hello["merged_pages"] == 0
        assert procfs.stat(hello["pid"]).comm == "gpuksm guard"
    assert (real / "guard.sock").stat().st_mode & 0o777 == 0o600


def test_clients_that_start_at_the_same_time_get_one_guard(real: Path) -> None:
    code = (
        "from gpuksm.client import GuardClient\n"
        "with GuardClient.connect(start=True) as guard: print(guard.request('hello')[0]['pid'])"
    )
    clients = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert len({client.communicate(timeout=60)[0] for client in clients}) == 1


def test_the_guard_is_detached_from_everything(real: Path) -> None:
    """A reader of the client's output sees its end while the guard lives on."""
    code = (
        "import os; from gpuksm.client import GuardClient; r, w = os.pipe(); os.set_inheritable(w, True)\n"
        "with GuardClient.connect(start=True) as guard: print(guard.request('hello')[0]['pid'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    guard = int(done.stdout)
    keeper = procfs.stat(guard).ppid
    for pid in (guard, keeper):
        links = procfs.fd_targets(pid)
        assert links[0] == "/dev/null"
        assert links[1] == links[2] == str(real / "guard.log")
        assert not any(link.startswith("pipe:") for fd, link in links.items() if pid == keeper)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) != os.getsid(0)
    assert procfs.stat(keeper).ppid != os.getpid()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_guard_that_cannot_start_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    broken = starting._BOOTSTRAP.replace("from gpuksm.guard import", "from gpuksm.gone import")
    monkeypatch.setattr(starting, "_BOOTSTRAP", broken)
    if ahead:
        client.start_ahead()
    with pytest.raises(errors.GuardError, match=r"did not start: .*No module named .gpuksm\.gone"):
        GuardClient.connect(start=True)


def _early() -> int:
    assert starting._ahead is not None
    return starting._ahead._process.pid


def test_what_was_started_ahead_becomes_the_keeper(real: Path) -> None:
    client.start_ahead()
    early = _early()
    client.start_ahead()
    assert _early() == early, "one is enough"
    assert "gpuksm itself" in str(eligibility.process_reason(early, named=True, allowed=writers.Allowed()))
    with GuardClient.connect(start=True) as guard:
        pid = guard.request("hello")[0]["pid"]
        assert procfs.stat(procfs.stat(pid).ppid).comm == "gpuksm keeper"
    assert starting._ahead is None
    assert not processes.alive(early)
    client.start_ahead()
    assert starting._ahead is None, "there is a guard"


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_started_ahead_and_is_not_wanted_ends_and_leaves_nothing(
    folder: Path, tmp_path: Path, killed: bool
) -> None:
    code = (
        "import os, time; from gpuksm import client, starting\n"
        "client.start_ahead()\n"
        "print(starting._ahead._process.pid, flush=True)\n" + ("time.sleep(100)" if killed else "")
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    early = int(asking.stdout.readline())
    if killed:
        asking.kill()
    asking.wait(10)
    asking.stdout.close()
    deadline = time.monotonic() + 10
    while processes.alive(early) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not processes.alive(early)
    assert not folder.exists()


def test_what_was_started_ahead_ends_when_another_was_quicker(real: Path) -> None:
    client.start_ahead()
    early = _early()
    code = "from gpuksm.client import GuardClient; GuardClient.connect(start=True)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with GuardClient.connect(start=True):
        assert starting._ahead is None
        assert not processes.alive(early)


def test_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4uft")
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", folder)
    with GuardClient.connect(start=True) as guard:
        guard.request("shutdown", force=False)


@pytest.mark.parametrize(
    ("closed", "arguments", "ahead"),
    [
        (None, ["scan", "--pid", "1"], True),
        (None, ["daemon"], True),
        (None, ["scan", "--dry-run"], False),
        (None, ["scan", "--help"], False),
        (None, ["status"], False),
        (None, [], False),
        ("stdin", ["scan"], False),
        ("stdout", ["scan"], False),
        ("stderr", ["scan"], False),
    ],
)
def test_when_something_is_started_ahead(
    monkeypatch: pytest.MonkeyPatch, closed: str | None, arguments: list[str], ahead: bool
) -> None:
    """Not where a standard stream is closed: no descriptor may get its number, or libraries print there."""
    did: list[str] = []
    monkeypatch.setattr(client, "start_ahead", lambda: did.append("ahead"))
    monkeypatch.setattr("gpuksm.cli.run", lambda: did.append("run"))
    monkeypatch.setattr(sys, "argv", ["gpuksm", *arguments])
    if closed is not None:
        monkeypatch.setattr(sys, closed, None)
    command.main()
    assert did == ["ahead"] * ahead + ["run"]


def test_a_successor_needs_no_file_of_the_package(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lie on a file server that hangs, or be replaced, while processes wait for a guard."""
    package = tmp_path / "installed" / "gpuksm"
    shutil.copytree(Path(client.__file__).parent, package)
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); from gpuksm.client import GuardClient\n"
        "with GuardClient.connect(start=True) as guard: print(guard.request('hello')[0]['pid'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first = int(done.stdout)
    keeper = procfs.stat(first).ppid
    shutil.rmtree(package)
    os.kill(first, signal.SIGKILL)
    monkeypatch.setattr(client, "REPLY_SECONDS", 20)
    try:
        with GuardClient.connect(start=False) as guard:
            assert guard.request("hello")[0]["pid"] != first
    except errors.GuardError:
        os.kill(keeper, signal.SIGKILL)  # it would try for ever
        raise


def test_one_that_was_killed_before_its_word_is_replaced(real: Path) -> None:
    client.start_ahead()
    os.kill(_early(), signal.SIGKILL)
    with GuardClient.connect(start=True) as guard:
        assert guard.request("hello")[0]["merged_pages"] == 0


def test_a_thread_that_waits_for_an_answer_ends_with_the_connection(serve: Serve) -> None:
    release, failed = threading.Event(), list[Exception]()

    def answer(_message: dict[str, Any], _payload: bytearray) -> None:
        release.wait(5)

    def ask() -> None:
        try:
            guard.request("attach")
        except errors.GuardError as error:
            failed.append(error)

    serve(answer)
    guard = GuardClient.connect(start=False)
    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.05)
    guard.close()
    asking.join(2)
    assert failed
    release.set()


def test_a_process_that_cannot_be_started_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RETRY_SECONDS", 0.0)
    tries: list[int] = []

    def start() -> int:
        tries.append(1)
        if len(tries) < 4:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return 7

    assert client._persistently(start) == 7
    tries.clear()
    monkeypatch.setattr(client, "_TRIES", 2)
    with pytest.raises(errors.GuardError, match="Resource temporarily unavailable"):
        client._persistently(start)
