"""Where a load puts its next bytes: slots inside the extents that the daemon granted for one file."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from weightd_daemon.core.arena import slot_bytes

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
    """Bump allocation in granted extents; a slot given back is used again by the next tensor that it fits."""

    def __init__(self, channel: Channel, wanted: int) -> None:
        self._channel = channel
        self._wanted = wanted
        self._lock = threading.Lock()
        self._open: list[Slot] = []
        self._freed: list[Slot] = []

    def take(self, length: int) -> Slot:
        """A slot for `length` bytes; asks the daemon for more memory when there is none. Errors: CapacityError."""
        size = slot_bytes(length)
        with self._lock:
            self._wanted = max(0, self._wanted - size)
            for places in (self._freed, self._open):
                fitting = [place for place in places if place.size >= size]
                if fitting:
                    return self._cut(places, min(fitting, key=lambda place: place.size), size)
            answer = self._channel.call("grant", want=max(size, self._wanted + size), need=size)
            place = Slot(answer["segment"], answer["offset"], answer["length"])
            self._open.append(place)
            return self._cut(self._open, place, size)

    def give_back(self, slot: Slot) -> None:
        """The bytes in the slot are not needed."""
        with self._lock:
            self._freed.append(slot)
            if len(self._freed) > _KEPT:
                self._freed.remove(min(self._freed, key=lambda place: place.size))

    @staticmethod
    def _cut(places: list[Slot], place: Slot, size: int) -> Slot:
        at = places.index(place)
        if place.size == size:
            del places[at]
        else:
            places[at] = Slot(place.segment, place.offset + size, place.size - size)
        return Slot(place.segment, place.offset, size)
