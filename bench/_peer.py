"""Children that load checkpoints in one way, when they are told. For bench/peers.py and bench/memory.py: WAY.

A line of standard input is a JSON list: `["load", PATH]`, `["keep", PATH, ...]` or `["drop"]`. Each is answered by a
line. `load` and `keep` fork a child, which has all imports behind it and has loaded nothing yet, and which loads the
files. It is timed until the tensors are there, and until a byte of each page of each tensor was read. Where they are to
be kept, it waits for `drop`.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing  # registers how tensors are sent

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    State = dict[str, torch.Tensor]
    Load = Callable[[str], State]

PAGE = 4096
THROUGH_TORCH = "torch.multiprocessing"
"""The parent has the tensors in shared memory, and sends them to children that ask."""


def with_weightd() -> Load:
    """Attach; the daemon first loads what is not resident."""
    import grpc  # noqa: F401  # a load needs it, and no import is timed

    import weightd.torch

    return weightd.torch.load_file


def with_safetensors(backend: str) -> Load:
    from safetensors.torch import load_file

    return lambda path: load_file(path, backend=backend)


def with_fastsafetensors() -> Load:
    """Without GPUDirect, which needs a GPU; otherwise as it comes."""
    from fastsafetensors import fastsafe_open

    def load(path: str) -> State:
        with fastsafe_open(path, nogds=True) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping

    return load


def with_runai() -> Load:
    """As it comes; the tensors belong to the caller."""
    from runai_model_streamer import SafetensorsStreamer

    def load(path: str) -> State:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            return dict(streamer.get_tensors())

    return load


WAYS: dict[str, Callable[[], Load]] = {
    "weightd": with_weightd,
    "mmap": lambda: with_safetensors("mmap"),
    "pread": lambda: with_safetensors("pread"),
    "fastsafetensors": with_fastsafetensors,
    "runai": with_runai,
    THROUGH_TORCH: lambda: with_safetensors("pread"),  # by which the parent loads
}


def touch(state: State) -> int:
    """Read a byte of each page of each tensor, and the last one. Returns their sum, by which loads are compared."""
    total = 0
    for tensor in state.values():
        flat = tensor.reshape(-1).view(torch.uint8)
        total += int(flat[::PAGE].sum(dtype=torch.int64)) + int(flat[-1])
    return total


def child(load: Load, paths: list[str], pipe: Connection, keep: bool) -> None:
    """Load, say what it took in seconds, and wait if the tensors are to be kept."""
    start = time.perf_counter()
    states = [load(path) for path in paths]
    loaded = time.perf_counter()
    total = sum(map(touch, states))
    read = time.perf_counter()
    pipe.send({"load": loaded - start, "read": read - start, "tensors": sum(map(len, states)), "sum": total})
    if keep:
        pipe.recv()


class Parent:
    """Forks the children of one way, and knows those that keep what they loaded."""

    def __init__(self, way: str) -> None:
        self._sends = way == THROUGH_TORCH
        self._load = WAYS[way]()
        self._sent: dict[str, State] = {}
        self._kept: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._fork = multiprocessing.get_context("fork")

    def load(self, paths: list[str], keep: bool) -> dict[str, Any]:
        """Have a child load the files. Returns its answer."""
        here, there = self._fork.Pipe()

        def asked(path: str) -> State:
            there.send(path)
            found: State = there.recv()
            return found

        for path in paths if self._sends else ():
            if path not in self._sent:
                self._sent[path] = {name: tensor.share_memory_() for name, tensor in self._load(path).items()}
        process = self._fork.Process(
            target=child, args=(asked if self._sends else self._load, paths, there, keep), daemon=True
        )
        process.start()
        for _ in paths if self._sends else ():
            here.send(self._sent[here.recv()])
        if not here.poll(120):
            raise SystemExit(f"a child with {paths} has not answered for two minutes")
        answer: dict[str, Any] = here.recv() | {"pid": process.pid}
        if keep:
            self._kept.append((process, here))
        else:
            process.join()
        return answer

    def drop(self) -> None:
        """Have all children end."""
        for process, pipe in self._kept:
            pipe.send("drop")
            process.join()
        self._kept.clear()
        self._sent.clear()


def main(way: str) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    parent = Parent(way)
    gc.collect()
    gc.disable()
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        verb, *paths = json.loads(line)
        answer: dict[str, Any] = {}
        if verb == "drop":
            parent.drop()
        else:
            answer = parent.load(paths, verb == "keep")
        print(json.dumps(answer), file=answers, flush=True)
    parent.drop()


if __name__ == "__main__":
    main(sys.argv[1])
