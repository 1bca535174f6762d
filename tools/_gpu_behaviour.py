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
    Usage,
    code,
    export_memory,
    fill,
    imported,
    is_double,
    mapped,
    nvml_device,
    peer,
    question,
    read,
    reading,
    set_access,
)

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

# -- what an owner without a context can do ----------------------------------------------------------------------------


@question(
    "granularity",
    "In what units is device memory allocated?",
    "cuMemGetAllocationGranularity, both flags",
    "the unit of segments, and what the smallest checkpoint costs",
)
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
    "whether the daemon can own memory without a context, and what that costs outside the budget",
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
    "whether a client must have a context before it attaches",
)
def _map_without_context() -> str:
    driver.initialise()
    size = driver.granularity(ORDINAL)
    allocation = driver.create(ORDINAL, size)
    place = driver.MappedAddressRange(ORDINAL, size)
    result = code("cuMemMap", place.address, size, 0, allocation, 0)
    return f"cuMemMap: {result}, cuMemSetAccess: {set_access(place.address, size, writable=True)}"


@question(
    "context-cost",
    "How much device memory does a context use?",
    "NVML's used memory around cuDevicePrimaryCtxRetain",
    "how much of a GPU the default budget leaves to contexts",
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
    "whether the daemon may believe NVML right after it released memory, or must wait",
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


@question(
    "uuid",
    "Does NVML know the device by the driver's UUID?",
    "nvmlDeviceGetHandleByUUID(cuDeviceGetUuid)",
    "whether NVML's figures are those of the device that the daemon serves",
)
def _uuid() -> str:
    driver.initialise()
    nvml, handle = nvml_device()
    ours, theirs = driver.uuid_of(ORDINAL), nvml.nvmlDeviceGetUUID(handle)
    return "yes, the same text" if ours == theirs else "NVML finds a device, but calls it otherwise"


# -- what read-only means ----------------------------------------------------------------------------------------------


@question(
    "copy-into-readonly",
    "What does a driver's copy into a read-only mapping do?",
    "import, map read-only, cuMemcpyHtoD, cuCtxSynchronize, cuMemGetInfo; then a read by another process",
    "what docs/security.md says of a client that writes by accident",
)
def _copy_into_readonly() -> str:
    return _attempt(_copy_over)


@question(
    "kernel-into-readonly",
    "What does a kernel's store into a read-only mapping do?",
    "import, map read-only, torch.Tensor.fill_, torch.cuda.synchronize, one more call; then a read by another process",
    "what docs/security.md says of a kernel that writes by accident, and whether its process must be restarted",
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
    "whether read-only mappings are a guard against accidents or protection",
)
def _upgrade() -> str:
    with peer(export_memory) as exporter:
        allocation, size = imported(exporter)
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
    "whether a loader may write where a client in the same process reads",
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
    "whether an attachment can be unmapped in one call",
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


@question(
    "one-access",
    "May one cuMemSetAccess cover several allocations, one of them mapped twice?",
    "one range over allocations A, B, A; one cuMemSetAccess for all; each is read",
    "whether a client may map an attachment as one range, which the library relies on",
)
def _one_access() -> str:
    with driver.on_device(ORDINAL):
        size = driver.granularity(ORDINAL)
        one, two = (driver.create(ORDINAL, size) for _ in range(2))
        for allocation, byte in ((one, PATTERN), (two, PATTERN + 1)):
            place = mapped(allocation, size, writable=True)
            fill(place.address, size, byte)
            place.close()
        whole = driver.MappedAddressRange(ORDINAL, 3 * size)
        for number, allocation in enumerate((one, two, one)):
            whole.map(number * size, size, allocation)
        result = set_access(whole.address, whole.size, writable=False)
        if result != SUCCESS:
            return f"no: cuMemSetAccess: {result}"
        bytes_ = (PATTERN, PATTERN + 1, PATTERN)
        return f"yes; reading {', '.join(reading(whole.address + n * size, byte) for n, byte in enumerate(bytes_))}"


@question(
    "zeroed-for-others",
    "Does new memory hold what another process left?",
    "a process fills 2 GiB and is killed; this one creates 2 GiB and counts bytes that are not zero",
    "whether the daemon must clear segments before another user gets them",
    seconds=90,
)
def _zeroed_for_others() -> str:
    with peer(_leave_filled) as other:
        other.receive()
    driver.initialise()
    size = _gigabytes()
    with driver.on_device(ORDINAL):
        place = mapped(driver.create(ORDINAL, size), size, writable=False)
        pieces = (read(place.address + offset, 64 * MIB) for offset in range(0, size, 64 * MIB))
        return f"{sum(len(piece) - piece.count(0) for piece in pieces)} bytes of {size // MIB} MiB are not zero"


def _leave_filled(connection: socket.socket) -> None:
    driver.initialise()
    size = _gigabytes()
    allocation = driver.create(ORDINAL, size)
    with driver.on_device(ORDINAL):
        fill(mapped(allocation, size, writable=True).address, size)
    connection.send(b".")
    connection.recv(1)


def _gigabytes() -> int:
    """So much that the memory just freed is used again; on the double, whose memory is the host's, less."""
    return (64 if is_double() else 2048) * MIB
