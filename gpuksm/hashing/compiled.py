"""Kernels as machine code, without numba where that has compiled them before.

Loading numba and its own cache costs half a second of processor time, more than
many a scan.  So the object code that numba makes of a module of kernels is kept
(`kernel_cache.py`), and later processes make it executable themselves
(`gpuksm.linux.objects`; LLVM's linker does where that cannot) and call it by numba's convention:

    int32 kernel(result *, exception **, arguments...)

where an array is seven arguments: memory information and parent (none here),
number of items, bytes of one, address, shape, stride; and the int32 is 0, or -2
for a result of None, unless something was raised.  The key of what is kept are
the sources in this package, the module's own, and the processor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import platform
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from gpuksm.hashing import kernel_cache
from gpuksm.linux import objects
from gpuksm.linux.native import Cell, function_at, processor

_OK, _NONE = 0, -2
_lock = threading.RLock()  # who needs them while another compiles them waits
_ARRAY = "ppiipii"


def library(module: str) -> Any:
    """The kernels of `module`, by name; compiled now unless an earlier process has done so."""
    with _lock:
        return _library(module)


@functools.cache
def _library(module: str) -> Any:
    name, key = module.rpartition(".")[2].strip("_"), _key(module)
    kept = kernel_cache.read(name, key)
    if kept is None:
        kept = build(importlib.import_module(module))
        kernel_cache.write(name, key, kept)
    return link(kept)


def build(module: ModuleType) -> bytes:
    """The machine code of the kernels of `module`, for `link`.  Imports numba.

    That is: the length of a table of contents, the table, and object files one after another.
    """
    from gpuksm.hashing import _jit

    kernels = _jit.machine_code(module)
    table = {name: {**code._asdict(), "code": len(code.code)} for name, code in kernels.items()}
    head = json.dumps(table).encode()
    return struct.pack("<I", len(head)) + head + b"".join(code.code for code in kernels.values())


def link(built: bytes) -> Any:
    """The kernels in `built`, by name, ready to be called."""
    (size,) = struct.unpack_from("<I", built)
    at = 4 + size
    found = SimpleNamespace()
    for name, facts in json.loads(built[4:at]).items():
        address = _address(built[at : at + facts["code"]], facts["symbol"])
        setattr(found, name, _callable(name, address, facts["parameters"], facts["result"]))
        at += facts["code"]
    return found


def _key(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    found = hashlib.sha256(Path(spec.origin).read_bytes())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    found.update(f"{platform.machine()} {processor()}".encode())
    return found.hexdigest()[:32]


_engines: list[Any] = []  # own the machine code


def _address(code: bytes, symbol: str) -> int:
    """Address of `symbol` in the object file `code`, which is made executable."""
    with contextlib.suppress(objects.Unlinkable):
        return objects.load(code, symbol)
    from llvmlite import binding  # type: ignore[import-untyped]

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(symbol))


def _callable(name: str, address: int, parameters: list[str], result: str) -> Callable[..., Any]:
    kinds = "".join(_ARRAY if parameter.startswith("array") else parameter for parameter in parameters)
    call = function_at(address, "pp" + kinds)
    arrays = [
        (np.dtype(parameter.split()[1]), parameter.endswith("readonly"))
        if parameter.startswith("array")
        else None
        for parameter in parameters
    ]

    def kernel(*arguments: Any) -> Any:
        if len(arguments) != len(arrays):
            raise TypeError(f"{name} takes {len(arrays)} arguments, not {len(arguments)}")
        cell, raised = Cell(result or "p"), Cell("p")
        flat: list[Any] = [cell.address, raised.address]
        for argument, wanted in zip(arguments, arrays, strict=True):
            if wanted is None:
                flat.append(argument)
                continue
            kind, readonly = wanted
            flags = argument.flags
            if argument.dtype != kind or argument.ndim != 1 or not flags.c_contiguous:
                raise TypeError(
                    f"{name} takes a contiguous array of {kind}, not {argument.dtype}{argument.shape}"
                )
            if not readonly and not flags.writeable:
                raise TypeError(f"{name} writes to an array that is read-only")
            place = argument.__array_interface__["data"][0]
            items, size = len(argument), kind.itemsize
            flat += (None, None, items, size, place, items, size)
        status = call(*flat)
        if status not in (_OK, _NONE):
            raise RuntimeError(f"{name} failed with status {status}")
        return cell.value if result else None

    kernel.__name__ = name
    return kernel
