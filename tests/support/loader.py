"""A loader with another hash function: `python -m support.loader KINDS CONTROL DESCRIPTORS PARENT`.

KINDS, separated by commas: "weak" makes digests of the first two bytes only, so that contents collide; "stopping" stops
the process (SIGSTOP) where the bytes at hand begin with STOP, so that a test can act at an exact moment of a load;
"lingering" stops it before it closes the segments of a job; "unborn" stops it before anything else. Any other word
stands for the usual one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import xxhash

from support.daemon import Daemon, eventually

STOP = b"a loader stops here "
PIECE = 1 << 20
"""Bytes that the loader reads and hashes at a time."""


def wait_stopped(daemon: Daemon, count: int = 1) -> list[int]:
    """Wait until so many loaders of a daemon have stopped; their process ids."""
    found: list[int] = []

    def stopped() -> bool:
        found[:] = [pid for pid in daemon.loaders() if state(pid) == "T"]
        return len(found) >= count

    eventually(stopped, what=f"{count} stopped loaders")
    return found


def resume(*pids: int) -> None:
    """Let stopped loaders go on."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    """A process's state as /proc names it: R, S, D, T (stopped), Z; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def stop() -> None:
    """Stop this process here and now. A signal to the process is any thread's to take, and the caller could go on."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


class _Hasher:
    def __init__(self, *, weak: bool, stopping: bool) -> None:
        self._weak, self._stopping = weak, stopping
        self._first = b""
        self._hash = xxhash.xxh3_128()

    def update(self, data: memoryview, /) -> None:
        if self._stopping and data[: len(STOP)] == STOP:
            stop()
        self._first = self._first or bytes(data[:2])
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._first.ljust(16, b"\0") if self._weak else self._hash.digest()


def main() -> int:
    """Be a loader."""
    from weightd_daemon.loader import job

    kinds = sys.argv[1].split(",")
    if "unborn" in kinds:
        stop()
    if "lingering" in kinds:
        open_io = job.open_io

        def open_lingering(*arguments: Any) -> Any:
            io = open_io(*arguments)
            close = io.close

            def linger() -> None:
                stop()
                close()

            io.close = linger  # type: ignore[method-assign]
            return io

        job.open_io = open_lingering

    def new_hasher() -> Any:
        return _Hasher(weak="weak" in kinds, stopping="stopping" in kinds)

    return job.main(sys.argv[2:], new_hasher)


if __name__ == "__main__":
    sys.exit(main())
