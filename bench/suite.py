"""Run the parts of `make bench`, each for a bounded time, and write what each found.

    .venv-peers/bin/python bench/suite.py [--parts peers,attach,...] [--quick] [--results bench/results]

A part is a script of this folder, which writes DATE-PART.json. One that fails or takes longer than its limit costs
only itself: the others run, and the suite ends with 1. In all it takes fifteen minutes at most, and a few seconds for
each part that has to be ended. `--quick` gives each part three rounds, or fewer where it has fewer, of the same sizes,
so that its ratios can be compared with those of a whole run; what attach takes few rounds of (`--few`) stays.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from _results import FOLDER, LEAST_ROUNDS

HERE = Path(__file__).resolve().parent


class Part(NamedTuple):
    """How a part is run: script, arguments, seconds after which it is ended, and rounds, if not the script's own."""

    script: str
    arguments: tuple[str, ...] = ()
    limit: float = 60
    rounds: int | None = None


PARTS = {
    "attach": Part("attach.py", ("--large", "1GiB", "--fresh", "2", "--few", "5"), 80, rounds=40),
    "peers": Part("peers.py", limit=180),
    "cold": Part("cold.py", ("--size", "512MiB", "--cases", "sizes,busy", "--seconds", "40"), 165),
    "load": Part("load.py", ("--size", "1GiB", "--ping-size", "0"), 60, rounds=6),
    "known": Part("known.py", limit=40),
    "memory": Part("memory.py", limit=95, rounds=2),
    "forward": Part("forward.py", limit=75),
    "fetch": Part("fleet_fetch.py", ("--receivers", "4", "--mib", "64", "--tensors", "32"), 50),
    "clients": Part("clients.py", ("--seconds-each", "1"), 75),
    "scale": Part(
        "scale.py",
        ("--checkpoints", "50,100,200", "--large", "2,4", "--names", "100,200,400", "--clients", "25,50,100"),
        80,
    ),
}
MOST_SECONDS = 900
"""All limits together."""
GRACE = 5.0
"""Seconds that the processes of a part have to end by themselves when they are asked to."""


def run(part: Part, results: Path, folder: Path | None, quick: bool) -> str:
    """Run a part. Returns how it failed, or nothing."""
    command = [sys.executable, str(HERE / part.script), "--results", str(results)]
    command += ["--folder", str(folder)] if folder else []
    rounds = min(part.rounds or LEAST_ROUNDS, LEAST_ROUNDS) if quick else part.rounds
    command += ["--rounds", str(rounds)] if rounds else []
    command += part.arguments
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            code = process.wait(part.limit)
        except subprocess.TimeoutExpired:
            end(process)
            return f"took more than {part.limit:.0f} s"
    return f"ended with {code}" if code else ""


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, its daemons and peers: ask them, and kill what is left after GRACE seconds."""
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            process.poll()  # or it would stay in its group
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """Run what is asked for; 1 if any part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in turn (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds of each comparison at most")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where to write (default: bench/results)")
    parser.add_argument(
        "--folder", type=Path, help="where to put files for the time: on a disk (default: the system's)"
    )
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}: there are {', '.join(PARTS)}")
    failed = []
    for name in names:
        begun = time.monotonic()
        print(f"suite: {name}", file=sys.stderr, flush=True)
        if fault := run(PARTS[name], options.results, options.folder, options.quick):
            failed.append(f"{name} {fault}")
        print(f"suite: {name} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"suite: {'; '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
