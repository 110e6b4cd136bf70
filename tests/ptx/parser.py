"""PTX text to kernels of decoded instructions; anything unexpected raises PtxError."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.errors import PtxError

REGISTER_BYTES = {"pred": 1, "b16": 2, "b32": 4, "b64": 8}


@dataclass(frozen=True)
class Register:
    """A register; `kind` is its declared type (pred, b16, b32, b64)."""

    name: str
    kind: str


@dataclass(frozen=True)
class Special:
    """A read-only special register, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer constant."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or the name of a parameter or label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """{a, b}, or the two destinations a|b."""

    first: Register
    second: Register


Operand = Register | Special | Immediate | Symbol | Address | Pair


@dataclass(frozen=True)
class Instruction:
    """One instruction: optional guard predicate, dotted opcode, operands, its text for messages."""

    guard: Register | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


@dataclass
class Kernel:
    """An entry: parameters as (name, type), instructions, labels, shared variables as (offset, bytes)."""

    name: str
    parameters: list[tuple[str, str]]
    max_threads: int | None = None
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared_bytes: int = 0

    @property
    def has_barriers(self) -> bool:
        return any(one.opcode[0] in ("bar", "barrier") for one in self.instructions)


@dataclass
class Module:
    """A translation unit: target, kernels by name, initialised global variables by name."""

    target: str
    kernels: dict[str, Kernel]
    globals: dict[str, np.ndarray]


def parse(text: str) -> Module:
    """Parse a PTX file as NVRTC or nvcc writes it."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    target = re.search(r"\.target\s+(\w+)", text)
    size = re.search(r"\.address_size\s+(\d+)", text)
    if target is None or size is None or size[1] != "64":
        raise PtxError("not a 64-bit PTX module")
    kernels = {}
    rest = text
    for entry in re.finditer(
        r"(?:\.visible\s+)?\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{(.*?)^\}", text, re.S | re.M
    ):
        name, parameters, directives, body = entry.groups()
        kernels[name] = _kernel(name, parameters, directives, body)
        rest = rest.replace(entry[0], "")
    if ".entry" in rest or ".func" in rest:
        raise PtxError("the module has functions that could not be read")
    return Module(target[1], kernels, _globals(rest))


def _globals(text: str) -> dict[str, np.ndarray]:
    found = {}
    pattern = r"\.(global|const)\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\](?:\s*=\s*\{([^}]*)\})?\s*;"
    for _space, name, size, values in re.findall(pattern, text):
        octets = np.zeros(int(size), np.uint8)
        given = [int(value, 0) for value in values.split(",")] if values else []
        octets[: len(given)] = given
        found[name] = octets
    left = re.sub(pattern, "", text)
    if re.search(r"\.(global|const|shared)\b", left):
        raise PtxError(f"variables that could not be read: {left.strip()[:200]}")
    return found


def _kernel(name: str, parameters: str, directives: str, body: str) -> Kernel:
    listed = [
        re.fullmatch(r"\.param\s+\.(\w+)(?:\s+\.ptr[\s.\w]*?)?\s+(\w+)", one.strip())
        for one in parameters.split(",")
        if one.strip()
    ]
    if None in listed:
        raise PtxError(f"{name}: parameters that could not be read: {parameters}")
    kernel = Kernel(name, [(one[2], one[1]) for one in listed if one is not None])
    limit = re.search(r"\.maxntid\s+(\d+)", directives)
    kernel.max_threads = int(limit[1]) if limit else None
    registers: dict[str, str] = {}
    for statement in re.findall(r"[^;:{}]*(?:\{[^}]*\}[^;:{}]*)*[;:]", body):
        text = " ".join(statement.split())
        if text.endswith(":"):
            kernel.labels[text[:-1].strip()] = len(kernel.instructions)
        elif text.startswith(".reg"):
            _declare_registers(text, registers)
        elif text.startswith(".shared"):
            _declare_shared(kernel, text)
        elif text.startswith(".pragma"):
            continue
        elif text.startswith("."):
            raise PtxError(f"{name}: unknown directive: {text}")
        else:
            kernel.instructions.append(_instruction(text[:-1].strip(), registers))
    return kernel


def _declare_registers(text: str, registers: dict[str, str]) -> None:
    match = re.fullmatch(r"\.reg \.(\w+) ?(%\w+)<(\d+)>;", text)
    if match is None or match[1] not in REGISTER_BYTES:
        raise PtxError(f"unknown register declaration: {text}")
    for number in range(int(match[3])):
        registers[f"{match[2]}{number}"] = match[1]


def _declare_shared(kernel: Kernel, text: str) -> None:
    match = re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", text)
    if match is None:
        raise PtxError(f"unknown shared declaration: {text}")
    align, size = int(match[1]), int(match[3])
    start = -(-kernel.shared_bytes // align) * align
    kernel.shared[match[2]] = (start, size)
    # A gap behind each variable, so that running over its end is out of bounds.
    kernel.shared_bytes = start + size + 64


def _instruction(text: str, registers: dict[str, str]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if match is None:
        raise PtxError(f"cannot be read: {text}")
    operands = re.split(r",\s*(?![^{\[]*[}\]])", match[4]) if match[4] else []
    guard = _operand(match[2], registers) if match[2] else None
    if guard is not None and not isinstance(guard, Register):
        raise PtxError(f"guard is no register: {text}")
    decoded = tuple(_operand(operand.strip(), registers) for operand in operands)
    return Instruction(guard, match[1] == "!", tuple(match[3].split(".")), decoded, text)


def _operand(text: str, registers: dict[str, str]) -> Operand:
    if text in registers:
        return Register(text, registers[text])
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    pair = re.fullmatch(r"\{\s*(%\w+)\s*,\s*(%\w+)\s*\}", text) or re.fullmatch(r"(%\w+)\|(%\w+)", text)
    if pair is not None:
        first, second = _operand(pair[1], registers), _operand(pair[2], registers)
        if isinstance(first, Register) and isinstance(second, Register):
            return Pair(first, second)
    address = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    if address is not None:
        base = _operand(address[1], registers)
        if isinstance(base, Register | Symbol | Immediate):
            return Address(base, int(address[2] or 0))
    if re.fullmatch(r"%[a-z]\w*(\.[xyz])?", text):
        return Special(text)
    if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
        return Symbol(text)
    raise PtxError(f"unknown operand: {text}")
