"""`gpuksm daemon`: rounds for ever, in the foreground, as service managers want it."""

from __future__ import annotations

import signal
import socket
import tomllib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from gpuksm import errors, knobs
from gpuksm.cli import _options, _output, _scanning
from gpuksm.linux.descriptors import await_readable
from gpuksm.targets import Finder, Selection

if TYPE_CHECKING:
    from gpuksm.scan.daemon import Setup

_ARGUMENTS, _RELOADING = "gpuksm.arguments", "gpuksm.reloading"
_TARGETS = ("pid", "tree", "name", "user", "cgroup", "registered")


class Percent(click.ParamType[int]):
    """`50%`, `50` or `150%` (one CPU and a half); 0 is no limit."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().removesuffix("%").strip()
        highest = knobs.TABLE["max_cpu_percent"].highest
        if not text.isdecimal() or int(text) > highest:
            self.fail(f"{value!r} is not a percentage such as 50%", param, ctx)
        return int(text)


class _Command(click.Command):
    """Keeps its arguments, so that SIGHUP can parse them again over a new configuration."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[_ARGUMENTS] = given
        return context


def _configured(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Take what the file says as the defaults of all other options."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise errors.UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.UsageError(f"{path} is no TOML: {error}") from None
    chosen = found.pop("targets", {})
    if not isinstance(chosen, dict):
        raise errors.UsageError(f"{path}: targets must be a table")
    known = {_key(each) for each in ctx.command.params if isinstance(each, click.Option)}
    wrong = [key for key in found if key not in known - {"config", "help", *_TARGETS}]
    wrong += [f"targets.{key}" for key in chosen if key not in _TARGETS]
    if wrong:
        raise errors.UsageError(f"{path}: there is no setting {wrong[0]}; see docs/settings.md")
    values = {**found, **{key: _listed(key, value) for key, value in chosen.items()}}
    ctx.default_map = {key.replace("-", "_"): value for key, value in values.items()}
    return path


def _key(option: click.Option) -> str:
    return option.opts[0].removeprefix("--")


def _listed(key: str, value: Any) -> Any:
    """`pid = 12` is the same as `pid = [12]`."""
    return [value] if key in ("pid", "tree") and not isinstance(value, list) else value


class _Signals:
    """`gpuksm.scan.daemon.Control`: SIGTERM and SIGINT end, SIGHUP reads the configuration again."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._ending = False
        self._reload = False
        self._wake, self._wake_write = socket.socketpair()
        for end in (self._wake, self._wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._ending = True

    def wait(self, seconds: float, readable: Sequence[int]) -> None:
        """See `Control`."""
        ready = await_readable([self._wake.fileno(), *readable], seconds)
        if self._wake.fileno() in ready:
            self._wake.recv(4096)

    def stopping(self) -> bool:
        """See `Control`."""
        return self._ending

    def reloaded(self) -> Setup | None:
        """See `Control`; a configuration that is wrong is said, and changes nothing."""
        if not self._reload:
            return None
        self._reload = False
        try:
            with command.make_context("daemon", list(self._arguments)) as context:
                context.meta[_RELOADING] = True
                setup: Setup = command.invoke(context)
                return setup
        except click.ClickException as error:
            _output.note(f"not reloaded: {error.format_message()}")
        except errors.GpuksmError as error:
            _output.note(f"not reloaded: {error}")
        return None


@click.command(cls=_Command)
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    callback=_configured,
    help="TOML file with these options by their long names, TARGETS in [targets]; SIGHUP reads it again.",
)
@_options.targets
@click.option(
    "--interval",
    type=_options.Duration(0.01, 3600),
    default="1s",
    show_default=True,
    metavar="TIME",
    help="Shortest time between two rounds, in which a page must not be written.",
)
@click.option(
    "--max-interval",
    type=_options.Duration(0.01, 86400),
    default="60s",
    show_default=True,
    metavar="TIME",
    help="Longest time between two rounds, when nothing changes.",
)
@click.option(
    "--max-cpu",
    type=Percent(),
    default="0",
    metavar="PERCENT",
    help="Most CPU time, of one CPU, that scanner and guard take, such as 50%; 0, the default: no limit.",
)
@_scanning.batch
@_scanning.hashing
@_scanning.across_nodes
@_scanning.allowed
@click.option(
    "--no-smart-scan", is_flag=True, help="Also look at memory that keeps being written in each round."
)
@click.option("--no-zero-pages", is_flag=True, help="Leave pages full of zeros alone.")
@click.pass_context
def command(
    context: click.Context,
    /,
    config: str | None,
    selection: Selection,
    interval: float,
    max_interval: float,
    max_cpu: int,
    no_smart_scan: bool,
    no_zero_pages: bool,
    **scanning: Any,
) -> Setup | None:
    """Merge equal pages of the TARGETS again and again, as they come up, until SIGTERM.

    TARGETS: as for `gpuksm scan`; processes that come to match or get registered
    later are taken too. A round reads only what was written since the last one and
    has calmed down. What is merged stays merged when the daemon ends.
    """
    from gpuksm.scan.daemon import Daemon, Setup

    finder = Finder(selection)
    # Whatever is wrong with what was named is an error now, and never later.
    if not finder():
        _output.note("no process matches or is registered yet; waiting for one")
    options = _scanning.scan_options(scanning)
    setup = Setup(
        finder,
        options,
        {
            "run": knobs.RUN_ON,
            "pages_to_scan": options.batch_pages,
            "sleep_millisecs": round(interval * 1000),
            "max_sleep_millisecs": round(max_interval * 1000),
            "max_cpu_percent": max_cpu,
            "use_zero_pages": int(not no_zero_pages),
            "smart_scan": int(not no_smart_scan),
            "merge_across_nodes": int(options.merge_across_nodes),
        },
    )
    if context.meta.get(_RELOADING):
        return setup
    Daemon(setup, _Signals(context.meta[_ARGUMENTS]), _output.note).run()
    return None
