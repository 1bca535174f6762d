"""`python -m support.counted_weightd_daemon serve …`: a daemon that counts what it has in memory when it gets SIGUSR1.

Tests know a daemon by `weightd_daemon` in its command line, so this module has it in its name.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from typing import NamedTuple

from support.daemon import Daemon, eventually
from support.memory import allocated
from weightd_daemon.__main__ import main

COUNTED = [sys.executable, "-m", "support.counted_weightd_daemon"]
_LINE = re.compile(r"^counted: (\d+) objects, (\d+) bytes$", re.MULTILINE)


class MemoryCount(NamedTuple):
    """How many small objects Python has, and how many bytes malloc has handed out to all others."""

    objects: int
    bytes: int


def count_of(daemon: Daemon) -> MemoryCount:
    """Have a daemon collect its garbage, and count."""
    before = len(_LINE.findall(daemon.logged()))
    os.kill(daemon.pid, signal.SIGUSR1)
    eventually(lambda: len(_LINE.findall(daemon.logged())) > before, what="a count")
    return MemoryCount(*map(int, _LINE.findall(daemon.logged())[-1]))


def _count(*_: object) -> None:
    gc.collect()
    sys.stderr.write(f"counted: {sys.getallocatedblocks()} objects, {allocated()} bytes\n")
    sys.stderr.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _count)
    sys.exit(main())
