"""The questions of tools/gpu_probe.py about memory that outlives its process, and about who may have it.

Each function is a probe, as in tools/_gpu_behaviour.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from _gpu_asking import (
    ORDINAL,
    NoAnswerError,
    export_by_ipc,
    export_memory,
    fill,
    imported,
    is_double,
    mapped,
    nvml_device,
    peer,
    question,
    reading,
)

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError, WeightdError

_NOBODY = 65534
_TRACE = Path(__file__).with_name("ioctl_trace.c")
_ATTACH_GPUS_TO_FD = "212"  # NV_ESC_ATTACH_GPUS_TO_FD of NVIDIA's open kernel modules

# -- after a kill ------------------------------------------------------------------------------------------------------


@question(
    "import-after-kill",
    "Does an exported descriptor alone keep the memory after its exporter was killed?",
    "SIGKILL of the exporter, 0.5 s, then import, map and read",
    "whether weights outlive a daemon that is killed while no client has the GPU open",
)
def _import_after_kill() -> str:
    with peer(export_memory) as exporter:
        _, (descriptor,) = exporter.receive()
        exporter.kill()
    return _imported_and_read(descriptor)


def _imported_and_read(descriptor: int) -> str:
    driver.initialise()
    size = driver.granularity(ORDINAL)
    with driver.on_device(ORDINAL):
        try:
            allocation = driver.import_descriptor(descriptor)
        except DeviceError as error:
            return f"no: import fails with {error.code}"
        return f"import succeeds, reading {reading(mapped(allocation, size, writable=False).address)}"


@question(
    "kept-by-descriptor-alone",
    "Does a descriptor keep memory while nobody else has the GPU open?",
    "SIGKILL of the exporter; which processes have /dev/nvidiaN open; 3 s; import, map and read",
    "the same; where a process has the GPU open, or persistence mode is on, the answer says nothing about it",
)
def _kept_by_descriptor_alone() -> str:
    with peer(export_memory) as exporter:
        _, (descriptor,) = exporter.receive()
        exporter.kill()
    openers = ", ".join(_openers())
    time.sleep(3)
    return f"{_imported_and_read(descriptor)}; meanwhile the GPU was open in {openers or 'no process'}"


def _openers() -> list[str]:
    """The processes that have a GPU's own device file open, as far as this user may see them."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if re.fullmatch(r"/dev/nvidia\d+", os.readlink(entry)):
                pid = entry.parts[2]
                found.add(f"{pid} ({Path('/proc', pid, 'comm').read_text().strip()})")
        except OSError:  # another user's process, or one that has ended
            continue
    return sorted(found)


@question(
    "attached",
    "Does an exported descriptor keep the GPU initialised by itself?",
    "the ioctls of libcuda while it exports: NV_ESC_ATTACH_GPUS_TO_FD (212) on the new descriptor means yes",
    "whether the daemon must keep /dev/nvidiaN open; unlike a kill, it tells so where persistence mode is on as well",
)
def _attached() -> str:
    driver.initialise()
    if is_double():
        raise NoAnswerError("the double makes no ioctl")
    with tempfile.TemporaryDirectory() as folder:
        descriptor, calls = _traced_export(Path(folder))
    if not calls:
        raise NoAnswerError("no ioctl of libcuda was seen: it may make them without the C library")
    attached = any(number == _ATTACH_GPUS_TO_FD and fd == descriptor for number, _, fd, _ in calls)
    shown = " ".join(f"{number}/{command}@{fd}" for number, command, fd, _ in calls[:12])
    says = "yes, libcuda attaches the GPU to it" if attached else "no, libcuda does not attach the GPU to it"
    return f"{says} (descriptor {descriptor}; ioctl/command@descriptor: {shown})"


