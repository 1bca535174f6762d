"""The fake driver of tests/fakecuda: how it is built, the environments that choose it, and what its GPUs hold."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import termios
import uuid as rfc4122
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parents[1] / "fakecuda"
DRIVER, NVML = "libcuda.so.1", "libnvidia-ml.so.1"
BUILD_SECONDS = 60.0
_SHARED = "alive", "machine", "nodes", "rules"
"""Sources that both libraries are built from."""
_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread")
_MEMORY, _CONTEXT, _LIFE = 60, 61, 46  # as in alive.c: which bytes of a file are locked says what of which GPU it is
_MOST_DEVICES = 16


def build(folder: Path) -> Path:
    """Compile libcuda.so.1 and libnvidia-ml.so.1 into `folder`. Returns the path of the first.

    Errors: RuntimeError (no compiler, or it complains).
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("gcc is not installed; the tests of GPU memory build their driver with it")
    nvml = [SOURCES / "nvml.c", *(SOURCES / f"{name}.c" for name in _SHARED)]
    driver = [source for source in sorted(SOURCES.glob("*.c")) if source.stem != "nvml"]
    for library, sources in ((NVML, nvml), (DRIVER, driver)):
        command = [compiler, *_FLAGS, f"-Wl,-soname,{library}", "-o", folder / library, *sources, "-ldl"]
        built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if built.returncode:
            raise RuntimeError(f"gcc could not build the fake driver:\n{built.stderr}")
    return folder / DRIVER


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
    mig: bool = False,
    nodes: Path | None = None,
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
        "MIG": int(mig) or None,
        "NODES": nodes,
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
    """Load the libraries into this process, before anything asks for them: cuda-bindings and pynvml then find them."""
    os.environ["FAKECUDA_MACHINE"] = str(_machine())
    for library in (DRIVER, NVML):
        ctypes.CDLL(str(folder / library), ctypes.RTLD_GLOBAL)


def uuid(gpu: int, *, mig: bool = False) -> str:
    """The UUID of a physical GPU, as nvidia-smi would write it; with `mig` that of its MIG instance."""
    number = bytes([0xF0 + gpu]) + b"akecuda" + bytes(6) + bytes([mig, gpu])
    return f"{'MIG' if mig else 'GPU'}-{rfc4122.UUID(bytes=number)}"


def make_nodes(folder: Path, devices: int = 1) -> Path:
    """Make the device nodes of a machine in `folder`, for the knob `nodes`: its GPUs are down then. Returns `folder`.

    Open /dev/nvidiaN there as one opens the real one, O_RDWR: it is a FIFO.
    """
    for name in ("nvidiactl", "nvidia-uvm"):
        (folder / name).touch()
    for gpu in range(devices):
        os.mkfifo(folder / f"nvidia{gpu}")
    return folder


def is_up(nodes: Path, gpu: int) -> bool:
    """Whether anybody has the node of a physical GPU open: by cuInit, NVML, or a descriptor of it anywhere."""
    try:
        os.close(os.open(nodes / f"nvidia{gpu}", os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
    return True


class BusyError(Exception):
    """Somebody has the GPU's node open."""


def reset(nodes: Path, gpu: int) -> None:
    """Reset a physical GPU, as `nvidia-smi --gpu-reset` does. Errors: BusyError.

    It is down then, and whatever was in its memory went with the last process that had it open.
    """
    if is_up(nodes, gpu):
        raise BusyError(f"GPU {gpu} is in use by one or more processes")


def device_bytes(gpu: int, nodes: Path | None = None) -> int:
    """Bytes of memory alive on a physical GPU, whoever holds them: processes, mappings, descriptors in a socket.

    Give `nodes` where processes have that knob: memory of an earlier life of the GPU is gone, whoever has descriptors.
    """
    return sum(_alive(_MEMORY, gpu, nodes))


def context_bytes(gpu: int, nodes: Path | None = None) -> list[int]:
    """Bytes that each context alive on a physical GPU takes, over all processes (see `context` of `environment`)."""
    return [size - 1 for size in _alive(_CONTEXT, gpu, nodes)]


def _alive(kind: int, gpu: int, nodes: Path | None) -> list[int]:
    """Sizes of the locks. The kernel lists a page at a time; a lock that comes or goes in between, of any process, can
    hide others. So: what is seen twice."""
    life = 0 if nodes is None else _life(nodes, gpu)
    if life is None:
        return []
    start = (1 << kind) + (life << _LIFE) + _machine() * _MOST_DEVICES + gpu
    before, now = None, _listed(start)
    while now != before:
        before, now = now, _listed(start)
    return list(now.values())


def _life(nodes: Path, gpu: int) -> int | None:
    """Which life a physical GPU is in, as nodes.c counts them; None: it is down, or its driver is not loaded yet."""
    node = os.open(nodes / f"nvidia{gpu}", os.O_RDONLY | os.O_NONBLOCK)
    try:
        written = fcntl.ioctl(node, termios.FIONREAD, bytes(4))
    finally:
        os.close(node)
    if not any(written):
        return None
    return int.from_bytes((nodes / f"nvidia{gpu}.lives").read_bytes(), sys.byteorder)


def _listed(wanted: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for line in Path("/proc/locks").read_text().splitlines():
        lock, *_, place, start, end = line.split()[1:]
        if lock == "OFDLCK" and int(start) == wanted:
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
