"""The fake driver of tests/fakecuda: how it is built, the environments that choose it, and what its GPUs hold."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import uuid as rfc4122
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parents[1] / "fakecuda"
BUILD_SECONDS = 60.0
_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread")
_MEMORY, _CONTEXT = 1 << 60, 1 << 61  # as in alive.h: which bytes of a file are locked says what of which GPU it is
_MOST_DEVICES = 16


def build(folder: Path) -> Path:
    """Compile libcuda.so.1 into `folder`. Returns its path. Errors: RuntimeError (no compiler, or it complains)."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("gcc is not installed; the tests of GPU memory build their driver with it")
    library = folder / "libcuda.so.1"
    command = [compiler, *_FLAGS, "-Wl,-soname,libcuda.so.1", "-o", library, *sorted(SOURCES.glob("*.c")), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if built.returncode:
        raise RuntimeError(f"gcc could not build the fake driver:\n{built.stderr}")
    return library


def environment(
    folder: Path,
    *,
    devices: int = 1,
    memory: int | None = None,
    granularity: int | None = None,
    visible: str | None = None,
    version: int | None = None,
    no_export: bool = False,
    no_ipc: bool = False,
    no_peers: bool = False,
    context: int | None = None,
    compute_mode: int | None = None,
    slow: str | None = None,
    hang: str | None = None,
    hang_while: Path | None = None,
    fail: str | None = None,
    rules: Path | None = None,
    fail_in: str | None = None,
    fail_once: Path | None = None,
    log: Path | None = None,
) -> dict[str, str]:
    """The variables that give a process the library in `folder`, to be added to os.environ.

    `memory`, `granularity` and `context` are bytes; `visible` is CUDA_VISIBLE_DEVICES, all devices if None. `fail` is
    "function[@gpu]:code[:nth],…", `slow` the same with milliseconds, `hang` without either. tests/fakecuda/README.md
    explains them.
    """
    knobs = {
        "MEM": memory,
        "GRAN": granularity,
        "VERSION": version,
        "NO_EXPORT": int(no_export) or None,
        "NO_IPC": int(no_ipc) or None,
        "NO_PEERS": int(no_peers) or None,
        "CONTEXT": context,
        "COMPUTE_MODE": compute_mode,
        "SLOW": slow,
        "HANG": hang,
        "HANG_WHILE": hang_while,
        "FAIL": fail,
        "RULES": rules,
        "FAIL_IN": fail_in,
        "FAIL_ONCE": fail_once,
        "LOG": log,
    }
    libraries = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices))) if visible is None else visible,
        "FAKECUDA_DEVICES": str(devices),
        "FAKECUDA_MACHINE": str(_machine()),
        **{f"FAKECUDA_{name}": str(value) for name, value in knobs.items() if value is not None},
    }


def preload(folder: Path) -> None:
    """Load the library into this process, before anything asks for a driver: cuda-bindings then finds it loaded."""
    os.environ["FAKECUDA_MACHINE"] = str(_machine())
    ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)


def uuid(gpu: int) -> str:
    """The UUID of a physical GPU, as nvidia-smi would write it."""
    return f"GPU-{rfc4122.UUID(bytes=bytes([0xF0 + gpu]) + b'akecuda' + bytes(7) + bytes([gpu]))}"


def device_bytes(gpu: int) -> int:
    """Bytes of memory alive on a physical GPU, whoever holds them: processes, mappings, descriptors in a socket."""
    return sum(_alive(_MEMORY, gpu))


def context_bytes(gpu: int) -> list[int]:
    """Bytes that each context alive on a physical GPU takes, over all processes (see `context` of `environment`)."""
    return [size - 1 for size in _alive(_CONTEXT, gpu)]


def _alive(kind: int, gpu: int) -> list[int]:
    """Sizes of the locks. The kernel lists a page at a time; a lock that comes or goes in between, of any process, can
    hide others. So: what is seen twice."""
    before, now = None, _listed(kind, gpu)
    while now != before:
        before, now = now, _listed(kind, gpu)
    return list(now.values())


def _listed(kind: int, gpu: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for line in Path("/proc/locks").read_text().splitlines():
        lock, *_, place, start, end = line.split()[1:]
        if lock == "OFDLCK" and int(start) == kind + _machine() * _MOST_DEVICES + gpu:
            sizes[place] = int(end) - int(start) + 1  # a file that CUDA IPC has opened a second time counts once
    return sizes


class Call(NamedTuple):
    """A line of FAKECUDA_LOG."""

    pid: int
    process: str
    """The module after `-m`, or the name of the script."""
    function: str
    """Without version: cuMemAlloc."""
    after_fork: bool


def calls(log: Path) -> list[Call]:
    """What the processes that wrote `log` have called, in order."""
    rows = [line.split() for line in log.read_text().splitlines()]
    return [Call(int(pid), process, function, bool(suffix)) for pid, process, function, *suffix in rows]


def _machine() -> int:
    """Which GPUs are meant: those of this run of pytest and its processes, not those of another run."""
    return int(os.environ.get("FAKECUDA_MACHINE") or os.getpid())