def _traced_export(folder: Path) -> tuple[str, list[list[str]]]:
    """Export in a process whose ioctls are written down: the descriptor, and the lines of tools/ioctl_trace.c."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise NoAnswerError("there is no C compiler (gcc or cc) to build tools/ioctl_trace.c with")
    library, trace = folder / "trace.so", folder / "trace"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, _TRACE], capture_output=True, text=True, check=False
    )
    if built.returncode:
        raise NoAnswerError(f"{compiler} cannot build tools/ioctl_trace.c: {built.stderr.strip().splitlines()[-1]}")
    program = (
        "import ctypes\nfrom weightd._mapping import cuda_driver as driver\ndriver.initialise()\n"
        f"allocation = driver.create({ORDINAL}, driver.granularity({ORDINAL}))\n"
        f"ctypes.CDLL(None).setenv(b'TRACE_TO', {os.fsencode(trace)!r}, 1)\n"
        "print(driver.export(allocation))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, timeout=50, check=True,
    )  # fmt: skip
    lines = trace.read_text().splitlines() if trace.exists() else []
    return done.stdout.strip(), [line.split(" ", 3) for line in lines]


@question(
    "read-after-kill",
    "Does a mapping outlive its exporter?",
    "import and map, SIGKILL of the exporter, 0.5 s, read",
    "whether clients of cuda_vmm run on when the daemon dies",
)
def _read_after_kill() -> str:
    with peer(export_memory) as exporter:
        allocation, size = imported(exporter)
        with driver.on_device(ORDINAL):
            address = mapped(allocation, size, writable=False).address
            before = reading(address)
            exporter.kill()
            return f"before: reading {before}; after: reading {reading(address)}"


@question(
    "ipc-after-kill",
    "CUDA IPC: does an opened handle outlive its exporter?",
    "cuIpcOpenMemHandle (timed), SIGKILL of the exporter, 0.5 s, read",
    "what documents say of clients of cuda_ipc when the holder dies",
)
def _ipc_after_kill() -> str:
    with peer(export_by_ipc) as exporter:
        data, _ = exporter.receive()
        with driver.on_device(ORDINAL):
            start = time.perf_counter()
            address = driver.open_ipc(data)
            microseconds = (time.perf_counter() - start) * 1e6
            before = reading(address)
            exporter.kill()
            return f"opened in {microseconds:.0f} µs; before: reading {before}; after: reading {reading(address)}"


@question(
    "ipc-open-after-kill",
    "CUDA IPC: can a handle be opened after its exporter was killed?",
    "SIGKILL of the exporter, 0.5 s, cuIpcOpenMemHandle",
    "whether a holder must live for new clients of cuda_ipc, as it does now",
)
def _ipc_open_after_kill() -> str:
    with peer(export_by_ipc) as exporter:
        data, _ = exporter.receive()
        exporter.kill()
    with driver.on_device(ORDINAL):
        try:
            address = driver.open_ipc(data)
        except DeviceError as error:
            return f"no: {error.code}"
        return f"it opens; reading {reading(address)}"


# -- what a descriptor is, and who may have it -------------------------------------------------------------------------


@question(
    "descriptor",
    "What is an exported descriptor?",
    "readlink, fstat, poll and the flags of one",
    "whether a service manager keeps it: one that polls it drops a descriptor that hangs up",
)
def _descriptor() -> str:
    driver.initialise()
    descriptor = driver.export(driver.create(ORDINAL, driver.granularity(ORDINAL)))
    status = os.fstat(descriptor)
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLPRI)  # errors and hang-ups are reported unasked
    events = [hex(event) for _, event in poller.poll(0)]
    kind = "a character device" if stat.S_ISCHR(status.st_mode) else "no character device"
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return (
        f"{os.readlink(f'/proc/self/fd/{descriptor}')}, {kind}, {number}; poll says {', '.join(events) or 'nothing'}; "
        f"O_NONBLOCK is {'set' if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK else 'not set'}"
    )


@question(
    "kept-descriptors",
    "Which descriptors and threads do the libraries keep?",
    "/proc/self/fd and /proc/self/task after cuInit, cuMemCreate, export, context, nvmlInit, and NVML's handle",
    "which descriptors a leak check allows, and what the unit's system call filter must allow",
)
def _kept_descriptors() -> str:
    said, before = [], _open_files()

    def look(step: str) -> None:
        nonlocal before
        now = _open_files()
        gained = ", ".join(f"{count} × {name}" for name, count in sorted((now - before).items()))
        said.append(f"{step}: {gained or 'none'}")
        before = now

    driver.initialise()
    look("cuInit")
    allocation = driver.create(ORDINAL, driver.granularity(ORDINAL))
    look("cuMemCreate")
    driver.export(allocation)
    look("export")
    with driver.on_device(ORDINAL):
        driver.call("cuCtxSynchronize")
    look("context")
    try:
        nvml_device()
        look("nvmlInit and a handle")
    except NoAnswerError as why:
        said.append(str(why))
    return f"{'; '.join(said)}; threads: {len(os.listdir('/proc/self/task'))}"


def _open_files() -> Counter[str]:
    """What this process has open, how often. Long numbers, such as inodes, are left out."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[re.sub(r"\d{3,}", "N", os.readlink(f"/proc/self/fd/{name}"))] += 1
        except OSError:  # the descriptor that listed the folder
            continue
    return found


