"""Decides where a load puts its next bytes: slots inside the extents that the daemon granted for one lane."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from weightd_daemon.core.arena import slot_bytes
from weightd_daemon.core.memory import SEGMENT_BYTES

from ._proto import loader_pb2 as wire

if TYPE_CHECKING:
    from .channel import LoaderChannel

_KEPT = 32
"""Places remembered for the next tensors; what was given back has memory behind it, fresh bytes have not."""


class LoaderSlot(NamedTuple):
    """Where the loader writes one tensor: `size` bytes at `offset` of a segment."""

    segment: int
    offset: int
    size: int

    @property
    def end(self) -> tuple[int, int]:
        """What follows: segment and offset."""
        return self.segment, self.offset + self.size


class LoaderSlotRow:
    """Tensors that the loader puts side by side, of `size` bytes in all, unless they turn out to be `apart`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.apart = False
        self.last: LoaderSlot | None = None


class LoaderSlots:
    """Bump allocation in the extents granted to the loader; a slot given back goes to the next tensor that it fits.

    `sizes` are the bytes of what is to stay in one piece, in order: a unit, or the units of a group. What is asked for
    ends where one of these ends, so that no extent keeps a tail that the next does not fit into.

    Where `frugal`, a place that fits is used before more is asked for, also if that breaks a group up: in a load that
    was not promised memory for all of its tensors, and once memory comes in pieces. Nobody is evicted for order's sake.
    """

    def __init__(self, channel: LoaderChannel, sizes: Iterable[int], *, frugal: bool = False) -> None:
        self._channel = channel
        self._ends = list(accumulate(sizes))
        self._taken = 0
        self._lock = threading.Lock()
        self._places: list[LoaderSlot] = []
        self._frugal = frugal

    def allocate(self, length: int, together: LoaderSlotRow | None = None) -> LoaderSlot:
        """A slot for `length` bytes, of what is to lie `together` if that is said, in the order of the calls.

        Asks the daemon for more memory when there is none. Errors: CapacityError.
        """
        size = slot_bytes(length)
        with self._lock:
            start, self._taken = self._taken, self._taken + size
            place = self._choose(size, together) or self._granted(size, start)
            slot = self._cut(place, size)
            if together is not None:
                together.last = slot
            return slot

    def give_back(self, slot: LoaderSlot) -> None:
        """The bytes in the slot are not needed."""
        with self._lock:
            for place in [place for place in self._places if place.end == slot[:2] or slot.end == place[:2]]:
                self._places.remove(place)
                slot = LoaderSlot(slot.segment, min(slot.offset, place.offset), slot.size + place.size)
            self._places.insert(0, slot)  # before fresh bytes of the same size
            if len(self._places) > _KEPT:
                self._places.remove(min(self._places, key=lambda place: place.size))

    def _choose(self, size: int, together: LoaderSlotRow | None) -> LoaderSlot | None:
        """The place to cut from: the least that will do, where nothing better is known."""
        fitting = [place for place in self._places if place.size >= size]
        if together is not None and not together.apart:
            if together.last is None:
                whole = [place for place in fitting if place.size >= together.size]
                fitting = whole if whole or not self._frugal else fitting
            else:
                end = together.last.end
                fitting = [place for place in fitting if place[:2] == end] or fitting
        return min(fitting, key=lambda place: place.size, default=None)

    def _granted(self, size: int, start: int) -> LoaderSlot:
        """A new extent, among the places now."""
        ends = self._ahead(size, start)
        extent = self._channel.call(wire.ToDaemon(grant=wire.Grant(ends=ends, need=size))).grant
        place = LoaderSlot(extent.segment, extent.offset, extent.length)
        self._frugal |= place.size < ends[0]
        self._places.append(place)
        return place

    def _ahead(self, size: int, start: int) -> list[int]:
        """Bytes from `start` to the end of each piece to come, as far as one segment goes; one piece at least."""
        first = bisect_right(self._ends, start)
        last = max(first + 1, bisect_right(self._ends, start + SEGMENT_BYTES))
        return [end - start for end in self._ends[first:last] if end - start >= size] or [size]

    def _cut(self, place: LoaderSlot, size: int) -> LoaderSlot:
        at = self._places.index(place)
        if place.size == size:
            del self._places[at]
        else:
            self._places[at] = LoaderSlot(place.segment, place.offset + size, place.size - size)
        return LoaderSlot(place.segment, place.offset, size)
