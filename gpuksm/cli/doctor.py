"""`gpuksm doctor`: what this machine and user can do, and what keeps a process out."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

import click

from gpuksm import errors, writers
from gpuksm.cli import _options

GOOD, NOTE, BAD = "ok", "note", "missing"


class Finding(NamedTuple):
    """One line of the report; `advice` is empty where there is nothing to do."""

    name: str
    state: str
    found: str
    advice: str = ""


@click.command()
@click.option(
    "--pid", type=_options.PidList(), multiple=True, metavar="N...", help="Look at these processes."
)
@_options.json_flag
def command(pid: tuple[tuple[int, ...], ...], as_json: bool) -> int:
    """Check the kernel, the permissions and the settings gpuksm depends on.

    With --pid also say of each process whether it can be merged, and how many
    of its resident pages are left out for what reason. Ends with 8 when
    something is missing that gpuksm cannot do without.
    """
    from gpuksm.cli import _output
    from gpuksm.report import text

    findings = [*_kernel(), *_settings(), *_backends(), _guard()]
    found = {
        "checks": [finding._asdict() for finding in findings],
        "targets": [_target(number) for group in pid for number in group],
    }
    _output.show(found, text.doctor, as_json)
    missing = any(finding.state == BAD for finding in findings)
    return errors.FeatureMissing.exit_code if missing else 0


def _kernel() -> Iterator[Finding]:
    from gpuksm.linux import page_references, pagemap, probe, uffd

    yield Finding("machine", GOOD, f"Linux {platform.release()}, {platform.machine()}, uid {os.geteuid()}")
    if platform.machine() != "x86_64":
        yield Finding("architecture", BAD, platform.machine(), "only x86_64 is supported")
    try:
        features, kernel_mode = probe.userfaultfd_features()
    except OSError as error:
        advice = "allow userfaultfd (CONFIG_USERFAULTFD, seccomp profile of the container)"
        yield Finding("userfaultfd", BAD, str(error.strerror), advice)
        return
    mode = "user and kernel faults" if kernel_mode else "user mode only (enough)"
    yield Finding("userfaultfd", GOOD, mode)
    for name, bit, since in (
        ("write tracking (WP_ASYNC)", uffd.FEATURE_WP_ASYNC, "6.7"),
        ("REMOVE events", uffd.FEATURE_EVENT_REMOVE, "4.11"),
        ("REMAP events", uffd.FEATURE_EVENT_REMAP, "4.11"),
        ("UNMAP events", uffd.FEATURE_EVENT_UNMAP, "4.11"),
    ):
        if features & bit:
            yield Finding(name, GOOD, "yes")
        else:
            yield Finding(name, BAD, "no", f"a kernel with it is needed (Linux {since} has it)")
    if pagemap.probe():
        yield Finding("PAGEMAP_SCAN", GOOD, "yes")
    else:
        yield Finding("PAGEMAP_SCAN", BAD, "no", "a kernel with it is needed (Linux 6.7 has it)")
    if probe.has_thread_pidfds():
        yield Finding("pidfds of threads", GOOD, "yes")
    else:
        advice = "processes wait for ever where guard and keeper are killed together (Linux 6.9 has them)"
        yield Finding("pidfds of threads", NOTE, "no", advice)
    why = page_references.why_not()
    if why is None:
        yield Finding("pages that devices hold", GOOD, "told from others")
    else:
        advice = "processes with direct I/O, AIO or io_uring are left out; see --allow-direct-io"
        yield Finding("pages that devices hold", NOTE, why, advice)


def _settings() -> Iterator[Finding]:
    from gpuksm.linux import probe

    yield _yama(probe.setting("/proc/sys/kernel/yama/ptrace_scope"))
    budget = int(probe.setting("/proc/sys/vm/max_map_count") or 0)
    advice = "raise vm.max_map_count: every merged run is a mapping" if budget < 65530 else ""
    yield Finding(
        "vm.max_map_count", NOTE if advice else GOOD, f"{budget}, half of it for merged runs", advice
    )
    huge = probe.chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if huge in ("within_size", "always", "force"):
        yield Finding("huge pages for shared memory", GOOD, huge)
    else:
        advice = "`within_size` in transparent_hugepage/shmem_enabled lets long runs map huge pages"
        yield Finding("huge pages for shared memory", NOTE, huge or "none", advice)
    if probe.setting("/sys/kernel/mm/ksm/run") == "1":
        advice = "it and gpuksm would do the same work twice where programs use MADV_MERGEABLE"
        yield Finding("the kernel's KSM", NOTE, "runs", advice)
    else:
        yield Finding("the kernel's KSM", GOOD, "off")
    numa = probe.setting("/proc/sys/kernel/numa_balancing")
    if numa not in (None, "0"):
        advice = "a merged page lies on one node, and others read it from there; see --no-merge-across-nodes"
        yield Finding("NUMA balancing", NOTE, "on", advice)


def _yama(scope: str | None) -> Finding:
    name = "ptrace (Yama)"
    if scope in (None, "0") or os.geteuid() == 0:
        if scope == "3":
            return Finding(name, BAD, "scope 3", "no process can be traced until a reboot with a lower scope")
        return Finding(name, GOOD, "no Yama" if scope is None else f"scope {scope}")
    if scope == "1":
        advice = "only for what `gpuksm exec` starts or registers itself; root may merge all"
        return Finding(name, NOTE, "scope 1", advice)
    return Finding(name, BAD, f"scope {scope}", "run gpuksm as root, or lower kernel.yama.ptrace_scope")


def _backends() -> Iterator[Finding]:
    from gpuksm.hashing import select

    for backend in ("cpu", "cuda", "opencl"):
        try:
            hasher, why = select.create(backend)
        except errors.BackendUnavailable as error:
            yield Finding(
                f"backend {backend}", BAD if backend == "cpu" else NOTE, "not available", str(error)
            )
            continue
        hasher.close()
        yield Finding(f"backend {backend}", GOOD, why)


def _guard() -> Finding:
    from gpuksm.client import GuardClient, runtime_dir

    try:
        guard = GuardClient.find()
        if guard is None:
            return Finding("guard", GOOD, f"none runs (its folder is {runtime_dir()})")
        with guard:
            hello, _ = guard.request("hello")
    except errors.GuardError as error:
        return Finding("guard", BAD, "unusable", str(error))
    return Finding("guard", GOOD, f"pid {hello['pid']}, {hello['merged_pages']} pages merged")


def _target(pid: int) -> dict[str, Any]:
    """What keeps process `pid` out: one reason for all of it, or pages by reason."""
    from gpuksm import eligibility, targets
    from gpuksm.linux import page_references, procfs

    found: dict[str, Any] = {"pid": pid, "name": None, "error": None, "message": None, "regions": 0}
    found |= {"bytes": 0, "skipped": {}}
    try:
        found["name"] = procfs.stat(pid).comm
        targets.check_named(pid)
        reason = eligibility.process_reason(
            pid, named=True, allowed=writers.NOTHING, can_look=page_references.can_look
        )
        regions, skipped = eligibility.regions(pid, None)
        found["regions"] = len(regions)
        found["bytes"] = sum(region.end - region.start for region in regions)
        found["skipped"] = skipped
    except errors.TargetGone:
        reason = errors.NoSuchProcess(f"there is no process {pid}; see `ps -e` for those that run")
    except errors.GpuksmError as error:
        reason = error
    if reason is not None:
        found["error"], found["message"] = type(reason).__name__, str(reason)
    return found
