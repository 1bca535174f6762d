"""The whole command: global options, the list of commands, and how each error becomes a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

import weightd
from weightd.cli import (
    browsing,
    changing,
    daemon,
    device_map,
    doctor,
    events,
    fleet_agents,
    fleet_cluster,
    fleet_group,
    inspecting,
    listing,
    loading,
    operating,
    planning,
    serving,
    token,
    unit,
    usage,
    watching,
)
from weightd.cli.context import INTERRUPTED, CommandInterruptedError, CommandOptions, SocketOption, say
from weightd.cli.output import StdoutClosedError, emit, flush
from weightd.errors import WeightdError

OUTPUT_CLOSED = 141  # what a shell reports of a command that SIGPIPE ended

_OF_A_CHOICE = "Value error, "  # what newer typers put before what is wrong with a choice

_EPILOG = """\b
Exit codes:
  0    success
  1    failure
  2    wrong usage
  3    not found
  4    in use
  5    does not fit
  69   no daemon, no catalogue of a fleet, or the daemon is draining
  75   try again: daemon full or not answering, device absent, or a system limit reached
  76   another protocol version
  77   not permitted, or no access to the daemon
  78   bad configuration
  130  interrupted
"""

app = typer.Typer(
    name="weightd",
    help="Hold checkpoints in memory once and share them between processes.",
    epilog=_EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    socket: SocketOption = None,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback before an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    settings: CommandOptions = context.obj
    settings.socket = socket
    settings.debug = debug
    if version:
        emit(f"weightd {weightd.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


app.command("serve")(serving.serve)
app.command("load")(loading.load)
app.command("ls")(listing.ls)
app.command("list", hidden=True)(listing.ls)
app.command("ps")(listing.ps)
app.command("inspect")(inspecting.inspect)
app.command("plan")(planning.plan)
app.command("pin")(changing.pin)
app.command("unpin")(changing.unpin)
app.command("rm")(changing.rm)
app.command("stats")(usage.stats)
app.command("map")(device_map.device_map)
app.command("verify")(loading.verify)
app.command("events")(events.events)
app.command("top")(watching.top)
app.command("web")(browsing.web)
app.command("drain")(operating.drain)
app.command("doctor")(doctor.doctor)
app.command("ping")(daemon.ping)
app.command("version")(daemon.version)
app.command("token")(token.token)
app.command("unit")(unit.unit)
app.command("config")(serving.config)
fleet_group.fleet.command("agent")(fleet_agents.agent)
fleet_group.fleet.command("fetch")(fleet_agents.fetch)
fleet_group.fleet.command("ls")(fleet_agents.ls)
fleet_group.fleet.command("stats")(fleet_cluster.stats)
fleet_group.fleet.command("place")(fleet_cluster.place)
fleet_group.fleet.command("load")(fleet_cluster.load)
fleet_group.fleet.command("drain")(fleet_cluster.drain)
fleet_group.fleet.command("catalogue")(fleet_cluster.catalogue)
app.add_typer(fleet_group.fleet)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing but SystemExit leaves here."""
    settings = CommandOptions()
    try:
        code = get_command(app).main(args=list(arguments), prog_name="weightd", standalone_mode=False, obj=settings)
        flush()
    except StdoutClosedError:
        # The reader went away (`weightd ls | head -1`): no message, and nothing left for the interpreter to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except CommandInterruptedError as error:
        say(str(error))
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except WeightdError as error:
        settings.report(error)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last place where an error can become one line
        return _unexpected(settings, error)
    if code == INTERRUPTED:  # newer typers turn Ctrl-C into this, older ones into Abort
        say("interrupted")
    return code if isinstance(code, int) else 0


def _unexpected(settings: CommandOptions, error: Exception) -> int:
    """A usage error keeps its own text and exit code 2; anything else is a bug."""
    # typer's usage errors come from click in its older versions and from a private module in its newer ones.
    describe = getattr(error, "format_message", None)
    if describe is None:
        settings.trace(error)
        hint = "" if settings.debug else " (run with --debug for the traceback)"
        say(f"{type(error).__name__}: {error}{hint}")
        return 1
    context = getattr(error, "ctx", None)
    said = str(describe()).replace(_OF_A_CHOICE, "").rstrip(".")
    say(f"{said}; see '{context.command_path if context else 'weightd'} --help'")
    return int(getattr(error, "exit_code", 2))
