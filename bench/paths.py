"""What a daemon keeps of paths that came and went: names, root record, memory.

    python bench/paths.py [--paths 50000] [--size 64KiB] [--budget 1MiB] [--format human|json]

Files of other content, each under a path of its own, are attached one after the other through a small budget and
deleted, under a stand-in for the service manager (tests/support/manager.py). At a fifth, half and all of the paths are
taken: the names that the daemon has, the memory of its root record, and its resident size.

Aim: the same at each of the three; 2 MiB more of either memory is too much.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from _daemon import machine, parse_size, scratch

import weightd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.daemon import Daemon
from support.manager import Manager

AIM_BYTES = 2 << 20


def write(path: Path, number: int, size: int) -> None:
    """A safetensors file of one tensor of `size` bytes, which begins with `number`."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + number.to_bytes(8, "little") + bytes(size - 8))


def taken(daemon: Daemon, manager: Manager, client: weightd.Client) -> dict[str, int]:
    """What the daemon has now."""
    manager.settle()
    root = next(descriptor for name, descriptor in manager.kept if name == "root")
    names = len(client.names())
    return {
        "names": names,
        "kept_descriptors": len(manager.kept),
        "record_bytes": os.fstat(root).st_blocks * 512,
        "rss_bytes": daemon.rss(),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    results: dict[str, Any] = {"machine": machine(), "at": {}}
    with scratch(options.folder) as folder:
        manager = Manager(folder / "notify")
        daemon = Daemon(manager=manager, budget=parse_size(options.budget), pool="0", log_level="error")
        try:
            begun = time.perf_counter()
            with weightd.connect(daemon.socket, timeout=60) as client:
                for number in range(1, options.paths + 1):
                    path = folder / f"checkpoint-{number}.safetensors"
                    write(path, number, parse_size(options.size))
                    client.attach(path).close()
                    path.unlink()
                    if number in (options.paths // 5, options.paths // 2, options.paths):
                        results["at"][number] = taken(daemon, manager, client)
                        print(number, results["at"][number], file=sys.stderr, flush=True)
            results["seconds"] = time.perf_counter() - begun
        finally:
            daemon.kill()
            manager.close()
    return results


def main() -> int:
    """Measure and report; 1 where an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=50_000)
    parser.add_argument("--size", default="64KiB")
    parser.add_argument("--budget", default="1MiB")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    results = measure(options)
    rows = list(results["at"].values())
    first, last = rows[0], rows[-1]
    met = first["names"] == last["names"] and all(
        last[key] - first[key] <= AIM_BYTES for key in ("record_bytes", "rss_bytes")
    )
    if options.format == "json":
        print(json.dumps({**results, "met": met}))
        return not met
    print(results["machine"], f"{results['seconds']:.0f} s", sep="\n")
    print("| paths | names | kept descriptors | root record KiB | RSS MiB |\n|---|---|---|---|---|")
    for number, row in results["at"].items():
        print(
            f"| {number:,} | {row['names']} | {row['kept_descriptors']} | {row['record_bytes'] >> 10} "
            f"| {row['rss_bytes'] / 2**20:.1f} |"
        )
    print("aims met" if met else "AIM MISSED")
    return not met


if __name__ == "__main__":
    sys.exit(main())
