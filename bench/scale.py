"""How what a daemon does grows with what it holds: checkpoints, and blobs.

    python bench/scale.py [--checkpoints 125,250,500,1000] [--tensors 100]
                          [--large 5,10,20,40] [--large-tensors 10000] [--rounds 5] [--format human|json]

A daemon in host memory, under a stand-in for the service manager (tests/support/manager.py), is filled step by step.
At each size it is timed: one more load, its removal, naming what is resident, a pin, an attach, `ls`, `stats`, the map
of the device, the tensors of one checkpoint, reading all events, and the restart after kill -9 that adopts everything.
Then the exponent of each: the slope of log(time) over log(size), from the upper half of the sizes, where what does not
grow matters least. Tensors have 8 bytes.
At each size it is timed: one more load, its removal, naming what is resident, a pin, an attach, `ls`, `stats`, a page
of pairs that share, reading all events, and the restart after kill -9 that adopts everything. Then the exponent of
each: the slope of log(time) over log(size), from the upper half of the sizes, where what does not grow matters least.
Tensors have 8 bytes.

Times are CPU time of the daemon's loop, which a busy machine changes little; that of the restart is wall time.

Aim: no exponent of one operation is above 1.15, which leaves room for n log n and for noise; loads, removals, names,
pins, attaches and lists of tensors do not grow (0.3). So n of these cost n.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _daemon import machine, scratch

import weightd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.daemon import Daemon
from support.manager import Manager

FLAT = ("load", "remove", "name", "pin", "attach", "tensors")
AIM, AIM_FLAT = 1.15, 0.3
EVENTS_PAUSE = 1.0
"""Seconds after which the daemon sends a user all recent events without holding them back."""


def write(path: Path, tensors: int, seed: int) -> None:
    """A safetensors file of tensors of 8 bytes that occur in no other file."""
    header = {
        f"model.layers.{at // 8}.{at % 8}.weight": {"dtype": "U8", "shape": [8], "data_offsets": [at * 8, at * 8 + 8]}
        for at in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(seed.to_bytes(4, "little") + at.to_bytes(4, "little") for at in range(tensors))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def loop_seconds(daemon: Daemon) -> float:
    """CPU time of the thread on which a daemon's loop runs."""
    return int(Path(f"/proc/{daemon.pid}/task/{daemon.pid}/schedstat").read_text().split()[0]) / 1e9


def median(daemon: Daemon, rounds: int, call: Callable[[], object], pause: float = 0.0) -> float:
    """Seconds of the daemon's loop, the median of some rounds; before each is a pause of so many seconds."""
    series = []
    for _ in range(rounds):
        time.sleep(pause)
        begun = loop_seconds(daemon)
        call()
        series.append(loop_seconds(daemon) - begun)
    return statistics.median(series)


def measure(daemon: Daemon, folder: Path, sizes: list[int], tensors: int, rounds: int) -> dict[int, dict[str, float]]:
    """Seconds of each operation, and the daemon's bytes, by number of checkpoints."""
    found: dict[int, dict[str, float]] = {}
    path, there = folder / "c.safetensors", 0

    def load() -> None:
        nonlocal there
        there += 1
        write(path, tensors, there)
        with weightd.connect(daemon.socket, timeout=120) as one:
            one.load_report(path, name=f"c{there}")

    def remove(client: weightd.Client) -> None:
        nonlocal there
        client.remove(f"c{there}")
        there -= 1

    for size in sizes:
        while there < size - rounds:
            load()
        row = found[size] = {"load": median(daemon, size - there, load)}
        for _ in range(rounds):
            load()
        names = iter(range(10**6))
        with weightd.connect(daemon.socket, timeout=120) as client:
            row["remove"] = median(daemon, rounds, lambda: remove(client))
            write(path, tensors, there)
            client.load_report(path)  # from now on these files are known to be resident
            client.attach("c1").close()
            row["name"] = median(daemon, rounds, lambda: client.load_report(path, name=f"also {size} {next(names)}"))  # noqa: B023  # called here
            row["pin"] = median(daemon, rounds, lambda: (client.pin("c1"), client.unpin("c1")))
            row["attach"] = median(daemon, rounds, lambda: client.attach("c1").close())
            row["ls"] = median(daemon, rounds, client.checkpoints)
            row["stats"] = median(daemon, rounds, client.stats)
            row["map"] = median(daemon, rounds, client.device_map)
            row["tensors"] = median(daemon, rounds, lambda: client.tensors("c1"))
            row["sharing"] = median(daemon, rounds, lambda: client.sharing(most=5000))
            row["events"] = median(daemon, rounds, lambda: list(client.events()), EVENTS_PAUSE)
        daemon.kill()
        begun = time.perf_counter()
        daemon.start()
        with weightd.connect(daemon.socket, timeout=120) as client:
            assert len(client.checkpoints()) == size
        row["restart"] = time.perf_counter() - begun
        row["rss_bytes"] = daemon.rss()
        print(size, {key: round(value, 4) for key, value in row.items()}, file=sys.stderr, flush=True)
    return found


def exponents(found: dict[int, dict[str, float]]) -> dict[str, float]:
    """The slope of log(value) over log(size), by least squares over the upper half of the sizes, two at least."""
    upper = sorted(found)[-max(2, len(found) // 2 + 1) :]
    logs = [math.log(size) for size in upper]
    return {
        key: statistics.linear_regression(logs, [math.log(found[size][key]) for size in upper]).slope
        for key in found[upper[0]]
    }


def main() -> int:
    """Measure and report; 1 where an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", default="125,250,500,1000")
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--large", default="5,10,20,40")
    parser.add_argument("--large-tensors", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    missed = []
    with scratch(options.folder) as folder:
        for what, sizes, tensors in (
            ("checkpoints", options.checkpoints, options.tensors),
            ("blobs", options.large, options.large_tensors),
        ):
            if not sizes:
                continue
            manager = Manager(folder / f"notify-{what}", most=1 << 16)
            daemon = Daemon(manager=manager, budget="4GiB", books="6GiB", log_level="error")
            try:
                found = measure(daemon, folder, [int(size) for size in sizes.split(",")], tensors, options.rounds)
            finally:
                daemon.kill()
                manager.close()
            slopes = exponents(found)
            results[what] = {"tensors": tensors, "found": found, "exponents": slopes}
            missed += [
                f"{what}: {key} {slope:.2f}"
                for key, slope in slopes.items()
                if slope > (AIM_FLAT if what == "checkpoints" and key in FLAT else AIM)
            ]
    results["missed"] = missed
    if options.format == "json":
        print(json.dumps(results))
        return bool(missed)
    print(results["machine"])
    for what in ("checkpoints", "blobs"):
        if what not in results:
            continue
        there = results[what]
        keys = list(there["exponents"])
        print(f"\n{what}: checkpoints of {there['tensors']:,} tensors; ms, RSS in MiB\n")
        print(f"| checkpoints | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|")
        for size, row in there["found"].items():
            cells = [f"{row[k] / 2**20:.0f}" if k == "rss_bytes" else f"{row[k] * 1000:.1f}" for k in keys]
            print(f"| {size} | {' | '.join(cells)} |")
        slopes = [f"{there['exponents'][key]:.2f}" for key in keys]
        print(f"| exponent | {' | '.join(slopes)} |")
    print("\naims met" if not missed else f"\nMISSED: {'; '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
