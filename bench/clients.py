"""What an attach takes while many clients are attached, and while many attach at once.

    python bench/clients.py [--attached 1000] [--at-once 1,8,64] [--seconds-each 2] [--rounds 5] [--results FOLDER]

Two daemons hold a checkpoint of 300 tensors, 64 MiB. `--attached` clients stay attached to the first, each with a
connection and a lease of its own: as many processes would not fit this machine, so four processes have a share of them
each. Nobody stays attached to the second. In turns, so many clients attach at once to each and let go again, for
`--seconds-each`; they are threads of at most four processes, so that of 64 attaches most wait for a core, and not for
the daemon. An attach is timed from the request to the mapped segments, without the connection.

Comparisons are the median and the 99th percentile of each number at once, in ms, by round.

Predicted: nothing that an attach does grows with those who are attached, so at most 1.2 × the other daemon's. With n at
once on c cores each waits for the n/c before it, so at 64 the median is about 64 times that of 1, on two cores that the
daemon and its clients share.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _daemon import percentile, scratch, serving, write_checkpoint
from _results import Comparison, Report, add_options

import weightd

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "crowded"
PROCESSES = 4
TENSORS, BYTES = 300, 64 << 20
CROWDED, EMPTY = "weightd, {} attached", "weightd, nobody else"
AIM = 1.2
PREDICTED = f"at most {AIM}: nothing that an attach does grows with those who are attached"


def shares(count: int) -> list[int]:
    """A number in parts for at most PROCESSES processes."""
    processes = min(PROCESSES, count)
    return [count // processes + (number < count % processes) for number in range(processes)]


@contextmanager
def crowd(socket: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of _crowd.py that has said its first line; its standard input ends with the block."""
    argv = [sys.executable, str(Path(__file__).parent / "_crowd.py"), str(socket), *arguments]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{argv[3]}: a client failed")
        yield process
        process.stdin.close()


def attaches(socket: Path, at_once: int, seconds: float) -> list[float]:
    """What attaches took, in ms, with so many at once."""
    with ExitStack() as stack:
        running = [stack.enter_context(crowd(socket, "attach", str(n), str(seconds))) for n in shares(at_once)]
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [taken for process in running for taken in json.loads(process.stdout.readline())]  # type: ignore[union-attr]  # a pipe


def measure(options: argparse.Namespace, report: Report) -> None:
    """All of it."""
    crowded = CROWDED.format(f"{options.attached:,}")
    with scratch(options.folder) as folder, ExitStack() as stack:
        sockets = {}
        for side in (crowded, EMPTY):
            name = "crowded" if side == crowded else "empty"
            daemon = stack.enter_context(
                serving(folder, name, "--budget", "256MiB", "--max-connections", str(options.attached + 200))
            )
            sockets[side] = daemon.socket
            write_checkpoint(folder / "m.safetensors", BYTES, TENSORS, 0)
            with weightd.connect(daemon.socket) as client:
                client.load(folder / "m.safetensors", name=NAME, pin=True)
        for share in shares(options.attached):
            stack.enter_context(crowd(sockets[crowded], "hold", str(share)))
        with weightd.connect(sockets[crowded]) as client:
            if len(client.leases()) != options.attached:
                raise SystemExit(f"{len(client.leases())} of {options.attached} clients are attached")
        for at_once in map(int, options.at_once.split(",")):
            found: dict[float, dict[str, list[float]]] = {0.5: {}, 0.99: {}}
            for number in range(options.rounds):
                for side in (crowded, EMPTY) if number % 2 else (EMPTY, crowded):
                    taken = attaches(sockets[side], at_once, options.seconds_each)
                    for share, samples in found.items():
                        samples.setdefault(side, []).append(percentile(taken, share))
            for share, samples in found.items():
                measure_of = "median" if share == 0.5 else "99th percentile"
                what = f"{measure_of} of attaches to {TENSORS} tensors, {at_once} at once"
                ordered = {side: samples[side] for side in (crowded, EMPTY)}
                name, aims = f"p{share * 100:.0f}_at_{at_once}", {EMPTY: AIM}
                report.add(Comparison(name, what, "ms", ordered, PREDICTED, aims=aims))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attached", type=int, default=1000, help="clients that stay attached to the first daemon")
    parser.add_argument("--at-once", default="1,8,64", help="numbers of clients that attach at once")
    parser.add_argument("--seconds-each", type=float, default=2.0, help="for which they do so in each round")
    parser.add_argument("--folder", type=Path, help="where to put files for the time (default: the system's)")
    add_options(parser, rounds=5)
    options = parser.parse_args()
    parameters: dict[str, Any] = {"attached": options.attached, "at_once": options.at_once}
    report = Report("clients", parameters)
    measure(options, report)
    report.write(options.results)


if __name__ == "__main__":
    main()
