"""weightd: one copy of the weights per machine.

    import weightd.torch
    state = weightd.torch.load_file("model.safetensors")

Tensors are shared: other processes, and other checkpoints, read the same memory. Writing to one in place makes the
written pages private to this process and costs their memory again; nobody else sees the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    CapacityError,
    DaemonBusyError,
    DaemonUnreachableError,
    DeviceAbsentError,
    DeviceError,
    DeviceMismatchError,
    DigestMismatchError,
    DrainingError,
    EventsLostError,
    ForkedError,
    FormatError,
    InUseError,
    InvalidReferenceError,
    LeaseLostError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolMismatchError,
    ResourceLimitError,
    ServerError,
    SharedWeightsError,
    WeightdError,
)

if TYPE_CHECKING:
    from ._mapping.cuda_release import unreleased_bytes, wait_until_released
    from .attachment import Attachment
    from .client import Client, connect

__version__ = "0.2.0"

__all__ = [
    "Attachment",
    "CapacityError",
    "Client",
    "DaemonBusyError",
    "DaemonUnreachableError",
    "DeviceAbsentError",
    "DeviceError",
    "DeviceMismatchError",
    "DigestMismatchError",
    "DrainingError",
    "EventsLostError",
    "ForkedError",
    "FormatError",
    "InUseError",
    "InvalidReferenceError",
    "LeaseLostError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProtocolMismatchError",
    "ResourceLimitError",
    "ServerError",
    "SharedWeightsError",
    "WeightdError",
    "__version__",
    "connect",
    "unreleased_bytes",
    "wait_until_released",
]

_LAZY = {
    "Attachment": "attachment",
    "Client": "client",
    "connect": "client",
    "unreleased_bytes": "_mapping.cuda_release",
    "wait_until_released": "_mapping.cuda_release",
}


def __getattr__(name: str) -> Any:
    """Import the library when it is first used: errors and the version cost nothing."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: what is imported when it is first used, too."""
    return sorted({*globals(), *__all__})
