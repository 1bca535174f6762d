"""Map segments: select the module that maps a kind of device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightd.errors import DeviceMismatchError, ServerError

from .host import MappedHostSegments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .segments import MappedSegments, SegmentToMap


def open_segments(
    kind: str, uuid: str, wanted: Sequence[SegmentToMap], lease: object, *, peers: bool = False
) -> MappedSegments:
    """Map segments of a device; they keep the lease. Descriptors stay the caller's. On an error nothing stays mapped.

    With `peers` the other visible GPUs that can access the device's memory may read the segments, too; memory of the
    host and of CUDA IPC needs nothing for that. With nothing wanted no driver is needed. Errors: DeviceMismatchError
    (the device is not visible here, or of a kind that this version does not know), DeviceError, ForkedError,
    ResourceLimitError, OSError.
    """
    if kind not in KINDS:
        raise DeviceMismatchError(f"{uuid} shares its memory by {kind!r}, which this version of weightd does not know")
    if any(isinstance(one.handle, bytes) != (kind == "cuda_ipc") for one in wanted):
        raise ServerError(f"the daemon sent handles that are not those of {kind}")
    return KINDS[kind](uuid, wanted, lease, peers)


def _host(_: str, wanted: Sequence[SegmentToMap], lease: object, __: bool) -> MappedSegments:
    return MappedHostSegments(wanted, lease)


def _cuda_vmm(uuid: str, wanted: Sequence[SegmentToMap], lease: object, peers: bool) -> MappedSegments:
    from .cuda_vmm import MappedVmmSegments  # these need the driver

    return MappedVmmSegments(uuid, wanted, lease, peers=peers)


def _cuda_ipc(uuid: str, wanted: Sequence[SegmentToMap], lease: object, _: bool) -> MappedSegments:
    from .cuda_ipc import MappedIpcSegments

    return MappedIpcSegments(uuid, wanted, lease)


KINDS: Final = {"host": _host, "cuda_vmm": _cuda_vmm, "cuda_ipc": _cuda_ipc}
"""How segments of each kind are mapped. "To add a device" in docs/architecture.md lists what else a kind needs."""
