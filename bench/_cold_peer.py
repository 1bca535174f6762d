"""Loads a safetensors file and reads every page of it, when it is told. For bench/cold.py.

`python _cold_peer.py WAY`, where WAY is `mmap` or `fastsafetensors`. A line of standard input is a list of paths in
JSON; the answer is a line: the seconds from opening the first until a byte of each page of the last was read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096


def touch(tensor: torch.Tensor) -> int:
    """Read a byte of each page."""
    return int(tensor.reshape(-1).view(torch.uint8)[::PAGE].sum(dtype=torch.int64))


def with_mmap() -> Callable[[str], int]:
    from safetensors.torch import load_file

    return lambda path: sum(map(touch, load_file(path).values()))


def with_fastsafetensors() -> Callable[[str], int]:
    """Without GPUDirect, which needs a GPU; otherwise as it comes."""
    from fastsafetensors import fastsafe_open

    def load(path: str) -> int:
        with fastsafe_open(path, nogds=True) as file:
            return sum(touch(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  # it is no mapping

    return load


def main(way: str) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    load = {"mmap": with_mmap, "fastsafetensors": with_fastsafetensors}[way]()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for path in json.loads(line):
            load(path)
        print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
