"""From a file to tensors that were read, by weightd and by what one would use instead.

    make .venv-peers/.installed
    .venv-peers/bin/python bench/peers.py [--size 1GiB] [--sides NAME,...] [--rounds 8] [--results FOLDER]

Each load is that of a fresh process, after its imports, and is timed until a byte of each page of each tensor was read.
All sides give the same tensors (checked). The checkpoint has 291 tensors of bf16. torch computes on one thread;
otherwise each peer is as it comes. A peer that is not installed is left out.

- warm: the file is in the page cache, and the checkpoint resident in the daemon, as for all processes but the first.
- first: the same, but the daemon, which keeps no pool, has to load the checkpoint into fresh memory first.
- cold: the file is on the disk, and nowhere else.

safetensors 0.9's `prefetch` loads to CUDA devices only, so it is not among these.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from _daemon import parse_size, scratch, serving, write_checkpoint
from _results import Comparison, Report, add_options, turns
from _sides import Side, forget, installed, make_cold, make_warm, start

if TYPE_CHECKING:
    from collections.abc import Collection

TENSORS = 291
WARM = ["safetensors mmap", "safetensors 0.9 mmap", "safetensors pread", "fastsafetensors", "Run:ai streamer"]
OF_TORCH = "torch.multiprocessing"
AIMS = {
    "warm": {"safetensors mmap": 1.2, "safetensors pread": 0.26, "fastsafetensors": 0.17, "Run:ai streamer": 0.07},
    "first": {"safetensors mmap": 10.0, "safetensors pread": 1.0},
    "cold": {"safetensors mmap": 1.4, "fastsafetensors": 1.2},
}
"""The figures of what is predicted below."""


class Loads:
    """Loads of one file, compared by what they read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums: set[int] = set()

    def seconds(self, side: Side) -> float:
        """Seconds until all was read."""
        answer = side.load(self.path)
        self._sums.add(answer["sum"])
        if answer["tensors"] != TENSORS or len(self._sums) > 1:
            raise SystemExit(f"{side.name} read other tensors than the sides before it")
        return float(answer["read"])


def aims(name: str, samples: Collection[str]) -> dict[str, float]:
    """What is predicted of a comparison, beside the sides that were measured."""
    return {side: aim for side, aim in AIMS[name].items() if side in samples}


def measure(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """All three."""
    versions = installed()
    path = folder / "m.safetensors"
    write_checkpoint(path, options.size, TENSORS, seed=0)
    loads = Loads(path)
    names = [name for name in options.sides.split(",") if name in versions]
    with ExitStack() as stack:
        daemon = stack.enter_context(serving(folder, "peers", "--budget", str(options.size * 9 // 8), "--pool", "0"))
        sides = start(stack, ["weightd", *names, OF_TORCH], daemon)

        def first() -> float:
            forget(daemon)
            return loads.seconds(sides["weightd"])

        # After the first load of a round the checkpoint is resident, and the next one finds it.
        warm = turns(
            {"weightd, first": first, "weightd": lambda: loads.seconds(sides["weightd"])}
            | {name: (lambda name=name: loads.seconds(sides[name])) for name in (*names, OF_TORCH)},
            options.rounds, options.seconds,
        )  # fmt: skip
        sides[OF_TORCH].drop()

        def cold(name: str) -> float:
            forget(daemon)
            make_cold(path)
            return loads.seconds(sides[name])

        chilled = turns(
            {name: (lambda name=name: cold(name)) for name in ("weightd", *names)}, options.rounds, options.seconds
        )
        make_warm(path)
    ours = warm.pop("weightd, first")
    report.add(Comparison(
        "warm", "load a checkpoint that is in memory, and read every page", "s", warm,
        "by hand, of 2 GB: 1.2 × safetensors' mmap, 0.26 × its pread, 0.17 × fastsafetensors, 0.07 × Run:ai",
        aims=aims("warm", warm),
    ))  # fmt: skip
    others = {side: values for side, values in warm.items() if side not in {"weightd", OF_TORCH}}
    report.add(Comparison(
        "first", "load a checkpoint that the daemon does not have yet, and read every page", "s",
        {"weightd": ours, **others},
        "an order of magnitude slower than mmap, which copies nothing; as fast as pread, which fills as much memory",
        aims=aims("first", others),
    ))  # fmt: skip
    report.add(Comparison(
        "cold", "load a checkpoint that is on the disk only, and read every page", "s", chilled,
        "by hand, of 2 GB, before cold loads were mended: 1.4 × safetensors' mmap, 1.2 × fastsafetensors",
        aims=aims("cold", chilled),
    ))  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=parse_size, default="1GiB", help="bytes of the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--sides", default=",".join(WARM), help="the peers (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where to put the checkpoint for the time: on a disk, not in memory"
    )
    add_options(parser, rounds=8, seconds=70)
    options = parser.parse_args()
    report = Report("peers", {"bytes": options.size, "tensors": TENSORS}, versions=installed())
    with scratch(options.folder) as folder:
        measure(options, folder, report)
    report.write(options.results)


if __name__ == "__main__":
    main()
