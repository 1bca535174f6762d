"""Attach to checkpoints in turns, and time each step. For bench/attach.py: SOCKET ROUNDS NAME..., or
SOCKET ROUNDS --few NAME TENSOR: all tensors of one checkpoint, and one of them.

The whole is timed without the clocks inside it: every other attach runs as users run it, the ones between are taken
apart.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

import torch

import weightd
import weightd.torch
from weightd import _manifest, attachment
from weightd._mapping import host
from weightd._proto.v1 import handles_pb2
from weightd._transport import handle_socket

if TYPE_CHECKING:
    from collections.abc import Callable


class Clocks:
    """Wraps functions of the library so that their time is added up, and puts them back."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._wrapped: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        places: list[tuple[Any, str, str]] = [
            (handle_socket.SocketClient, "__init__", "connect and hello"),
            (handle_socket.SocketClient, "attach", "attach request and answer"),
            (host, "map_lease", "map the manifest"),
            (host, "map_segment", "map the segments"),
            (_manifest.Manifest, "__init__", "manifest: protobuf"),
            (_manifest.Manifest, "_read", "manifest: columns to rows"),
            (attachment, "_copies", "manifest: equal addresses"),
            (attachment.Attachment, "state_dict", "make the tensors"),
        ]
        for owner, name, label in places:
            self._replace(owner, name, self._timed(getattr(owner, name), label))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._wrapped:
            setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, value: object) -> None:
        self._wrapped.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[label] += time.perf_counter() - start

        return timed


def attach(socket: str, name: str, *tensors: str) -> float:
    """Connect, attach and make all tensors, or those. Returns milliseconds; letting go of them is not counted."""
    gc.collect()
    start = time.perf_counter()
    client = weightd.connect(socket)
    attached = client.attach(name, tensors=tensors)
    state = attached.state_dict()
    seconds = time.perf_counter() - start
    assert sum(tensor.numel() for tensor in state.values())
    attached.close()
    client.close()
    return seconds * 1e3


def main(socket: str, rounds: int, names: list[str]) -> dict[str, Any]:
    """Times of each round by step, in milliseconds, for each name."""
    gc.disable()  # or a round pays for the garbage of those before it
    found: dict[str, Any] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            total = attach(socket, name)
            with Clocks() as clocks:
                clocked = attach(socket, name)
            steps = {step: seconds * 1e3 for step, seconds in clocks.seconds.items()}
            steps["everything else"] = clocked - sum(steps.values())
            found[name].append({"total": total, **steps})
    return found | {"torch": torch.__version__, "grpc": "grpc" in sys.modules}


def few(socket: str, rounds: int, name: str, tensor: str) -> dict[str, Any]:
    """Times of each round, in milliseconds, for all tensors and for one, in turns."""
    gc.disable()
    times = [(attach(socket, name), attach(socket, name, tensor)) for _ in range(rounds)]
    return {"all": [every for every, _ in times], "one": [one for _, one in times], "grpc": "grpc" in sys.modules}


if __name__ == "__main__":
    assert handles_pb2.HandleRequest  # protobuf is imported before the clock starts
    socket, rounds, *rest = sys.argv[1:]
    if rest[0] == "--few":
        print(json.dumps(few(socket, int(rounds), *rest[1:])))
    else:
        print(json.dumps(main(socket, int(rounds), rest)))
