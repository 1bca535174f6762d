"""`python -m weightd_daemon serve|config`: what `weightd serve` and `weightd config` run."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .app import AlreadyServedError, Daemon
from .config import EXIT_CONFIG, ConfigError, Loaded, Settings, load
from .loader.process import DEFAULT_ARGV

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: list[str] | None = None, loader_argv: Sequence[str] = DEFAULT_ARGV) -> int:
    """Run a command. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        loaded = load(options.config, vars(options), os.environ)
    except ConfigError as error:
        sys.stderr.write(f"weightd: {error}\n")
        return EXIT_CONFIG
    if options.command == "config":
        _print_config(loaded, as_json=options.format == "json")
        return 0
    logging.basicConfig(
        level=loaded.settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    for chatty in ("grpc", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.INFO)
    try:
        return asyncio.run(_serve(loaded.settings, loader_argv))
    except ConfigError as error:
        sys.stderr.write(f"weightd: {error}\n")
        return EXIT_CONFIG
    except AlreadyServedError as error:
        sys.stderr.write(f"weightd: {error}\n")
        return 1


async def _serve(settings: Settings, loader_argv: Sequence[str]) -> int:
    return await Daemon(settings, loader_argv).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightd", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("serve", "run the daemon in the foreground; it prints one line when it is ready"),
        ("config", "print every setting, and where its value comes from"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
        for setting in fields(Settings):
            command.add_argument(
                f"--{setting.name.replace('_', '-')}",
                dest=setting.name,
                action="append" if setting.metadata["repeatable"] else "store",
                metavar="N" if setting.type == "int" else "VALUE",
                help=str(setting.metadata["help"]).replace("%", "%%"),
            )
        if name == "config":
            command.add_argument("--format", choices=("table", "json"), default="table")
    return parser


def _print_config(loaded: Loaded, *, as_json: bool) -> None:
    rows = [(setting.name, getattr(loaded.settings, setting.name)) for setting in fields(Settings)]
    if as_json:
        table = {name: {"value": value, "origin": loaded.origins[name]} for name, value in rows}
        sys.stdout.write(json.dumps(table, indent=2) + "\n")
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        shown = value if isinstance(value, int) else json.dumps(value)
        sys.stdout.write(f"{name:<{width}} = {shown}  # {loaded.origins[name]}\n")


if __name__ == "__main__":
    sys.exit(main())
