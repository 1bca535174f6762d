"""The programs behind `weightd fleet fetch` and `weightd fleet ls` (`python -m weightd_fleet.agent.asking`).

`fetch` ends with {"fetched"}, `ls` with {"peers"}.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from weightd.errors import WeightdError
from weightd_daemon.answers import answer

from .addresses import parse_address
from .agent import NodeSettings, fetching_node
from .fetching import fetch
from .requests import FetchOrder

if TYPE_CHECKING:
    from weightd_daemon.answers import ProgramAnswers

    from .addresses import AgentAddress
    from .fetching import FetchingNode


def main(arguments: list[str] | None = None) -> int:
    """Fetch a checkpoint, or list what peers have. Returns the exit code: 0 also where the answer is an error."""
    parser = argparse.ArgumentParser(prog="weightd_fleet.agent.asking", allow_abbrev=False)
    parser.add_argument("--from", dest="peers", action="append", required=True)
    parser.add_argument("--tls-dir")
    parser.add_argument("--patience", type=float, default=30.0)
    parser.add_argument("--state-dir")
    parser.add_argument("--socket")
    parser.add_argument("--sink", default="files")
    parser.add_argument("--name", default="")
    parser.add_argument("--folder", default="")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("what", choices=("fetch", "ls"))
    parser.add_argument("digest", nargs="?", default="")
    return answer("fleet", _answered, parser, arguments)


def _answered(options: argparse.Namespace, answers: ProgramAnswers) -> dict[str, Any]:
    settings = NodeSettings(options.state_dir, options.socket, options.tls_dir, options.patience)
    peers = tuple(map(parse_address, options.peers))
    with fetching_node(settings) as node:
        if options.what == "fetch":
            folder = os.path.abspath(options.folder) if options.folder else ""
            order = FetchOrder(options.digest, peers, options.sink, options.name, folder, pin=options.pin)
            found = fetch(node, order, lambda done, total: answers.advance("receiving", done, total), answers.note)
            return {"fetched": found._asdict()}
        return {"peers": [_listed(node, address) for address in peers]}


def _listed(node: FetchingNode, address: AgentAddress) -> dict[str, Any]:
    """What a peer has, or why it does not say."""
    try:
        with node.peer(address) as peer:
            entries = peer.inventory()
    except WeightdError as error:
        return {"peer": str(address), "checkpoints": [], "problem": str(error)}
    checkpoints = [
        {
            "digest": entry.name,
            "total_bytes": entry.total_bytes,
            "tensors": entry.tensors,
            "repository": entry.repository,
            "commit": entry.commit,
        }
        for entry in entries
    ]
    return {"peer": str(address), "checkpoints": checkpoints, "problem": ""}


if __name__ == "__main__":
    sys.exit(main())
