"""Where things lie in this kernel's own structures, as it says itself.

Source: Documentation/bpf/btf.rst; /sys/kernel/btf/vmlinux, Linux 5.4 and newer with CONFIG_DEBUG_INFO_BTF,
readable by everybody.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from gpuksm.errors import FeatureMissing

PATH = Path("/sys/kernel/btf/vmlinux")

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_STRUCT, _UNION, _ENUM = 4, 5, 6
_MODIFIERS = (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag
# What follows a type's three words, in words: some, and some for each of its members.
_WORDS, _WORDS_EACH = array("I", bytes(4 * 32)), array("I", bytes(4 * 32))
for _kind in (1, 14, 17):  # int, variable, declaration tag
    _WORDS[_kind] = 1
_WORDS[3] = 3  # array
for _kind in (6, 13):  # enum, function prototype
    _WORDS_EACH[_kind] = 2
for _kind in (4, 5, 15, 19):  # struct, union, data section, enum of 64 bits
    _WORDS_EACH[_kind] = 3


class Btf:
    """The types of the running kernel.  FeatureMissing where it tells of none, or not of one asked for."""

    def __init__(self, path: Path = PATH) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FeatureMissing(
                f"the kernel does not describe its types ({path}: {error.strerror})"
            ) from None
        if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != _MAGIC:
            raise FeatureMissing(f"{path} is no BTF")
        _, _, _, header, types, type_bytes, strings, string_bytes = _HEADER.unpack_from(data)
        self._strings = data[header + strings : header + strings + string_bytes]
        self._words = array("I")
        self._words.frombytes(data[header + types : header + types + type_bytes])
        # Where each type begins, by its number (0 is void), as far as that was asked for.
        self._at, self._end = array("I", [0]), 0

    def size(self, name: str) -> int:
        """Bytes of `struct name`."""
        return self._words[self._find(name) + 2]

    def offset(self, name: str, *members: str) -> int:
        """Bytes from the start of `struct name` to its member, to a member of that, and so on."""
        at, offset = self._find(name), 0
        for member in members:
            found = self._member(at, member)
            if found is None:
                raise FeatureMissing(f"this kernel's struct {name} has no {member}")
            offset, at = offset + found[0], self._type(found[1])
        return offset

    def enumerator(self, name: str) -> int:
        """The value of an enumerator, 32 bits."""
        wanted, words = self._name(name), self._words
        for at in self._types():
            info = words[at + 1]
            if info >> 24 & 31 == _ENUM:
                for item in range(at + 3, at + 3 + 2 * (info & 0xFFFF), 2):
                    if words[item] == wanted:
                        return words[item + 1]
        raise FeatureMissing(f"this kernel has no {name}")

    def _name(self, name: str) -> int:
        at = self._strings.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            raise FeatureMissing(f"this kernel has no {name}")
        return at + 1

    def _types(self) -> Iterator[int]:
        """Where the types begin, from the first on."""
        words, number = self._words, 1
        while number < len(self._at) or self._end < len(words):
            if number == len(self._at):
                self._at.append(self._end)
                info = words[self._end + 1]
                kind = info >> 24 & 31
                self._end += 3 + _WORDS[kind] + _WORDS_EACH[kind] * (info & 0xFFFF)
            yield self._at[number]
            number += 1

    def _type(self, number: int) -> int:
        """Where a type begins."""
        if number >= len(self._at):
            next(itertools.islice(self._types(), number - 1, None), None)
        return self._at[number]

    def _find(self, name: str) -> int:
        """Where `struct name` begins."""
        wanted, words = self._name(name), self._words
        for at in self._types():
            if words[at] == wanted and words[at + 1] >> 24 & 31 == _STRUCT:
                return at
        raise FeatureMissing(f"this kernel has no struct {name}")

    def _member(self, at: int, name: str) -> tuple[int, int] | None:
        """(offset, type's number) of a member of the type that begins at `at`, or of a nameless member."""
        words = self._words
        while words[at + 1] >> 24 & 31 in _MODIFIERS:
            at = self._type(words[at + 2])
        info = words[at + 1]
        if info >> 24 & 31 not in (_STRUCT, _UNION):
            return None
        for item in range(at + 3, at + 3 + 3 * (info & 0xFFFF), 3):
            bits = words[item + 2] & 0xFFFFFF if info >> 31 else words[item + 2]
            called = self._strings[words[item] : self._strings.index(b"\0", words[item])].decode()
            if called == name:
                return bits // 8, words[item + 1]
            inner = None if called else self._member(self._type(words[item + 1]), name)
            if inner is not None:
                return bits // 8 + inner[0], inner[1]
        return None
