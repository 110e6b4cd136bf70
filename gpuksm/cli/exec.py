"""`gpuksm exec`: commands that are registered from their start.

The jobs come first: nothing that goes wrong with the guard after they were
started ends or delays them.  Signals that are sent to gpuksm reach every job;
those of the terminal reach the jobs by themselves, as they are in its
foreground process group.
"""

from __future__ import annotations

import os
import signal
import subprocess

import click

from gpuksm import errors
from gpuksm.cli import _options, _output
from gpuksm.client import GuardClient
from gpuksm.linux import personality

EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
_SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h: sent by the terminal driver
_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--same-layout",
    is_flag=True,
    help="Switch address randomisation off, so that pages full of pointers become equal. "
    "This trades a mitigation against exploits for memory: for trusted batch jobs only.",
)
@click.option("-n", "copies", type=_options.Count(1, 4096), default=1, metavar="N", help="Run N copies.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def command(same_layout: bool, copies: int, cmd: tuple[str, ...]) -> int:
    """Run CMD, registered with the guard from its start; a later `gpuksm scan` merges it.

    Each copy finds its number, from 0, in GPUKSM_INDEX. Ends with the exit code
    of the first copy that failed, 128 + N for one killed by signal N.
    """
    with GuardClient.connect(start=True) as guard:
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_FORWARDED})
        jobs: list[subprocess.Popen[bytes]] = []
        code = 0
        try:
            for index in range(copies):
                jobs.append(_start(cmd, index, same_layout, previous))
                _register(guard, jobs[-1].pid)
        except OSError as error:
            _output.note(f"cannot run {cmd[0]}: {error.strerror}")
            code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
            for job in jobs:
                job.terminate()
    try:
        return _wait(jobs, code)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start(
    cmd: tuple[str, ...], index: int, same_layout: bool, mask: set[int | signal.Signals]
) -> subprocess.Popen[bytes]:
    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        personality.allow_any_tracer()
        if same_layout:
            personality.disable_address_randomisation()

    # preexec_fn is safe here: this process has one thread.
    environment = {**os.environ, "GPUKSM_INDEX": str(index)}
    return subprocess.Popen(cmd, env=environment, preexec_fn=in_child)


def _register(guard: GuardClient, pid: int) -> None:
    try:
        guard.request("register", pid=pid, ranges=None)
    except (errors.TargetGone, errors.NoSuchProcess):
        pass  # it has already done its work
    except errors.GpuksmError as error:
        _output.note(f"process {pid} runs, but is not registered: {error}")


def _wait(jobs: list[subprocess.Popen[bytes]], code: int) -> int:
    """Forward signals until every job has ended; `code`, or the code of the first that failed."""
    while True:
        for job in list(jobs):
            ended = job.poll()
            if ended is None:
                continue
            jobs.remove(job)
            if ended and not code:
                code = ended if ended > 0 else 128 - ended
        if not jobs:
            return code
        received = signal.sigwaitinfo({signal.SIGCHLD, *_FORWARDED})
        if received.si_signo != signal.SIGCHLD and received.si_code != _SI_KERNEL:
            for job in jobs:
                job.send_signal(received.si_signo)
