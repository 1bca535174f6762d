"""The programs behind `weightd fleet ls`, `stats`, `place`, `load`, `drain` and `catalogue` for a cluster of Ray
(`python -m weightd_fleet.engines.ray_asking`). Each ends with one key, named like the command.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from weightd_daemon.answers import answer

from .ray_connection import connect_catalogue, restart_catalogue

if TYPE_CHECKING:
    from weightd_daemon.answers import ProgramAnswers


def main(arguments: list[str] | None = None) -> int:
    """Ask the catalogue of a cluster. Returns the exit code: 0 also where the answer is an error."""
    parser = argparse.ArgumentParser(prog="weightd_fleet.engines.ray_asking", allow_abbrev=False)
    parser.add_argument("--address")
    parser.add_argument("--port", type=int)
    parser.add_argument("--tls-dir")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--on", action="append")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--keep-replicas", type=int, default=1)
    parser.add_argument("what", choices=("ls", "stats", "place", "load", "drain", "catalogue"))
    parser.add_argument("subject", nargs="?", default="")
    return answer("fleet", _answered, parser, arguments)


def _answered(options: argparse.Namespace, _: ProgramAnswers) -> dict[str, Any]:
    if options.what == "catalogue":
        catalogue = restart_catalogue(options.address, port=options.port, tls_dir=options.tls_dir)
    else:
        catalogue = connect_catalogue(options.address, start_it=False)
    try:
        return {options.what: _asked(options, catalogue.ask)}
    finally:
        catalogue.leave()


def _asked(options: argparse.Namespace, ask: Any) -> dict[str, Any]:
    if options.what == "ls":
        return {"checkpoints": list(map(asdict, ask("checkpoints"))), "nodes": _nodes(ask)}
    if options.what == "place":
        placed = ask("place", options.subject, options.replicas or 1)
        return asdict(placed) | {"options": placed.options() if placed.targets else None}
    if options.what == "load":
        return asdict(ask("load", options.subject, options.on, options.replicas, options.pin))
    if options.what == "drain":
        return asdict(ask("drain", options.subject, options.keep_replicas))
    stats = ask("stats")
    return asdict(stats) | {"since": stats.since.isoformat(), "each": _nodes(ask)}


def _nodes(ask: Any) -> list[dict[str, Any]]:
    """The nodes without their lists of checkpoints."""
    nodes = map(asdict, ask("nodes"))
    return [
        {key: value for key, value in node.items() if key != "serves"}
        | {
            "devices": [
                {key: value for key, value in device.items() if not isinstance(value, tuple)}
                for device in node["devices"]
            ]
        }
        for node in nodes
    ]


if __name__ == "__main__":
    sys.exit(main())
