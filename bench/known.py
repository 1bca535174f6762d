"""Loads of bytes that the daemon knows: an unchanged file, an equal one, and one that is to be verified.

    python bench/known.py [--size 1GiB] [--rounds 7] [--results FOLDER]

Everything is in the page cache. Each is beside a load of the same file into fresh memory, in the same round.

- unchanged: the file is resident and has not changed since, so nothing is read.
- equal: another file whose tensors are all resident, which is read, hashed and compared.
- verified: as unchanged, with `verify`, so that all is read and hashed.
- one thread: a load into fresh memory on one reader thread, beside one on as many as a load has by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from itertools import count
from pathlib import Path

from _daemon import Daemon, parse_size, scratch, serving, write_checkpoint
from _results import Comparison, Report, add_options, turns
from _sides import forget, make_warm

import weightd

TENSORS = 291
FRESH = "load into fresh memory"


class Loads:
    """Loads of two equal files by one daemon, and by one that reads on one thread."""

    def __init__(self, folder: Path, size: int, daemon: Daemon, single: Daemon) -> None:
        self._daemon, self._single = daemon, single
        self._file, self._equal = folder / "m.safetensors", folder / "equal.safetensors"
        write_checkpoint(self._file, size, TENSORS, seed=0)
        shutil.copyfile(self._file, self._equal)
        make_warm(self._equal)
        self._pasts = count(int(time.time()) - 500_000)

    def fresh(self) -> float:
        """Load what is not resident; it stays."""
        forget(self._daemon)
        return self._seconds(self._daemon, self._file)

    def one_thread(self) -> float:
        forget(self._single)
        return self._seconds(self._single, self._file)

    def unchanged(self) -> float:
        return self._seconds(self._daemon, self._file)

    def verified(self) -> float:
        return self._seconds(self._daemon, self._file, verify=True)

    def equal(self) -> float:
        """Load the other file, which the daemon takes for one that has changed since it saw it last."""
        past = next(self._pasts)
        os.utime(self._equal, (past, past))
        return self._seconds(self._daemon, self._equal)

    @staticmethod
    def _seconds(daemon: Daemon, path: Path, *, verify: bool = False) -> float:
        with weightd.connect(daemon.socket) as client:
            client.ping()  # sets up the channel, which is no part of a load
            start = time.perf_counter()
            client.load(path, verify=verify)
            return time.perf_counter() - start


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="1GiB", help="bytes of the file (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to put the files for the time (default: the system's)")
    add_options(parser, rounds=7, seconds=50)
    options = parser.parse_args()
    report = Report("known", {"bytes": options.size, "tensors": TENSORS})
    budget = ("--budget", str(options.size * 9 // 8), "--pool", "0")
    with (
        scratch(options.folder) as folder,
        serving(folder, "known", *budget) as daemon,
        serving(folder, "single", *budget, "--reader-threads", "1") as single,
    ):
        loads = Loads(folder, options.size, daemon, single)
        found = turns(
            {
                "one thread": loads.one_thread,
                FRESH: loads.fresh,
                "unchanged": loads.unchanged,
                "verified": loads.verified,
                "equal": loads.equal,
                # Backwards as forwards, a load into fresh memory comes before those that need one.
                f"{FRESH} ": loads.fresh,
            },
            options.rounds, options.seconds,
        )  # fmt: skip
    fresh = found[FRESH]
    for name, what, predicted, aim in (
        ("unchanged", "load a resident file that has not changed", "nothing is read: under a hundredth", 0.01),
        ("equal", "load another file, whose tensors are all resident", "reads and compares, fills no memory: 0.3", 0.3),
        ("verified", "load a resident file with verify", "reads and hashes, fills no memory: 0.3", 0.3),
        ("one thread", "load into fresh memory on one reader thread", "1.2: filling memory is most of it", 1.2),
    ):
        samples = {f"weightd, {name}": found[name], FRESH: fresh}
        report.add(Comparison(name, what, "s", samples, predicted, aims={FRESH: aim}))
    report.write(options.results)


if __name__ == "__main__":
    main()
