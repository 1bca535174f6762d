"""Evicts to make room: for a load, or because the budget has become smaller. Whom, eviction.py chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .eviction import Departures, choose, least_recently_used

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .checkpoint import Checkpoint
    from .load_books import LoadBooks
    from .prospect import Trial
    from .store import Store


def could_fit(store: Store, books: LoadBooks, needed: int, piece: int, full: MemoryError | None = None) -> bool:
    """Whether `evict_for` would do. It looks at no more checkpoints than would go."""
    trial = _trial(store, books, full)
    departures = Departures(trial)
    for checkpoint in _evictable(store, books.device):
        if _fits(trial, needed, piece):
            return True
        departures.free(checkpoint)
    return _fits(trial, needed, piece)


def evict_for(store: Store, books: LoadBooks, needed: int, piece: int, full: MemoryError | None = None) -> bool:
    """Evict so that a load can get `needed` bytes, with an extent of `piece` whole pages. Whether anybody went.

    `full` is what the device said, if it has refused memory. Where the books cannot say whom that takes, because the
    device does not tell what it has free, the least recently used goes that gives anything back; call again then.
    """
    trial = _trial(store, books, full)
    now = trial.outcome()
    if _fits(trial, needed, piece):
        return _evict(store, books.device, trial, lambda: trial.outcome().total > now.total, books)
    return _evict(store, books.device, trial, lambda: _fits(trial, needed, piece), books)


def fit(store: Store, device: str) -> int:
    """Evict what the budget does not hold any more. Returns the bytes still beyond it, which are leased or pinned."""
    memory = store.memories[device]
    excess = memory.excess()
    if not excess:
        return 0
    trial = memory.trial("", None)
    before = trial.common
    departures, there = Departures(trial), list(_evictable(store, device))
    for checkpoint in there:
        departures.free(checkpoint)
    most = min(excess, trial.common - before)
    for checkpoint in there:
        departures.keep(checkpoint)
    _evict(store, device, trial, lambda: trial.common - before >= most)
    return memory.excess()


def _trial(store: Store, books: LoadBooks, full: MemoryError | None) -> Trial:
    memory = store.memories[books.device]
    return memory.trial(books.domain, books.number, None if full is None else memory.available())


def _fits(trial: Trial, needed: int, piece: int) -> bool:
    total, largest = trial.outcome()
    return total >= needed and largest >= piece


def _evict(store: Store, device: str, trial: Trial, enough: Callable[[], bool], books: LoadBooks | None = None) -> bool:
    departures = Departures(trial)
    chosen = choose(_evictable(store, device), departures.free, departures.keep, enough)
    for checkpoint in chosen:
        load, by = (books.number, books.by) if books else (0, None)
        if books and books.domain != checkpoint.key.domain:
            by = None  # users who are kept apart are not told of each other
        store.evict(checkpoint, "capacity", load, by)
    return bool(chosen)


def _evictable(store: Store, device: str) -> Iterator[Checkpoint]:
    """Those that may go, least recently used first."""
    there = (checkpoint for checkpoint in store.checkpoints.values() if checkpoint.key.device == device)
    return least_recently_used(there, lambda checkpoint: store.leases.is_held(checkpoint.key))
