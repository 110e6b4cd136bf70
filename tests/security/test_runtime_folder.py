"""The runtime folder and its files in every state an attacker or a crash may leave (docs/security.md)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from tests import requirements_env
from tests.support.world import World


def _scan(world: World) -> None:
    victims = [world.victim("ksm", 64, 5) for _ in range(2)]
    world.scan(*victims)
    for victim in victims:
        assert victim.merged_pages("memory") >= 63


def _group_writable(world: World) -> None:
    world.folder.chmod(0o770)


def _foreign(world: World) -> None:
    requirements_env.need("root")
    os.chown(world.folder, 65534, -1)


def _symlink(world: World) -> None:
    elsewhere = world.folder.with_name(world.folder.name + "-elsewhere")
    world.folder.rename(elsewhere)
    world.folder.symlink_to(elsewhere)


@pytest.mark.parametrize("spoil", [_group_writable, _foreign, _symlink])
def test_an_unsafe_folder_is_refused(world: World, spoil: Callable[[World], None]) -> None:
    victim = world.victim("ksm", 64, 5)
    spoil(world)
    try:
        result = world.gpuksm("scan", "--pid", victim.pid)
        assert result.code == 7, result
        assert result.err.count("\n") == 1
    finally:
        if world.folder.is_symlink():
            target = world.folder.resolve()
            world.folder.unlink()
            target.rename(world.folder)
        os.chown(world.folder, os.getuid(), -1)
        world.folder.chmod(0o700)
    assert not list(world.folder.iterdir())


def test_a_stale_socket_and_old_locks_do_no_harm(world: World) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(world.folder / "guard.sock"))
    for name in ("lock", "keeper.lock"):
        (world.folder / name).write_text("planted")
    _scan(world)


@pytest.mark.parametrize("name", ["lock", "keeper.lock", "guard.log"])
def test_a_link_in_the_place_of_a_file_is_not_followed(world: World, name: str) -> None:
    """Nothing is written or made where a planted symbolic link points; one line says what is wrong."""
    target = world.folder / "elsewhere"
    (world.folder / name).symlink_to(target)
    victim = world.victim("ksm", 64, 5)
    result = world.gpuksm("scan", "--pid", victim.pid)
    assert not target.exists()
    assert result.code == 7, result
    assert result.err.count("\n") == 1
    victim.verify()


def test_the_files_are_for_their_owner_only(world: World) -> None:
    _scan(world)
    modes = {path.name: path.stat().st_mode & 0o777 for path in world.folder.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_a_peer_of_another_user_is_hung_up_on(world: World, user_world: World) -> None:
    """Even where both the folder and the socket would let it pass, it gets no answer."""
    _scan(world)
    script = (
        "import socket, sys\nfrom gpuksm import wire\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.settimeout(10)\n"
        "try:\n    sock.connect(sys.argv[1])\n"
        "    wire.send(sock, {'op': 'status'})\n    wire.receive(sock)\n    answered = 1\n"
        "except (ConnectionError, wire.WireError):\n    answered = 0\n"
        "print('READY answered=%d' % answered, flush=True)\n"
    )
    world.folder.chmod(0o711)
    (world.folder / "guard.sock").chmod(0o666)
    assert user_world.python(script, world.folder / "guard.sock").values["answered"] == "0"
    world.folder.chmod(0o700)
