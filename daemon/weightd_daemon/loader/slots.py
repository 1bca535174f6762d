"""Where a load puts its next bytes: slots inside the extents that the daemon granted for one file."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from weightd_daemon.core.arena import slot_bytes
from weightd_daemon.core.memory import SEGMENT_BYTES

if TYPE_CHECKING:
    from .channel import Channel

_KEPT = 32
"""Freed slots remembered for the next tensors; they have memory behind them, fresh bytes have not."""


class Slot(NamedTuple):
    """`size` bytes at `offset` of a segment."""

    segment: int
    offset: int
    size: int


class Slots:
    """Bump allocation in granted extents; a slot given back is used again by the next tensor that it fits.

    `sizes` are the bytes that each unit of the file will take, in order: what is asked for ends where a unit ends, so
    that no extent keeps a tail that the next tensor does not fit into.
    """

    def __init__(self, channel: Channel, sizes: Iterable[int]) -> None:
        self._channel = channel
        self._ends = list(accumulate(sizes))
        self._taken = 0
        self._lock = threading.Lock()
        self._open: list[Slot] = []
        self._freed: list[Slot] = []

    def take(self, length: int) -> Slot:
        """A slot for `length` bytes; asks the daemon for more memory when there is none. Errors: CapacityError."""
        size = slot_bytes(length)
        with self._lock:
            start, self._taken = self._taken, self._taken + size
            for places in (self._freed, self._open):
                fitting = [place for place in places if place.size >= size]
                if fitting:
                    return self._cut(places, min(fitting, key=lambda place: place.size), size)
            answer = self._channel.call("grant", want=max(size, self._ahead(start)), need=size)
            place = Slot(answer["segment"], answer["offset"], answer["length"])
            self._open.append(place)
            return self._cut(self._open, place, size)

    def give_back(self, slot: Slot) -> None:
        """The bytes in the slot are not needed."""
        with self._lock:
            self._freed.append(slot)
            if len(self._freed) > _KEPT:
                self._freed.remove(min(self._freed, key=lambda place: place.size))

    def _ahead(self, start: int) -> int:
        """Bytes of the units to come that fit into one segment."""
        whole = bisect_right(self._ends, start + SEGMENT_BYTES)
        return self._ends[whole - 1] - start if whole else 0

    @staticmethod
    def _cut(places: list[Slot], place: Slot, size: int) -> Slot:
        at = places.index(place)
        if place.size == size:
            del places[at]
        else:
            places[at] = Slot(place.segment, place.offset + size, place.size - size)
        return Slot(place.segment, place.offset, size)
