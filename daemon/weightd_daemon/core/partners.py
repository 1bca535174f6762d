"""What one checkpoint shares with others, found from the sets that its parts are in (sharing.py).

Counting takes steps, between which the index must not change.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .sharing import WORK_IN_A_STEP

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from .sharing import BlobUsers, Sharer

ComponentPair = tuple[str, str]
"""A component of the one checkpoint, and one of the other."""


class Partners:
    """The checkpoints that have bytes in common with one, once `count` is through: all, or those that came `later`."""

    def __init__(self, one: Sharer, *, later: bool = False) -> None:
        self._one = one
        self._later = later
        self.shared: dict[Sharer, int] = defaultdict(int)
        """Bytes of blobs that both use, each counted once."""
        self.only: dict[Sharer, int] = defaultdict(int)
        """Of these, what nobody else uses; none where a checkpoint is missing."""

    def count(self) -> Iterator[None]:
        """Count in steps."""
        counted: set[BlobUsers] = set()
        work = 0
        for part in self._one.parts:
            for users in part.sets:
                work += 1
                if users.sharers > 1 and users not in counted:  # the first of its parts there, so the others follow
                    counted.add(users)
                    work += len(users.parts)
                    self._count_set(users, users.parts.index(part) if self._later else 0)
                if work >= WORK_IN_A_STEP:
                    work = 0
                    yield

    def _count_set(self, users: BlobUsers, start: int) -> None:
        """Count the checkpoints whose parts are at `start` or later."""
        one, length, shared = self._one, users.length, self.shared
        last = one
        for part in users.parts[start:] if start else users.parts:
            if (sharer := part.sharer) is not last and sharer is not one:
                shared[sharer] += length
                last = sharer
        if users.sharers == 2 and last is not one:
            self.only[last] += length


def count_components(
    one: Sharer, others: Container[Sharer], found: dict[Sharer, dict[ComponentPair, int]]
) -> Iterator[None]:
    """Count in steps what each component of `one` has in common with each of some others: bytes, into `found`."""
    work = 0
    for part in one.parts:
        for users in part.sets:
            for other in users.parts if users.sharers > 1 else ():
                if other.sharer in others and other.sharer is not one:
                    pairs, pair = found.setdefault(other.sharer, {}), (part.component, other.component)
                    pairs[pair] = pairs.get(pair, 0) + users.length
            work += len(users.parts)
            if work >= WORK_IN_A_STEP:
                work = 0
                yield
