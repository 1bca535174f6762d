"""Every error that weightd raises, and the one table that maps them to the wire and to exit codes.

    WeightdError
     ├─ InvalidReferenceError (ValueError)      a reference, name, device or argument that cannot be
     │   └─ SharedWeightsError (RuntimeError)   a write into weights that other processes read
     ├─ NotFoundError (LookupError)             no such checkpoint, tensor or file
     ├─ FormatError (ValueError)                a checkpoint file that is corrupt or not supported
     ├─ DigestMismatchError                     resident bytes do not match their digest
     ├─ CapacityError (MemoryError)             does not fit, after eviction; or a limit of the user is reached
     ├─ ResourceLimitError (OSError)            a process is out of descriptors, address space, mappings or processes
     ├─ InUseError                              somebody holds it
     ├─ LeaseLostError                          the daemon no longer knows the lease or the load
     ├─ DeviceMismatchError                     the device is not visible to this process
     ├─ DeviceError (RuntimeError)              a call of the device's driver failed, or the device was lost
     │   └─ DeviceAbsentError                   the device cannot be served now; what is kept on it stays kept
     ├─ PermissionDeniedError (PermissionError) not yours, or a daemon that you may not reach
     ├─ DaemonUnreachableError (ConnectionError) no daemon serves at the address
     │   ├─ DaemonBusyError                     one is there, and is full or does not answer in time
     │   └─ DrainingError                       one answers, and lends and loads nothing new
     ├─ ProtocolMismatchError                   what answers speaks another protocol
     ├─ EventsLostError                         a reader of events was too slow
     ├─ ForkedError (RuntimeError)              a client used in a forked child
     └─ ServerError                             a bug in the daemon; its log has the id

The daemon raises the same classes; only its edges turn them into gRPC codes. Nothing here imports grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


class WeightdError(Exception):
    """Base of all errors; `reason` names it on the wire, `grpc_code` and `exit_code` are its translations."""

    reason: ClassVar[str] = "INTERNAL"
    grpc_code: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})

    def __str__(self) -> str:
        return self.message


class InvalidReferenceError(WeightdError, ValueError):
    """The reference, name, device or argument cannot be what the caller meant."""

    reason = "INVALID_REFERENCE"
    grpc_code = "INVALID_ARGUMENT"
    exit_code = 2


class SharedWeightsError(InvalidReferenceError, RuntimeError):
    """A framework would write into shared weights; a RuntimeError, as torch raises in its place."""


class NotFoundError(WeightdError, LookupError):
    """No such checkpoint, component, tensor or file."""

    reason = "NOT_FOUND"
    grpc_code = "NOT_FOUND"
    exit_code = 3


class FormatError(WeightdError, ValueError):
    """A checkpoint file is corrupt, changed while it was read, or is of a kind that is not supported."""

    reason = "FORMAT"
    grpc_code = "FAILED_PRECONDITION"


class DigestMismatchError(WeightdError):
    """Resident bytes no longer match their digest."""

    reason = "DIGEST_MISMATCH"
    grpc_code = "DATA_LOSS"


class CapacityError(WeightdError, MemoryError):
    """The bytes do not fit on the device, after everything that may be evicted was counted.

    Or the user has as much as one may have: then `limit` names the daemon's setting.
    """

    reason = "CAPACITY"
    grpc_code = "RESOURCE_EXHAUSTED"
    exit_code = 5

    def _bytes(self, key: str) -> int:
        return int(self.metadata.get(key, "0"))

    @property
    def limit(self) -> str:
        """The setting that limits what one user may have, such as "max_user_leases"; empty where the device is full."""
        return self.metadata.get("limit", "")

    @property
    def requested_bytes(self) -> int:
        """Bytes that were asked for."""
        return self._bytes("requested_bytes")

    @property
    def free_bytes(self) -> int:
        """Bytes that the budget still allowed, reusable holes included."""
        return self._bytes("free_bytes")

    @property
    def evictable_bytes(self) -> int:
        """Bytes that eviction could have returned."""
        return self._bytes("evictable_bytes")

    @property
    def pinned_bytes(self) -> int:
        """Bytes that only pins keep."""
        return self._bytes("pinned_bytes")

    @property
    def leased_bytes(self) -> int:
        """Bytes that leases keep."""
        return self._bytes("leased_bytes")


class ResourceLimitError(WeightdError, OSError):
    """A process has come to a limit of the operating system; the message says which process, and what to do.

    It is this process, the daemon or one of its loaders.
    """

    reason = "RESOURCE_LIMIT"
    grpc_code = "RESOURCE_EXHAUSTED"
    exit_code = 75

    @property
    def limit(self) -> str:
        """The limit's name, such as "RLIMIT_NOFILE" or "vm.max_map_count"; "memory" where the kernel had none left."""
        return self.metadata.get("limit", "")


