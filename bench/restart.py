"""How long a service is away: from kill -9 to the first attach of the next daemon, by what is resident.

    python bench/restart.py [--sizes 64MiB,1GiB,8GiB] [--rounds 7] [--many 100] [--format human|json]

A daemon in host memory, under a stand-in for the service manager (tests/support/manager.py), is killed and started at
once, as `systemctl` would, but without systemd's own pause. Files are sparse, and each tensor begins with bytes of its
own: the memory is written, and little is read from the disk. At last `--many` checkpoints of 1,000 tensors each are
resident: what the daemon takes for itself, and how long listing takes.

Aim: under 1 s with 8 GiB resident, whatever the bytes; under 150 MB and 100 ms with 100 checkpoints of 1,000 tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _daemon import Spread, machine, parse_size, scratch

import weightd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.daemon import Daemon
from support.manager import Manager

AIM_SECONDS, AIM_BYTES, AIM_LIST_SECONDS = 1.0, 150 << 20, 0.1
TENSORS, MANY_TENSORS = 64, 1000


def write_sparse(path: Path, size: int, tensors: int, seed: int) -> None:
    """A safetensors file of about `size` bytes, of which the first 16 of each tensor are its own and the rest zero."""
    length = max(16, size // tensors)
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(tensors)]
    header = {
        name: {"dtype": "U8", "shape": [length], "data_offsets": [at * length, (at + 1) * length]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + tensors * length)
        for at in range(tensors):
            file.seek(start + at * length)
            file.write(seed.to_bytes(8, "little") + at.to_bytes(8, "little"))


def restarts(daemon: Daemon, name: str, rounds: int) -> list[float]:
    """Seconds from the kill to the first attach."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        daemon.kill()
        daemon.start()
        with weightd.connect(daemon.socket) as client, client.attach(name):
            found.append(time.perf_counter() - begun)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it; times in seconds."""
    results: dict[str, Any] = {"machine": machine(), "seconds": {}}
    with scratch(options.folder) as folder:
        manager = Manager(folder / "notify")
        for text in options.sizes.split(","):
            size = parse_size(text)
            daemon = Daemon(manager=manager, budget=size * 9 // 8)
            try:
                write_sparse(folder / "c.safetensors", size, TENSORS, 1)
                with weightd.connect(daemon.socket, timeout=60) as client:
                    client.load_report(folder / "c.safetensors", name="c")
                results["seconds"][text] = Spread.of(restarts(daemon, "c", options.rounds))._asdict()
                with weightd.connect(daemon.socket, timeout=60) as client:
                    client.remove("c")
            finally:
                daemon.close(check=False)
        daemon = Daemon(manager=manager)
        try:
            for number in range(options.many):
                write_sparse(folder / "c.safetensors", 0, MANY_TENSORS, number)
                with weightd.connect(daemon.socket, timeout=60) as client:
                    client.load_report(folder / "c.safetensors", name=f"c{number}")
            results["many"] = {"before_bytes": daemon.rss()}
            results["many"]["restart_seconds"] = Spread.of(restarts(daemon, "c0", options.rounds))._asdict()
            with weightd.connect(daemon.socket, timeout=60) as client:
                client.ping()
                for what, call in (("list", client.checkpoints), ("stats", client.stats)):
                    series = []
                    for _ in range(options.rounds):
                        begun = time.perf_counter()
                        call()
                        series.append(time.perf_counter() - begun)
                    results["many"][f"{what}_seconds"] = Spread.of(series)._asdict()
            results["many"]["after_bytes"] = daemon.rss()
        finally:
            daemon.close(check=False)
            manager.close()
    return results


def show(results: dict[str, Any], many: int) -> None:
    """For people."""
    print(f"machine: {results['machine']}")
    print("from kill -9 to the first attach:")
    for text, spread in results["seconds"].items():
        print(f"  {text:>7} resident: {Spread(**spread).show('ms', 1000, 0)}")
    there = results["many"]
    print(f"with {many} checkpoints of {MANY_TENSORS} tensors:")
    print(f"  restart: {Spread(**there['restart_seconds']).show('ms', 1000, 0)}")
    print(f"  ls:      {Spread(**there['list_seconds']).show('ms', 1000, 1)}")
    print(f"  stats:   {Spread(**there['stats_seconds']).show('ms', 1000, 1)}")
    print(f"  the daemon takes {there['before_bytes'] >> 20} MiB, the next one {there['after_bytes'] >> 20} MiB")
    slow = [text for text, spread in results["seconds"].items() if spread["median"] >= AIM_SECONDS]
    large = max(there["before_bytes"], there["after_bytes"]) >= AIM_BYTES
    late = max(there["list_seconds"]["median"], there["stats_seconds"]["median"]) >= AIM_LIST_SECONDS
    print(f"aims: {'missed' if slow or large or late else 'met'}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64MiB,1GiB,8GiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--many", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    results = measure(options)
    if options.format == "json":
        print(json.dumps(results, indent=2))
    else:
        show(results, options.many)


if __name__ == "__main__":
    main()