@question(
    "reopened-descriptor",
    "Can an exported descriptor be opened again through /proc/self/fd?",
    "open(/proc/self/fd/N), then import the new descriptor",
    "whether a descriptor can be handed out without write access, as a memfd is",
)
def _reopened_descriptor() -> str:
    driver.initialise()
    descriptor = driver.export(driver.create(ORDINAL, driver.granularity(ORDINAL)))
    try:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    except OSError as error:
        return f"no: open fails with {error.strerror}"
    try:
        driver.import_descriptor(again)
    except DeviceError as error:
        return f"no: it opens, but the import fails with {error.code}"
    return "yes, and the import of what was opened succeeds"


@question(
    "two-importers",
    "May a process import one descriptor twice, and its own?",
    "export; two imports in the same process, both mapped and read",
    "whether a process may attach twice, which the library relies on",
)
def _two_importers() -> str:
    with driver.on_device(ORDINAL):
        size = driver.granularity(ORDINAL)
        allocation = driver.create(ORDINAL, size)
        fill(mapped(allocation, size, writable=True).address, size)
        descriptor = driver.export(allocation)
        try:
            places = [mapped(driver.import_descriptor(os.dup(descriptor)), size, writable=False) for _ in range(2)]
        except DeviceError as error:
            return f"no: {error.metadata['call']} fails with {error.code}"
        return f"yes; reading {' and '.join(reading(place.address) for place in places)}"


@question(
    "other-user",
    "Can another user map exported memory, and open a CUDA IPC handle?",
    "root exports, uid 65534 imports, maps read-only and reads; cuIpcOpenMemHandle, read",
    "whether cuda_ipc can serve clients of another user than the holder's, as a service of the system must",
)
def _other_user() -> str:
    if os.getuid():
        raise NoAnswerError("only root can become another user")
    with peer(export_memory) as exporter, peer(export_by_ipc) as other, peer(_open_as_nobody) as nobody:
        _, (descriptor,) = exporter.receive()
        handle, _ = other.receive()
        nobody.send(descriptor, data=handle)
        return nobody.receive()[0].decode()


def _open_as_nobody(connection: socket.socket) -> None:
    handle, (descriptor,), _, _ = socket.recv_fds(connection, 64, 1)
    # Loaded while root: nobody may not see where these lie.
    from cuda.bindings import driver as _  # noqa: F401  # imported for the driver module, which imports it lazily

    ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)

    def by_descriptor() -> int:
        return mapped(driver.import_descriptor(descriptor), driver.granularity(ORDINAL), writable=False).address

    said = []
    for name, open_memory in (("descriptor", by_descriptor), ("CUDA IPC", lambda: driver.open_ipc(handle))):
        try:
            with driver.on_device(ORDINAL):
                said.append(f"{name}: yes, reading {reading(open_memory())}")
        except WeightdError as error:
            said.append(f"{name}: no, {error}")
    connection.send("; ".join(said).encode())
    connection.recv(1)
