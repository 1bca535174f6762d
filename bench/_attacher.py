"""Attach to checkpoints in turns, and time each step. For bench/attach.py: SOCKET ROUNDS NAME..., or
SOCKET ROUNDS --few NAME TENSOR: all tensors of one checkpoint, and one of them, or
SOCKET ROUNDS --beside NAME PATH: the checkpoint of a file, beside safetensors' own load of that file, or
SOCKET ROUNDS --touch NAME PATH: the same up to a read of each page, with `populate` and without.

The whole is timed without the clocks inside it: every other attach runs as users run it, the ones between are taken
apart.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

import safetensors.torch
import torch

import weightd
import weightd.torch
from weightd import _manifest, _tensor_rows, attachment
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
            (_tensor_rows.TensorRows.copies, "func", "manifest: equal addresses"),
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


def clocked(act: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a call, and what it returned."""
    gc.collect()
    start = time.perf_counter()
    result = act()
    return (time.perf_counter() - start) * 1e3, result


def beside(socket: str, rounds: int, name: str, path: str) -> dict[str, Any]:
    """Times of each round, in milliseconds; the ways take turns, and each makes every tensor but "attach alone"."""
    gc.disable()
    os.environ["WEIGHTD_SOCKET"] = socket  # for load_file
    client = weightd.connect(socket)

    def attached() -> tuple[Any, ...]:
        attachment = client.attach(name)
        return attachment, attachment.state_dict()

    def connected() -> tuple[Any, ...]:
        new = weightd.connect(socket)
        attachment = new.attach(name)
        return attachment, attachment.state_dict(), new

    ways: dict[str, Callable[[], Any]] = {
        "safetensors": lambda: safetensors.torch.load_file(path),
        "attach alone": lambda: (client.attach(name),),
        "attach": attached,
        "connect and attach": connected,
        "weightd.torch.load_file": lambda: weightd.torch.load_file(path),
    }
    found: dict[str, Any] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, act in ways.items():
            ms, result = clocked(act)
            if round_:  # the first imports, and connects the client that load_file shares
                found[way].append(ms)
            if isinstance(result, tuple):
                result[0].close()
                if len(result) > 2:
                    result[2].close()
            del result
    return found


def touch(socket: str, rounds: int, name: str, path: str) -> dict[str, Any]:
    """Times of each round, in milliseconds: to make all tensors, and then to read a byte of each of their pages."""
    gc.disable()
    client = weightd.connect(socket)

    def attached(*, populate: bool) -> tuple[Any, ...]:
        attachment = client.attach(name, populate=populate)
        return attachment.state_dict(), attachment

    ways: dict[str, Callable[[], Any]] = {
        "safetensors": lambda: (safetensors.torch.load_file(path),),
        "attach": lambda: attached(populate=False),
        "attach, populate": lambda: attached(populate=True),
    }
    found: dict[str, Any] = {f"{way}: {what}": [] for way in ways for what in ("make", "touch", "both")}
    for _ in range(rounds):
        for way, act in ways.items():
            made, result = clocked(act)
            pages = [tensor.view(torch.uint8).reshape(-1)[::4096] for tensor in result[0].values()]
            touched, _ = clocked(lambda pages=pages: [page.sum() for page in pages])
            for what, ms in (("make", made), ("touch", touched), ("both", made + touched)):
                found[f"{way}: {what}"].append(ms)
            for lent in result[1:]:
                lent.close()
            del result, pages
    return found


if __name__ == "__main__":
    assert handles_pb2.HandleRequest  # protobuf is imported before the clock starts
    socket, rounds, *rest = sys.argv[1:]
    if parted := {"--few": few, "--beside": beside, "--touch": touch}.get(rest[0]):
        print(json.dumps(parted(socket, int(rounds), *rest[1:])))
    else:
        print(json.dumps(main(socket, int(rounds), rest)))
