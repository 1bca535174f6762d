"""What leases cost: memory that is left behind by those that have ended, and what asking takes while there are many.

    python bench/leases.py [--cycles 100000] [--held 20000] [--rounds 50] [--folder DIR] [--format human|json]

First one process loads a file by `weightd.torch.load_file` and drops it, `--cycles` times, and nobody asks the daemon
anything: its resident memory and the client's, after a tenth of the cycles and at the end. Then one process takes
`--held` leases: `stats`, `ping` and an attach are timed by another client before and with them; the longest time that
another process waited for an answer while they were taken, and while they ended all at once, is that of `ping`.
Aims: memory within 2 MB; `stats` at most 5 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _daemon import Daemon, Spread, machine, scratch, serving, write_checkpoint

import weightd

if TYPE_CHECKING:
    from collections.abc import Callable

_CYCLES = """
import gc, os, sys
import weightd.torch
path, cycles = sys.argv[1], int(sys.argv[2])
rss = lambda pid: int(next(l for l in open(f"/proc/{pid}/status") if l.startswith("VmRSS")).split()[1]) * 1024
for number in range(1, cycles + 1):
    weightd.torch.load_file(path)
    if number in (cycles // 10, cycles):
        gc.collect()
        print(rss(sys.argv[3]), rss("self"), len(weightd.torch.shared_client()._connection._held), flush=True)
"""
_HOLD = """
import sys
import weightd
client = weightd.connect(timeout=60.0)
held = [client.attach("held") for _ in range(int(sys.argv[1]))]
print("held", flush=True)
sys.stdin.read()
"""


def seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """How long each of `rounds` calls takes, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[1:]


def cycles(daemon: Daemon, path: Path, number: int) -> dict[str, Any]:
    """Resident bytes of daemon and client after a tenth of the cycles and at the end."""
    output = subprocess.run(
        [sys.executable, "-c", _CYCLES, str(path), str(number), str(daemon.pid)],
        env={**os.environ, "WEIGHTD_SOCKET": str(daemon.socket)}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    first, last = ([int(word) for word in line.split()] for line in output.splitlines())
    return {
        "cycles": number,
        "daemon_bytes": [first[0], last[0]],
        "client_bytes": [first[1], last[1]],
        "client_remembers": last[2],
    }


def held(daemon: Daemon, number: int, rounds: int) -> dict[str, Any]:
    """Times of calls without and with many leases of one process, and the longest of a ping at the changes."""
    with weightd.connect(daemon.socket, timeout=60.0) as client:
        calls: dict[str, Callable[[], object]] = {
            "stats": client.stats,
            "ping": client.ping,
            "attach": lambda: client.attach("held", manifest_only=True).close(),
        }
        before = {name: Spread.of(seconds(call, rounds))._asdict() for name, call in calls.items()}
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "WEIGHTD_SOCKET": str(daemon.socket)},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        leases = client.stats().leases
        during = {name: Spread.of(seconds(call, rounds))._asdict() for name, call in calls.items()}
        start = time.perf_counter()
        process.kill()
        ending = seconds(client.ping, 5)
        while client.stats().leases:
            ending += seconds(client.ping, 1)
        process.wait()
        process.stdin.close()
        process.stdout.close()
        return {
            "leases": leases,
            "before": before,
            "with": during,
            "ended_within": time.perf_counter() - start,
            "ping_while_they_end": Spread.of(ending)._asdict(),
        }


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="What leases cost.")
    parser.add_argument("--cycles", type=int, default=100_000)
    parser.add_argument("--held", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    with scratch(options.folder) as folder:
        path = folder / "held.safetensors"
        write_checkpoint(path, 1 << 20, 16, 0)
        # No limit of a user: unless it runs as root, this is one.
        with serving(folder, "leases", "--budget", "64MiB", "--max-user-leases", "0") as daemon:
            with weightd.connect(daemon.socket) as client:
                client.load(path, name="held", pin=True)
            found["memory"] = cycles(daemon, path, options.cycles)
            found["asking"] = held(daemon, options.held, options.rounds)
    if options.format == "json":
        json.dump(found, sys.stdout, indent=2)
        print()
        return 0
    memory, asking = found["memory"], found["asking"]
    print(f"{memory['cycles']} times load_file, and dropped: the client remembers {memory['client_remembers']}")
    for who in ("daemon", "client"):
        first, last = memory[f"{who}_bytes"]
        print(f"{who:<8} {first / 1e6:.2f} MB after a tenth, {last / 1e6:.2f} MB at the end")
    print(f"{asking['leases']} leases of one process")
    for name, spread in asking["with"].items():
        print(f"{name:<8} {Spread(**asking['before'][name]).show('ms', 1e3)} without, "
              f"{Spread(**spread).show('ms', 1e3)} with them")  # fmt: skip
    most = asking["ping_while_they_end"]["most"]
    print(f"all had ended after {asking['ended_within']:.1f} s, a ping took {most * 1e3:.1f} ms at most meanwhile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
