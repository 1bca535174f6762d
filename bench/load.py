"""Load throughput, hashing and comparing included, beside `sendfile` of the same file into a fresh memfd.

    python bench/load.py [--size 2GiB] [--rounds 9] [--ping-size 4GiB] [--folder DIR] [--format human|json]
        [--results FOLDER]

Everything is read from a warm page cache. `sendfile` runs on one thread: it is the least that filling fresh memory
costs there, for it neither looks at the bytes nor copies them twice. A load reads on as many threads as there are cores
(4 at most), which is how it makes up for its second copy. The two take turns, so that a machine that changes its speed
changes it for both; a ratio is the median of the ratios of neighbours.

- fresh: the daemon keeps no pool, so that each load takes new memory from the kernel.
  Aim: at least 1.3 × the speed of sendfile.
- pooled: what was loaded before was removed, its memory is still there, the file is another.
  Aim: at least 3 × the speed of sendfile. On two cores it is out of reach: a bare loop without a daemon does not get
  there (bench/results/2026-11-29-loads.md).
- hashing: the same loads by a daemon whose loaders do not hash. Aim: less than 3 % difference in fresh memory.
- ping: how long a control call takes while a large load runs, and what the daemon's own memory is. Aims: p99 under
  50 ms, 150 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _daemon import Daemon, Spread, machine, parse_size, percentile, scratch, serving, write_checkpoint
from _results import Comparison, Report, add_options

import weightd

HERE = Path(__file__).parent
GB = 1e9
TENSORS = 291
NAME = "checkpoint-of-bench-load"
LEAST_SPEED = {"fresh": 1.3, "pooled": 3.0}
"""Aims, by the speed of sendfile."""
PLAIN, SENDFILE = "weightd, not hashing", "sendfile, one thread"
_SENDFILE_CHUNK = 1 << 30


def sendfile_seconds(path: Path) -> float:
    """How long one thread takes to send a file into a fresh memfd."""
    target = os.memfd_create("bench", os.MFD_CLOEXEC)
    with path.open("rb", buffering=0) as source:
        size = os.fstat(source.fileno()).st_size
        os.ftruncate(target, size)
        done = 0
        start = time.perf_counter()
        while done < size:
            done += os.sendfile(target, source.fileno(), done, min(_SENDFILE_CHUNK, size - done))
        seconds = time.perf_counter() - start
    os.close(target)
    return seconds


def load_seconds(daemon: Daemon, path: Path) -> float:
    """How long a client waits for a load. Afterwards the checkpoint is removed again, and its memory given back."""
    with weightd.connect(daemon.socket) as client:
        client.ping()  # sets up the channel, which is no part of a load
        start = time.perf_counter()
        result = client.load_report(path, name=NAME)
        seconds = time.perf_counter() - start
        assert result is not None
        if result.read_bytes != result.total_bytes or result.unique_bytes != result.total_bytes:
            raise SystemExit(f"this load shared bytes and measures nothing: {result}")
    with weightd.connect(daemon.socket) as client:
        client.remove(NAME)
        settle(client)
    return seconds


def settle(client: weightd.Client) -> None:
    """Wait until nothing is on its way back to the system."""
    before = -1
    while True:
        used = client.stats().devices[0].used_bytes
        if used == before:
            return
        before = used
        time.sleep(0.15)


def compare(hashing: Daemon, plain: Daemon, files: list[Path], rounds: int) -> dict[str, Any]:
    """Rounds of sendfile, a load, and a load without hashing, the latter two in turns; the first is not counted."""
    seconds: dict[str, list[float]] = {"sendfile": [], "load": [], "load_unhashed": []}
    for number in range(rounds + 1):
        path = files[number % len(files)]
        steps = [("load", hashing), ("load_unhashed", plain)]
        found = {"sendfile": sendfile_seconds(path)}
        for name, daemon in steps if number % 2 else reversed(steps):
            found[name] = load_seconds(daemon, path)
        if number:
            for name, value in found.items():
                seconds[name].append(value)
    size = files[0].stat().st_size
    ratios = [a / b for a, b in zip(seconds["sendfile"], seconds["load"], strict=True)]
    costs = [a / b - 1 for a, b in zip(seconds["load"], seconds["load_unhashed"], strict=True)]
    return {
        "gb_per_s": {
            name: Spread.of([size / GB / value for value in values])._asdict() for name, values in seconds.items()
        },
        "ratio_to_sendfile": Spread.of(ratios)._asdict(),
        "hashing_costs": Spread.of(costs)._asdict(),
        "seconds": seconds,
    }


def measure_pings(daemon: Daemon, path: Path) -> dict[str, Any]:
    """Ping from another process, idle and while `path` loads."""
    found = {}
    for name in ("idle", "loading"):
        command = [sys.executable, str(HERE / "_pinger.py"), str(daemon.socket)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pinger:
            assert pinger.stdout is not None
            pinger.stdout.readline()
            seconds = 1.0
            if name == "idle":
                time.sleep(seconds)
            else:
                with weightd.connect(daemon.socket) as client:
                    result = client.load_report(path, name=NAME)
                assert result is not None
                seconds = result.seconds
            pings: list[float] = json.loads(pinger.communicate("stop\n")[0])
        found[name] = {
            "pings": len(pings), "p50_ms": percentile(pings, 0.5), "p99_ms": percentile(pings, 0.99),
            "most_ms": max(pings), "seconds": seconds,
        }  # fmt: skip
    return found | {"peak_rss": daemon.peak_rss(), "bytes": path.stat().st_size}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    results: dict[str, Any] = {"machine": machine(), "size": options.size, "rounds": options.rounds}
    unhashed = HERE / "_unhashed.py"
    with scratch(options.folder) as folder:
        files = [folder / "a.safetensors", folder / "b.safetensors"]
        for seed, path in enumerate(files):
            write_checkpoint(path, options.size, TENSORS, seed)
        sizes = ("--budget", str(options.size * 2))
        for name, pool, used in (("fresh", 0, files[:1]), ("pooled", options.size * 2, files)):
            with ExitStack() as stack:
                hashing = stack.enter_context(serving(folder, "hashing", *sizes, "--pool", str(pool)))
                plain = stack.enter_context(serving(folder, "plain", *sizes, "--pool", str(pool), script=unhashed))
                if name == "pooled":  # the first round fills the pools, and is not counted
                    load_seconds(hashing, files[1]), load_seconds(plain, files[1])
                results[name] = compare(hashing, plain, used, options.rounds)
                results[name]["peak_rss"] = hashing.peak_rss()
        for path in files:
            path.unlink()
        if options.ping_size:
            large = folder / "large.safetensors"
            write_checkpoint(large, options.ping_size, TENSORS, 9)
            with serving(folder, "pinged", "--budget", str(options.ping_size * 9 // 8)) as daemon:
                results["ping"] = measure_pings(daemon, large)
    return results


def record(results: dict[str, Any], report: Report) -> None:
    """Put the seconds into the form of results."""
    for name, predicted, unhashed in (
        ("fresh", "by speed at least 1.3 × sendfile; 1.0 × without hashing", 1.0),
        (
            "pooled",
            "by speed at least 3 × sendfile, which was found to be out of reach on two cores; 1.2 × without hashing",
            1.2,
        ),
    ):
        seconds = results[name]["seconds"]
        samples = {
            "weightd": seconds["load"],
            PLAIN: seconds["load_unhashed"],
            SENDFILE: seconds["sendfile"],
        }
        aims = {PLAIN: unhashed, SENDFILE: 1 / LEAST_SPEED[name]}
        report.add(Comparison(name, f"a load into {name} memory", "s", samples, predicted, aims=aims))


def show(results: dict[str, Any]) -> None:
    """Print for people."""
    print(f"load: {results['size'] / GB:.1f} GB, {TENSORS} tensors, warm page cache; {results['machine']}")
    for name, aim in LEAST_SPEED.items():
        part = results[name]
        for series, label in (
            ("sendfile", "sendfile, 1 thread"),
            ("load", "load"),
            ("load_unhashed", "load, unhashed"),
        ):
            print(f"  {name:6} {label:20} {Spread(**part['gb_per_s'][series]).show('GB/s')}")
        ratio, cost = Spread(**part["ratio_to_sendfile"]), Spread(**part["hashing_costs"])
        print(f"  {name:6} {'load / sendfile':20} {ratio.show('×')}, aim ≥ {aim}")
        print(f"  {name:6} {'hashing costs':20} {cost.show('%', 100, 1)}{', aim < 3 %' if name == 'fresh' else ''}")
    if "ping" in results:
        ping = results["ping"]
        for name, aim in (("idle", ""), ("loading", ", aim p99 < 50 ms")):
            p = ping[name]
            print(
                f"  ping while {name}: p50 {p['p50_ms']:.2f} ms, p99 {p['p99_ms']:.2f} ms, most {p['most_ms']:.2f} ms "
                f"({p['pings']} in {p['seconds']:.1f} s){aim}"
            )
        rss = {name: f"{size / 1e6:.0f} MB" for name, size in ping["peak_rss"].items()}
        print(f"  peak RSS with {ping['bytes'] / GB:.1f} GB loaded: {rss}, aim: daemon < 150 MB")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="2GiB", help="bytes of a checkpoint (two are made)")
    parser.add_argument(
        "--ping-size", type=parse_size, default="4GiB", help="bytes of the load that is pinged; 0: none"
    )
    parser.add_argument("--folder", type=Path, help="where to put checkpoints for the time (default: the system's)")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    add_options(parser)
    options = parser.parse_args()
    report = Report("load", {"bytes": options.size, "tensors": TENSORS})
    results = measure(options)
    record(results, report)
    report.write(options.results)
    if options.format == "json":
        print(json.dumps(results, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
