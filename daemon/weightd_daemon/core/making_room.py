"""Makes room for a load by eviction, or refuses the load with a reason. eviction.py chooses the checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arena import round_up
from .capacity import CapacityEstimate, room
from .eviction import chosen_beyond, chosen_for, could_fit
from .prospect import EvictionTrial, prospect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightd.errors import WeightdError

    from .checkpoint import Checkpoint
    from .lease import LeasePeer
    from .store import ContentStore


class Evictor:
    """Evicts least recently used checkpoints until an open load fits.

    `place` is the load's device and sharing domain; `by` asked for the load.

    `full` is everywhere what the device said, if it has refused memory.
    """

    def __init__(self, store: ContentStore, place: tuple[str, str], load: int, by: LeasePeer | None) -> None:
        self._store = store
        self._place = place
        self._device, self._domain = place
        self._memory = store.memories[self._device]
        self._load = load
        self._by = by

    def check(self, needed: int, piece: int, full: MemoryError | None = None) -> None:
        """Refuse the load if `needed` bytes, or one extent of `piece` bytes, would not fit even after every eviction.

        Not while memory is on its way back, for nobody knows yet what that will make room for. Errors: CapacityError,
        DeviceAbsentError (whatever lies there stays).
        """
        piece = round_up(piece, self._memory.page)
        now = prospect(self._memory, self._domain, self._load)
        if self._memory.reclaiming or (full is None and needed <= now.total and piece <= now.largest):
            return
        if could_fit(self._trial(full), self._store.evictable(self._device), needed, piece):
            return  # seen without a look at everything
        found = self._room(full)
        if piece > found.largest_bytes:
            raise found.error(piece, full)
        if needed > found.free_bytes + found.evictable_bytes:
            raise found.error(needed, full)

    def evict_for(self, needed: int, piece: int, full: MemoryError | None = None) -> bool:
        """Evict for `needed` bytes with an extent of `piece` bytes, as `chosen_for` says. Whether anybody went."""
        piece = round_up(piece, self._memory.page)
        chosen = chosen_for(self._trial(full), self._store.evictable(self._device), needed, piece)
        self._evict(chosen)
        return bool(chosen)

    def evict_for_device(self, wanted: int) -> bool:
        """Evict so that `wanted` bytes go back to the device itself, or as many as can. Whether anybody went."""
        trial = EvictionTrial(self._memory, self._domain, self._load)
        chosen = chosen_beyond(trial, self._store.evictable(self._device), wanted)
        self._evict(chosen)
        return bool(chosen)

    def evict_for_books(self, needed: int) -> None:
        """Evict for `needed` bytes of the daemon's books, on whatever device. Errors: CapacityError."""
        store = self._store
        self._evict(store.books.chosen_for(needed, store.evictable()))

    def refusal(self, requested: int, full: MemoryError | None = None) -> WeightdError:
        """The error that says why `requested` bytes do not fit. Errors: DeviceAbsentError, as in `check`."""
        return self._room(full).error(requested, full)

    def _evict(self, chosen: Iterable[Checkpoint]) -> None:
        for checkpoint in chosen:
            # Users who are kept apart are not told of each other.
            by = self._by if checkpoint.key.domain == self._domain else None
            self._store.evict(checkpoint, "capacity", self._load, by)

    def _room(self, full: MemoryError | None) -> CapacityEstimate:
        self._store.check_present(self._device)  # law 12: it would call evictable what does not go
        there = ((c, self._store.leases.is_held(c.key)) for c in self._store.on_device(self._device))
        return room(self._memory, self._place, self._load, there, full)

    def _trial(self, full: MemoryError | None) -> EvictionTrial:
        return EvictionTrial(self._memory, self._domain, self._load, None if full is None else self._memory.available())
