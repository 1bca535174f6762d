"""Cold loads: from the disk into memory, beside the disk itself and beside what one would use instead.

    .venv-peers/bin/python bench/cold.py [--size 1GiB] [--cases sizes,busy,...] [--rounds 8] [--results FOLDER]

Before each load the files are dropped from the page cache, and it is checked that they are gone. The sides of a round
follow each other, in turns forwards and backwards, so that a disk that changes its speed changes it for all.

- weightd: a load into memory that a removed checkpoint has left (pooled), or that the kernel has yet to give (fresh),
  hashing and comparing included.
- disk: the same files read with `O_DIRECT` by one reader, 8 MiB at a time, into one buffer.
- safetensors mmap, fastsafetensors: a fresh process, until a byte of each page was read. What this interpreter lacks is
  left out. They do not hash, and mmap's pages are the page cache itself.
- before: weightd of another checkout (`--before FOLDER`), where one is named.

Cases: `sizes` is a file of 290 tensors as in a Llama; `equal` one of tensors of 16 MiB; `shards` eight files; `small`
files of 4 MiB; `busy` is `sizes` while a process keeps one core busy. Aims: 0.9 of the disk's speed pooled, 0.8 fresh.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from _daemon import Daemon, parse_size, scratch, serving, tensor_name, write_checkpoint
from _results import Comparison, Report, add_options, turns
from _sides import Side, installed, make_cold

import weightd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).resolve().parent
NAME = "checkpoint-of-bench-cold"
READ = 8 << 20
TENSORS = 290
EQUAL = 16 << 20
SMALL = 4 << 20
SHARDS = 8
CASES = ("sizes", "busy", "equal", "shards", "small")
PEERS = ("safetensors mmap", "fastsafetensors")
LEAST_SPEED = {"pooled": 0.9, "fresh": 0.8}
"""Aims, by the speed of the disk."""
PREDICTED = "0.9 of the disk's speed pooled and 0.8 fresh: reads are in flight while pieces are hashed and copied"


def disk_seconds(paths: list[Path]) -> float:
    """How long one reader takes past the page cache."""
    buffer = memoryview(mmap.mmap(-1, READ))
    start = time.perf_counter()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        position = 0
        while count := os.preadv(descriptor, [buffer], position):
            position += count
        os.close(descriptor)
    return time.perf_counter() - start


def load_seconds(daemon: Daemon, folder: Path, size: int) -> float:
    """How long a client waits for a load. Afterwards the checkpoint is removed again, and its memory given back."""
    with weightd.connect(daemon.socket) as client:
        client.ping()  # sets up the channel, which is no part of a load
        start = time.perf_counter()
        result = client.load_report(folder, name=NAME)
        seconds = time.perf_counter() - start
        if result is None or result.read_bytes < size * 0.99 or result.unique_bytes < size * 0.99:
            raise SystemExit(f"this load shared bytes and measures nothing: {result}")
    with weightd.connect(daemon.socket) as client:  # another one: the first has a lease that waits for its attach
        client.remove(NAME)
        before = -1
        while before != (before := client.stats().devices[0].used_bytes):
            time.sleep(0.15)  # memory is returned by a thread
    return seconds


def write_files(folder: Path, case: str, size: int) -> list[Path]:
    """The files of a case: a checkpoint that a client loads by the folder."""
    folder.mkdir()
    count = {"shards": SHARDS, "small": size // SMALL}.get(case, 1)
    tensors = {"sizes": TENSORS, "busy": TENSORS, "equal": size // EQUAL, "shards": TENSORS // SHARDS}.get(case, 2)
    paths = []
    for number in range(count):
        name = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
        paths.append(folder / name)
        write_checkpoint(paths[-1], size // count, tensors, number, prefix=f"{number}.", equal=case == "equal")
    if count > 1:
        names = {f"{number}.{tensor_name(at)}": path.name for number, path in enumerate(paths) for at in range(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return paths


@contextmanager
def busy(case: str) -> Iterator[None]:
    """Keep one core busy meanwhile, if that is the case."""
    if case != "busy":
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(case: str, options: argparse.Namespace, folder: Path, report: Report) -> None:
    """One case, into pooled and into fresh memory."""
    model = folder / case
    paths = write_files(model, case, options.size)
    size = sum(path.stat().st_size for path in paths)

    def cold(seconds: Callable[[], float]) -> Callable[[], float]:
        def side() -> float:
            for path in paths:
                make_cold(path)
            return seconds()

        return side

    with ExitStack() as stack:
        started = [stack.enter_context(Side(name)) for name in PEERS if name in installed()]
        peers = {peer.name: cold(lambda peer=peer: peer.load(*paths)["read"]) for peer in started}
        for memory, pool in (("pooled", size * 2), ("fresh", 0)):
            sizes = ("--budget", str(size * 2), "--pool", str(pool))
            daemons = {"weightd": stack.enter_context(serving(folder, f"{case}-{memory}", *sizes))}
            if options.before:
                daemons["before"] = stack.enter_context(earlier(options.before, folder, f"{case}-{memory}-0", sizes))
            sides = {
                name: cold(lambda daemon=daemon: load_seconds(daemon, model, size)) for name, daemon in daemons.items()
            }
            with busy(case):
                samples = turns(
                    sides | {"disk": cold(lambda: disk_seconds(paths))} | peers, options.rounds, options.seconds
                )
            report.add(
                Comparison(
                    f"{case}, {memory}",
                    f"{case}: a load of {size / 1e9:.2f} GB from the disk into {memory} memory",
                    "s",
                    samples,
                    PREDICTED,
                    aims={"disk": 1 / LEAST_SPEED[memory]},
                )
            )
    shutil.rmtree(model)


@contextmanager
def earlier(root: Path, folder: Path, name: str, sizes: tuple[str, ...]) -> Iterator[Daemon]:
    """A daemon of another checkout."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{root / 'client'}:{root / 'daemon'}"
    try:
        with ExitStack() as stack:
            daemon = stack.enter_context(serving(folder, name, *sizes))
            os.environ.pop("PYTHONPATH")
            yield daemon
    finally:
        if path is not None:
            os.environ["PYTHONPATH"] = path


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="1GiB", help="bytes of a checkpoint (default: %(default)s)")
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas (default: %(default)s)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of weightd to compare with")
    parser.add_argument("--folder", type=Path, help="where to put files for the time: on a disk, not in memory")
    add_options(parser, rounds=8, seconds=60)
    options = parser.parse_args()
    report = Report("cold", {"bytes": options.size}, versions=installed())
    with scratch(options.folder) as folder:
        for case in options.cases.split(","):
            measure(case, options, folder, report)
    report.write(options.results)


if __name__ == "__main__":
    main()
