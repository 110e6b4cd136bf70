"""What the kernel says of its own structures."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from gpuksm.errors import FeatureMissing
from gpuksm.linux.btf import PATH, Btf
from tests import requirements_env


@pytest.fixture(scope="module")
def kernel() -> Btf:
    requirements_env.need("btf")
    return Btf()


def test_structures_of_the_system_calls(kernel: Btf) -> None:
    """Their layout is known from elsewhere: include/uapi/linux/uio.h, <time.h>."""
    assert kernel.size("iovec") == 16
    assert [kernel.offset("iovec", name) for name in ("iov_base", "iov_len")] == [0, 8]
    assert kernel.offset("pollfd", "revents") == 6


def test_nameless_members_and_members_of_members(kernel: Btf) -> None:
    assert kernel.offset("page", "_refcount") == kernel.offset("folio", "_refcount")
    assert kernel.offset("address_space", "i_pages", "xa_head") == kernel.offset(
        "address_space", "i_pages"
    ) + kernel.offset("xarray", "xa_head")


def test_enumerators(kernel: Btf) -> None:
    assert kernel.enumerator("PG_locked") == 0
    assert kernel.enumerator("BPF_PROG_TYPE_SYSCALL") == 31


@pytest.mark.parametrize(
    "ask",
    [
        lambda kernel: kernel.size("no such struct"),
        lambda kernel: kernel.offset("iovec", "iov_nothing"),
        lambda kernel: kernel.offset("iovec", "iov_len", "deeper"),
        lambda kernel: kernel.offset("iov_len"),
        lambda kernel: kernel.enumerator("iov_len"),
        lambda kernel: kernel.enumerator("NO_SUCH_ENUMERATOR"),
    ],
)
def test_what_is_not_there(kernel: Btf, ask) -> None:
    with pytest.raises(FeatureMissing, match="kernel"):
        ask(kernel)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FeatureMissing, match="does not describe its types"):
        Btf(tmp_path / "missing")
    for content in (b"", b"\x9f\xeb", struct.pack("<H", 0x1234) + bytes(100)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(FeatureMissing, match="no BTF"):
            Btf(tmp_path / "other")


def test_everybody_may_read_it() -> None:
    requirements_env.need("btf")
    assert PATH.stat().st_mode & 0o444 == 0o444
