"""The memory of one device: a budget, the arenas of its sharing domains, and what is on its way back to the system.

Nothing here touches memory. A new segment comes from the `create` argument; memory that can go is queued as
*reclaims* (`Punch`, `Release`), which somebody else carries out and reports done. Until then it counts as used,
so used_bytes never passes the budget.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arena import Arena, Extent, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SEGMENT_BYTES = 1 << 30
"""Largest segment, unless one tensor needs more. A segment is the unit of mapping, isolation and return."""

_SMALLEST_PIECE = 4 << 20
"""A populated hole below this is not worth cutting a larger request for."""


@dataclass(frozen=True, slots=True)
class Punch:
    """Give the pages of a free extent back to the system."""

    domain: str
    extent: Extent


@dataclass(frozen=True, slots=True)
class Release:
    """Give a whole segment back to the system."""

    segment: int
    size: int


Reclaim = Punch | Release


class DeviceMemory:
    """Books of one device.

    `create(bytes)` makes a segment and returns its number; it may raise MemoryError. `on_reclaim` is told when there
    is a reclaim to carry out.
    """

    def __init__(
        self,
        *,
        budget: int,
        page: int,
        sparse: bool,
        pool_limit: int,
        create: Callable[[int], int],
        on_reclaim: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget = budget
        self.page = page
        self._sparse = sparse
        self._pool_limit = pool_limit
        self._create = create
        self._on_reclaim = on_reclaim
        self._arenas: dict[str, Arena] = {}
        self._domain_of: dict[int, str] = {}
        self._promised: dict[int, int] = {}
        self._reclaims: deque[Reclaim] = deque()
        self._releasing = 0
        self._outstanding = 0

    @property
    def used(self) -> int:
        """Physical bytes, those promised to a load or on their way out included."""
        return sum(arena.used for arena in self._arenas.values()) + self._releasing

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self._domain_of)

    @property
    def reclaiming(self) -> bool:
        """Whether memory is on its way back: a request that fails now may succeed when it has arrived."""
        return self._outstanding > 0

    def arena(self, domain: str) -> Arena:
        """The arena of one sharing domain."""
        return self._arenas.setdefault(domain, Arena(self.page))

    def domain_of(self, segment: int) -> str:
        """The sharing domain that a segment belongs to."""
        return self._domain_of[segment]

    def size(self, segment: int) -> int:
        """Length of a segment."""
        return self.arena(self._domain_of[segment]).size(segment)

    # -- promises: bytes that an admitted load will ask for --------------------------------------------------------

    def promise(self, load: int, size: int) -> None:
        """Keep `size` bytes of the budget for a load that was admitted."""
        self._promised[load] = size

    def withdraw(self, load: int) -> None:
        """The load has ended, or gets by without its promise."""
        self._promised.pop(load, None)

    def free_for(self, load: int | None = None) -> int:
        """Bytes of the budget that are neither used nor promised to another load."""
        others = sum(size for number, size in self._promised.items() if number != load)
        return self.budget - self.used - others

    def obtainable(self, domain: str, load: int | None = None) -> int:
        """What a load can get without evicting: free budget, populated holes of its domain, and empty segments."""
        holes = self.arena(domain).populated_hole_bytes()
        pool = sum(
            arena.populated(segment)
            for name, arena in self._arenas.items()
            if name != domain
            for segment in arena
            if arena.is_empty(segment)
        )
        return self.free_for(load) + holes + pool

    # -- granting and taking back ----------------------------------------------------------------------------------

    def grant(self, load: int, domain: str, want: int, need: int) -> Extent | None:
        """An extent of up to `want` and at least `need` bytes, or None when there is none without evicting.

        In this order: a hole that takes all of it, memory-backed ones first; a good piece that is memory-backed; a new
        segment; whatever hole is large enough; and, where only empty segments stand in the way, they are released and
        None is returned with `reclaiming` set.
        """
        need, free = round_up(need, self.page), self.free_for(load)
        # Below zero where others were promised populated holes; what this load may have of them costs nothing.
        arena, budget, obtainable = self.arena(domain), max(0, free), self.obtainable(domain, load)
        if need > obtainable:
            return None
        want = max(need, min(round_up(want, self.page), SEGMENT_BYTES, obtainable // self.page * self.page))
        extent = arena.best_fit(want, budget) or arena.largest(max(need, _SMALLEST_PIECE), 0, populated=True)
        if extent is None and need <= budget:
            size = max(need, min(want, budget // self.page * self.page))
            segment = self._create(size)
            arena.add_segment(segment, size, sparse=self._sparse)
            self._domain_of[segment] = domain
            extent = Extent(segment, 0, size)
        if extent is None:
            extent = arena.largest(need, budget, populated=False)
        if extent is None:
            self._release_empty(need - free)
            return None
        arena.take(extent)
        if load in self._promised:
            self._promised[load] = max(0, self._promised[load] - extent.length)
        return extent

    def give_back(self, domain: str, extents: Iterable[Extent], *, pool: bool) -> None:
        """Return bytes. Segments that become empty stay in the pool if `pool` and the limit allow; other pages go."""
        arena = self.arena(domain)
        touched: dict[int, list[Extent]] = {}
        for extent in extents:
            arena.give_back(extent)
            touched.setdefault(extent.segment, []).append(extent)
        for segment, parts in touched.items():
            if arena.is_empty(segment):
                pooled = pool and arena.populated(segment) and self.pooled_bytes() <= self._pool_limit
                if not pooled:
                    self._release(arena, segment)
            elif self._sparse:
                for part in parts:
                    for leaving in arena.start_leaving(segment, part.offset, part.end):
                        self._queue(Punch(domain, leaving))

    def pooled_bytes(self) -> int:
        """Memory in empty segments that wait for the next load."""
        return sum(
            arena.populated(segment) for arena in self._arenas.values() for segment in arena if arena.is_empty(segment)
        )

    def take_reclaims(self) -> list[Reclaim]:
        """The reclaims to carry out now; each is handed out once and reported by `reclaimed`."""
        reclaims = list(self._reclaims)
        self._reclaims.clear()
        return reclaims

    def reclaimed(self, reclaim: Reclaim) -> None:
        """A reclaim has been carried out: its memory is gone."""
        self._outstanding -= 1
        if isinstance(reclaim, Release):
            self._releasing -= reclaim.size
            return
        arena = self.arena(reclaim.domain)
        arena.left(reclaim.extent)
        if arena.is_empty(reclaim.extent.segment):
            self._release(arena, reclaim.extent.segment)

    def _release_empty(self, wanted: int) -> None:
        """Queue empty segments for release until `wanted` bytes are on their way."""
        for arena in self._arenas.values():
            for segment in [s for s in arena if arena.is_empty(s)]:
                if wanted <= 0:
                    return
                wanted -= arena.populated(segment)
                self._release(arena, segment)

    def _release(self, arena: Arena, segment: int) -> None:
        size = arena.populated(segment)
        arena.remove_segment(segment)
        del self._domain_of[segment]
        self._releasing += size
        self._queue(Release(segment, size))

    def _queue(self, reclaim: Reclaim) -> None:
        self._outstanding += 1
        self._reclaims.append(reclaim)
        self._on_reclaim()
