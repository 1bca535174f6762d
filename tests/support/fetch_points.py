"""`python -m support.fetch_points POINT N PROGRAM …`: a program of the fleet's that kills itself at a named point.

POINT is reached for the N-th time; PROGRAM is "asking" or "agent".
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from weightd_fleet.agent import __main__ as agent_program
from weightd_fleet.agent import asking
from weightd_fleet.agent.local_blobs import BlobReaders
from weightd_fleet.agent.sink_files import FilesSink
from weightd_fleet.agent.sink_memory import MemorySink
from weightd_fleet.agent.staging import IncomingRow

POINTS: dict[str, tuple[Any, str]] = {
    "received": (IncomingRow, "write"),
    "verified": (IncomingRow, "verify"),
    "staged": (IncomingRow, "keep"),
    "renamed": (FilesSink, "_rename"),
    "offered": (MemorySink, "_load"),
    "composed": (MemorySink, "_compose"),
    "served": (BlobReaders, "pieces"),
}
"""After which method each point is, in the order of a fetch; "served" is in an agent, before a row is sent."""


def install(point: str, number: int) -> None:
    """Have the process kill itself when a point is reached for the `number`-th time."""
    owner, name = POINTS[point]
    original = getattr(owner, name)
    left = number

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        result = original(*arguments, **options)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    install(sys.argv[1], int(sys.argv[2]))
    sys.exit({"asking": asking.main, "agent": agent_program.main}[sys.argv[3]](sys.argv[4:]))
