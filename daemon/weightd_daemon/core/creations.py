"""Segments that are being made for loads: the core requests them, somebody else makes them and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .arena import Extent


@dataclass(eq=False, slots=True)
class Creation:
    """A new segment for a load: of `size` bytes, or of less down to `least` where the device has no room for that.

    `ends` are where the load's extent may end, ascending (DeviceMemory.grant).
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
    """What is being made for each load, at most one segment, and what came of it, until the load asks again."""

    def __init__(self) -> None:
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

    def begin(self, creation: Creation) -> None:
        """Somebody is about to be asked for this segment."""
        self._pending[creation.load] = creation
        self.bytes += creation.size

    def end(self, creation: Creation, outcome: Extent | Exception | None) -> None:
        """It was made, or was not, which the load hears when it asks again. None is no outcome."""
        del self._pending[creation.load]
        self.bytes -= creation.size
        if creation.wanted and outcome is not None:
            self._outcomes[creation.load] = outcome

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
