"""The commands `serve` and `config`, with an option for each setting; both become the daemon's own process."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Annotated, Any, NoReturn

import typer

from weightd._settings import SETTINGS
from weightd.cli.context import CommandOptions, FormatOption, OutputFormat, open_client
from weightd.cli.daemon import require_daemon
from weightd.cli.output import emit, emit_json, flush

_ConfigOption = Annotated[str | None, typer.Option("--config", metavar="FILE", help="TOML file with settings")]
_RunningOption = Annotated[
    bool, typer.Option("--running", help="Print the settings of the running daemon; only --socket goes with it.")
]


def _become_daemon(command: str, context: typer.Context, options: dict[str, Any]) -> NoReturn:
    # The client may not import the daemon; a new image also leaves none of typer, rich or grpc in its memory.
    require_daemon(command)
    settings: CommandOptions = context.obj
    if options.get("socket") is None:
        options["socket"] = settings.socket
    arguments = []
    for name, said in options.items():
        values = [] if said is None else said if isinstance(said, list) else [said]
        arguments += [f"--{name.replace('_', '-')}={value}" for value in values]
    flush()
    # -P: a weightd_daemon that lies in the current directory must not be what starts.
    command_line = [sys.executable, "-P", "-m", "weightd_daemon", command, *arguments]
    os.execv(sys.executable, command_line)  # noqa: S606 - no shell is what is wanted


def _serve(context: typer.Context, **options: Any) -> None:
    """Run the daemon in the foreground.

    It prints one line on standard output once it is ready.

    Settings come from a TOML file, then from WEIGHTD_* in the environment, then from these options.

    \b
    Examples:
      weightd serve --budget 16GiB
      weightd serve --device host --device cuda:0 --budget host=16GiB,cuda:0=80%
      weightd serve --config /etc/weightd/weightd.toml
    """
    _become_daemon("serve", context, options)


def _config(context: typer.Context, *, running: bool, **options: Any) -> None:
    """Print the settings that `serve` would use, with their origins.

    The output is TOML, which --config reads back. With --running, it has the settings of the running daemon, and what
    defaults that depend on the machine, such as the budget, have come to there.

    \b
    Examples:
      weightd config                       the settings that apply here
      weightd config --config weightd.toml --budget 80%
      weightd config --budget 16GiB >weightd.toml
      weightd config --running             the settings that the daemon goes by
    """
    if running:
        _print_running(context, options)
        return
    if options["format"] is OutputFormat.TABLE:
        options["format"] = None
    else:
        options["format"] = str(options["format"].value)
    _become_daemon("config", context, options)


def _print_running(context: typer.Context, options: dict[str, Any]) -> None:
    """Print the settings of the daemon; no setting but its socket may be given."""
    for name, said in options.items():
        if said is not None and name not in ("socket", "format"):
            raise typer.BadParameter(f"--running and --{name.replace('_', '-')} exclude each other")
    with open_client(context, options["socket"], read_only=True) as client:
        settings = client.settings()
    if options["format"] is OutputFormat.JSON:
        table = {one.key: {"value": tomllib.loads(f"it = {one.value}")["it"], "origin": one.origin} for one in settings}
        emit_json(table)
        return
    width = max((len(one.key) for one in settings), default=0)
    for one in settings:
        origin = one.origin.encode("unicode_escape").decode("ascii")
        emit(f"{one.key:<{width}} = {one.value}  # {origin}")


def _with_settings(function: Callable[..., None], **more: tuple[Any, object]) -> Callable[..., None]:
    """Give `function` an option for each setting, and `more`: pairs of annotation and default."""
    options: dict[str, tuple[Any, object]] = {"config": (_ConfigOption, None)}
    for name, setting in SETTINGS.items():
        option = typer.Option(f"--{name.replace('_', '-')}", metavar=setting.metavar, help=setting.help)
        options[name] = Annotated[(list[str] if setting.repeatable else str) | None, option], None
    parameters = [Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in (options | more).items()
    ]
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # inspect.signature looks there
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    return function


serve = _with_settings(_serve)
config = _with_settings(_config, format=(FormatOption, OutputFormat.TABLE), running=(_RunningOption, False))
