"""The memory of one device: its budget, the arenas of its sharing domains, and memory that is being released.

Nothing here touches memory. A new segment is asked for as a `Creation`, and memory that can go is queued as *reclaims*
(`ExtentReclaim`, `SegmentReclaim`); somebody else carries both out and reports. What is being made counts as used from
the request on, and what goes until its return is reported, so no grant takes `used` past the budget. A restart may find
more than the budget: `excess` says how much has to be evicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arena import Arena, Extent, round_up
from .creations import Creation, Creations, cut
from .promises import ArenaHoles, PromisedMemory
from .ranges import RangeSet
from .reclaims import BlobFreeQueue, ExtentReclaim, Reclaim, Reclaims, SegmentReclaim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


SEGMENT_BYTES = 1 << 30
"""Largest segment, unless one tensor or group needs more. A segment is the unit of mapping, isolation and return."""

_SMALLEST_PIECE = 4 << 20
"""A populated hole below this is not worth cutting a larger request for."""


class MemoryAccounting:
    """Pure bookkeeping of one device's memory: arenas, budget, promises, and what is being given back.

    `create` is asked for each new segment, and answers with `made` or `failed`, at once or later. `on_reclaim` is told
    when there is a reclaim to carry out, or a load that was waited for has ended. `available()` is what the device
    itself has free, whoever uses it, or None where nobody knows. `before_use` is called before bytes that may have been
    given back are granted, or returned to the system. Without `sparse` a segment is all or nothing.
    """

    def __init__(
        self,
        *,
        budget: int,
        page: int,
        sparse: bool,
        pool_limit: int,
        create: Callable[[Creation], None],
        on_reclaim: Callable[[], None] = lambda: None,
        available: Callable[[], int | None] = lambda: None,
        before_use: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget = budget
        self.page = page
        self.available = available
        self.sparse = sparse
        self.quarantine = False
        """Whether a process that nobody could end may still write to segments that are adopted now (see `thaw`)."""
        self._pool_limit = pool_limit
        self._pooling = True
        self._on_reclaim = on_reclaim
        self._before_use = before_use
        self._arenas: dict[str, Arena] = {}
        self._domain_of: dict[int, str] = {}
        self._promises = PromisedMemory()
        self._creations = Creations(create, self._promises)
        self._granted: dict[int, list[Extent]] = {}
        self._reclaims = Reclaims(on_reclaim)
        self.freeing = BlobFreeQueue(on_reclaim)
        self.losses = 0
        """How often the memory was lost."""
        self.lost_by = ""
        """Why it was lost last."""

    @property
    def used(self) -> int:
        """Physical bytes, those that are being made for a load or on their way out included."""
        return sum(arena.used for arena in self._arenas.values()) + self._creations.bytes + self._reclaims.releasing

    @property
    def in_flight(self) -> int:
        """Bytes that are being made for loads, or granted to loads that have not ended and not to stay."""
        granted = sum(extent.length for extents in self._granted.values() for extent in extents)
        return granted + self._creations.bytes

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self._domain_of)

    def domains(self) -> dict[int, str]:
        """The sharing domain of each segment, in the order of their numbers."""
        return dict(sorted(self._domain_of.items()))

    @property
    def reclaiming(self) -> bool:
        """Whether memory is on its way: a request that fails now may succeed when it has arrived."""
        return bool(self._reclaims or self._promises.ending or self.freeing or self._creations)

    @property
    def creating(self) -> bool:
        """Whether a segment is being made."""
        return bool(self._creations)

    def resize(self, budget: int, pool_limit: int) -> None:
        """Have another budget, not below what is used, and another pool: what is beyond it goes back now."""
        self.budget, self._pool_limit = budget, pool_limit
        self._return_unused(self.pooled_bytes() - pool_limit)

    def change_page(self, page: int) -> None:
        """Have pages of another size. Nothing may have been granted by now, nor taken in that is `sparse`."""
        self.page = page
        for arena in self._arenas.values():
            arena.change_page(page)

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

    def promise(self, load: int, domain: str, size: int) -> None:
        """Keep `size` bytes for a load that was admitted."""
        self._promises.make(load, domain, size)

    def withdraw(self, load: int) -> None:
        """Nothing is kept for the load any more, and nothing expected of it."""
        if self._promises.withdraw(load):
            self._on_reclaim()

    def expect(self, load: int) -> None:
        """The load asks for nothing more, and what it leaves is on its way back."""
        self._promises.expect(load)

    def in_segments(self, size: int, runs: int) -> int:
        """What `size` bytes of whole tensors take when loaders lay them out one after the other, in so many runs.

        Each segment ends with a tensor, and its last page may be nearly empty. Two neighbours of a run hold more than
        SEGMENT_BYTES, or they would be one; so there are at most this many.
        """
        segments = runs + 2 * (size // SEGMENT_BYTES)
        return round_up(size, self.page) + (segments - 1) * self.page if size else 0

    def obtainable(self, domain: str, load: int | None = None) -> int:
        """What a load can get without evicting: free budget, populated holes of its domain, and what others can return.

        On a device that is not sparse it may be in pieces.
        """
        return self.shares(domain, load, self.holes())[1]

    def assured(self, load: int) -> int:
        """As `obtainable`, without what rests on holes in partly used segments: tensors may not fit into them."""
        common = sum(holes.common for holes in self.holes().values())
        return self.budget - self.used + common - sum(self._promises.others(load).values())

    def holes(self) -> dict[str, ArenaHoles]:
        """The populated holes of each domain."""
        holes = {}
        for domain, arena in self._arenas.items():
            populated = arena.populated_hole_bytes()
            common = populated if self.sparse else arena.empty_bytes
            holes[domain] = ArenaHoles(populated - common, common)
        return holes

    def shares(self, domain: str, load: int | None, holes: Mapping[str, ArenaHoles]) -> tuple[int, int]:
        """What may become new segments of a load, and all that it may take."""
        return self._promises.shares(domain, load, self.budget - self.used, holes)

    # -- granting and taking back ----------------------------------------------------------------------------------

    def grant(self, load: int, domain: str, want: int, need: int, ends: Sequence[int] = ()) -> Extent | None:
        """An extent of up to `want` and at least `need` bytes, or None when there is none without evicting.

        In this order: a hole that takes all of it, memory-backed ones first; a good piece that is memory-backed; a new
        segment; whatever hole is large enough. While a segment is being made for the load, and where returning what is
        unused makes room for one, None is returned with `reclaiming` set: the load asks again when something has come.
        Less than `want` ends at one of `ends`, ascending, if one fits; the first is what a good piece should have, and
        may be more than a segment's bytes.
        Errors: MemoryError, the device has no room though the budget has; whatever else kept a segment from being made.
        """
        if load in self._creations:
            return None
        made = self._creations.outcome(load)
        if isinstance(made, Extent) and made.length >= need:
            return made
        full = made if isinstance(made, MemoryError) else None
        need, free = round_up(need, self.page), self.budget - self.used
        fits = [end for end in (round_up(end, self.page) for end in ends) if end >= need]
        spare, obtainable = self.shares(domain, load, self.holes())
        if need > obtainable:
            return None
        arena, budget = self.arena(domain), max(0, min(free, spare))
        most = max(SEGMENT_BYTES, fits[0]) if fits else SEGMENT_BYTES
        want = cut(max(need, min(round_up(want, self.page), most, obtainable // self.page * self.page)), fits)
        good = max(need, _SMALLEST_PIECE, fits[0] if fits and fits[0] <= want else 0)
        extent = arena.best_fit(want, budget) or arena.largest(good, 0, populated=True)
        if extent is None and full is None and need <= budget:
            size = cut(max(need, min(want, budget // self.page * self.page)), fits)
            self._creations.ask(Creation(load, domain, size, need, fits, self.losses))
            made = self._creations.outcome(load)
            if not isinstance(made, MemoryError):
                return made
            full = made
        extent = extent or arena.largest(need, budget, populated=False)
        if extent is None:
            if full is not None:
                self._return_unused(need)
                raise full
            if need <= spare:
                self._return_unused(need - free)
            return None
        extent = self._occupy(load, arena, extent._replace(length=cut(extent.length, fits)))
        self._promises.spend(load, extent.length)
        return extent

    def made(self, creation: Creation, segment: int) -> bool:
        """The segment of a creation is there, under a number that was never used before: it is the load's.

        Returns whether it belongs to this memory. The memory that it was made for may be lost; then it is the caller's.
        """
        if creation.losses != self.losses:
            return False
        arena, extent = self.arena(creation.domain), self._creations.made(creation, segment)
        arena.add_segment(segment, creation.size, sparse=self.sparse)
        self._domain_of[segment] = creation.domain  # law 9: until it is released
        if creation.wanted:
            self._occupy(creation.load, arena, extent)
        else:
            self._let_go(arena, segment, pool=True)
        return True

    def failed(self, creation: Creation, error: Exception) -> None:
        """The segment of a creation could not be made. Where the device has no room, a smaller one is asked for."""
        if creation.losses == self.losses:
            self._creations.failed(creation, error, self.page)

    def granted(self, load: int) -> list[Extent]:
        """What a load was granted and is to give back when it ends."""
        return self._granted.get(load, [])

    def leave(self, load: int, rest: list[Extent]) -> None:
        """Of what a load was granted, only `rest` goes back when it ends: blobs that were sealed lie in the others."""
        self._granted[load] = rest

    def return_grants(self, load: int) -> None:
        """Nothing has open any more what a load was granted: what is not to stay goes back to the system."""
        self._creations.abandon(load)
        if extents := self._granted.pop(load, None):
            self.give_back(self._domain_of[extents[0].segment], extents, pool=False)

    def give_back(self, domain: str, extents: Iterable[Extent], *, pool: bool) -> None:
        """Return bytes. Segments that become empty stay in the pool if `pool` and the limit allow; other pages go."""
        arena = self.arena(domain)
        returned: dict[int, RangeSet] = {}
        for extent in extents:  # joined, for these may be 100,000 neighbours, and each range becomes a system call
            returned.setdefault(extent.segment, RangeSet()).add(extent.offset, extent.end)
        for segment, ranges in returned.items():
            for start, end in ranges:
                arena.give_back(Extent(segment, start, end - start))
            if arena.is_empty(segment):
                self._let_go(arena, segment, pool=pool)
            elif self.sparse:
                for start, end in ranges:
                    for leaving in arena.start_leaving(segment, start, end):
                        self._reclaims.add(ExtentReclaim(domain, leaving, self.losses))

    def adopt(
        self, domain: str, segment: int, size: int, taken: RangeSet, hollow: Iterable[tuple[int, int]], *, frozen: bool
    ) -> None:
        """Take in a segment that an earlier daemon has filled (Arena.adopt_segment); its unused pages go back.

        During a `quarantine` they stay, unused, until `thaw`.
        """
        arena = self.arena(domain)
        arena.adopt_segment(segment, size, taken, hollow, frozen=frozen, quarantine=self.quarantine)
        self._domain_of[segment] = domain
        self._return_pages(segment)

    def quarantined(self) -> list[int]:
        """The segments of which bytes are set aside until `thaw`."""
        return [segment for segment, domain in self._domain_of.items() if self._arenas[domain].is_quarantined(segment)]

    def thaw(self, segment: int, hollow: Iterable[tuple[int, int]]) -> None:
        """Free what was set aside of a segment; `hollow` are its ranges without memory. Unused pages go back."""
        if (domain := self._domain_of.get(segment)) is None:
            return
        self._arenas[domain].thaw(segment, hollow)
        if self._arenas[domain].is_empty(segment):
            self._release(self._arenas[domain], segment)
        else:
            self._return_pages(segment)

    def is_frozen(self, segment: int) -> bool:
        """Whether a segment has bytes that the books do not know (Arena.adopt_segment)."""
        return self.arena(self._domain_of[segment]).is_frozen(segment)

    def close_pool(self) -> None:
        """Return what is unused to the system, and pool nothing more until `open_pool`."""
        self._pooling = False
        self._return_unused(self.used)

    def open_pool(self) -> None:
        """Pool empty segments again."""
        self._pooling = True

    def excess(self) -> int:
        """Bytes beyond the budget when all has gone that is unused, or on its way already; that is now queued."""
        self._return_unused(self._excess())
        return max(0, self._excess())

    def _excess(self) -> int:
        leaving = self._reclaims.releasing + sum(arena.leaving for arena in self._arenas.values())
        return self.used - leaving - self.budget

    def pooled_bytes(self) -> int:
        """Memory in empty segments that wait for the next load."""
        return sum(arena.empty_bytes for arena in self._arenas.values())

    @property
    def unused_segment_bytes(self) -> int:
        """Memory in segments without a blob or a load: the pool, and what is on its way back to the system."""
        return self.pooled_bytes() + self._reclaims.releasing

    def next_reclaims(self) -> list[Reclaim]:
        """The reclaims to carry out now; each is handed out once and reported by `reclaimed`."""
        if self._reclaims.waiting:
            self._before_use()
        return self._reclaims.take()

    def reclaimed(self, reclaim: Reclaim) -> None:
        """A reclaim has been carried out: its memory is gone. One from before a loss tells nothing new."""
        if reclaim.losses != self.losses:
            return
        self._reclaims.done(reclaim)  # law 8: only now does it count no longer
        if isinstance(reclaim, SegmentReclaim):
            return
        arena = self.arena(reclaim.domain)
        arena.left(reclaim.extent)
        if arena.is_empty(reclaim.extent.segment):
            self._release(arena, reclaim.extent.segment)

    def lose(self, reason: str = "") -> None:
        """The memory is gone, all of it: begin again with nothing, and with nothing to return."""
        self.losses += 1
        self.lost_by = reason
        self._arenas.clear()
        self._domain_of.clear()
        self._promises.clear()
        self._creations.clear()
        self._granted.clear()
        self._reclaims.clear()
        self.freeing.clear()

    def _occupy(self, load: int, arena: Arena, extent: Extent) -> Extent:
        self._before_use()
        arena.occupy(extent)
        self._granted.setdefault(load, []).append(extent)
        return extent

    def _let_go(self, arena: Arena, segment: int, *, pool: bool) -> None:
        """Pool an empty segment if that is allowed, or release it."""
        pooled = pool and self._pooling and arena.populated(segment) and self.pooled_bytes() <= self._pool_limit
        if not pooled or arena.is_frozen(segment):
            self._release(arena, segment)

    def _return_unused(self, wanted: int) -> None:
        """Queue empty segments, and free pages where they can be punched, until `wanted` bytes are on their way."""
        for arena in self._arenas.values():
            for segment in arena.empty_segments():
                if wanted <= 0:
                    return
                wanted -= arena.populated(segment)
                self._release(arena, segment)
        if not self.sparse:
            return
        for domain, arena in self._arenas.items():
            for segment in arena.segments_with_holes():
                if wanted <= 0:
                    return
                for leaving in arena.start_leaving(segment):
                    wanted -= leaving.length
                    self._reclaims.add(ExtentReclaim(domain, leaving, self.losses))

    def _return_pages(self, segment: int) -> None:
        """Queue the unused pages of a segment, on a device where they can be punched."""
        domain = self._domain_of[segment]
        for leaving in self._arenas[domain].start_leaving(segment) if self.sparse else ():
            self._reclaims.add(ExtentReclaim(domain, leaving, self.losses))

    def _release(self, arena: Arena, segment: int) -> None:
        size = arena.populated(segment)
        arena.remove_segment(segment)
        del self._domain_of[segment]
        self._reclaims.add(SegmentReclaim(segment, size, self.losses))
