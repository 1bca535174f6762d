"""Map segments: which module maps which kind of device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd.errors import DeviceMismatchError, ServerError

from .host import HostSegments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .segments import Segments, Wanted


def open_segments(kind: str, uuid: str, wanted: Sequence[Wanted], lease: object) -> Segments:
    """Map segments of a device; they keep the lease. Descriptors stay the caller's. On an error nothing stays mapped.

    With nothing wanted no driver is needed. Errors: DeviceMismatchError (the device is not visible here, or of a kind
    that this version does not know), DeviceError, ForkedError, ResourceLimitError, OSError.
    """
    if kind not in ("host", "cuda_vmm", "cuda_ipc"):
        raise DeviceMismatchError(f"{uuid} shares its memory by {kind!r}, which this version of weightd does not know")
    if any(isinstance(one.handle, bytes) != (kind == "cuda_ipc") for one in wanted):
        raise ServerError(f"the daemon sent handles that are not those of {kind}")
    if kind == "host":
        return HostSegments(wanted, lease)
    if kind == "cuda_vmm":
        from .cuda_vmm import VmmSegments

        return VmmSegments(uuid, wanted, lease)
    from .cuda_ipc import IpcSegments

    return IpcSegments(uuid, wanted, lease)
