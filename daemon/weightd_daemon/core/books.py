"""The daemon's own books: for each checkpoint, the size of its manifest plus a fixed amount for each tensor.

Books are host memory, whatever device a checkpoint lies on, and there is one limit for all of them: a file of a million
tensors without a byte costs a device nothing, and the daemon a gigabyte. Neither `used_bytes` nor the eviction of a
device counts them. See docs/decisions/0031-books-are-paid-for.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd._sizes import size
from weightd.errors import CapacityError

from .eviction import choose

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .checkpoint import Checkpoint


class BookkeepingMemory:
    """Memory of the daemon's own books: what resident checkpoints take, and what open loads will. `limit` 0 is none."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.used = 0
        """Bytes of the books of resident checkpoints."""
        self._coming: dict[int, int] = {}
        self._unchecked: set[int] = set()
        """Those of the loads with an entry in `_coming` that were not checked: perhaps they bring nothing new."""

    @property
    def coming(self) -> int:
        """Bytes that open loads will need, as far as they know by now."""
        return sum(self._coming.values())

    def enter(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is resident."""
        self.used += checkpoint.books_bytes

    def strike(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is no longer resident."""
        self.used -= checkpoint.books_bytes

    def reserve(self, load: int, needed: int, evictable: Iterable[Checkpoint]) -> None:
        """Reserve `needed` bytes for an open load. Nobody is evicted before it is sealed.

        Errors: CapacityError, the load would not fit even if all of `evictable` were evicted; then nothing is reserved.
        """
        self._check(needed, self.coming - self._coming.get(load, 0), evictable)
        self._coming[load] = needed
        self._unchecked.discard(load)

    def expect(self, load: int, needed: int) -> None:
        """Reckon with `needed` bytes for an open load whose content may be resident, and do not refuse it by now."""
        self._coming[load] = needed
        self._unchecked.add(load)

    def check_seal(self, load: int, needed: int, evictable: Iterable[Checkpoint]) -> None:
        """Keep what is reserved for others from a load that was only expected and brings something new after all.

        Errors: CapacityError.
        """
        if load in self._unchecked:
            self._check(needed, sum(self._coming[other] for other in self._coming.keys() - self._unchecked), evictable)

    def forget(self, load: int) -> None:
        """A load is over, or sealed."""
        self._coming.pop(load, None)
        self._unchecked.discard(load)

    def chosen_for(self, needed: int, evictable: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Which checkpoints, of any device, to evict so that a new one can have `needed` bytes; often none.

        They are chosen from `evictable`, least recently used first, as decision 0019 says, by what they give back of
        the books. Errors: CapacityError.
        """
        beyond = self.used + needed - self.limit
        if not self.limit or beyond <= 0:
            return []
        freed = 0

        def free(checkpoint: Checkpoint) -> None:
            nonlocal freed
            freed += checkpoint.books_bytes

        def keep(checkpoint: Checkpoint) -> None:
            nonlocal freed
            freed -= checkpoint.books_bytes

        chosen = choose(evictable, free, keep, lambda: freed >= beyond)
        if not chosen:
            raise self._refusal(needed, self.used - freed, 0)
        return chosen

    def chosen_beyond(self, evictable: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Which checkpoints to evict if the limit is below what is used: all of `evictable` if they are too few."""
        there = list(evictable)
        try:
            return self.chosen_for(0, there)
        except CapacityError:
            return there

    def _check(self, needed: int, others: int, evictable: Iterable[Checkpoint]) -> None:
        if not self.limit:
            return
        if needed > self.limit:
            raise self._refusal(needed, 0, 0)
        beyond = self.used + others + needed - self.limit
        freed = 0
        for checkpoint in evictable:
            if freed >= beyond:
                break
            freed += checkpoint.books_bytes
        if freed < beyond:
            raise self._refusal(needed, self.used - freed, others)

    def _refusal(self, needed: int, kept: int, others: int) -> CapacityError:
        advice = "remove or unpin a checkpoint, stop a process that holds one (`weightd ps`), or raise --books"
        if needed > self.limit:
            advice = "that is more than the whole limit; raise --books"
        text = f"{size(kept)} are of checkpoints that are pinned, leased or on an absent device"
        if others:
            text += f", {size(others)} of loads under way"
        return CapacityError(
            f"the limit books is reached: the list of tensors needs {size(needed)} of the daemon's own memory, and of "
            f"{size(self.limit)}, {text}; {advice}",
            {"limit": "books", "requested_bytes": str(needed), "free_bytes": str(max(0, self.limit - kept - others))},
        )
