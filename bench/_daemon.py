"""What the benchmarks share: checkpoints of random bytes, a daemon of their own, medians."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CHUNK = 16 << 20


class Daemon(NamedTuple):
    """A running daemon."""

    socket: Path
    pid: int

    def peak_rss(self) -> dict[str, int]:
        """Largest resident size so far, in bytes, of the daemon and of its loader."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        loaders = [_peak(int(child)) for child in children]
        return {"daemon": _peak(self.pid), "loader": max(loaders, default=0)}


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@contextmanager
def serving(
    folder: Path, name: str, *options: str, script: Path | None = None, before: Sequence[str] = ()
) -> Iterator[Daemon]:
    """A daemon with its socket and its state below `folder`, on host memory unless `options` name a device.

    `script` replaces `-m weightd_daemon`; `before` are arguments of it that come before `serve`.
    """
    socket = folder / f"{name}.sock"
    device = () if "--device" in options else ("--device", "host")
    program = [str(script), *before] if script is not None else ["-m", "weightd_daemon"]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable, *program, "serve", "--socket", str(socket), "--state-dir", str(folder / name),
                "--log-level", "warning", *device, *options,
            ],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"the daemon did not start: {(folder / f'{name}.log').read_text()}")
        yield Daemon(socket, process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A temporary folder for checkpoints; it should lie on a disk, not in memory."""
    with tempfile.TemporaryDirectory(prefix="weightd-bench-", dir=folder) as path:
        yield Path(path)


def write_checkpoint(path: Path, size: int, tensors: int, seed: int, *, prefix: str = "", equal: bool = False) -> None:
    """A safetensors file of `tensors` BF16 tensors, about `size` random bytes in all, left in the page cache.

    As in a Llama: of nine tensors in a layer seven are matrices of several sizes and two are small norms; unless all
    are `equal` in size. Names begin with `prefix`.
    """
    pattern = (1.0,) if equal else (1.0, 0.25, 0.25, 1.0, 2.6, 2.6, 2.6, 0.0, 0.0)
    weights = [pattern[number % len(pattern)] for number in range(tensors)]
    columns = 1024
    rows = [max(1, round(size * weight / sum(weights) / columns / 2)) for weight in weights]
    header: dict[str, object] = {}
    offset = 0
    for number, count in enumerate(rows):
        length = count * columns * 2
        header[prefix + tensor_name(number)] = {
            "dtype": "BF16",
            "shape": [count, columns],
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, _CHUNK):
            file.write(generator.bytes(min(_CHUNK, offset - start)))
        file.flush()
        os.fsync(file.fileno())  # or writing back would go on while something is measured
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass
    past = time.time() - 3600
    os.utime(path, (past, past))


def tensor_name(number: int) -> str:
    """The name of a tensor of `write_checkpoint`."""
    return f"model.layers.{number // 9}.part.{number % 9}.weight"


class Spread(NamedTuple):
    """Median, quartiles and extremes of a series."""

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, min(values), max(values), len(values))

    def show(self, unit: str, scale: float = 1, digits: int = 2) -> str:
        """`median unit (quartiles low–high, n = count)`."""
        median, low, high = (f"{value * scale:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} {unit} (quartiles {low}–{high}, n = {self.count})"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def parse_size(text: str) -> int:
    """Bytes from `512MiB` or `2GiB`."""
    number, unit = float(text.rstrip("KMGiB")), text.lstrip("0123456789.")
    return int(number * {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit])


def machine() -> dict[str, str | int]:
    """What kind of machine this is; nothing that names it."""
    return {
        "cores": os.cpu_count() or 0,
        "architecture": platform.machine(),
        "processor": _processor(),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30,
    }


def _processor() -> str:
    """The model, as the kernel calls it: a ratio may be another on another one. Not every architecture says it."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
