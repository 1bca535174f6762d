"""Memory of processes that hold models, by weightd and by what one would use instead: a grid of processes and models.

    .venv-peers/bin/python bench/memory.py [--size 128MiB] [--processes 1,2,4] [--models 1,2,4] [--results FOLDER]

Each process loads all models and reads every page. The models are of one family: the first half of each one's bytes is
the same. Memory is the sum of PSS, the proportional set size, of all processes of a side, and of weightd's daemon or
the parent that shares by torch.multiprocessing, less what these had before. The page cache counts where it is mapped:
safetensors' pread leaves as much again there, which the kernel can take back.
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from _daemon import Daemon, parse_size, scratch, serving, write_checkpoint
from _results import Comparison, Report, add_options, turns
from _sides import Side, forget, installed, make_warm, start

TENSORS = 146
SIDES = ["weightd", "safetensors mmap", "safetensors pread", "torch.multiprocessing"]
MIB = 1 << 20


def write_family(folder: Path, size: int, models: int) -> list[Path]:
    """Checkpoints that have the first half of their bytes in common."""
    paths = [folder / f"{number}.safetensors" for number in range(models)]
    write_checkpoint(paths[0], size, TENSORS, seed=0)
    for seed, path in enumerate(paths[1:], 1):
        shutil.copyfile(paths[0], path)
        length = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(length // 2)
            file.write(np.random.default_rng(seed).bytes(length - length // 2))
        make_warm(path)
    return paths


def pss(pid: int) -> int:
    """The proportional set size of a process, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/{pid}/smaps_rollup has no line Pss")


def grown(side: Side, daemon: Daemon, paths: list[Path], processes: int) -> float:
    """MiB by which a side grows while so many processes hold the models."""
    others = [side.pid, *([daemon.pid] if side.name == "weightd" else [])]
    before = sum(map(pss, others))
    children = [side.keep(*paths)["pid"] for _ in range(processes)]
    after = sum(map(pss, [*others, *children]))
    side.drop()
    if side.name == "weightd":
        forget(daemon)
    return (after - before) / MIB


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="128MiB", help="bytes of a model (default: %(default)s)")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--models", default="1,2,4")
    parser.add_argument("--folder", type=Path, help="where to put the models for the time (default: the system's)")
    add_options(parser, rounds=2, seconds=30)
    options = parser.parse_args()
    models = [int(number) for number in options.models.split(",")]
    report = Report("memory", {"bytes of a model": options.size, "tensors": TENSORS}, versions=installed())
    with scratch(options.folder) as folder, ExitStack() as stack:
        paths = write_family(folder, options.size, max(models))
        daemon = stack.enter_context(serving(folder, "memory", "--budget", str(options.size * (max(models) + 1))))
        sides = start(stack, SIDES, daemon)
        for processes in map(int, options.processes.split(",")):
            for number in models:
                samples = turns(
                    {
                        name: (lambda side=side: grown(side, daemon, paths[:number], processes))  # noqa: B023  # called here
                        for name, side in sides.items()
                    },
                    options.rounds, options.seconds, warm_up=False,
                )  # fmt: skip
                ours, private = (number + 1) / 2 / number, 1 / processes * (number + 1) / 2 / number
                what = f"memory of {_count(processes, 'process', 'es')} with {_count(number, 'model', 's')}"
                predicted = f"{ours:.2f} × mmap and torch.multiprocessing, {private:.2f} × pread, for the weights alone"
                report.add(Comparison(f"{processes} × {number}", what, "MiB", samples, predicted))
    report.write(options.results)


def _count(number: int, what: str, plural: str) -> str:
    return f"{number} {what}{plural if number > 1 else ''}"


if __name__ == "__main__":
    main()
