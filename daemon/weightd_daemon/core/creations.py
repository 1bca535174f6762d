"""Segments that are being made for loads: the core requests them, somebody else makes them and reports."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .arena import Extent, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .promises import PromisedMemory


def cut(length: int, ends: Sequence[int]) -> int:
    """The greatest of `ends`, ascending, that is in `length`; all of it where none is."""
    at = bisect_right(ends, length)
    return ends[at - 1] if at else length


@dataclass(eq=False, slots=True)
class Creation:
    """A new segment for a load: of `size` bytes, or of less down to `least` where the device has no room for that.

    `ends` are where the load's extent may end, ascending (MemoryAccounting.grant).
    """

    load: int
    domain: str
    size: int
    least: int
    ends: Sequence[int]
    losses: int
    """How often the device had lost its memory when this was queued."""
    promised: int = 0
    """Bytes of the load's promise that this took."""
    wanted: bool = True
    """Whether the load still waits for it; what nobody wants need not be made."""


class Creations:
    """What is being made for each load, at most one segment, and what came of it, until the load asks again.

    `create` is asked for each. What is being made takes its bytes from the load's promise.
    """

    def __init__(self, create: Callable[[Creation], None], promises: PromisedMemory) -> None:
        self._create = create
        self._promises = promises
        self._pending: dict[int, Creation] = {}
        self._outcomes: dict[int, Extent | Exception] = {}
        self.bytes = 0
        """Bytes that are being made, or may be by now: they count as used."""

    def __contains__(self, load: int) -> bool:
        """Whether a segment is being made for a load."""
        return load in self._pending

    def __bool__(self) -> bool:
        """Whether anything is being made."""
        return bool(self._pending)

    def ask(self, creation: Creation) -> None:
        """Ask for a segment."""
        creation.promised = self._promises.spend(creation.load, creation.size)
        self._pending[creation.load] = creation
        self.bytes += creation.size  # law 8: it counts before it is there
        self._create(creation)

    def made(self, creation: Creation, segment: int) -> Extent:
        """A segment is there. Returns the extent of it that the load gets, if it still waits."""
        extent = Extent(segment, 0, cut(creation.size, creation.ends))
        self._end(creation)
        if creation.wanted:
            self._outcomes[creation.load] = extent
            self._promises.restore(creation.load, max(0, creation.promised - extent.length))
        return extent

    def failed(self, creation: Creation, error: Exception, page: int) -> None:
        """A segment could not be made. Where the device has no room, a smaller one of whole pages is asked for."""
        self._end(creation)
        self._promises.restore(creation.load, creation.promised)
        if not creation.wanted:
            return
        if isinstance(error, MemoryError) and creation.size > creation.least:
            self.ask(replace(creation, size=max(creation.least, round_up(creation.size // 2, page))))
        else:
            self._outcomes[creation.load] = error

    def outcome(self, load: int) -> Extent | MemoryError | None:
        """What came of a load's request, told once; None while it is under way, and where there was none.

        Errors: whatever kept the segment from being made, unless it was want of memory.
        """
        outcome = self._outcomes.pop(load, None)
        if isinstance(outcome, Exception) and not isinstance(outcome, MemoryError):
            raise outcome
        return outcome

    def abandon(self, load: int) -> None:
        """The load has ended."""
        self._outcomes.pop(load, None)
        if load in self._pending:
            self._pending[load].wanted = False

    def clear(self) -> None:
        """The memory is gone, with all that was being made."""
        for creation in self._pending.values():
            creation.wanted = False
        self._pending.clear()
        self._outcomes.clear()
        self.bytes = 0

    def _end(self, creation: Creation) -> None:
        del self._pending[creation.load]
        self.bytes -= creation.size
