"""The root file system that bench/machines.py hands to its machines."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bench import machines


def _members(archive: bytes) -> dict[str, bytes]:
    """Unpacked as the kernel does: Documentation/driver-api/early-userspace/buffer-format.rst."""
    found, at = dict[str, bytes](), 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        start = (at + 110 + length + 3) & ~3
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = archive[start : start + size]
        at = (start + size + 3) & ~3


def test_each_machine_has_the_same_files_and_knows_their_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    contents = {"b.so": b"b" * 700_001, "a.so.1": b"a" * 900_000, "c.so": b"c" * 10}
    for name, content in contents.items():
        (library / name).write_bytes(content)
    (library / "d.so").symlink_to("c.so")
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"\x7fELF")
    monkeypatch.setattr(machines, "LIBRARY", library)
    machines.write_root(tmp_path / "root", busybox, 1, 7)
    found = _members((tmp_path / "root").read_bytes())
    assert found["bin/busybox"] == b"\x7fELF"
    assert b"count=7 " in found["init"]
    files = [found["files/0"], found["files/1"]]
    assert files == [b"a" * 900_000, b"b" * ((1 << 20) - 900_000)]
    assert "files/2" not in found
    sums = [f"{hashlib.sha256(each).hexdigest()}  /files/{number}" for number, each in enumerate(files)]
    assert found["sums"].decode().splitlines() == sums


def test_without_qemu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machines.shutil, "which", lambda _name: None)
    monkeypatch.setattr("sys.argv", ["machines.py", "--kernel", "k", "--busybox", "b"])
    assert machines.main() == machines.UNABLE
    assert capsys.readouterr().err.count("\n") == 1
