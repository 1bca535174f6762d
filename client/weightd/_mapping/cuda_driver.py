"""The CUDA driver API, through cuda-bindings: calls that raise, devices by UUID, allocations and address ranges.

All calls of the driver go through this module; client, loader, holder and daemon use it alike. Devices go by *ordinal*,
the number that this process knows them by (CUDA_VISIBLE_DEVICES); between processes they are named by UUID.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from typing import TYPE_CHECKING, Any
from uuid import UUID

from weightd.errors import DeviceError, DeviceMismatchError, ForkedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Ordinal = int
Allocation = Any
"""A CUmemGenericAllocationHandle."""

# Re-entrant: a finalizer of a mapping may run in the midst of a call that this very thread makes.
_lock = threading.RLock()
_initialised_in: int | None = None
_contexts: dict[Ordinal, Any] = {}

_FORKED = "CUDA does not survive a fork; start the process with `spawn`, and attach there"
_UNKNOWN = re.compile(r"(\d+) is not a valid CUresult")


def _new_lock() -> None:
    """In a forked child, for the thread that had the lock is not there, and finalizers run there too."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


def call(name: str, *arguments: Any) -> Any:
    """Call a driver function; returns its result, a tuple where there are several. Errors: DeviceError."""
    function = getattr(_driver(), name)
    try:
        status, *results = function(*arguments)
    except (KeyError, ValueError) as error:
        raise _unknown_status(name, error) from None
    if status:
        raise _failure(name, status)
    return results[0] if len(results) == 1 else tuple(results)


def initialise() -> None:
    """Get the driver ready, once. Errors: DeviceMismatchError (no driver, no GPU), ForkedError."""
    global _initialised_in
    known = _initialised_in
    if known == os.getpid():
        return
    if known is not None:  # before the lock, which another thread may have held when this process was forked
        raise ForkedError(_FORKED)
    with _lock:
        try:
            call("cuInit", 0)
        except DeviceMismatchError:
            raise
        except DeviceError as error:
            if error.code == "CUDA_ERROR_NOT_INITIALIZED":  # torch, say, had initialised it before the fork
                raise ForkedError(_FORKED) from error
            raise DeviceMismatchError(
                f"no CUDA device can be used here: cuInit failed with {error.code}", error.metadata
            ) from error
        except Exception as error:  # cuda-bindings raises its own kinds where libcuda is missing or too old
            raise DeviceMismatchError(f"no CUDA driver can be used here: {_first_line(error)}") from error
        _initialised_in = os.getpid()


def is_ours() -> bool:
    """Whether this process may call the driver: it has initialised it, not its parent before a fork."""
    return _initialised_in == os.getpid()


@functools.cache
def bound(name: str) -> Callable[..., None]:
    """`call` of one function whose result is of no use, looked up once: 0.5 µs instead of 1.1, with the GIL held."""
    function = getattr(_driver(), name)

    def checked(*arguments: Any) -> None:
        try:
            status = function(*arguments)[0]
        except (KeyError, ValueError) as error:
            raise _unknown_status(name, error) from None
        if status:
            raise _failure(name, status)

    return checked


# -- devices -----------------------------------------------------------------------------------------------------------


def device_count() -> int:
    """How many GPUs this process sees. Errors: DeviceMismatchError, DeviceError."""
    initialise()
    return int(call("cuDeviceGetCount"))


def ordinal_of(uuid: str) -> Ordinal:
    """The ordinal of a GPU. Errors: DeviceMismatchError (this process does not see it), DeviceError."""
    visible: list[str] = []
    failed: dict[str, str] = {}
    for ordinal in range(device_count()):
        try:
            visible.append(_uuid(ordinal))
        except DeviceError as error:  # which matters only if it is the one that is meant
            visible.append(f"cuda:{ordinal} ({error})")
            failed = error.metadata
        if visible[-1] == uuid:
            return ordinal
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES={setting})" if setting is not None else ""
    kind = DeviceError if failed else DeviceMismatchError
    raise kind(f"{uuid} is not visible to this process{why}; it sees {', '.join(visible) or 'no GPU'}", failed)


