"""What the programs of tests/driver/test_fakecuda.py do with the driver, through cuda-bindings."""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Any

from cuda.bindings import driver

GRANULE = 2 << 20
DESCRIPTOR = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
NO_HANDLE = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
PEER_ACCESS = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
NON_BLOCKING = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
READ, READ_WRITE = 1, 3


def status(name: str, *arguments: Any) -> int:
    """Call a driver function; returns its CUresult."""
    return int(getattr(driver, name)(*arguments)[0])


def ok(name: str, *arguments: Any) -> Any:
    """Call a driver function that must succeed; returns its result."""
    code, *results = getattr(driver, name)(*arguments)
    assert code == driver.CUresult.CUDA_SUCCESS, f"{name}: {code!r}"
    return results[0] if len(results) == 1 else tuple(results)


def start(ordinal: int = 0) -> Any:
    """Initialise the driver and make the primary context of a device current; returns the context."""
    ok("cuInit", 0)
    context = ok("cuDevicePrimaryCtxRetain", ordinal)
    ok("cuCtxSetCurrent", context)
    return context


def properties(ordinal: int = 0, types: Any = DESCRIPTOR) -> Any:
    """Of an allocation on a device that can be exported as `types`."""
    made = driver.CUmemAllocationProp()
    made.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = ordinal
    made.requestedHandleTypes = types
    return made


def access(flags: int, ordinal: int = 0) -> Any:
    """An access description: READ or READ_WRITE."""
    made = driver.CUmemAccessDesc()
    made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = ordinal
    made.flags = driver.CUmemAccess_flags(flags)
    return made


def create(size: int = GRANULE, ordinal: int = 0, types: Any = DESCRIPTOR) -> Any:
    """Allocate; returns the handle."""
    return ok("cuMemCreate", size, properties(ordinal, types), 0)


def mapped(allocation: Any, flags: int, size: int = GRANULE, ordinal: int = 0) -> int:
    """Map an allocation at addresses of its own; returns the first."""
    address = int(ok("cuMemAddressReserve", size, 0, 0, 0))
    ok("cuMemMap", address, size, 0, allocation, 0)
    ok("cuMemSetAccess", address, size, [access(flags, ordinal)], 1)
    return address


def pinned(size: int) -> Any:
    """A pinned host buffer, as a ctypes array."""
    return (ctypes.c_ubyte * size).from_address(int(ok("cuMemHostAlloc", size, 0)))


def driver_address(buffer: Any) -> int:
    """Where a writable buffer begins."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))


def write(address: int, content: bytes) -> None:
    """Copy to the device, and wait."""
    ok("cuMemcpyHtoD", address, content, len(content))


def read(address: int, size: int) -> str:
    """Copy from the device, and wait; returns hexadecimal digits, which JSON can carry."""
    content = bytearray(size)
    ok("cuMemcpyDtoH", content, address, size)
    return content.hex()


def exported(address: int) -> str:
    """The CUDA IPC handle of an address, as hexadecimal digits."""
    handle = ok("cuIpcGetMemHandle", address)  # owns the bytes: it has to live until they are read
    return ctypes.string_at(handle.getPtr(), 64).hex()


def ipc_handle(digits: str) -> Any:
    """The handle that `exported` gave."""
    handle = driver.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), bytes.fromhex(digits), 64)
    return handle


def give(descriptor: int) -> None:
    """Send a descriptor to the test, and close it here."""
    socket.send_fds(link(), [b"."], [descriptor])
    os.close(descriptor)


def take() -> int:
    """A descriptor that the test has given."""
    return socket.recv_fds(link(), 1, 1)[1][0]


_links: list[socket.socket] = []


def link() -> socket.socket:
    """The connection to the test."""
    if not _links:
        _links.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        _links[0].connect(os.environ["FAKECUDA_TEST_LINK"])
    return _links[0]