class InUseError(WeightdError):
    """Somebody holds the thing; the message names the holders."""

    reason = "IN_USE"
    grpc_code = "FAILED_PRECONDITION"
    exit_code = 4


class LeaseLostError(WeightdError):
    """The daemon no longer knows the lease, offer or load: it restarted, or the load was cancelled."""

    reason = "LEASE_LOST"
    grpc_code = "ABORTED"


class DeviceMismatchError(WeightdError):
    """The checkpoint is on a device that this process cannot see."""

    reason = "DEVICE_MISMATCH"
    grpc_code = "FAILED_PRECONDITION"


class DeviceError(WeightdError, RuntimeError):
    """A call of the device's driver failed, or the device was lost with all that lay on it."""

    reason = "DEVICE"
    grpc_code = "ABORTED"

    @property
    def code(self) -> str:
        """The driver's name of the error, such as "CUDA_ERROR_OUT_OF_MEMORY"; empty where it is not the driver's."""
        return self.metadata.get("code", "")


class DeviceAbsentError(DeviceError):
    """The device cannot be served at the moment. Nothing on it is lost, and the daemon tries it again by itself."""

    reason = "DEVICE_ABSENT"
    exit_code = 75


class PermissionDeniedError(WeightdError, PermissionError):
    """The thing belongs to another user, or the daemon is one that this user may not reach.

    There is a daemon, then, so it is no DaemonUnreachableError: nothing is to be loaded privately beside it.
    """

    reason = "PERMISSION_DENIED"
    grpc_code = "PERMISSION_DENIED"
    exit_code = 77


class DaemonUnreachableError(WeightdError, ConnectionError):
    """No daemon serves at the address."""

    reason = "UNREACHABLE"
    grpc_code = "UNAVAILABLE"
    exit_code = 69


class DaemonBusyError(DaemonUnreachableError):
    """A daemon is there, and has no connection left or does not answer in time: try again."""

    reason = "BUSY"
    exit_code = 75


class DrainingError(DaemonUnreachableError):
    """The daemon answers, but lends and loads nothing new: to who wants that, it is as good as gone.

    So what is done without a daemon (`fallback`) is done now, too.
    """

    reason = "DRAINING"


class ProtocolMismatchError(WeightdError):
    """What answers speaks another version of the protocol, or is no weightd daemon."""

    reason = "PROTOCOL_MISMATCH"
    grpc_code = "FAILED_PRECONDITION"
    exit_code = 76


class EventsLostError(WeightdError):
    """A reader of events was too slow, so that some were dropped; the message says how many."""

    reason = "EVENTS_LOST"
    grpc_code = "ABORTED"


class ForkedError(WeightdError, RuntimeError):
    """A client was used in a forked child. Its tensors stay readable there; start workers with `spawn` to attach."""

    reason = "FORKED"


class ServerError(WeightdError):
    """A bug in the daemon. The message carries an id that stands in its log."""

    reason = "INTERNAL"


_BY_REASON: dict[str, type[WeightdError]] = {
    kind.reason: kind
    for kind in (
        InvalidReferenceError,
        NotFoundError,
        FormatError,
        DigestMismatchError,
        CapacityError,
        ResourceLimitError,
        InUseError,
        LeaseLostError,
        DeviceMismatchError,
        DeviceError,
        DeviceAbsentError,
        PermissionDeniedError,
        DaemonUnreachableError,
        DaemonBusyError,
        DrainingError,
        ProtocolMismatchError,
        EventsLostError,
        ForkedError,
        ServerError,
    )
}


REASONS = tuple(_BY_REASON)
"""Every reason that an error may have."""

GRPC_CODES = tuple(sorted({kind.grpc_code for kind in _BY_REASON.values()}))
"""The names of the gRPC codes that errors are translated to."""


def from_wire(reason: str, message: str, metadata: Mapping[str, str] | None = None) -> WeightdError:
    """Build the error that `reason` names; an unknown reason becomes a ServerError."""
    said = message if message.strip() else f"{reason or 'an error'}, without a message"
    return _BY_REASON.get(reason, ServerError)(said, metadata)