def uuid_of(ordinal: Ordinal) -> str:
    """The UUID of a GPU. Errors: DeviceMismatchError (there are fewer), DeviceError."""
    devices = device_count()
    if not 0 <= ordinal < devices:
        raise DeviceMismatchError(f"cuda:{ordinal} is not there; this process sees {devices} CUDA devices")
    return _uuid(ordinal)


def name_of(ordinal: Ordinal) -> str:
    """The device's name for people."""
    text: bytes = call("cuDeviceGetName", 256, call("cuDeviceGet", ordinal))
    return text.partition(b"\0")[0].decode(errors="replace")


def total_memory(ordinal: Ordinal) -> int:
    """Bytes of memory that the device has."""
    return int(call("cuDeviceTotalMem", call("cuDeviceGet", ordinal)))


def compute_mode(ordinal: Ordinal) -> int:
    """The device's compute mode, a CUcomputemode: who may have a context. Errors: DeviceError."""
    attribute = _driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
    return int(call("cuDeviceGetAttribute", attribute, call("cuDeviceGet", ordinal)))


class _OnDevice:
    """Make the device's primary context, the one that torch uses, current in this thread. Errors: DeviceError.

    It is retained once and kept while the process lives.
    """

    __slots__ = ("_ordinal",)

    def __init__(self, ordinal: Ordinal) -> None:
        self._ordinal = ordinal

    def __enter__(self) -> None:
        _enter(self._ordinal)

    def __exit__(self, *_: object) -> None:
        bound("cuCtxPopCurrent")()


on_device = _OnDevice  # a function to its callers; a generator's context manager takes 1 µs more


def is_active(ordinal: Ordinal) -> bool:
    """Whether this process has the device's primary context: without it torch has queued nothing there."""
    _, active = call("cuDevicePrimaryCtxGetState", call("cuDeviceGet", ordinal))
    return bool(active)


def peers_of(ordinal: Ordinal) -> list[Ordinal]:
    """The other GPUs that this process sees and that can access a GPU's memory. Errors: DeviceError."""
    device = call("cuDeviceGet", ordinal)
    others = (other for other in range(device_count()) if other != ordinal)
    return [other for other in others if call("cuDeviceCanAccessPeer", call("cuDeviceGet", other), device)]


# -- allocations: no context needed ------------------------------------------------------------------------------------


def granularity(ordinal: Ordinal) -> int:
    """Bytes in which the device's memory is allocated and mapped."""
    flag = _driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(call("cuMemGetAllocationGranularity", _properties(ordinal), flag))


def create(ordinal: Ordinal, size: int) -> Allocation:
    """Allocate `size` bytes, a multiple of the granularity, that can be exported. Errors: DeviceError."""
    return call("cuMemCreate", size, _properties(ordinal), 0)


def export(allocation: Allocation) -> int:
    """A descriptor that stands for an allocation, and keeps its memory. Errors: DeviceError."""
    descriptor = int(call("cuMemExportToShareableHandle", allocation, _descriptor_type(), 0))
    os.set_inheritable(descriptor, False)
    return descriptor


def import_descriptor(descriptor: int) -> Allocation:
    """The allocation that a descriptor stands for; the descriptor stays the caller's. Errors: DeviceError."""
    return call("cuMemImportFromShareableHandle", descriptor, _descriptor_type())


def ordinal_of_allocation(allocation: Allocation) -> Ordinal | None:
    """The GPU on which an allocation lies, as far as the driver says; None where it does not."""
    try:
        location = call("cuMemGetAllocationPropertiesFromHandle", allocation).location
    except DeviceError:  # whether it answers for what was imported is not documented
        return None
    on_device = location.type == _driver().CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    return int(location.id) if on_device else None


def release(allocation: Allocation) -> None:
    """Give an allocation up; its memory goes when nobody maps, imports or holds a descriptor of it any more."""
    call("cuMemRelease", allocation)


