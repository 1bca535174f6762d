"""Memory that is being released: requests that the core queues, and that the reclaimer executes and reports."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .arena import Extent


@dataclass(frozen=True, slots=True)
class ExtentReclaim:
    """Queued request of the books: give the pages of a free extent back to the system."""

    domain: str
    extent: Extent
    losses: int = field(default=0, compare=False)
    """How often the device had lost its memory when this was queued."""


@dataclass(frozen=True, slots=True)
class SegmentReclaim:
    """Queued request of the books: give a whole segment back to the system."""

    segment: int
    size: int
    losses: int = field(default=0, compare=False)
    """As in ExtentReclaim."""


Reclaim = ExtentReclaim | SegmentReclaim


class Reclaims:
    """The reclaims of one device that are queued or being carried out. `kick` is told of each that is queued."""

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._queue: deque[Reclaim] = deque()
        self._outstanding = 0
        self.releasing = 0
        """Bytes of segments that are queued for release, or being released."""

    def __bool__(self) -> bool:
        """Whether any reclaim has not been reported done."""
        return self._outstanding > 0

    @property
    def waiting(self) -> bool:
        """Whether `take` would return any."""
        return bool(self._queue)

    def add(self, reclaim: Reclaim) -> None:
        """Queue a reclaim."""
        self._outstanding += 1
        self.releasing += reclaim.size if isinstance(reclaim, SegmentReclaim) else 0
        self._queue.append(reclaim)
        self._kick()

    def take(self) -> list[Reclaim]:
        """The reclaims to carry out now, each handed out once."""
        taken = list(self._queue)
        self._queue.clear()
        return taken

    def done(self, reclaim: Reclaim) -> None:
        """A reclaim was carried out."""
        self._outstanding -= 1
        self.releasing -= reclaim.size if isinstance(reclaim, SegmentReclaim) else 0

    def clear(self) -> None:
        """The memory is gone, and with it all that was to be returned."""
        self._queue.clear()
        self._outstanding = self.releasing = 0


class BlobFreeQueue:
    """Blobs of evicted checkpoints that are freed in steps, for they are many. `kick` is called when there are any."""

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._steps: deque[Iterator[None]] = deque()

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._steps)

    def begin(self, steps: Iterator[None]) -> None:
        """Free blobs by going through `steps`, each of which takes a moment."""
        self._steps.append(steps)
        self._kick()

    def go_on(self) -> bool:
        """Go one step on. Returns whether there was anything to do."""
        if not self._steps:
            return False
        if next(self._steps[0], self) is self:
            self._steps.popleft()
        return True

    def clear(self) -> None:
        """Do nothing more: the memory is gone."""
        self._steps.clear()
