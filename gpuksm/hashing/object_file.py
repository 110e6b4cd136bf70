"""Placing the object code of a kernel in memory: the few relocations that numba's code needs.

Numba compiles with the large code model, so that all that is left to do for one of
our kernels is to write absolute addresses of constants, of other functions in the
same file, and of memcpy and its like.  Loading LLVM for that takes 20 ms in each
command.  Whatever else a file holds is LLVM's to place: the answer is None then.
(ELF-64 and its x86-64 supplement.)
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from gpuksm.linux import native

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_X86_64 = 62
_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_ALLOC, _WRITE = 2, 1
_UNDEFINED, _SPECIAL = 0, 0xFF00
_R_X86_64_64 = 1
_HEADER = struct.Struct("<16xHH4x8x8xQ4xH4xHHH")  # type, machine, sections at; size, section entries, ...
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    at: int
    size: int
    link: int
    info: int
    align: int
    entry: int


def place(code: bytes, symbol: str) -> int | None:
    """Address of the function `symbol` of the object file `code`, or None where LLVM has to do it."""
    if not code.startswith(_MAGIC):
        return None
    _, machine, sections_at, _, entry_size, count, _ = _HEADER.unpack_from(code)
    if machine != _X86_64 or entry_size != _SECTION.size:
        return None
    sections = [
        _Section(*_SECTION.unpack_from(code, sections_at + number * entry_size)) for number in range(count)
    ]
    places: dict[int, int] = {}
    image = bytearray()
    for number, section in enumerate(sections):
        if not section.flags & _ALLOC or not section.size:
            continue
        if section.flags & _WRITE:
            return None
        if section.kind != _PROGBITS:
            continue  # how to unwind: nothing here is ever unwound through
        image += bytes(-len(image) % max(1, section.align))
        places[number] = len(image)
        image += code[section.at : section.at + section.size]
    try:
        memory = native.Executable(max(1, len(image)))
        symbols = _symbols(code, sections, {number: memory.address + at for number, at in places.items()})
        if not _relocate(code, sections, places, symbols, image):
            return None
        memory.fill(image)
    except OSError:  # no memory of ours may be executed here; LLVM may know a way
        return None
    return next((address for name, address in symbols if name == symbol), None)


def _symbols(code: bytes, sections: list[_Section], places: dict[int, int]) -> list[tuple[str, int | None]]:
    """(name, address, None where it is in nothing that was placed) of every symbol."""
    table = next((section for section in sections if section.kind == _SYMTAB), None)
    if table is None:
        return []
    names = sections[table.link]
    found: list[tuple[str, int | None]] = []
    for at in range(table.at, table.at + table.size, _SYMBOL.size):
        name_at, _, _, section, value, _ = _SYMBOL.unpack_from(code, at)
        begin = names.at + name_at
        name = code[begin : code.index(b"\0", begin)].decode()
        if section == _UNDEFINED:
            found.append((name, native.libc_function(name) if name else None))
        elif section < _SPECIAL and section in places:
            found.append((name, places[section] + value))
        else:
            found.append((name, None))
    return found


def _relocate(
    code: bytes,
    sections: list[_Section],
    places: dict[int, int],
    symbols: list[tuple[str, int | None]],
    image: bytearray,
) -> bool:
    """Write addresses into `image`; False for a relocation that is not known here."""
    for section in sections:
        if section.kind != _RELA or section.info not in places:
            continue
        for at in range(section.at, section.at + section.size, _RELOCATION.size):
            offset, info, addend = _RELOCATION.unpack_from(code, at)
            _, address = symbols[info >> 32]
            if info & 0xFFFFFFFF != _R_X86_64_64 or address is None:
                return False
            struct.pack_into("<Q", image, places[section.info] + offset, address + addend)
    return True
