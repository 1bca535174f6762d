"""Absent devices: the settings, or weights that are kept, name them, and they cannot be served now.

Absent is not gone. A stand-in holds the descriptors of what is kept of a device, so that the books, the root record and
the service manager's store stay as they are, and the device takes the segments over when it can be served again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Never, Protocol

from weightd.errors import DeviceAbsentError
from weightd.types import ALIGNMENT

from .driver_thread import AnyThread

if TYPE_CHECKING:
    from collections.abc import Iterator

KeptKinds = Mapping[str, str]
"""By UUID, the kind ("cuda_vmm", "host") of each device of which the root record names a segment that is kept."""


@dataclass(frozen=True, slots=True)
class AbsentDevice:
    """A device that cannot be served now. `index` is the driver's number of it, None where the driver does not say.

    `kind` is how its segments are shared, None where nothing of it is kept and no transport was tried. `reason` is for
    people: what the driver said, and what to do about it where that is known. `said` is whether the settings name it.
    """

    uuid: str
    index: int | None
    kind: str | None
    reason: str
    said: bool = True

    @property
    def words(self) -> str:
        """Why it cannot be used, and what becomes of it, for whoever wants to."""
        return f"{self.reason}; what is kept on it stays kept" + (", and it is tried again by itself" * self.said)

    @property
    def names(self) -> tuple[str, ...]:
        """What settings may call it, most telling first."""
        if self.kind == "host":
            return (self.uuid,)
        return self.uuid, *(() if self.index is None else (f"cuda:{self.index}",)), "cuda"


class TakesOver(Protocol):
    """A device that can take over what a stand-in holds."""

    def import_held(self, held: StandInDevice) -> dict[int, Any]:
        """Import every segment, all or none; on any thread. Returns the allocations by number. Errors: DeviceError."""

    def take_over(self, held: StandInDevice, imported: dict[int, Any]) -> None:
        """Have every segment under its number, before any other. What was released since the import goes."""

    def give_up(self, imported: dict[int, Any]) -> None:
        """Release what is not taken over."""


class StandInDevice:
    """Holds the segments of a device that does not serve, as a device (see devices/device.py).

    It makes and hands out nothing. What is released is closed, which is all that a device needs to give it back.
    """

    lasting = True
    default_share = 0.0
    loader_bytes = 0
    sparse = False
    creates_by = ""
    releases_by = "close"
    page = ALIGNMENT
    """As small as can be: what pages a device has is known when it serves, and nothing is granted before."""

    def __init__(self, uuid: str, kind: str) -> None:
        self.uuid = uuid
        self.kind = kind
        self.calls = AnyThread()
        self.name = "absent device"
        self.note = ""
        self._numbers = count(1)
        self._segments: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def open_node(self) -> None:
        """What is kept already stays."""

    def capacity(self) -> int:
        """Nobody knows."""
        return 0

    def available(self) -> None:
        """Nobody knows."""

    async def refresh(self) -> None:
        """Nobody knows."""

    def adopt(self, descriptor: int, size: int) -> int:
        """Hold a segment by its descriptor. What it is, the device finds out when it takes it over."""
        segment = next(self._numbers)
        self._segments[segment] = descriptor, size
        return segment

    def hollow(self, segment: int) -> list[tuple[int, int]]:
        """Nobody knows: none."""
        return []

    def create(self, size: int) -> Never:
        """Errors: DeviceAbsentError, always."""
        raise self._refusal()

    def writable(self, segment: int) -> Never:
        """Errors: DeviceAbsentError, always."""
        raise self._refusal()

    shared = writable

    def allocated(self, segment: int) -> int:
        """All of it: a segment of a GPU is all or nothing."""
        return self._segments[segment][1]

    def punch(self, segment: int, offset: int, length: int) -> Never:
        """Nothing that is held here has holes."""
        raise NotImplementedError(f"{self.kind} memory has no holes")

    def release(self, segment: int) -> None:
        """Close the descriptor; the driver frees the memory when nobody maps it any more."""
        with self._lock:
            descriptor, _ = self._segments.pop(segment)
        os.close(descriptor)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._segments

    def close(self) -> None:
        """Close every descriptor."""
        for segment in list(self._segments):
            self.release(segment)

    # -- for the device that takes over --------------------------------------------------------------------------------

    def duplicates(self) -> Iterator[tuple[int, int, int]]:
        """Number, size and a duplicate of the descriptor of each segment; the caller closes the duplicate.

        On any thread: a segment that is released meanwhile is left out, or goes on living in its duplicate.
        """
        for segment in list(self._segments):
            with self._lock:
                if segment not in self._segments:
                    continue
                descriptor, size = self._segments[segment]
                duplicate = os.dup(descriptor)
            yield segment, size, duplicate

    def hand_over(self) -> dict[int, tuple[int, int]]:
        """Every segment with its descriptor, which are the caller's from now on, and its size."""
        segments, self._segments = self._segments, {}
        return segments

    def _refusal(self) -> DeviceAbsentError:
        return DeviceAbsentError(f"device {self.uuid} is absent", {"device": self.uuid})
