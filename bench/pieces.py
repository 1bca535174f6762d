"""How fast a loader's threads move bytes to a GPU, by the size of their pieces and their number.

    python bench/pieces.py [--size 2GiB] [--pieces 1,4,16] [--threads 4,8] [--rounds 5] [--folder DIR] [--format json]

A file of random bytes in the page cache is read in pieces of so many MiB, hashed or not, and copied to memory of the
first GPU, with the buffers and streams of a loader (daemon/weightd_daemon/devices/cuda_io.py). Each choice has a
process of its own; its first round is not counted. Prints median rates, and writes nothing.

Decides `PIECE` of devices/segment_io.py and the default of the setting `reader_threads`. With small pieces Python's
share of the work, under the GIL, may be the limit; large pieces do not fit into the processor's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _daemon import Spread, parse_size, scratch

from weightd._mapping import cuda_driver as driver
from weightd.errors import WeightdError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
GB = 10**9
SEGMENT = 1 << 30
CHUNK = 16 * MIB
SECONDS = 120.0
"""How long one choice may take."""


class Mover:
    """A file, memory of the GPU that it is copied to, and threads with a loader's buffers."""

    def __init__(self, path: Path, piece: int, threads: int) -> None:
        """`piece` is in bytes. Errors: DeviceMismatchError (no GPU), DeviceError."""
        from weightd_daemon.devices import segment_io

        segment_io.PIECE = piece  # before cuda_io takes it over
        from weightd_daemon.devices.access import open_io
        from weightd_daemon.devices.device import DeviceSegment

        self._file = os.open(path, os.O_RDONLY)
        self._piece = piece
        self._pieces = os.fstat(self._file).st_size // piece
        driver.initialise()
        page = driver.granularity(0)
        self._segment = min(SEGMENT, -(-self._pieces * piece // page) * page)
        count = -(-self._pieces * piece // self._segment)
        self._io: Any = open_io(
            "cuda_vmm",
            driver.uuid_of(0),
            {n: DeviceSegment(n, self._segment, driver.export(driver.create(0, self._segment))) for n in range(count)},
        )
        self._stagings = [self._io.staging() for _ in range(threads)]

    def rate(self, *, hashing: bool) -> float:
        """Copy the whole file; bytes a second."""
        numbers = iter(range(self._pieces))
        failed: list[BaseException] = []
        crew = [
            threading.Thread(target=self._copy, args=(staging, numbers, hashing, failed)) for staging in self._stagings
        ]
        start = time.perf_counter()
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if failed:
            raise failed[0]
        return self._pieces * self._piece / (time.perf_counter() - start)

    def _copy(self, staging: Any, numbers: Iterator[int], hashing: bool, failed: list[BaseException]) -> None:
        import xxhash

        try:
            self._io.enter()
            for number in numbers:  # shared: the next one is taken with the GIL held
                buffer = staging.acquire()
                piece = buffer.view[: self._piece]
                if os.preadv(self._file, [piece], number * self._piece) != self._piece:
                    raise OSError(f"piece {number} could not be read whole")
                if hashing:
                    xxhash.xxh3_128_digest(piece)
                segment, offset = divmod(number * self._piece, self._segment)
                staging.write(buffer, self._piece, segment, offset)
            staging.synchronize()
        except BaseException as error:  # noqa: BLE001  # raised again where the thread is joined
            failed.append(error)


def measure_one(path: Path, piece: int, threads: int, rounds: int) -> dict[str, list[float]]:
    """Bytes a second of each round that counts, hashed and not."""
    mover = Mover(path, piece, threads)
    mover.rate(hashing=True)
    return {
        "hashed": [mover.rate(hashing=True) for _ in range(rounds)],
        "unhashed": [mover.rate(hashing=False) for _ in range(rounds)],
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each choice. One that fails says why, and the others are worth having."""
    rows = []
    with scratch(options.folder) as folder:
        path = folder / "random"
        with path.open("wb") as file:
            for _ in range(0, options.size, CHUNK):
                file.write(os.urandom(CHUNK))
        for piece in options.pieces:
            for threads in options.threads:
                row: dict[str, Any] = {"piece_mib": piece, "threads": threads}
                command = [sys.executable, __file__, "--one", str(path), "--rounds", str(options.rounds)]
                command += ["--pieces", str(piece), "--threads", str(threads)]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
                    rates = json.loads(done.stdout)
                    row |= {name: Spread.of(values)._asdict() for name, values in rates.items()}
                except subprocess.SubprocessError as error:
                    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
                    row["failed"] = lines[-1]
                rows.append(row)
                print(show(row), flush=True, file=sys.stderr if options.format == "json" else sys.stdout)
    return rows


def show(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "failed" in row:
        cells = [f"failed: {row['failed']}", ""]
    else:
        cells = [Spread(**row[name]).show("GB/s", 1 / GB, 1) for name in ("hashed", "unhashed")]
    return f"| {row['piece_mib']} MiB | {row['threads']} | {' | '.join(cells)} |"


def numbers(text: str) -> list[int]:
    """Numbers, with commas."""
    return [int(part) for part in text.split(",")]


def main() -> str | int:
    """Measure and print. Returns an exit code or a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=2 << 30, help="of the file")
    parser.add_argument("--pieces", type=numbers, default=[1, 4, 16], help="sizes in MiB, with commas")
    parser.add_argument("--threads", type=numbers, default=[4, 8], help="numbers of threads, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are counted; at least 2")
    parser.add_argument("--folder", type=Path, help="where to put the file for the time (default: the system's)")
    parser.add_argument("--format", choices=("human", "json"), default="human", help="what to print")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if options.one:
        print(json.dumps(measure_one(options.one, options.pieces[0] * MIB, options.threads[0], options.rounds)))
        return 0
    try:
        driver.initialise()
    except WeightdError as error:
        return f"pieces: {error}"
    if driver.name_of(0).startswith("FakeCUDA"):
        print("pieces: on a test double; these figures say nothing about a GPU", file=sys.stderr)
    if options.format == "human":
        print("| piece | threads | hashed | unhashed |\n| --- | --- | --- | --- |")
    rows = measure(options)
    if options.format == "json":
        print(json.dumps(rows, indent=2))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