class MappedAddressRange:
    """Range of device addresses into which memory is mapped, until `close`. Sizes are bytes."""

    def __init__(self, ordinal: Ordinal, size: int) -> None:
        self._ordinal = ordinal
        self._mapped: list[tuple[int, int]] = []
        self.size = size
        self.address = int(call("cuMemAddressReserve", size, 0, 0, 0))

    def map(self, offset: int, size: int, allocation: Allocation) -> None:
        """Map a whole allocation at `offset`. It stays mapped when the allocation is released. Errors: DeviceError."""
        call("cuMemMap", self.address + offset, size, 0, allocation, 0)
        self._mapped.append((self.address + offset, size))

    def allow(self, *, writable: bool, peers: Sequence[Ordinal] = ()) -> None:
        """Let the device, and its peers, read, or read and write, the whole range, all of which is mapped.

        Errors: DeviceError.
        """
        driver = _driver()
        flags = driver.CUmemAccess_flags
        granted = []
        for ordinal in (self._ordinal, *peers):
            access = driver.CUmemAccessDesc()
            access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = ordinal
            access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
            granted.append(access)
        call("cuMemSetAccess", self.address, self.size, granted, len(granted))

    def close(self) -> None:
        """Unmap everything and give the addresses back; the device must not use them any more.

        Errors: DeviceError, the first, after everything was tried; what is still mapped can be tried again.
        """
        mapped, self._mapped = self._mapped, []
        failed: DeviceError | None = None
        for address, size in mapped:
            try:
                call("cuMemUnmap", address, size)
            except DeviceError as error:
                failed = failed or error
                self._mapped.append((address, size))
        if failed:
            try:
                raise failed
            finally:
                del failed  # it is in its own traceback's reach: that cycle would keep all who are closing
        if self.address:
            call("cuMemAddressFree", self.address, self.size)
            self.address = 0


# -- CUDA IPC: memory that belongs to the process that allocated it ----------------------------------------------------


def ipc_handle(address: int) -> bytes:
    """The 64 bytes that stand for a whole cuMemAlloc allocation in other processes. Errors: DeviceError."""
    handle = call("cuIpcGetMemHandle", address)
    return ctypes.string_at(handle.getPtr(), _driver().CU_IPC_HANDLE_SIZE)


def open_ipc(handle: bytes) -> int:
    """The address of another process's allocation, all of it, always writable; a context must be current.

    Errors: DeviceError.
    """
    driver = _driver()
    opaque = driver.CUipcMemHandle()
    ctypes.memmove(opaque.getPtr(), handle, len(handle))
    return int(call("cuIpcOpenMemHandle", opaque, driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS))


# -- inside ------------------------------------------------------------------------------------------------------------


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DeviceMismatchError(
            "GPU memory needs the package cuda-bindings, which is not installed; "
            "pip install '.[cuda]' in weightd's checkout",
            {"package": "cuda-bindings"},
        ) from None
    return driver


def _failure(name: str, status: Any) -> DeviceError:
    return DeviceError(f"{name} failed with {status.name}; see `nvidia-smi`", {"call": name, "code": status.name})


def _unknown_status(name: str, error: Exception) -> Exception:
    """What is to be raised where cuda-bindings is older than the driver, and does not know the status of a call.

    It raises KeyError with the number (12), or ValueError with a sentence (13); anything else is a fault of the caller.
    """
    told = error.args[0] if error.args else None
    matched = _UNKNOWN.fullmatch(told) if isinstance(told, str) else None
    if isinstance(told, int):
        code = f"CUDA_ERROR_{told}"
    elif matched is not None:
        code = f"CUDA_ERROR_{matched[1]}"
    else:
        return error
    return DeviceError(f"{name} failed with {code}; see `nvidia-smi`", {"call": name, "code": code})


def _enter(ordinal: Ordinal) -> None:
    """Push the device's primary context; whoever calls this pops it."""
    initialise()
    if ordinal not in _contexts:
        with _lock:
            if ordinal not in _contexts:
                _contexts[ordinal] = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", ordinal))
    bound("cuCtxPushCurrent")(_contexts[ordinal])


def _uuid(ordinal: Ordinal) -> str:
    # cuda-bindings 12 has both; without a suffix it is the first version, which knows nothing of MIG.
    name = "cuDeviceGetUuid_v2" if hasattr(_driver(), "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    return f"GPU-{UUID(bytes=bytes(call(name, call('cuDeviceGet', ordinal)).bytes))}"


def _properties(ordinal: Ordinal) -> Any:
    driver = _driver()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    properties.requestedHandleTypes = _descriptor_type()
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    properties.allocFlags.gpuDirectRDMACapable = int(call("cuDeviceGetAttribute", attribute, ordinal))
    return properties


def _descriptor_type() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
