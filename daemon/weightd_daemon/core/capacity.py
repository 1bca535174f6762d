"""What a device could still take: the books by what keeps each byte, and the error that states them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd.errors import CapacityError, WeightdError

from .arena import round_up
from .making_room import could_fit

if TYPE_CHECKING:
    from .blob import Blob
    from .load_books import LoadBooks
    from .store import Store


class Room(NamedTuple):
    """Bytes of a device as a load sees them: budget, free (holes included), evictable (what it would get back).

    And what only pins keep, what leases keep, the largest piece that could be had, evictable bytes included, and what
    the device itself has free, if that is known.
    """

    device: str
    budget_bytes: int
    free_bytes: int
    evictable_bytes: int
    pinned_bytes: int
    leased_bytes: int
    largest_bytes: int
    device_free_bytes: int | None

    def error(self, requested: int, full: MemoryError | None = None) -> WeightdError:
        """The error that says why `requested` bytes do not fit; `full` is what the device itself said, if it did."""
        if isinstance(full, WeightdError):  # it was not for want of bytes
            return full
        figures = {key: value for key, value in self._asdict().items() if key != "device" and value is not None}
        budget, free, evictable, pinned, leased, largest = (_size(figures[key]) for key in self._fields[1:7])
        advice = "remove or unpin a checkpoint, stop a process that holds one (`weightd ps`), or raise --budget"
        reason = ""
        if requested > self.budget_bytes:
            advice = "that is more than the whole budget; raise --budget"
        elif full is not None:
            reason = f"; the device itself has no room{f': {full}' if str(full) else ''}"
            advice = "stop what else uses the device, remove or unpin a checkpoint, or lower --budget"
        elif self.largest_bytes < requested <= self.free_bytes + self.evictable_bytes:
            reason = f"; what is free or evictable lies in pieces, the largest of {largest}"
        return CapacityError(
            f"{_size(requested)} do not fit on {self.device}: {free} free, {evictable} evictable, "
            f"{pinned} pinned, {leased} leased, of a budget of {budget}{reason}; {advice}",
            {"requested_bytes": str(requested), **{key: str(value) for key, value in figures.items()}},
        )


def _size(value: int) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 // 10 else f"{value / 2**20:.1f} MiB"


def room(store: Store, books: LoadBooks, full: MemoryError | None = None) -> Room:
    """The room on the device of a load, as that load sees it; `full` if the device itself has refused memory."""
    memory = store.memories[books.device]
    available = memory.available()
    leased: dict[int, Blob] = {}
    pinned: dict[int, Blob] = {}
    rest: dict[int, Blob] = {}
    for checkpoint in store.checkpoints.values():
        if checkpoint.key.device == books.device:
            kept = leased if store.leases.is_held(checkpoint.key) else pinned if checkpoint.pinned else rest
            kept.update(checkpoint.unique)
    evictable = [b for number, b in rest.items() if number not in leased and number not in pinned and not b.holds]
    now = memory.prospect(books.domain, books.number)
    slots = [blob.slot for blob in evictable]
    then = memory.prospect(books.domain, books.number, slots, None if full is None else available)
    return Room(
        books.device,
        budget_bytes=memory.budget,
        free_bytes=max(0, now.total),
        evictable_bytes=then.total - now.total,
        pinned_bytes=sum(blob.length for number, blob in pinned.items() if number not in leased),
        leased_bytes=sum(blob.length for blob in leased.values()),
        largest_bytes=max(0, then.largest),
        device_free_bytes=available,
    )


def check_room(store: Store, books: LoadBooks, needed: int, piece: int, full: MemoryError | None = None) -> None:
    """Refuse a load whose `needed` bytes, or one extent of `piece` bytes, would not fit even after every eviction.

    Not while memory is on its way back, for nobody knows yet what that will make room for. Errors: CapacityError.
    """
    memory = store.memories[books.device]
    piece = round_up(piece, memory.page)
    now = memory.prospect(books.domain, books.number)
    if memory.reclaiming or (full is None and needed <= now.total and piece <= now.largest):
        return
    if could_fit(store, books, needed, piece, full):
        return  # seen without a look at everything
    found = room(store, books, full)
    if piece > found.largest_bytes:
        raise found.error(piece, full)
    if needed > found.free_bytes + found.evictable_bytes:
        raise found.error(needed, full)
