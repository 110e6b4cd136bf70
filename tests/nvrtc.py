"""NVRTC by ctypes, from pip's nvidia-cuda-nvrtc packages: needs no GPU and no toolkit."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from tests.requirements_env import require


class CompileError(Exception):
    """What NVRTC said."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        import nvidia  # type: ignore[import-untyped]
    except ImportError:
        return None
    for root in nvidia.__path__:
        # cuda_nvrtc/lib in the packages for CUDA 12, cu13/lib in those for 13.
        for found in sorted(Path(root).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(found))
    return None


def library() -> ctypes.CDLL:
    """The library; without it the test is skipped, or fails where `nvrtc` is required."""
    found = _library()
    if found is None:
        require("nvrtc", "no nvidia-cuda-nvrtc package is installed")
    return found


@functools.cache
def compile_source(source: str, arch: str, *options: str) -> str:
    """PTX of `source` for a virtual architecture such as "compute_75"."""
    return _compile(source, arch, options, "PTX").decode().rstrip("\0")


@functools.cache
def compile_binary(source: str, arch: str, *options: str) -> bytes:
    """A cubin of `source` for a real architecture such as "sm_75": runs NVIDIA's assembler as well."""
    return _compile(source, arch, options, "CUBIN")


@functools.cache
def assembler_log(source: str, arch: str) -> str:
    """What the assembler says of each kernel: registers, spills, stack."""
    return _compile(source, arch, ("--ptxas-options=-v",), "ProgramLog").decode()


def _compile(source: str, arch: str, options: tuple[str, ...], kind: str) -> bytes:
    nvrtc = library()
    program = ctypes.c_void_p()
    _check(
        nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gpuksm.cu", 0, None, None)
    )
    given = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in options)]
    status = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    try:
        if status != 0:
            raise CompileError(_fetch(nvrtc, program, "ProgramLog").decode())
        return _fetch(nvrtc, program, kind)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    room = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{what}"](program, room))
    return room.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise CompileError(f"NVRTC error {status}")
