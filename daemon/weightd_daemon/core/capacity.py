"""What a device could still take: the books by what keeps each byte, and the error that states them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd.errors import CapacityError

from .arena import round_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .blob import Blob
    from .load_books import LoadBooks
    from .memory import DeviceMemory
    from .ranges import Ranges
    from .store import Store


class Room(NamedTuple):
    """Bytes of a device: budget, free (holes included), evictable (what it would get back), only pinned, leased."""

    device: str
    budget_bytes: int
    free_bytes: int
    evictable_bytes: int
    pinned_bytes: int
    leased_bytes: int

    def error(self, requested: int) -> CapacityError:
        """The error that says why `requested` bytes do not fit."""
        figures = {key: value for key, value in self._asdict().items() if key != "device"}
        budget, free, evictable, pinned, leased = map(_size, figures.values())
        advice = "remove or unpin a checkpoint, stop a process that holds one (`weightd ps`), or raise --budget"
        if requested > self.budget_bytes:
            advice = "that is more than the whole budget; raise --budget"
        return CapacityError(
            f"{_size(requested)} do not fit on {self.device}: {free} free, {evictable} evictable, "
            f"{pinned} pinned, {leased} leased, of a budget of {budget}; {advice}",
            {"requested_bytes": str(requested), **{key: str(value) for key, value in figures.items()}},
        )


def _size(value: int) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 // 10 else f"{value / 2**20:.1f} MiB"


def room(store: Store, device: str, domain: str) -> Room:
    """The room on a device, as a load of that sharing domain sees it."""
    memory = store.memories[device]
    leased: dict[int, Blob] = {}
    pinned: dict[int, Blob] = {}
    rest: dict[int, Blob] = {}
    for checkpoint in store.checkpoints.values():
        if checkpoint.key.device == device:
            kept = leased if store.holders(checkpoint) else pinned if checkpoint.pinned else rest
            kept.update(checkpoint.unique)
    evictable = [b for number, b in rest.items() if number not in leased and number not in pinned and not b.holds]
    return Room(
        device,
        budget_bytes=memory.budget,
        free_bytes=max(0, memory.obtainable(domain)),
        evictable_bytes=_returnable(memory, evictable),
        pinned_bytes=sum(blob.length for number, blob in pinned.items() if number not in leased),
        leased_bytes=sum(blob.length for blob in leased.values()),
    )


def check_room(store: Store, books: LoadBooks, needed: int) -> None:
    """Refuse a load whose `needed` bytes would not fit even after every eviction. Errors: CapacityError."""
    obtainable = store.memories[books.device].obtainable(books.domain, books.number)
    if needed > obtainable:
        found = room(store, books.device, books.domain)
        if needed > obtainable + found.evictable_bytes:
            raise found.error(needed)


def _returnable(memory: DeviceMemory, blobs: Iterable[Blob]) -> int:
    """Whole pages that would be free without these blobs and are not now."""
    by_segment: dict[int, list[Blob]] = {}
    for blob in blobs:
        by_segment.setdefault(blob.segment, []).append(blob)
    size = 0
    for segment, inside in by_segment.items():
        ranges = memory.arena(memory.domain_of(segment)).free_ranges(segment)
        before = _whole_pages(ranges, memory.page)
        for blob in inside:
            ranges.add(blob.slot.offset, blob.slot.end)
        size += _whole_pages(ranges, memory.page) - before
    return size


def _whole_pages(ranges: Ranges, page: int) -> int:
    return sum(max(0, end // page * page - round_up(start, page)) for start, end in ranges)
