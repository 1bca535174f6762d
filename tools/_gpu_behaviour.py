"""The questions of tools/gpu_probe.py about what CUDA does and no document states.

Each function is a probe. It runs in a process of its own, because a fault ends the context it happens in, and returns
its answer in words, figures only as measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import time
from typing import TYPE_CHECKING

from _gpu_asking import (
    MIB,
    ORDINAL,
    PATTERN,
    SUCCESS,
    NoAnswerError,
    Peer,
    Usage,
    code,
    export_memory,
    fill,
    is_double,
    mapped,
    nvml_device,
    peer,
    question,
    reading,
    set_access,
)

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

IPC_BYTES = 64


def _imported(exporter: Peer) -> tuple[driver.Allocation, int]:
    _, (descriptor,) = exporter.receive()
    driver.initialise()
    allocation = driver.import_descriptor(descriptor)
    os.close(descriptor)
    return allocation, driver.granularity(ORDINAL)


# -- what an owner without a context can do ----------------------------------------------------------------------------


@question("granularity", "In what units is device memory allocated?", "cuMemGetAllocationGranularity, both flags")
def _granularity() -> str:
    driver.initialise()
    from cuda.bindings import driver as cuda

    flag = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    recommended = int(driver.call("cuMemGetAllocationGranularity", driver._properties(ORDINAL), flag))
    return f"minimum {driver.granularity(ORDINAL) / MIB:g} MiB, recommended {recommended / MIB:g} MiB"


@question(
    "create-without-context",
    "Can a process without a context allocate and export, and how much device memory does that use?",
    "NVML's used memory while another process calls cuInit, cuMemCreate of 128 MiB, export, release",
)
def _create_without_context() -> str:
    with peer(_own) as owner:
        usage = Usage()
        said = []
        for step in ("cuInit", "cuMemCreate", "export", "release"):
            owner.send()
            owner.receive()
            said.append(f"{step} {usage.change()}")
    return f"yes; {', '.join(said)}"


def _own(connection: socket.socket) -> None:
    """Take one step for each message."""
    connection.recv(1)
    driver.initialise()
    connection.send(b".")
    connection.recv(1)
    allocation = driver.create(ORDINAL, 128 * MIB)
    connection.send(b".")
    connection.recv(1)
    descriptor = driver.export(allocation)
    connection.send(b".")
    connection.recv(1)
    os.close(descriptor)
    driver.release(allocation)
    connection.send(b".")
    connection.recv(1)


@question(
    "map-without-context",
    "Can a process without a context map memory?",
    "cuMemMap and cuMemSetAccess while no context is current",
)
def _map_without_context() -> str:
    driver.initialise()
    size = driver.granularity(ORDINAL)
    allocation = driver.create(ORDINAL, size)
    place = driver.MappedAddressRange(ORDINAL, size)
    result = code("cuMemMap", place.address, size, 0, allocation, 0)
    return f"cuMemMap: {result}, cuMemSetAccess: {set_access(place.address, size, writable=True)}"


@question(
    "context-cost", "How much device memory does a context use?", "NVML's used memory around cuDevicePrimaryCtxRetain"
)
def _context_cost() -> str:
    driver.initialise()
    usage = Usage()
    with driver.on_device(ORDINAL):
        driver.call("cuCtxSynchronize")
        return usage.change()


@question(
    "nvml-after-release",
    "Does NVML's used memory fall at once when memory is released?",
    "cuMemCreate of 1 GiB, cuMemRelease, then NVML every millisecond",
)
def _nvml_after_release() -> str:
    driver.initialise()
    usage = Usage()
    before = usage.used()
    allocation = driver.create(ORDINAL, 1024 * MIB)
    if usage.used() - before < 900 * MIB:
        return "NVML did not show the allocation in the first place"
    driver.release(allocation)
    start = time.perf_counter()
    for look in range(2000):
        if usage.used() - before < 100 * MIB:
            return f"by look {look + 1}, {(time.perf_counter() - start) * 1e3:.1f} ms after the release"
        time.sleep(0.001)
    return "not within 2 s"


@question("uuid", "Does NVML know the device by the driver's UUID?", "nvmlDeviceGetHandleByUUID(cuDeviceGetUuid)")
def _uuid() -> str:
    driver.initialise()
    nvml, handle = nvml_device()
    ours, theirs = driver.uuid_of(ORDINAL), nvml.nvmlDeviceGetUUID(handle)
    return "yes, the same text" if ours == theirs else "NVML finds a device, but calls it otherwise"


# -- who keeps memory alive --------------------------------------------------------------------------------------------


@question(
    "import-after-kill",
    "Does an exported descriptor alone keep the memory after its exporter was killed?",
    "SIGKILL of the exporter, 0.5 s, then import, map and read",
)
def _import_after_kill() -> str:
    with peer(export_memory) as exporter:
        _, (descriptor,) = exporter.receive()
        exporter.kill()
    driver.initialise()
    size = driver.granularity(ORDINAL)
    with driver.on_device(ORDINAL):
        try:
            allocation = driver.import_descriptor(descriptor)
        except DeviceError as error:
            return f"no: import fails with {error.code}"
        return f"import succeeds, reading {reading(mapped(allocation, size, writable=False).address)}"


@question(
    "read-after-kill",
    "Does a mapping outlive its exporter?",
    "import and map, SIGKILL of the exporter, 0.5 s, read",
)
def _read_after_kill() -> str:
    with peer(export_memory) as exporter:
        allocation, size = _imported(exporter)
        with driver.on_device(ORDINAL):
            address = mapped(allocation, size, writable=False).address
            before = reading(address)
            exporter.kill()
            return f"before: reading {before}; after: reading {reading(address)}"


@question(
    "reopened-descriptor",
    "Can an exported descriptor be opened again through /proc/self/fd?",
    "open(/proc/self/fd/N), then import the new descriptor",
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
    "ipc-after-kill",
    "CUDA IPC: does an opened handle outlive its exporter?",
    "cuIpcOpenMemHandle (timed), SIGKILL of the exporter, 0.5 s, read",
)
def _ipc_after_kill() -> str:
    with peer(_export_by_ipc) as exporter:
        data, _ = exporter.receive()
        with driver.on_device(ORDINAL):
            start = time.perf_counter()
            address = _open_ipc(data)
            microseconds = (time.perf_counter() - start) * 1e6
            before = reading(address)
            exporter.kill()
            return f"opened in {microseconds:.0f} µs; before: reading {before}; after: reading {reading(address)}"


@question(
    "ipc-open-after-kill",
    "CUDA IPC: can a handle be opened after its exporter was killed?",
    "SIGKILL of the exporter, 0.5 s, cuIpcOpenMemHandle",
)
def _ipc_open_after_kill() -> str:
    with peer(_export_by_ipc) as exporter:
        data, _ = exporter.receive()
        exporter.kill()
    with driver.on_device(ORDINAL):
        try:
            address = _open_ipc(data)
        except DeviceError as error:
            return f"no: {error.code}"
        return f"it opens; reading {reading(address)}"


def _export_by_ipc(connection: socket.socket) -> None:
    with driver.on_device(ORDINAL):
        address = int(driver.call("cuMemAlloc", 2 * MIB))
        fill(address, 2 * MIB)
        handle = driver.call("cuIpcGetMemHandle", address)
        connection.send(ctypes.string_at(handle.getPtr(), IPC_BYTES))
        connection.recv(1)


def _open_ipc(data: bytes) -> int:
    from cuda.bindings import driver as cuda

    handle = cuda.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), data, IPC_BYTES)
    flag = cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    return int(driver.call("cuIpcOpenMemHandle", handle, flag))


# -- what read-only means ----------------------------------------------------------------------------------------------


@question(
    "copy-into-readonly",
    "What does a driver's copy into a read-only mapping do?",
    "import, map read-only, cuMemcpyHtoD, cuCtxSynchronize, cuMemGetInfo; then a read by another process",
)
def _copy_into_readonly() -> str:
    return _attempt(_copy_over)


@question(
    "kernel-into-readonly",
    "What does a kernel's store into a read-only mapping do?",
    "import, map read-only, torch.Tensor.fill_, torch.cuda.synchronize, one more call; then a read by another process",
    seconds=180,
)
def _kernel_into_readonly() -> str:
    return _attempt(_store_by_kernel)


def _attempt(write: Callable[[int, int], str]) -> str:
    """Write through a read-only mapping in one process, and read in another what became of the memory."""

    def attempt(connection: socket.socket) -> None:
        _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
        answer = {}
        with driver.on_device(ORDINAL):
            place = mapped(driver.import_descriptor(descriptor), driver.granularity(ORDINAL), writable=False)
            try:
                answer["said"] = write(place.address, place.size)
            except NoAnswerError as why:
                answer["skipped"] = str(why)
            connection.send(json.dumps(answer).encode())
            connection.recv(1)

    with peer(export_memory) as exporter, peer(attempt) as writer:
        _, (descriptor,) = exporter.receive()
        writer.send(descriptor)
        answer = json.loads(writer.receive()[0])
        writer.kill()
        if "skipped" in answer:
            raise NoAnswerError(answer["skipped"])
        with driver.on_device(ORDINAL):
            place = mapped(driver.import_descriptor(descriptor), driver.granularity(ORDINAL), writable=False)
            return f"{answer['said']}; afterwards reading it elsewhere {reading(place.address)}"


def _copy_over(address: int, size: int) -> str:
    source = (ctypes.c_ubyte * 64)()
    copied = code("cuMemcpyHtoD", address, ctypes.addressof(source), min(64, size))
    return f"cuMemcpyHtoD: {copied}, synchronising: {code('cuCtxSynchronize')}, next call: {code('cuMemGetInfo')}"


def _store_by_kernel(address: int, size: int) -> str:
    try:
        import torch
    except ImportError:
        raise NoAnswerError("torch is not installed") from None
    if is_double() or not torch.cuda.is_available():
        raise NoAnswerError("torch.cuda does not run here")
    from cuda.core import Buffer

    tensor = torch.from_dlpack(Buffer.from_handle(address, size, owner=object()))
    said = []
    for step in (lambda: tensor.fill_(1), torch.cuda.synchronize, lambda: torch.zeros(1, device="cuda")):
        try:
            step()
            said.append("returns")
        except RuntimeError as error:
            said.append(f"raises {type(error).__name__} ({str(error).splitlines()[0]})")
    launch, wait, after = said
    return f"the launch {launch}, synchronising {wait}, the next kernel {after}"


@question(
    "upgrade",
    "Can a client make its own read-only mapping writable?",
    "import, map read-only, cuMemSetAccess for reading and writing, cuMemsetD8, read",
)
def _upgrade() -> str:
    with peer(export_memory) as exporter:
        allocation, size = _imported(exporter)
        with driver.on_device(ORDINAL):
            address = mapped(allocation, size, writable=False).address
            result = set_access(address, size, writable=True)
            if result != SUCCESS:
                return f"no: cuMemSetAccess: {result}"
            other = PATTERN ^ 0xFF
            fill(address, size, other)
            return f"yes: cuMemSetAccess succeeds, and reading after a write {reading(address, other)}"


@question(
    "two-mappings",
    "Can one process map one allocation twice, once to write and once to read?",
    "two ranges over one allocation; a write through one is read through the other",
)
def _two_mappings() -> str:
    with driver.on_device(ORDINAL):
        size = driver.granularity(ORDINAL)
        allocation = driver.create(ORDINAL, size)
        try:
            one = mapped(allocation, size, writable=True)
            two = mapped(allocation, size, writable=False)
        except DeviceError as error:
            return f"no: {error.metadata['call']} fails with {error.code}"
        fill(one.address, size)
        return f"yes; reading through the second {reading(two.address)}"


@question(
    "unmap-adjacent",
    "May one cuMemUnmap cover several adjacent mappings?",
    "two allocations mapped side by side, one cuMemUnmap over both",
)
def _unmap_adjacent() -> str:
    driver.initialise()
    size = driver.granularity(ORDINAL)
    place = driver.MappedAddressRange(ORDINAL, 2 * size)
    for offset in (0, size):
        place.map(offset, size, driver.create(ORDINAL, size))
    place.allow(writable=True)
    result = code("cuMemUnmap", place.address, 2 * size)
    return "yes" if result == SUCCESS else f"no: {result}"
