"""What a resident tensor costs the daemon itself, beside its bytes: memory of its process, and of its manifest.

    python bench/books.py [--tensors 20000,60000] [--format human|json]

For each kind of checkpoint a daemon in host memory loads one of so many tensors; its resident size is read when that
has settled; then it is killed, and the size of the next daemon is read, which takes the checkpoint up (under a stand-in
for the service manager). The cost of a tensor is the difference between the two numbers of tensors, divided by theirs:
what a daemon takes anyway falls out. Manifests are memfds that it does not map, so they are counted apart.

`BYTES_OF_TENSOR` in weightd_daemon/core/checkpoint.py is to be no less than the largest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from _daemon import machine, scratch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.daemon import Daemon
from support.manager import Manager
from weightd_daemon.core.checkpoint import BYTES_OF_TENSOR

KINDS = {"64 bytes each": 64, "2 KiB each": 2048, "no bytes": 0}
SETTLED_SECONDS, SETTLED_BYTES = 3.0, 1 << 20


def write(path: Path, tensors: int, length: int) -> None:
    """A safetensors file of so many tensors of `length` bytes, no two alike."""
    names = [f"model.layers.{number}.mlp.experts.weight" for number in range(tensors)]
    header = {
        name: {"dtype": "U8", "shape": [length], "data_offsets": [at * length, (at + 1) * length]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(tensors if length else 0):
            file.write(at.to_bytes(8, "little").ljust(length, b"\1"))


def settled(daemon: Daemon) -> int:
    """Resident bytes of the daemon, when they no longer change: what was freed goes back a second later."""
    before = daemon.rss()
    while True:
        time.sleep(SETTLED_SECONDS)
        now = daemon.rss()
        if abs(now - before) < SETTLED_BYTES:
            return now
        before = now


def measure(folder: Path, tensors: int, length: int) -> dict[str, int]:
    """Resident bytes after a load and after a restart, bytes of the manifest, and what the books say."""
    path = folder / "m.safetensors"
    write(path, tensors, length)
    manager = Manager(folder / "notify")
    daemon = Daemon(manager=manager, books="0", log_level="warning")
    try:
        client = daemon.connect(600.0)
        client.load(path, name="m", pin=True)
        found = {"loaded": settled(daemon)}
        with client.attach("m", manifest_only=True):
            books = client.stats().books
            assert books is not None
        found["books"] = books.used_bytes
        found["manifest"] = books.used_bytes - tensors * BYTES_OF_TENSOR
        client.close()
        daemon.kill()
        daemon.start()
        found["restarted"] = settled(daemon)
    finally:
        daemon.close(check=False)
        manager.close()
        path.unlink()
        (folder / "notify").unlink(missing_ok=True)
    return found


def main() -> None:
    """Print the cost of a tensor of each kind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tensors", default="20000,60000")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    few, many = (int(number) for number in options.tensors.split(","))
    rows = []
    with scratch(None) as folder:
        for kind, length in KINDS.items():
            small, large = (measure(folder, tensors, length) for tensors in (few, many))
            each = {key: round((large[key] - small[key]) / (many - few)) for key in large}
            rows.append({"kind": kind, **each})
    if options.format == "json":
        print(json.dumps({"machine": machine(), "pid": os.getpid(), "bytes_of_tensor": BYTES_OF_TENSOR, "rows": rows}))
        return
    print(f"bytes a tensor, from {few} to {many} tensors; BYTES_OF_TENSOR is {BYTES_OF_TENSOR}")
    for row in rows:
        print(f"{row['kind']:>14}: {row['loaded']} after the load, {row['restarted']} after a restart, "
              f"{row['manifest']} in the manifest")  # fmt: skip


if __name__ == "__main__":
    main()
