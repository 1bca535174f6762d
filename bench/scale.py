"""How what a daemon does grows with what it holds and serves: checkpoints, blobs, names, and clients.

    python bench/scale.py [--checkpoints 125,250,500,1000] [--tensors 100]
                          [--large 5,10,20,40] [--large-tensors 10000]
                          [--names 250,500,1000] [--clients 50,100,200]
                          [--rounds 5] [--format human|json] [--results FOLDER]

A daemon in host memory, under a stand-in for the service manager (tests/support/manager.py), is filled step by step.
At each size it is timed: one more load, its removal, naming what is resident, a pin, an attach, `ls`, `stats`, the map
of the device, the tensors of one checkpoint, a page of pairs that share, reading all events, and the restart after
kill -9 that adopts everything. Tensors have 8 bytes. With names of one checkpoint, and with clients that hold a lease
each, it is timed: a name, a pin, an attach, `ls`, `ps`, `stats`.

Then the exponent of each, by round: the slope of log(time) over log(size), from the upper half of the sizes, where what
does not grow matters least.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _daemon import machine, scratch
from _results import Comparison, Report, add_options

import weightd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.daemon import Daemon
from support.manager import Manager

Samples = dict[int, dict[str, list[float]]]
"""Samples of each operation, by size."""

FLAT = ("load", "remove", "name", "pin", "attach", "tensors")
WALL = "restart"
MEMORY = "rss_bytes"
RESTARTS = 2
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


def timed(daemon: Daemon, rounds: int, call: Callable[[], object], pause: float = 0.0) -> list[float]:
    """Seconds of the daemon's loop, of some rounds; before each is a pause of so many seconds."""
    series = []
    for _ in range(rounds):
        time.sleep(pause)
        begun = loop_seconds(daemon)
        call()
        series.append(loop_seconds(daemon) - begun)
    return series


def say(size: int, row: dict[str, list[float]]) -> None:
    """Progress."""
    medians = {key: round(statistics.median(values), 4) for key, values in row.items()}
    print(size, medians, file=sys.stderr, flush=True)


def measure(daemon: Daemon, folder: Path, sizes: list[int], tensors: int, rounds: int) -> Samples:
    """Seconds of each operation, and the daemon's bytes, by number of checkpoints."""
    found: Samples = {}
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
        row = found[size] = {"load": timed(daemon, size - there, load)}
        for _ in range(rounds):
            load()
        names = iter(range(10**6))
        with weightd.connect(daemon.socket, timeout=120) as client:
            row["remove"] = timed(daemon, rounds, lambda: remove(client))
            write(path, tensors, there)
            client.load_report(path)  # from now on these files are known to be resident
            client.attach("c1").close()
            row["name"] = timed(daemon, rounds, lambda: client.load_report(path, name=f"also {size} {next(names)}"))  # noqa: B023  # called here
            row["pin"] = timed(daemon, rounds, lambda: (client.pin("c1"), client.unpin("c1")))
            row["attach"] = timed(daemon, rounds, lambda: client.attach("c1").close())
            row["ls"] = timed(daemon, rounds, client.checkpoints)
            row["stats"] = timed(daemon, rounds, client.stats)
            row["map"] = timed(daemon, rounds, client.device_map)
            row["tensors"] = timed(daemon, rounds, lambda: client.tensors("c1"))
            row["sharing"] = timed(daemon, rounds, lambda: client.sharing(most=5000))
            row["events"] = timed(daemon, rounds, lambda: list(client.events()), EVENTS_PAUSE)
        row[WALL], row[MEMORY] = [], []
        for _ in range(RESTARTS):
            daemon.kill()
            begun = time.perf_counter()
            daemon.start()
            with weightd.connect(daemon.socket, timeout=120) as client:
                assert len(client.checkpoints()) == size
            row[WALL].append(time.perf_counter() - begun)
            row[MEMORY].append(daemon.rss())
        say(size, row)
    return found


def measure_around(
    daemon: Daemon, folder: Path, sizes: list[int], rounds: int, add: Callable[[int], object]
) -> Samples:
    """Seconds of each operation on one checkpoint, while `add` brings more of something around it."""
    found: Samples = {}
    path, there = folder / "one.safetensors", 0
    write(path, 100, seed=0)
    with weightd.connect(daemon.socket, timeout=120) as client:
        client.load_report(path, name="one")
        for size in sizes:
            for number in range(there, size):
                add(number)
            there = size
            calls = {
                "name": lambda: client.load_report(path, name="another"),
                "pin": lambda: (client.pin("one"), client.unpin("one")),
                "attach": lambda: client.attach("one").close(),
                "ls": client.checkpoints,
                "ps": client.leases,
                "stats": client.stats,
            }
            row = found[size] = {key: timed(daemon, rounds, call) for key, call in calls.items()}
            say(size, row)
    return found


