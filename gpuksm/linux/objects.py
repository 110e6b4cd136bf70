"""Makes the functions of an ELF object file executable, as a linker would; x86-64.

Just what compilers leave in object files of functions that stand alone: code and constants, absolute and
relative relocations (System V ABI, AMD64 supplement, 4.4.1) between these and to memcpy and its like in the C
library.  Anything else raises `Unlinkable`.  What is loaded stays as long as the process.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from typing import NamedTuple

from gpuksm.linux._libc import PAGE_SIZE, function

FROM_LIBC = frozenset({"memcpy", "memmove", "memset", "memcmp"})

_MACHINE_X86_64, _RELOCATABLE = 62, 1
_SYMTAB, _RELA, _NOBITS = 2, 4, 8  # sh_type
_WRITE, _ALLOC = 1, 2  # sh_flags
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")

# What is written for each relocation: S + A, or S + A - P.
_WRITTEN: dict[int, tuple[str, bool]] = {1: ("<Q", False), 2: ("<i", True), 4: ("<i", True), 24: ("<q", True)}

_mprotect = function("mprotect", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_loaded: list[mmap.mmap] = []  # own the code


class Unlinkable(Exception):
    """The object file needs more than this linker does."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry: int


class _Symbol(NamedTuple):
    """`address` None: not in what was loaded; `section` 0 then means somewhere else altogether."""

    name: str
    address: int | None
    section: int


def load(code: bytes, symbol: str) -> int:
    """Address of the function `symbol` of the object file `code`, made executable; Unlinkable."""
    try:
        return _load(code, symbol)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise Unlinkable(f"a damaged object file: {error}") from None


def _load(code: bytes, symbol: str) -> int:
    sections, name_of = _sections(code)
    kept = {
        index: section
        for index, section in enumerate(sections)
        if section.flags & _ALLOC and section.size and name_of(section.name) != ".eh_frame"
    }
    places, size = {}, 0
    for index, section in kept.items():
        size = -(-size // max(1, section.alignment)) * max(1, section.alignment)
        places[index] = size
        size += section.size
    if not 0 < size <= len(code):
        raise Unlinkable("no code, or more than the file has")
    size = -(-size // PAGE_SIZE) * PAGE_SIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for index, section in kept.items():
        if section.kind == _NOBITS or section.flags & _WRITE or section.alignment > PAGE_SIZE:
            raise Unlinkable("variables, or an alignment of more than a page")
        memory[places[index] : places[index] + section.size] = code[section.offset :][: section.size]

    (table,) = [section for section in sections if section.kind == _SYMTAB]
    names = sections[table.link]
    symbols: list[_Symbol] = []
    for name, _, _, where, value, _ in _each(_SYMBOL, code, table):
        address = base + places[where] + value if where in places else None
        symbols.append(_Symbol(_text(code, names.offset + name), address, where))
    for section in sections:
        if section.kind == _RELA and section.info in kept:
            for offset, info, addend in _each(_RELOCATION, code, section):
                at, kind = places[section.info] + offset, info & 0xFFFFFFFF
                _relocate(memory, at, base, kind, symbols[info >> 32], addend)
    _mprotect(base, size, mmap.PROT_READ | mmap.PROT_EXEC)
    _loaded.append(memory)
    for found in symbols:
        if found.name == symbol and found.address is not None:
            return found.address
    raise Unlinkable(f"no {symbol} in the object file")


def _relocate(memory: mmap.mmap, at: int, base: int, kind: int, symbol: _Symbol, addend: int) -> None:
    name, address, where = symbol
    if kind not in _WRITTEN:
        raise Unlinkable(f"relocation {kind}")
    if address is None:
        if where or name not in FROM_LIBC:
            raise Unlinkable(f"{name or 'something'} is not in the object file")
        address = ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
    form, relative = _WRITTEN[kind]
    struct.pack_into(form, memory, at, address + addend - (base + at if relative else 0))


def _sections(code: bytes) -> tuple[list[_Section], Callable[[int], str]]:
    """The sections of the file, and what turns their names, numbers in the file, into text."""
    ident, kind, machine, _, _, _, start, _, _, _, _, size, count, strings = _HEADER.unpack_from(code)
    if ident[:6] != b"\x7fELF\x02\x01" or kind != _RELOCATABLE or machine != _MACHINE_X86_64:
        raise Unlinkable("no object file for x86-64")
    if size != _SECTION.size:
        raise Unlinkable("sections of another size")
    sections = [_Section(*_SECTION.unpack_from(code, start + index * size)) for index in range(count)]
    names = sections[strings]
    return sections, lambda name: _text(code, names.offset + name)


def _each(record: struct.Struct, code: bytes, section: _Section) -> list[tuple[int, ...]]:
    whole = code[section.offset : section.offset + section.size]
    return list(record.iter_unpack(whole))


def _text(code: bytes, at: int) -> str:
    return code[at : code.index(b"\0", at)].decode()
