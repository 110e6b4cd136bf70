"""The command line: one file per verb, loaded when it is used.

`main` is the one place where an error becomes a line on stderr and an exit code
(docs/exit-codes.md).  Nothing heavy (numpy, numba, rich) is imported before a
verb needs it, so that `gpuksm --help` answers at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO, cast

import click

from gpuksm import __version__, errors
from gpuksm.report.plain import printable

EXIT_USAGE = 2
EXIT_INTERNAL = 70
EXIT_OUTPUT = 74
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
# New objects between two looks for cyclic garbage, which by default are a hundred while modules load.
_GARBAGE = 50_000

# verb: one line of help.  The command is `command` in gpuksm/cli/<verb>.py.
VERBS = {
    "scan": "Merge equal pages of processes.",
    "daemon": "Merge equal pages again and again, as they come up.",
    "ctl": "Read and set what the running daemon goes by.",
    "estimate": "Say what a scan would save, without changing anything.",
    "unmerge": "Give merged pages back as private memory.",
    "exec": "Run a command, registered from its start.",
    "register": "Register processes, so that a plain `gpuksm scan` takes them.",
    "unregister": "Take a registration back.",
    "status": "Show what is registered and merged.",
    "metrics": "Print counters for Prometheus.",
    "doctor": "Say what works here, and what keeps a process out.",
    "bench": "Measure the stages of a scan on this machine.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"gpuksm.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpuksm", message="%(prog)s %(version)s")
def cli() -> None:
    """Merge identical memory pages of running processes, from user space."""


class _Output:
    """Standard output, which ends nothing when it cannot be written: `failure` says why at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._noted(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._noted(self._stream.flush)

    def _noted(self, do: Callable[[], object]) -> None:
        try:
            do()
        except BrokenPipeError:
            raise
        except OSError as error:
            self.failure = self.failure or str(error.strerror)


def _nowhere(number: int) -> TextIO:
    """In the place of an output that is closed, and of its number, which no file of ours must get."""
    while (handle := os.open(os.devnull, os.O_WRONLY)) < number:
        pass
    return os.fdopen(handle, "w")


def run() -> NoReturn:
    """The command `gpuksm`: `main`, and the end of the process.

    Without what Python and the libraries that were loaded do at an end, which takes 30 ms and has no use:
    all that outlives a command is closed by then.  With GPUKSM_DEBUG=1 it ends as usual, for profilers.
    """
    gc.set_threshold(_GARBAGE)
    output = _Output(sys.stdout or _nowhere(1))
    sys.stdout, sys.stderr = cast(TextIO, output), sys.stderr or _nowhere(2)
    code = main()
    with contextlib.suppress(BrokenPipeError, ValueError):
        output.flush()
    if output.failure:
        _fail(f"cannot write to standard output ({output.failure}); what was done stays done", EXIT_OUTPUT)
        code = code or EXIT_OUTPUT
    if os.environ.get("GPUKSM_DEBUG") == "1":
        sys.exit(code)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with cli.make_context("gpuksm", arguments) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.UsageError as error:
        return _fail(error.format_message(), EXIT_USAGE)
    except errors.GpuksmError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader is gone; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if os.environ.get("GPUKSM_DEBUG") == "1":
            traceback.print_exc()
        text = f"internal error: {type(error).__name__}: {error} (GPUKSM_DEBUG=1 shows the details)"
        return _fail(text, EXIT_INTERNAL)


def _fail(message: str, code: int) -> int:
    print("gpuksm:", printable(message), file=sys.stderr)
    return code
