"""The looks at the socket and at the daemon behind it, each in a process of its own: a path may lead into a dead mount.

It prints a line when it begins, and then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket as sockets
import stat
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from weightd._transport.address import candidates, find_socket, listener_of
from weightd._transport.unreachable import barrier, group_name, user_name
from weightd.errors import WeightdError

_SECONDS = 4.0
"""For each answer of the daemon: less than the whole look may take, so that its error is told."""


def socket(said: str | None) -> dict[str, Any]:
    """The socket that a client would use, its folder, and who may connect. `refused` is why none may be used."""
    _begin()
    facts: dict[str, Any] = {"candidates": list(map(str, candidates(said))), "socket": "", "refused": ""}
    try:
        path = find_socket(said)
    except WeightdError as error:
        return facts | {"refused": str(error)}
    facts |= {"socket": str(path), "status": _status(path), "folder": _status(path.parent), "barrier": barrier(path)}
    return facts | {"path": str(path.parent), "uid": os.geteuid(), "user": user_name(os.geteuid())}


def daemon(said: str | None) -> dict[str, Any]:
    """Who answers there. `error` is the class of what went wrong, or empty, and `message` its text."""
    from weightd import connect

    import_module("weightd._transport.rpc")  # gRPC takes a while, which the limit is not for
    _begin()
    facts: dict[str, Any] = {"error": "", "message": ""}
    try:
        with connect(said, timeout=_SECONDS) as client:
            client.ping()
            pid, uid = _listener(client.socket)
            version, stats = client.version(), client.stats()
    except WeightdError as error:
        return facts | {"error": type(error).__name__, "message": str(error)}
    index = stats.digest_index
    return facts | {
        "version": version.version,
        "uptime": version.uptime_seconds,
        "pid": pid,
        "uid": uid,
        "user": user_name(uid),
        "state": stats.state,
        "devices": [
            {"uuid": each.uuid, "kind": each.kind, "budget": each.budget_bytes, "used": each.used_bytes,
             "absence": each.absence}
            for each in stats.devices
        ],
        "index": "" if index is None else index.path,
        "index_problem": "" if index is None else index.problem,
    }  # fmt: skip


_LOOKS: dict[str, Callable[[str | None], dict[str, Any]]] = {"socket": socket, "daemon": daemon}


def _status(path: Path) -> dict[str, Any] | None:
    """Kind, mode and owner of a file; None where it is missing, or hidden."""
    try:
        status = path.stat()
    except OSError:
        return None
    return {
        "is_socket": stat.S_ISSOCK(status.st_mode),
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "owner": user_name(status.st_uid),
        "group": group_name(status.st_gid),
    }


def _listener(path: Path) -> tuple[int, int]:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(_SECONDS)
        try:
            probe.connect(str(path))
        except OSError:
            return 0, -1
        return listener_of(probe)


def main(arguments: list[str] | None = None) -> int:
    """Make one look. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="weightd.cli.health.daemon_look", allow_abbrev=False)
    parser.add_argument("look", choices=_LOOKS)
    parser.add_argument("--socket")
    parser.add_argument("--parent", type=int)  # its calls have limits of their own; it ends in any case
    options = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(_LOOKS[options.look](options.socket)) + "\n")
    return 0


def _begin() -> None:
    sys.stdout.write("begun\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
