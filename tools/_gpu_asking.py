"""What the probes of tools/gpu_probe.py are made of: the list of questions, device memory by NVML, forked exporters."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ORDINAL = 0
MIB = 1 << 20
SUCCESS = "CUDA_SUCCESS"
PATTERN = 0x5A
_PATIENCE = 60.0
_FAILED = b"failed: "


class NoAnswerError(Exception):
    """This question cannot be answered here; the message says what is missing."""


@dataclass(frozen=True)
class Question:
    """A question about the GPU, what its answer decides, and the function that finds it and puts it into words."""

    name: str
    text: str
    how: str
    decides: str
    answer: Callable[[], str]
    seconds: float


QUESTIONS: dict[str, Question] = {}


def question(
    name: str, text: str, how: str, decides: str, seconds: float = 60
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function as the probe that answers `text`; it may take `seconds`."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        QUESTIONS[name] = Question(name, text, how, decides, function, seconds)
        return function

    return register


def code(name: str, *arguments: Any) -> str:
    """Call the driver, and name what it returned."""
    try:
        driver.call(name, *arguments)
    except DeviceError as error:
        return error.code
    return SUCCESS


def is_double() -> bool:
    """Whether the driver is the project's test double."""
    return driver.name_of(ORDINAL).startswith("FakeCUDA")


# -- what the device has in use ----------------------------------------------------------------------------------------


def nvml_device() -> tuple[Any, Any]:
    """The NVML library and its handle of our device. Errors: NoAnswerError."""
    try:
        import pynvml
    except ImportError:
        raise NoAnswerError("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(driver.uuid_of(ORDINAL))
    except pynvml.NVMLError as error:
        raise NoAnswerError(f"NVML does not answer: {error}") from None


class Usage:
    """Device memory in use, all processes together, as changes since the last look."""

    def __init__(self) -> None:
        """Errors: NoAnswerError."""
        self._nvml, self._handle = nvml_device()
        self._before = self.used()

    def used(self) -> int:
        """Bytes in use now."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def change(self) -> str:
        """By how much it changed, in words."""
        now = self.used()
        change, self._before = now - self._before, now
        return f"{change / MIB:+,.0f} MiB"


# -- memory ------------------------------------------------------------------------------------------------------------


def mapped(allocation: driver.Allocation, size: int, *, writable: bool) -> driver.MappedAddressRange:
    """The allocation, mapped into this process."""
    place = driver.MappedAddressRange(ORDINAL, size)
    place.map(0, size, allocation)
    place.allow(writable=writable)
    return place


def set_access(address: int, size: int, *, writable: bool) -> str:
    """Choose how a mapping may be used, and name what the driver returned."""
    from cuda.bindings import driver as cuda

    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = ORDINAL
    flags = cuda.CUmemAccess_flags
    access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    return code("cuMemSetAccess", address, size, [access], 1)


def fill(address: int, size: int, byte: int = PATTERN) -> None:
    """Set device memory, and wait for it."""
    driver.call("cuMemsetD8", address, byte, size)
    driver.call("cuCtxSynchronize")


def read(address: int, size: int = 4) -> bytes:
    """Copy device memory to the host. Errors: DeviceError."""
    there = (ctypes.c_ubyte * size)()
    driver.call("cuMemcpyDtoH", ctypes.addressof(there), address, size)
    return bytes(there)


def reading(address: int, expected: int = PATTERN) -> str:
    """What reading device memory gives, in words."""
    try:
        found = read(address)
    except DeviceError as error:
        return f"fails with {error.code}"
    return (
        "gives the bytes that were written" if found == bytes([expected]) * 4 else f"gives other bytes: {found.hex()}"
    )


# -- other processes ---------------------------------------------------------------------------------------------------


class Peer:
    """A forked process and the socket to it. Fork it before this process touches the driver."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self._pid: int | None = pid
        self._connection = connection

    def receive(self) -> tuple[bytes, list[int]]:
        """What it sent, with descriptors. Errors: RuntimeError (it ended instead)."""
        data, descriptors, _, _ = socket.recv_fds(self._connection, 4096, 8)
        if not data or data.startswith(_FAILED):
            raise RuntimeError(f"the other process ended: {data.removeprefix(_FAILED).decode() or 'no reason given'}")
        return data, descriptors

    def send(self, *descriptors: int, data: bytes = b".") -> None:
        """Send it bytes, by default one, and descriptors."""
        socket.send_fds(self._connection, [data], descriptors)

    def kill(self) -> None:
        """SIGKILL it, and give the driver time to notice."""
        if self._pid is None:
            return
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = None
        time.sleep(0.5)


@contextmanager
def peer(work: Callable[[socket.socket], None]) -> Iterator[Peer]:
    """A process that does `work` with a socket to this one, and is killed at the end of the block."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        theirs.settimeout(_PATIENCE)
        try:
            work(theirs)
        except Exception as error:  # noqa: BLE001  # a fork must not run on into its parent's code
            theirs.send(_FAILED + f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(_PATIENCE)
    other = Peer(pid, ours)
    try:
        yield other
    finally:
        other.kill()
        ours.close()


def imported(exporter: Peer) -> tuple[driver.Allocation, int]:
    """What a process that runs `export_memory` exported, imported here, and its size in bytes."""
    _, (descriptor,) = exporter.receive()
    driver.initialise()
    allocation = driver.import_descriptor(descriptor)
    os.close(descriptor)
    return allocation, driver.granularity(ORDINAL)


def export_memory(connection: socket.socket) -> None:
    """For `peer`: send the descriptor of one granule that holds PATTERN, then wait to be killed."""
    driver.initialise()
    size = driver.granularity(ORDINAL)
    allocation = driver.create(ORDINAL, size)
    with driver.on_device(ORDINAL):
        fill(mapped(allocation, size, writable=True).address, size)
    socket.send_fds(connection, [b"."], [driver.export(allocation)])
    connection.recv(1)


def export_by_ipc(connection: socket.socket) -> None:
    """For `peer`: send the CUDA IPC handle of memory that holds PATTERN, then wait to be killed."""
    with driver.on_device(ORDINAL):
        address = int(driver.call("cuMemAlloc", 2 * MIB))
        fill(address, 2 * MIB)
        connection.send(driver.ipc_handle(address))
        connection.recv(1)
