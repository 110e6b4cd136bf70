"""Runs a kernel: warps over numpy, minimum-PC reconvergence, barriers, shuffles.

Threads are grouped into units that run one after the other until each waits at
a barrier or has ended.  A kernel without barriers is one unit of many blocks; a
kernel with barriers has one unit for each warp number, so that a missing
barrier shows: one warp runs far ahead of the next, in either order, and shared
memory also tracks who touched what between barriers.  All lanes of a unit that
are at one instruction execute it in one numpy call.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.ptx import operations
from tests.ptx.errors import PtxError
from tests.ptx.memory import GlobalMemory, SharedMemory, every, some
from tests.ptx.parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Operand,
    Pair,
    Register,
    Special,
    Symbol,
)

WARP = 32
LANES_AT_ONCE = 1 << 16
Mask = NDArray[np.bool_]
Step = Callable[["Unit", Mask], None]


class Unit:
    """Threads that run together: registers, where each group of lanes is, who waits at which barrier."""

    def __init__(
        self,
        block: NDArray[np.int64],
        tid: NDArray[np.int64],
        grid: int,
        block_threads: int,
        rows: NDArray[np.int64],
    ) -> None:
        self.size = block.size
        self.rows = rows  # row of shared memory of each lane's block
        self.threads = block * block_threads + tid
        self.registers: dict[str, NDArray[np.generic]] = {}
        self.partly: dict[str, Mask] = {}  # lanes in which a register holds a value, where not in all
        self.full = True  # whether the instruction at hand is executed by all lanes
        self.groups: dict[int, Mask] = {0: np.ones(self.size, np.bool_)}
        self.waiting: dict[int, Mask] = {}
        self.specials = {
            "%tid.x": tid.astype(np.uint32),
            "%ctaid.x": block.astype(np.uint32),
            "%ntid.x": np.full(self.size, block_threads, np.uint32),
            "%nctaid.x": np.full(self.size, grid, np.uint32),
            "%laneid": (tid % WARP).astype(np.uint32),
        }

    def whole_warps(self, mask: Mask) -> bool:
        """True when no warp has only some of its lanes in `mask`."""
        warps = mask.reshape(-1, WARP)
        return bool((warps.all(1) | ~warps.any(1)).all())


class Machine:
    """One module over one memory; `executed` counts instructions by opcode, once for all lanes of a group."""

    def __init__(self, module: Module, memory: GlobalMemory | None = None) -> None:
        self.memory = GlobalMemory() if memory is None else memory
        self.kernels = module.kernels
        self.symbols = {name: self.memory.place(octets, False) for name, octets in module.globals.items()}
        self.executed: Counter[str] = Counter()
        self._programs: dict[str, Program] = {}

    def launch(
        self, name: str, grid: int, block: int, arguments: Sequence[int], reverse: bool = False
    ) -> None:
        """Run `grid` blocks of `block` threads; `reverse` lets the highest warp run first."""
        kernel = self.kernels.get(name)
        if kernel is None:
            raise PtxError(f"no kernel {name}")
        if (
            grid < 1
            or block < 1
            or block % WARP
            or (kernel.max_threads is not None and block > kernel.max_threads)
        ):
            raise PtxError(f"{name}: cannot launch {grid} x {block}")
        if len(arguments) != len(kernel.parameters):
            raise PtxError(f"{name} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
        values = {}
        for (parameter, kind), value in zip(kernel.parameters, arguments, strict=True):
            width = operations.unsigned(kind)
            if not 0 <= int(value) < 1 << (8 * width.itemsize):
                raise PtxError(f"{name}: {value} does not fit .{kind}")
            values[parameter] = width.type(int(value))
        if name not in self._programs:
            self._programs[name] = Program(kernel, self)
        program = self._programs[name]
        self.memory.begin_launch()
        at_once = max(1, LANES_AT_ONCE // block)
        for first in range(0, grid, at_once):
            program.run(np.arange(first, min(grid, first + at_once)), grid, block, values, reverse)


class Program:
    """A kernel whose instructions have become Python functions."""

    def __init__(self, kernel: Kernel, machine: Machine) -> None:
        self.kernel, self.machine = kernel, machine
        self.parameters: dict[str, np.generic] = {}
        self.shared: SharedMemory | None = None
        self.steps: list[Step | None] = [
            None if one.opcode[0] in ("bra", "ret", "exit", "bar") else self._step(one)
            for one in kernel.instructions
        ]
        self.names = [".".join(one.opcode) for one in kernel.instructions]
        for one in kernel.instructions:
            if one.opcode[0] == "bar" and (
                one.opcode != ("bar", "sync") or one.operands != (Immediate(0),) or one.guard
            ):
                raise PtxError(f"unknown barrier: {one.text}")

    def run(
        self,
        blocks: NDArray[np.int64],
        grid: int,
        block: int,
        parameters: dict[str, np.generic],
        reverse: bool,
    ) -> None:
        """Run these blocks to their end."""
        self.parameters = parameters
        rows = np.arange(blocks.size)
        self.shared = SharedMemory(blocks.size, self.kernel.shared_bytes, self.kernel.shared)
        width = WARP if self.kernel.has_barriers else block
        units = []
        for start in range(0, block, width):
            tid = np.tile(np.arange(start, start + width), blocks.size)
            units.append(Unit(np.repeat(blocks, width), tid, grid, block, np.repeat(rows, width)))
        if reverse:
            units.reverse()
        while any(unit.groups for unit in units):
            for unit in units:
                self._run_unit(unit)
            self._release(units, blocks.size)

    def _run_unit(self, unit: Unit) -> None:
        while unit.groups:
            at = min(unit.groups)
            mask = unit.groups.pop(at)
            unit.full = every(mask)
            while True:
                if at in unit.groups:
                    mask = mask | unit.groups.pop(at)
                    unit.full = every(mask)
                if at >= len(self.steps):
                    raise PtxError(f"{self.kernel.name} runs over its end")
                instruction = self.kernel.instructions[at]
                self.machine.executed[self.names[at]] += 1
                step = self.steps[at]
                if step is None:
                    self._control(unit, instruction, at, mask)
                    break
                try:
                    step(unit, mask)
                except PtxError as error:
                    raise PtxError(f"{self.kernel.name}: {instruction.text}: {error}") from None
                at += 1

    def _control(self, unit: Unit, instruction: Instruction, at: int, mask: Mask) -> None:
        """Branch, end, or wait; puts the lanes into their new groups."""
        kind = instruction.opcode[0]
        if kind == "bar":
            if not unit.whole_warps(mask):
                raise PtxError(f"{self.kernel.name}: barrier in a divergent warp")
            unit.waiting[at] = unit.waiting[at] | mask if at in unit.waiting else mask
            return
        taken = mask
        if instruction.guard is not None:
            taken = mask & (self._register(unit, instruction.guard, mask) != instruction.negated)
        stay = mask & ~taken
        places = [(at + 1, stay)]
        if kind == "bra":
            target = instruction.operands[0]
            if not isinstance(target, Symbol) or target.name not in self.kernel.labels:
                raise PtxError(f"unknown branch: {instruction.text}")
            if (
                "uni" in instruction.opcode
                and (taken.reshape(-1, WARP).any(1) & stay.reshape(-1, WARP).any(1)).any()
            ):
                raise PtxError(f"bra.uni that diverges: {instruction.text}")
            places.append((self.kernel.labels[target.name], taken))
        for place, lanes in places:
            if some(lanes):
                unit.groups[place] = unit.groups[place] | lanes if place in unit.groups else lanes

    def _release(self, units: Sequence[Unit], blocks: int) -> None:
        """Let blocks go on whose threads have all arrived; a block of which only some have never can."""
        if not any(unit.waiting for unit in units):
            return
        assert self.shared is not None
        places = {at for unit in units for at in unit.waiting}
        arrived = {at: np.zeros(blocks, np.int64) for at in places}
        threads = np.zeros(blocks, np.int64)
        for unit in units:
            threads += np.bincount(unit.rows, minlength=blocks)
            for at, mask in unit.waiting.items():
                arrived[at] += np.bincount(unit.rows[mask], minlength=blocks)
        for at in places:
            if some((arrived[at] != 0) & (arrived[at] != threads)):
                raise PtxError(f"{self.kernel.name}: only some threads of a block reach a barrier")
            self.shared.barrier(arrived[at] != 0)
        for unit in units:
            for at, mask in unit.waiting.items():
                unit.groups[at + 1] = mask
            unit.waiting = {}

    # What follows turns instructions into functions.

    def _step(self, one: Instruction) -> Step:
        kind = one.opcode[0]
        if kind in ("ld", "st"):
            step = self._memory_step(one)
        elif kind in ("shfl", "vote"):
            step = self._exchange_step(one)
        elif kind == "mov" and any(isinstance(operand, Pair) for operand in one.operands):
            step = self._pair_step(one)
        else:
            step = self._arithmetic_step(one)
        if one.guard is None:
            return step
        guard, negated = one.guard, one.negated

        def guarded(unit: Unit, mask: Mask) -> None:
            mask = mask & (self._register(unit, guard, mask) != negated)
            outer, unit.full = unit.full, every(mask)
            if some(mask):
                step(unit, mask)
            unit.full = outer

        return guarded

    def _arithmetic_step(self, one: Instruction) -> Step:
        operation = operations.compile_operation(one.opcode)
        target, *sources = one.operands
        if not isinstance(target, Register) or len(sources) != len(operation.sources):
            raise PtxError(f"unknown form: {one.text}")
        relaxed = one.opcode[0] == "cvt"
        readers = [
            self._reader(source, dtype, relaxed)
            for source, dtype in zip(sources, operation.sources, strict=True)
        ]
        if relaxed and _width(target).itemsize < operations.unsigned(one.opcode[1]).itemsize:
            raise PtxError(f"{target.name} is too narrow: {one.text}")

        def step(unit: Unit, mask: Mask) -> None:
            value = operation.compute(*(read(unit, mask) for read in readers))
            self._set(unit, target, value.astype(_width(target)) if relaxed else value, mask)

        return step

    def _pair_step(self, one: Instruction) -> Step:
        """mov.b64 between a 64-bit register and a pair of 32-bit ones."""
        target, source = one.operands
        if one.opcode != ("mov", "b64"):
            raise PtxError(f"unknown form: {one.text}")
        half = np.uint64(32)
        if isinstance(target, Pair):
            read = self._reader(source, np.dtype(np.uint64))
            low, high = target.first, target.second

            def split(unit: Unit, mask: Mask) -> None:
                value = read(unit, mask)
                self._set(unit, low, value.astype(np.uint32), mask)
                self._set(unit, high, (value >> half).astype(np.uint32), mask)

            return split
        if not isinstance(target, Register) or not isinstance(source, Pair):
            raise PtxError(f"unknown form: {one.text}")
        word = np.dtype(np.uint32)
        read_low, read_high = self._reader(source.first, word), self._reader(source.second, word)

        def join(unit: Unit, mask: Mask) -> None:
            value = read_low(unit, mask).astype(np.uint64) | read_high(unit, mask).astype(np.uint64) << half
            self._set(unit, target, value, mask)

        return join

    def _exchange_step(self, one: Instruction) -> Step:
        full = Immediate(-1), Immediate(0xFFFFFFFF)
        word = np.dtype(np.uint32)
        if one.opcode == ("shfl", "sync", "bfly", "b32"):
            target, source, lanes, clamp, members = one.operands
            read, read_lanes = self._reader(source, word), self._reader(lanes, word)
            read_clamp = self._reader(clamp, word)
            value_to = target.first if isinstance(target, Pair) else target
            inside_to = target.second if isinstance(target, Pair) else None
        elif one.opcode == ("vote", "sync", "ballot", "b32"):
            value_to, source, members = one.operands
            read, inside_to = self._reader(source, np.dtype(np.bool_)), None
        else:
            raise PtxError(f"unknown instruction {one.text}")
        if not isinstance(value_to, Register):
            raise PtxError(f"unknown form: {one.text}")
        destination, read_members = value_to, self._reader(members, word)
        shuffle = one.opcode[0] == "shfl"

        def step(unit: Unit, mask: Mask) -> None:
            if some(read_members(unit, mask)[mask] != word.type(full[1].value)):
                raise PtxError("not every lane is a member")
            if not unit.full and not unit.whole_warps(mask):
                raise PtxError("lanes of a warp are missing")
            rows = read(unit, mask).reshape(-1, WARP)
            if not shuffle:
                bits = (rows.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
                self._set(unit, destination, np.repeat(bits, WARP), mask)
                return
            steps = read_lanes(unit, mask)[mask]
            if some(read_clamp(unit, mask)[mask] != 31) or some(steps != steps[0]) or steps[0] >= WARP:
                raise PtxError("only butterflies over the whole warp are known")
            self._set(unit, destination, rows[:, np.arange(WARP) ^ int(steps[0])].reshape(-1), mask)
            if inside_to is not None:
                self._set(unit, inside_to, np.ones(unit.size, np.bool_), mask)

        return step

    def _memory_step(self, one: Instruction) -> Step:
        load = one.opcode[0] == "ld"
        space, kind = one.opcode[1], one.opcode[-1]
        register, address = one.operands if load else one.operands[::-1]
        dtype = operations.unsigned(kind)
        if not isinstance(address, Address) or (load and not isinstance(register, Register)):
            raise PtxError(f"unknown form: {one.text}")
        middle = one.opcode[2:-1]
        if load and space == "param" and not middle:
            return self._parameter_step(register, address, dtype)
        if (
            space not in ("global", "shared")
            or middle not in ((), ("nc",))
            or (middle and (not load or space == "shared"))
        ):
            raise PtxError(f"unknown instruction {one.text}")
        locate = self._address(address, space)

        def step(unit: Unit, mask: Mask) -> None:
            at, threads, rows = locate(unit, mask), unit.threads, unit.rows
            if not unit.full:
                at, threads, rows = at[mask], threads[mask], rows[mask]
            if load and space == "global":
                found = self.machine.memory.load(at, dtype, threads, bool(middle))
            elif load:
                assert self.shared is not None
                found = self.shared.load(rows, at, dtype, threads)
            else:
                values = write(unit, mask)
                values = values if unit.full else values[mask]
                if space == "global":
                    self.machine.memory.store(at, values, threads)
                else:
                    assert self.shared is not None
                    self.shared.store(rows, at, values, threads)
                return
            if unit.full:
                wide = found.astype(_width(register), copy=False)
            else:
                wide = np.zeros(unit.size, _width(register))
                wide[mask] = found
            self._set(unit, register, wide, mask)

        if load:
            if _width(register).itemsize < dtype.itemsize or (kind[0] == "s" and _width(register) != dtype):
                raise PtxError(f"unknown form of load: {one.text}")
        else:
            write = self._reader(register, dtype, relaxed=True)
        return step

    def _parameter_step(self, register: Register, address: Address, dtype: np.dtype) -> Step:
        if not isinstance(address.base, Symbol) or address.offset or _width(register) != dtype:
            raise PtxError("unknown form of ld.param")
        name = address.base.name
        declared = dict(self.kernel.parameters).get(name)
        if declared is None or operations.unsigned(declared) != dtype:
            raise PtxError(f"no parameter {name} of that type")
        return lambda unit, mask: self._set(unit, register, np.full(unit.size, self.parameters[name]), mask)

    def _address(self, address: Address, space: str) -> Callable[[Unit, Mask], NDArray[np.uint64]]:
        base, offset = address.base, np.uint64(address.offset & (1 << 64) - 1)
        width = _width(base) if isinstance(base, Register) else np.dtype(np.uint64)
        read = self._reader(base, width)
        bits = np.uint64(0xFFFFFFFF) if space == "shared" else ~np.uint64(0)
        return lambda unit, mask: read(unit, mask).astype(np.uint64) + offset & bits

    def _reader(
        self, operand: Operand, dtype: np.dtype, relaxed: bool = False
    ) -> Callable[[Unit, Mask], NDArray[np.generic]]:
        """A function that gives the operand's value in every lane, as `dtype`.

        `relaxed`: a wider register gives its low bits, as PTX allows cvt and st.
        """
        if isinstance(operand, Register):
            if relaxed and _width(operand).itemsize > dtype.itemsize:
                return lambda unit, mask: self._register(unit, operand, mask).astype(dtype)
            if _width(operand) != dtype:
                raise PtxError(f"{operand.name} is .{operand.kind}, not {dtype}")
            return lambda unit, mask: self._register(unit, operand, mask)
        if isinstance(operand, Special):
            if dtype != np.uint32:
                raise PtxError(f"{operand.name} is 32 bits wide")
            return lambda unit, mask: self._special(unit, operand)
        if isinstance(operand, Immediate):
            if dtype == np.bool_:
                value: np.generic = np.bool_(operand.value != 0)
            else:
                value = dtype.type(operand.value & (1 << 8 * dtype.itemsize) - 1)
            return lambda unit, mask: np.full(unit.size, value)
        if isinstance(operand, Symbol):
            place = self._place(operand.name)
            return lambda unit, mask: np.full(unit.size, dtype.type(place))
        raise PtxError(f"unknown operand {operand}")

    def _place(self, name: str) -> int:
        if name in self.kernel.shared:
            return self.kernel.shared[name][0]
        if name in self.machine.symbols:
            return self.machine.symbols[name]
        raise PtxError(f"unknown symbol {name}")

    def _special(self, unit: Unit, special: Special) -> NDArray[np.generic]:
        if special.name not in unit.specials:
            raise PtxError(f"unknown special register {special.name}")
        return unit.specials[special.name]

    def _register(self, unit: Unit, register: Register, mask: Mask) -> NDArray[np.generic]:
        name = register.name
        if name not in unit.registers or (name in unit.partly and not every(unit.partly[name][mask])):
            raise PtxError(f"{name} is read before it is written")
        return unit.registers[name]

    def _set(self, unit: Unit, register: Register, value: NDArray[np.generic], mask: Mask) -> None:
        name = register.name
        if value.dtype != _width(register):
            raise PtxError(f"{name} is .{register.kind}, not {value.dtype}")
        if unit.full:
            unit.registers[name] = value
            unit.partly.pop(name, None)
        elif name not in unit.registers:
            unit.registers[name], unit.partly[name] = value, mask
        else:
            # A new array: `mov` may have given the old one to another register.
            unit.registers[name] = np.where(mask, value, unit.registers[name])
            if name in unit.partly:
                unit.partly[name] = unit.partly[name] | mask


@functools.cache
def _width(register: Operand) -> np.dtype:
    if not isinstance(register, Register):
        raise PtxError(f"{register} is no register")
    return operations.unsigned(register.kind)
