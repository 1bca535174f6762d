"""Selects how a loader accesses each kind of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightd.errors import DeviceError, DeviceMismatchError

from .cuda_errors import explained
from .host_io import HostSegmentIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .device import DeviceSegment
    from .segment_io import DeviceSegmentIO, OnFull


def _give_up(error: DeviceError) -> None:
    raise error


def open_io(kind: str, uuid: str, segments: Mapping[int, DeviceSegment], on_full: OnFull = _give_up) -> DeviceSegmentIO:
    """Access to a device's segments; `segments` may grow meanwhile. Errors: DeviceError, those of `on_full`."""
    try:
        return KINDS[kind](kind, uuid, segments, on_full)
    except DeviceMismatchError as error:  # clients would take that for their own process
        raise DeviceError(f"the loader cannot use the device: {error.message}") from error
    except DeviceError as error:
        raise type(error)(explained(error), error.metadata) from error


def _host(_: str, __: str, segments: Mapping[int, DeviceSegment], ___: OnFull) -> DeviceSegmentIO:
    return HostSegmentIO(segments)


def _cuda(kind: str, uuid: str, segments: Mapping[int, DeviceSegment], on_full: OnFull) -> DeviceSegmentIO:
    from .cuda_io import CudaSegmentIO  # it needs cuda-bindings, which a loader of host memory must not

    return CudaSegmentIO(kind, uuid, segments, on_full)


KINDS: Final = {"host": _host, "cuda_vmm": _cuda, "cuda_ipc": _cuda}
"""How a loader gets at segments of each kind."""