def measure_names(daemon: Daemon, folder: Path, sizes: list[int], rounds: int) -> Samples:
    """By number of names of one checkpoint."""
    with weightd.connect(daemon.socket, timeout=120) as client:
        path = folder / "one.safetensors"
        return measure_around(daemon, folder, sizes, rounds, lambda n: client.load_report(path, name=f"also {n}"))


def measure_clients(daemon: Daemon, folder: Path, sizes: list[int], rounds: int) -> Samples:
    """By number of connections that hold a lease."""
    with ExitStack() as stack:

        def add(_: int) -> None:
            time.sleep(0.005)  # a user may connect 250 times a second
            client = stack.enter_context(weightd.connect(daemon.socket, timeout=120))
            stack.enter_context(client.attach("one"))

        return measure_around(daemon, folder, sizes, rounds, add)


def exponents(found: Samples) -> dict[str, list[float]]:
    """For each round the slope of log(value) over log(size), by least squares.

    Of the upper half of the sizes, two at least, and of as many rounds as there are of each size.
    """
    upper = sorted(found)[-max(2, len(found) // 2 + 1) :]
    logs = [math.log(size) for size in upper]
    return {
        key: [
            statistics.linear_regression(logs, [math.log(value) for value in values]).slope
            for values in zip(*(found[size][key] for size in upper), strict=False)
        ]
        for key in found[upper[0]]
    }


FILLS: dict[str, Callable[[Daemon, Path, list[int], argparse.Namespace], Samples]] = {
    "checkpoints": lambda daemon, folder, sizes, options: measure(
        daemon, folder, sizes, options.tensors, options.rounds
    ),
    "blobs": lambda daemon, folder, sizes, options: measure(
        daemon, folder, sizes, options.large_tensors, options.rounds
    ),
    "names": lambda daemon, folder, sizes, options: measure_names(daemon, folder, sizes, options.rounds),
    "clients": lambda daemon, folder, sizes, options: measure_clients(daemon, folder, sizes, options.rounds),
}
"""What a daemon is filled with."""


def show(what: str, found: Samples, slopes: dict[str, float]) -> None:
    """A table of medians, and of exponents below it."""
    print(f"\n{what}; ms, RSS in MiB\n")
    print(f"| {what} | {' | '.join(slopes)} |\n|---{'|---' * len(slopes)}|")
    for size, row in found.items():
        medians = {key: statistics.median(values) for key, values in row.items()}
        cells = [f"{medians[k] / 2**20:.0f}" if k == MEMORY else f"{medians[k] * 1000:.1f}" for k in slopes]
        print(f"| {size} | {' | '.join(cells)} |")
    print(f"| exponent | {' | '.join(f'{slope:.2f}' for slope in slopes.values())} |")


def main() -> int:
    """Measure and report; 1 where an aim is missed and no results are written, in which it can be seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", default="125,250,500,1000")
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--large", dest="blobs", default="5,10,20,40", help="checkpoints of --large-tensors tensors")
    parser.add_argument("--large-tensors", type=int, default=10_000)
    parser.add_argument("--names", default="250,500,1000")
    parser.add_argument("--clients", default="50,100,200")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    add_options(parser, rounds=5)
    options = parser.parse_args()
    asked = {what: [int(size) for size in sizes.split(",")] for what in FILLS if (sizes := getattr(options, what))}
    parameters = {what: ", ".join(map(str, sizes)) for what, sizes in asked.items()}
    report = Report(
        "scale", {**parameters, "tensors": options.tensors, "tensors of a large one": options.large_tensors}
    )
    results: dict[str, Any] = {"machine": machine()}
    missed = []
    with scratch(options.folder) as folder:
        for what, sizes in asked.items():
            manager = Manager(folder / f"notify-{what}", most=1 << 16)
            daemon = Daemon(manager=manager, budget="4GiB", books="6GiB", log_level="error")
            try:
                found = FILLS[what](daemon, folder, sizes, options)
            finally:
                daemon.kill()
                manager.close()
            slopes = exponents(found)
            middle = {key: statistics.median(values) for key, values in slopes.items()}
            results[what] = {"found": found, "exponents": middle}
            for key, slope in middle.items():
                aim = AIM if what in {"blobs"} or key not in FLAT else AIM_FLAT
                if slope > aim:
                    missed.append(f"{what}: {key} {slope:.2f}")
                report.add(Comparison(
                    f"{what}: {key}", f"{key} over {what}", "", {"weightd": slopes[key]}, f"at most {aim}",
                    aims={"weightd": aim},
                ))  # fmt: skip
    report.write(options.results)
    results["missed"] = missed
    if options.format == "json":
        print(json.dumps(results))
    else:
        print(results["machine"])
        for what in asked:
            show(what, results[what]["found"], results[what]["exponents"])
        print("\naims met" if not missed else f"\nMISSED: {'; '.join(missed)}")
    return bool(missed) and options.results is None


if __name__ == "__main__":
    sys.exit(main())
