"""Fixtures of the tests that merge real processes.

A test asks for `world` (this user) or `user_world` (an unprivileged user, needs
root to become it), or for `each_world` to run as both.
"""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuksm
from gpuksm.hashing import kernel_cache
from tests import requirements_env
from tests.support import victims
from tests.support.world import User, World

NOBODY = 65534

# An interpreter below a home folder cannot be reached by another user: give that
# user a private view of the file system in which it can.
_PRIVATE_VIEW = """
set -e
mount --bind "$1" "$2"
mount -t tmpfs -o mode=755 tmpfs "$3"
mkdir -p "$1"
mount --bind "$2" "$1"
umount -l "$2"
shift 3
exec "$@"
"""


def pytest_configure(config: pytest.Config) -> None:
    """Have gpuksm's bytecode there, as an installation has it: each test starts a dozen of its processes."""
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(Path(gpuksm.__file__).parent, quiet=2, workers=0)


@pytest.fixture(scope="session")
def kernels() -> Path | None:
    """Where compiled kernels are kept, and are now: to compile them takes minutes beside busy victims."""
    subprocess.run([sys.executable, "-c", "from gpuksm import scan; scan.load()"], check=True, timeout=300)
    return kernel_cache.folder()


@pytest.fixture(scope="session")
def victims_folder(kernels: Path | None) -> Iterator[Path]:
    """A folder with every victim compiled, readable by all users."""
    requirements_env.need("gcc")
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-victims-"))
    folder.chmod(0o755)
    try:
        victims.build(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test puts into the environment, a fault say, must not come to the next one's guard."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def nobody(kernels: Path | None) -> Iterator[User]:
    """An unprivileged user that can run this interpreter."""
    requirements_env.need("root", "setpriv", "unshare")
    home = Path(tempfile.mkdtemp(prefix="gpuksm-home-"))
    os.chown(home, NOBODY, NOBODY)
    change = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    if kernels is not None:
        shutil.copytree(kernels, home / "numba")
        for path in (home / "numba", *(home / "numba").iterdir()):
            os.chown(path, NOBODY, NOBODY)
    try:
        yield User(NOBODY, change, _python_prefix(change, home), home)
    finally:
        shutil.rmtree(home)


def _python_prefix(change: tuple[str, ...], home: Path) -> tuple[str, ...]:
    # setpriv itself may still pass closed folders: what counts is what its child can run.
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import numba'], check=True)"
    plain = subprocess.run([*change, sys.executable, "-c", again], capture_output=True, cwd="/")
    if plain.returncode == 0:
        return change
    base = Path(sys.base_prefix)
    closed = next((folder for folder in reversed(base.parents) if not folder.stat().st_mode & 0o001), None)
    if closed is None:
        requirements_env.require("root", f"another user cannot run {sys.executable}: {plain.stderr!r}")
    through = home / "interpreter"
    through.mkdir()
    script = ("sh", "-c", _PRIVATE_VIEW, "sh", str(base), str(through), str(closed))
    return ("unshare", "--mount", "--propagation", "private", *script, *change)


def _open_world(victims_folder: Path, user: User) -> Iterator[World]:
    requirements_env.need("uffd")
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-run-"))
    folder.chmod(0o700)
    os.chown(folder, user.uid, -1)
    world = World(folder, victims_folder, user)
    try:
        yield world
        world.close()
    finally:
        for victim in world.victims:
            victim.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def world(victims_folder: Path) -> Iterator[World]:
    """A guard runtime folder, victims and commands of this test alone, as the user who runs the tests."""
    yield from _open_world(victims_folder, User(os.getuid()))


@pytest.fixture
def user_world(victims_folder: Path, nobody: User) -> Iterator[World]:
    """The same as an unprivileged user."""
    yield from _open_world(victims_folder, nobody)


@pytest.fixture(params=["self", "nobody"])
def each_world(request: pytest.FixtureRequest, victims_folder: Path) -> Iterator[World]:
    """The same, once as the user who runs the tests and once unprivileged."""
    user = User(os.getuid()) if request.param == "self" else request.getfixturevalue("nobody")
    yield from _open_world(victims_folder, user)


@pytest.fixture
def container_world(victims_folder: Path) -> Iterator[World]:
    """The same as root of a user namespace, as in a rootless container."""
    requirements_env.need("root", "unshare", "nsenter")
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "sh", "-c", "echo; exec sleep 1000"],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        with holder.stdout:
            holder.stdout.readline()  # its user is mapped
        inside = ("nsenter", "--user", f"--target={holder.pid}")
        yield from _open_world(victims_folder, User(os.getuid(), inside, inside))
    finally:
        holder.kill()
        holder.wait()
