"""Object files of a compiler are made executable, or refused: never half."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.linux import objects, vm
from gpuksm.linux.native import function_at, processor
from tests import requirements_env

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64 alone")

# Constants in two places, a call to a function of its own, and one to the C library's.
_SOURCE = """
#include <string.h>
static const double scale[4] = {0.5, 2, 8, 32};
__attribute__((noinline)) static int twice(int number) { return 2 * number; }
int scaled(long number, long at) { return (int)(number * scale[at]) + twice((int)number); }
int filled(char *memory, long byte, long size) { memset(memory, (int)byte, size); return 7; }
"""
_SETTINGS = (["-mcmodel=large", "-fno-pic"], ["-mcmodel=small", "-fno-pic"], ["-fpic", "-fvisibility=hidden"])


def _object(folder: Path, source: str, *options: str) -> bytes:
    requirements_env.need("gcc")
    (folder / "code.c").write_text(source)
    command = ["gcc", "-O2", "-c", "-fno-builtin", *options, "-o", "code.o", "code.c"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return (folder / "code.o").read_bytes()


@pytest.mark.parametrize("options", _SETTINGS, ids=" ".join)
def test_functions_run_or_are_refused(tmp_path: Path, options: list[str]) -> None:
    code = _object(tmp_path, _SOURCE, *options)
    try:
        scaled = function_at(objects.load(code, "scaled"), "ii")
    except objects.Unlinkable:
        # Code that must lie within 2 GiB of the C library, or finds it by a table of addresses.
        assert "large" not in " ".join(options)
        return
    assert scaled(10, 3) == 340
    assert scaled(10, 0) == 25


def test_the_c_library_is_called(tmp_path: Path) -> None:
    filled = function_at(objects.load(_object(tmp_path, _SOURCE, *_SETTINGS[0]), "filled"), "pii")
    memory = bytearray(100)
    assert filled(vm.address_of(memory), 9, 60) == 7
    assert memory == bytes([9]) * 60 + bytes(40)


@pytest.mark.parametrize(
    "source",
    [
        "int abort(void); int scaled(long a, long b) { return abort(); }",
        "int counter; int scaled(long a, long b) { return ++counter; }",
        "int other(void) { return 1; }",
    ],
    ids=["a function that is not there", "a variable", "no such function"],
)
def test_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(objects.Unlinkable):
        objects.load(_object(tmp_path, source, *_SETTINGS[0]), "scaled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _object(tmp_path_factory.mktemp("whole"), _SOURCE, *_SETTINGS[0])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_loaded_but_never_run(whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert objects.load(bytes(damaged), "scaled") > 0
    except objects.Unlinkable:
        return


def test_sections_beyond_what_an_address_can_be_are_damage(whole: bytes) -> None:
    """Offset 40 of the header is where the table of sections begins, 8 bytes."""
    damaged = bytearray(whole)
    damaged[47] = 128
    with pytest.raises(objects.Unlinkable, match="damaged"):
        objects.load(bytes(damaged), "scaled")


def test_the_processor_is_told() -> None:
    assert "flags:" in processor()
    assert processor() == processor()
