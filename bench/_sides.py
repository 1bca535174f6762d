"""The sides of bench/peers.py and bench/memory.py: processes of bench/_peer.py, and what they need to be fair."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import weightd

if TYPE_CHECKING:
    from _daemon import Daemon

HERE = Path(__file__).resolve().parent
NEXT_SAFETENSORS = Path(sys.prefix) / "safetensors-next"
"""Where the Makefile puts the next safetensors in the environment of the peers."""
_PROBES = 64
_PATIENCE = 10.0
"""Seconds."""


class Way(NamedTuple):
    """How a side loads: the word that bench/_peer.py knows, and packages that come first."""

    word: str
    package: str
    before: Path | None = None


WAYS = {
    "weightd": Way("weightd", "weightd"),
    "safetensors mmap": Way("mmap", "safetensors"),
    "safetensors pread": Way("pread", "safetensors"),
    "safetensors 0.9 mmap": Way("mmap", "safetensors", NEXT_SAFETENSORS),
    "fastsafetensors": Way("fastsafetensors", "fastsafetensors"),
    "Run:ai streamer": Way("runai", "runai-model-streamer"),
    "torch.multiprocessing": Way("torch.multiprocessing", "torch"),
}


def installed() -> dict[str, str]:
    """The version of each side, of those that this interpreter has."""
    found = {}
    for side, way in WAYS.items():
        path = [str(way.before)] if way.before else sys.path
        for distribution in importlib.metadata.distributions(name=way.package, path=path):
            found[side] = distribution.version
            break
    return found


class Side:
    """A process that forks children which load in one way. It ends with its context, and when this process ends."""

    def __init__(self, name: str, daemon: Daemon | None = None) -> None:
        way = WAYS[name]
        paths = [str(way.before)] if way.before else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
        if daemon is not None:
            environment["WEIGHTD_SOCKET"] = str(daemon.socket)
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "_peer.py"), way.word],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.pid: int = self._answer()["pid"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, at which it ends

    def load(self, *paths: Path) -> dict[str, Any]:
        """Have a fresh child load files, read them and end. Seconds until then: `load`, `read`."""
        return self._ask("load", *paths)

    def keep(self, *paths: Path) -> dict[str, Any]:
        """As `load`, but the child, `pid`, keeps the tensors until `drop`."""
        return self._ask("keep", *paths)

    def drop(self) -> None:
        """Have all children end."""
        self._ask("drop")

    def _ask(self, verb: str, *paths: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, *map(str, paths)]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start(stack: ExitStack, names: list[str], daemon: Daemon) -> dict[str, Side]:
    """A side for each name; of weightd's, `daemon` is asked."""
    return {name: stack.enter_context(Side(name, daemon)) for name in names}


def forget(daemon: Daemon) -> None:
    """Remove all checkpoints of a daemon, once nobody holds them any more."""
    with weightd.connect(daemon.socket) as client:
        end = time.monotonic() + 60
        while client.leases():
            if time.monotonic() > end:
                raise SystemExit("leases of children that have ended are still held after a minute")
            time.sleep(0.01)
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)
        before = -1
        while before != (before := client.stats().devices[0].used_bytes):
            time.sleep(0.15)  # memory is returned by a thread


def make_cold(path: Path) -> None:
    """Drop a file, which nobody maps, from the page cache, and make sure that it is gone."""
    end = time.monotonic() + _PATIENCE
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())  # what is not written yet stays
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Pages that are being read, or that a process which ends has mapped, stay at first.
        while (cached := _cached(file.fileno())) is not None:
            if time.monotonic() > end:
                raise SystemExit(f"{path.name} is still in the page cache, at place {cached} of {_PROBES}")
            time.sleep(0.05)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what looking may have brought


def _cached(descriptor: int) -> int | None:
    """The first of several places of a file that is in the page cache; None where none is."""
    step = os.fstat(descriptor).st_size // _PROBES
    for place in range(_PROBES):
        with contextlib.suppress(BlockingIOError):
            os.preadv(descriptor, [bytearray(1)], step * place, os.RWF_NOWAIT)
            return place
    return None


def make_warm(path: Path) -> None:
    """Read a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(16 << 20):
            pass
