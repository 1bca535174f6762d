"""What every kind of device memory offers an attachment once it is mapped, and which module maps which kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from weightd.errors import DeviceMismatchError, ServerError

from .host import HostSegments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .ranges import Range

Memory = memoryview | Any
"""A memoryview on the host, a `cuda.core.Buffer` on a GPU; `Any` for that one, which is not installed everywhere."""


class Wanted(NamedTuple):
    """A segment to map: its number in the manifest, its bytes, its descriptor or CUDA IPC handle, and how often.

    `copies` is how many names at most have one address in it: each needs an address of its own.
    """

    segment: int
    size: int
    handle: int | bytes
    copies: int


class Segments(Protocol):
    """Mapped segments. Whatever `buffer` returned keeps what it needs of them, and the lease, until it is gone."""

    @property
    def torch_device(self) -> str:
        """What torch calls the device in this process: "cpu", "cuda:1"."""

    def ranges(self) -> list[Range]:
        """Everything that is mapped."""

    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Address and length of each mapping, by segment and copy."""

    def buffer(self, segment: int, copy: int, offset: int, length: int) -> Memory:
        """`length` bytes, not 0, at an offset of a segment; `copy` is less than the segment's `copies`.

        Errors: KeyError (the segment is not mapped), DeviceError, ForkedError (the GPU's memory is the parent's).
        """


def open_segments(kind: str, uuid: str, wanted: Sequence[Wanted], lease: object) -> Segments:
    """Map segments of a device; they keep the lease. Descriptors stay the caller's. On an error nothing stays mapped.

    With nothing wanted no driver is needed. Errors: DeviceMismatchError (the device is not visible here, or of a kind
    that this version does not know), DeviceError, ForkedError, ResourceLimitError, OSError.
    """
    if kind not in KINDS:
        raise DeviceMismatchError(f"{uuid} shares its memory by {kind!r}, which this version of weightd does not know")
    if any(isinstance(one.handle, bytes) != (kind == "cuda_ipc") for one in wanted):
        raise ServerError(f"the daemon sent handles that are not those of {kind}")
    return KINDS[kind](uuid, wanted, lease)


def _host(_: str, wanted: Sequence[Wanted], lease: object) -> Segments:
    return HostSegments(wanted, lease)


def _cuda_vmm(uuid: str, wanted: Sequence[Wanted], lease: object) -> Segments:
    from .cuda_vmm import VmmSegments  # these need the driver

    return VmmSegments(uuid, wanted, lease)


def _cuda_ipc(uuid: str, wanted: Sequence[Wanted], lease: object) -> Segments:
    from .cuda_ipc import IpcSegments

    return IpcSegments(uuid, wanted, lease)


KINDS: Final = {"host": _host, "cuda_vmm": _cuda_vmm, "cuda_ipc": _cuda_ipc}
"""How segments of each kind are mapped. "To add a device" in docs/architecture.md lists what else a kind needs."""
