"""How kernels are compiled: ahead of the first call, without the GIL.

Importing this module imports numba, so only modules of kernels do, and those are
imported only to be compiled: see `compiled.py`, which also keeps what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numba
from llvmlite import binding  # type: ignore[import-untyped]
from numba import types

from gpuksm.linux.objects import FROM_LIBC


def kernel(*signatures: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for exactly one signature, to be called by other kernels or as machine code.

    Nothing of Python's is compiled in: it cannot be called from Python as it is.
    """
    alone: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return numba.njit(list(signatures), nogil=True, **alone)


class Compiled(NamedTuple):
    """Machine code of one kernel: its symbol in the object file, its parameters and its result.

    Parameters are "array DTYPE", with " readonly" where that is so, or a kind of
    `gpuksm.linux.native`; the result is such a kind, or nothing.
    """

    symbol: str
    parameters: list[str]
    result: str
    code: bytes


def machine_code(module: ModuleType) -> dict[str, Compiled]:
    """The kernels of `module` that others call, by name.  RuntimeError for one that cannot stand alone."""
    return {
        name: _machine_code(name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and hasattr(value, "nopython_signatures")
    }


def _machine_code(name: str, dispatcher: Any) -> Compiled:
    (signature,) = dispatcher.nopython_signatures
    overload = dispatcher.overloads[signature.args]
    module = binding.parse_assembly(overload.library.get_llvm_str())
    declared = {function.name for function in module.functions if function.is_declaration}
    foreign = {each for each in declared if not each.startswith("llvm.")} - FROM_LIBC
    if foreign:
        raise RuntimeError(f"the kernel {name} needs {', '.join(sorted(foreign))}")
    return Compiled(
        overload.fndesc.llvm_func_name,
        [_parameter(kind) for kind in signature.args],
        "" if isinstance(signature.return_type, types.NoneType) else _parameter(signature.return_type),
        bytes(overload.library._get_compiled_object()),
    )


def _parameter(kind: Any) -> str:
    if isinstance(kind, types.Array) and kind.ndim == 1 and kind.layout == "C":
        return f"array {kind.dtype.name}{'' if kind.mutable else ' readonly'}"
    return {types.int64: "i", types.uint64: "u", types.float64: "d"}[kind]
