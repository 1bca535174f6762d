"""`python -m weightd_daemon serve|config`, which `weightd serve` and `weightd config` execute."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._limits import DAEMON, out_of_descriptors

from . import logs
from .app import AlreadyRunningError, Daemon
from .config.settings import ConfigError, LoadedSettings, Settings, TemporaryConfigError, load, plain
from .config.toml_file import toml_value
from .devices.cuda_modes import stay_outside_mps
from .loads.loader_process import DEFAULT_ARGV

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DESCRIPTORS = 24
"""Descriptors that must be free at the start. A daemon with monitoring and without a GPU needed 20 (measured)."""
_OUTPUT_CLOSED = 141
"""What a shell reports of a command that SIGPIPE ended, as for every other command of `weightd`."""


def main(arguments: list[str] | None = None, loader_argv: Sequence[str] = DEFAULT_ARGV) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        loaded = load(options.config, vars(options), os.environ)
    except ConfigError as error:
        sys.stderr.write(f"weightd: {error}\n")
        return error.exit_code
    if options.command == "config":
        try:
            _print_config(loaded, as_json=options.format == "json")
            sys.stdout.flush()
        except BrokenPipeError:  # `weightd config | head -1`; and nothing is left for the interpreter to flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _OUTPUT_CLOSED
        return 0
    logs.begin(loaded.settings)

    def read() -> LoadedSettings:
        return load(options.config, vars(options), os.environ)

    _raise_descriptor_limit()
    stay_outside_mps(os.environ)  # before anybody calls the driver; loaders and holders inherit it
    try:
        if limit := out_of_descriptors("starting", DAEMON, needed=_DESCRIPTORS):
            raise limit
        return asyncio.run(_serve(loaded, read, loader_argv))
    except ConfigError as error:
        where = f"{loaded.origins[error.key]}: " if error.key else ""
        sys.stderr.write(f"weightd: {where}{error}\n")
        return error.exit_code
    except OSError as error:
        if (temporary := TemporaryConfigError.of(error, "starting")) is None:
            raise
        sys.stderr.write(f"weightd: {temporary}\n")
        return temporary.exit_code
    except AlreadyRunningError as error:
        sys.stderr.write(f"weightd: {error}\n")
        return 1


async def _serve(loaded: LoadedSettings, read: Callable[[], LoadedSettings], loader_argv: Sequence[str]) -> int:
    return await Daemon(loaded, read, loader_argv).run()


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit: every segment takes two descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightd", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("serve", "run the daemon in the foreground, and print one line once it is ready"),
        ("config", "print every setting with its origin"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
        for setting in fields(Settings):
            command.add_argument(
                f"--{setting.name.replace('_', '-')}",
                dest=setting.name,
                action="append" if setting.metadata["repeatable"] else "store",
                metavar=str(setting.metadata["metavar"]),
                help=str(setting.metadata["help"]).replace("%", "%%"),
            )
        if name == "config":
            command.add_argument("--format", choices=("table", "json"), default="table")
    return parser


def _print_config(loaded: LoadedSettings, *, as_json: bool) -> None:
    """Print all settings with their origins: as JSON, or as TOML that `--config` reads."""
    rows = [(setting.name, plain(getattr(loaded.settings, setting.name))) for setting in fields(Settings)]
    if as_json:
        table = {name: {"value": value, "origin": loaded.origins[name]} for name, value in rows}
        sys.stdout.write(json.dumps(table, indent=2) + "\n")
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        origin = loaded.origins[name].encode("unicode_escape").decode("ascii")
        sys.stdout.write(f"{name:<{width}} = {toml_value(value)}  # {origin}\n")


if __name__ == "__main__":
    sys.exit(main())
