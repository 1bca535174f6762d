"""The eviction policy. It chooses checkpoints; the store evicts them (decision 0019).

Checkpoints are taken in the order of their last use until what goes with them is enough. Of those, the more recently
used first, each is spared without which the others would do as well. So nobody goes who gives nothing back, and nobody
goes where the less recently used would be enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .arena import Extent
    from .blob import Blob
    from .checkpoint import Checkpoint, CheckpointKey
    from .prospect import EvictionTrial


U = TypeVar("U")


def choose(
    candidates: Iterable[U], free: Callable[[U], None], keep: Callable[[U], None], enough: Callable[[], bool]
) -> list[U]:
    """Which of the candidates, least recently used first, are to go; none where all together are not enough.

    `free` tries what going without one gives, `keep` takes that back, `enough` says whether the tries suffice by now.
    At most three such steps a candidate that is looked at.
    """
    tried: list[U] = []
    remaining = iter(candidates)
    while not enough():
        candidate = next(remaining, None)
        if candidate is None:
            return []
        free(candidate)
        tried.append(candidate)
    chosen = tried[-1:]  # without the last it was not enough
    for candidate in reversed(tried[:-1]):
        keep(candidate)
        if not enough():
            free(candidate)
            chosen.append(candidate)
    return chosen[::-1]


class _Departures:
    """Which bytes go with checkpoints: blobs that no other has and on which no load relies."""

    def __init__(self, trial: EvictionTrial) -> None:
        self._trial = trial
        self._left: dict[int, int] = {}
        """References to blobs that are left, by number; of those only that several checkpoints have."""
        self._parts: dict[CheckpointKey, tuple[list[Extent], list[Blob]]] = {}

    def free(self, checkpoint: Checkpoint) -> None:
        """Try to go without a checkpoint."""
        own, shared = self._parts_of(checkpoint)
        for extent in own:
            self._trial.free(extent)
        for blob in shared:
            left = self._left[blob.number] = self._left.get(blob.number, blob.references) - 1
            if not left:
                self._trial.free(blob.slot)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint after all."""
        own, shared = self._parts_of(checkpoint)
        for extent in own:
            self._trial.keep(extent)
        for blob in shared:
            if not self._left[blob.number]:
                self._trial.keep(blob.slot)
            self._left[blob.number] += 1

    def _parts_of(self, checkpoint: Checkpoint) -> tuple[list[Extent], list[Blob]]:
        """The bytes that go with a checkpoint whatever else goes, and its blobs that may stay for others.

        Whole runs where all of their blobs go: a checkpoint may have 100,000.
        """
        parts = self._parts.get(checkpoint.key)
        if parts is None:
            parts = self._parts[checkpoint.key] = [], []
            own, shared = parts
            for extent, blobs in checkpoint.runs:
                if all(blob.references == 1 and not blob.holds for blob in blobs):
                    own.append(extent)
                    continue
                own += [blob.slot for blob in blobs if blob.references == 1 and not blob.holds]
                shared += [blob for blob in blobs if blob.references > 1 and not blob.holds]
        return parts


def could_fit(trial: EvictionTrial, evictable: Iterable[Checkpoint], needed: int, piece: int) -> bool:
    """Whether evicting gives a load `needed` bytes, with an extent of `piece` whole pages.

    Looks at no more checkpoints, least recently used first, than would go.
    """
    departures = _Departures(trial)
    for checkpoint in evictable:
        if _fits(trial, needed, piece):
            return True
        departures.free(checkpoint)
    return _fits(trial, needed, piece)


def chosen_for(trial: EvictionTrial, evictable: Iterable[Checkpoint], needed: int, piece: int) -> list[Checkpoint]:
    """Which checkpoints to evict so that a load gets what `could_fit` asks about; empty where that cannot be had.

    If the load could have it already, the device has refused what the books promise, without saying what it has free.
    Then the least recently used is chosen that gives anything back.
    """
    departures = _Departures(trial)
    now = trial.outcome()
    if _fits(trial, needed, piece):
        return choose(evictable, departures.free, departures.keep, lambda: trial.outcome().total > now.total)
    return choose(evictable, departures.free, departures.keep, lambda: _fits(trial, needed, piece))


def chosen_beyond(trial: EvictionTrial, evictable: Iterable[Checkpoint], excess: int) -> list[Checkpoint]:
    """Which checkpoints to evict so that `excess` bytes go back to the system, or as many as can."""
    before = trial.common
    departures, there = _Departures(trial), list(evictable)
    for checkpoint in there:
        departures.free(checkpoint)
    most = min(excess, trial.common - before)
    for checkpoint in there:
        departures.keep(checkpoint)
    return choose(there, departures.free, departures.keep, lambda: trial.common - before >= most)


def _fits(trial: EvictionTrial, needed: int, piece: int) -> bool:
    total, largest = trial.outcome()
    return total >= needed and largest >= piece
