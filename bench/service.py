"""What asking a daemon costs that holds many checkpoints, and what its own memory is then.

    python bench/service.py [--checkpoints 100] [--tensors 1000] [--rounds 50] [--folder DIR] [--format human|json]

The checkpoints' tensors are 256 bytes each and all different, so the books are as large as those of real checkpoints,
and the memory is not. Everything is asked by one client, over and over: `ls` and `stats` are the calls behind these
commands (a command takes a third of a second more to start), `metrics` is a GET of the page. Aims: each under 100 ms,
the daemon's own memory below 150 MB.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _daemon import Daemon, Spread, machine, scratch, serving

import weightd

if TYPE_CHECKING:
    from collections.abc import Callable

_LENGTH = 256
_GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def write_small(path: Path, tensors: int, seed: int) -> None:
    """A safetensors file of many small tensors that no other file has."""
    header = {
        f"model.layers.{number // 9}.part.{number % 9}.weight": {
            "dtype": "U8", "shape": [_LENGTH], "data_offsets": [number * _LENGTH, (number + 1) * _LENGTH],
        }
        for number in range(tensors)
    }  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + np.random.default_rng(seed).bytes(tensors * _LENGTH))


def page(address: Path) -> bytes:
    """The metrics."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(address))
        connection.sendall(_GET)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    answer = b"".join(parts)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"no metrics: {answer[:100]!r}")
    return answer


def seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """How long each call takes; the first is not counted."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[1:]


def measure(daemon: Daemon, address: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fill the daemon, then ask."""
    with weightd.connect(daemon.socket, timeout=60.0) as client:
        for number in range(options.checkpoints):
            path = folder / f"{number}.safetensors"
            write_small(path, options.tensors, number)
            client.load(path, name=f"checkpoint-{number}")
            path.unlink()
        stats = client.stats()
        if (stats.checkpoints, stats.blobs) != (options.checkpoints, options.checkpoints * options.tensors):
            raise SystemExit(f"not everything is resident: {stats}")
        asked: dict[str, Callable[[], object]] = {
            "ls": client.checkpoints,
            "stats": client.stats,
            "metrics": lambda: page(address),
        }
        taken = {name: seconds(call, options.rounds) for name, call in asked.items()}
    return {
        "machine": machine(),
        "checkpoints": options.checkpoints,
        "tensors": options.tensors,
        "seconds": {name: Spread.of(values)._asdict() for name, values in taken.items()},
        "peak_rss": daemon.peak_rss()["daemon"],
    }


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="What asking a daemon costs that holds many checkpoints.")
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    with scratch(options.folder) as folder:
        address = folder / "metrics.sock"
        with serving(folder, "service", "--budget", "2GiB", "--metrics", str(address)) as daemon:
            found = measure(daemon, address, folder, options)
    if options.format == "json":
        json.dump(found, sys.stdout, indent=2)
        print()
        return 0
    print(f"{options.checkpoints} checkpoints of {options.tensors} tensors")
    for name, spread in found["seconds"].items():
        print(f"{name:<8} {Spread(**spread).show('ms', 1e3)}, most {spread['most'] * 1e3:.2f}")
    print(f"daemon   {found['peak_rss'] / 1e6:.0f} MB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
