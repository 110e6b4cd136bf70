"""What a machine must have for a test, and the switch that turns skips into failures.

`GPUKSM_REQUIRE` is a comma-separated list of names (`uffd,root,gcc,gdb,pocl,...`
or `all`).  A test that lacks something of that list fails instead of being
skipped, so that a machine that is meant to run everything cannot silently run less.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import struct
from collections.abc import Callable
from typing import NoReturn

import pytest

# <linux/userfaultfd.h>: UFFDIO_API, UFFD_FEATURE_WP_ASYNC (Linux 6.7), UFFD_FEATURE_WP_UNPOPULATED (6.4).
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_WP_ASYNC = 1 << 15
_WP_UNPOPULATED = 1 << 13
_SYS_USERFAULTFD = 323
_UFFD_USER_MODE_ONLY = 1
_MOST_MAPPINGS = 300_000
_KVM_CREATE_VM = 0xAE01


def required(name: str) -> bool:
    """True when GPUKSM_REQUIRE says that this machine must have `name`."""
    names = os.environ.get("GPUKSM_REQUIRE", "").replace(" ", "").split(",")
    return name in names or "all" in names


def require(name: str, reason: str) -> NoReturn:
    """End the test because the requirement `name` is missing: a skip, or a failure where it is required."""
    if required(name):
        pytest.fail(f"{name} is required here (GPUKSM_REQUIRE) and missing: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def need(*names: str) -> None:
    """Go on only when every one of `names` is to be had: a program, or a key of PROBES."""
    for name in names:
        reason = PROBES[name]() if name in PROBES else _program(name)
        if reason:
            require(name, reason)


@functools.cache
def _program(name: str) -> str:
    return "" if shutil.which(name) else f"no program {name} on the PATH"


@functools.cache
def _uffd() -> str:
    """Empty when asynchronous write tracking works for this user, else why not."""
    from gpuksm.linux import _libc

    userfaultfd = _libc.syscall_function("userfaultfd", _SYS_USERFAULTFD, ctypes.c_int)
    try:
        fd = userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
    except OSError as error:
        return str(error)
    try:
        request = bytearray(struct.pack("QQQ", _UFFD_API, _WP_ASYNC | _WP_UNPOPULATED, 0))
        fcntl.ioctl(fd, _UFFDIO_API, request)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "userfaultfd without WP_ASYNC (Linux 6.7)"
        return str(error)
    finally:
        os.close(fd)
    return ""


def _thread_pidfd() -> str:
    from gpuksm.linux import probe

    return "" if probe.has_thread_pidfds() else "no pidfds of threads (Linux 6.9)"


def _root() -> str:
    return "" if os.geteuid() == 0 else "not run by root"


def _realtime() -> str:
    """Empty when a thread may be given a real-time priority (root may not where a control group has none)."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        return str(error)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return ""


def _map_limit() -> str:
    """Empty when a test can use up the mappings that a process may have."""
    with open("/proc/sys/vm/max_map_count") as file:
        limit = int(file.read())
    return "" if limit <= _MOST_MAPPINGS else f"vm.max_map_count is {limit}, too many to make in a test"


def _memory() -> str:
    """Empty when 4 GiB can be used by the larger end-to-end tests."""
    with open("/proc/meminfo") as file:
        available_kb = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return "" if available_kb > 4 << 20 else f"only {available_kb} kB of memory available"


def _userfaultfd_device() -> str:
    return "" if os.access("/dev/userfaultfd", os.R_OK | os.W_OK) else "/dev/userfaultfd cannot be opened"


@functools.cache
def _kvm() -> str:
    """Empty when a virtual machine can be made."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return str(error)
    try:
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        return str(error)
    finally:
        os.close(device)
    return ""


def _tun() -> str:
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "/dev/net/tun cannot be opened"


def _vhost() -> str:
    return _tun() or (
        "" if os.access("/dev/vhost-net", os.R_OK | os.W_OK) else "/dev/vhost-net cannot be opened"
    )


def _btf() -> str:
    return "" if os.access("/sys/kernel/btf/vmlinux", os.R_OK) else "no /sys/kernel/btf/vmlinux"


@functools.cache
def _bpf() -> str:
    """Empty when a BPF program that reads the kernel's memory may be loaded."""
    from gpuksm.linux import bpf

    code = bpf.Code()
    code.call(bpf.GET_CURRENT_TASK)
    code.copy(bpf.R6, bpf.R0)
    code.read_kernel(-8, 8, bpf.R6, 0)
    code.end()
    try:
        bpf.Program(code).close()
    except OSError as error:
        return str(error)
    return ""


PROBES: dict[str, Callable[[], str]] = {
    "uffd": _uffd,
    "thread_pidfd": _thread_pidfd,
    "root": _root,
    "realtime": _realtime,
    "map_limit": _map_limit,
    "userfaultfd_device": _userfaultfd_device,
    "memory": _memory,
    "kvm": _kvm,
    "tun": _tun,
    "vhost": _vhost,
    "btf": _btf,
    "bpf": _bpf,
}
