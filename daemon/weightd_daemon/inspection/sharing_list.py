"""ListSharing: the pairs of checkpoints that have bytes in common, those with most first.

Not all pairs are kept: n checkpoints with one tensor in common are n²/2 of them. To find a page, the sets of blobs are
gone through, and the best pairs behind the last of the page before are kept: some more than for this page, as numbers,
and until a checkpoint comes or goes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from weightd._proto.v1 import inspection_pb2
from weightd_daemon.core.partners import ComponentPair, Partners, count_components
from weightd_daemon.turns import LoopTurn

from .pages import position_of, rows_of, token_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.sharing import Sharer
    from weightd_daemon.core.store import ContentStore

    from .sharing_upkeep import SharingUpkeep

_CALL = "ListSharing"
_MOST_OF_PAIR = 1 << 20
"""Bytes that the pairs of components of two checkpoints may take: where they might take more, none is told of."""
_MOST_OF_PAGE = 16 << 20
"""The same, of a page."""
_NUMBERS_BYTES = 16
"""Of one pair of components: its number of bytes, and what tells the fields apart."""
_KEPT = 20_000
"""Pairs that are found at once for who goes on behind the first page: 170 bytes each."""
_KNOWN = 4
"""Answers that are kept: those asked for last."""
_FIRST = ((1 << 63) - 1, 0, 0)
"""The place before all pairs: bytes in common, and the numbers of both."""


class _Pair(NamedTuple):
    """Two checkpoints, and what they have in common. Of two such tuples the smaller one is listed later."""

    shared_bytes: int
    before_one: int
    """The number of `one` below 0: of pairs with as much in common, the one that came first is listed first."""
    before_other: int
    only_bytes: int
    one: Sharer
    other: Sharer


_Place = tuple[int, int, int]
"""As a pair begins; what is listed behind it is smaller."""
_Numbers = tuple[int, int, int, int]
"""What a pair has beside its checkpoints. Plain: thousands of anything else cost collections of garbage time."""
_Question = tuple[bool, str, str, "CheckpointKey | None"]
"""Who asks, as an admin and of which domain, and about which device or checkpoint."""


class _KnownPairs(NamedTuple):
    """All pairs behind a place, or the first of them, ascending: no record of one that has gone is to stay for them."""

    revision: int
    """Of the index."""
    begin: _Place
    pairs: list[_Numbers]
    are_all: bool

    def behind(self, begin: _Place, most: int) -> list[_Numbers] | None:
        """At most so many pairs behind a place, in their order; None where that is not known."""
        end = bisect_left(self.pairs, begin)
        if begin > self.begin or (end < most and not self.are_all):
            return None
        return self.pairs[max(0, end - most) : end][::-1]


class SharingList:
    """Answers ListSharing."""

    def __init__(self, store: ContentStore, catalog: Catalog, upkeep: SharingUpkeep) -> None:
        self._store = store
        self._catalog = catalog
        self._upkeep = upkeep
        self._known: dict[_Question, _KnownPairs] = {}

    async def page(
        self, who: Principal, request: inspection_pb2.ListSharingRequest, device: str
    ) -> inspection_pb2.ListSharingResponse:
        """A page of what `who` may see, on a device given by its UUID or on all.

        Each pair is right at a moment during the call. Errors: NotFoundError, InvalidReferenceError, DeviceError.
        """
        most = rows_of(request.page_size)
        shared, one, other = position_of(request.page_token, _CALL, _FIRST)
        reference = self._catalog.find(who, request.reference, device) if request.reference else None
        response = inspection_pb2.ListSharingResponse(revision=self._store.revision.number)
        begin = (int(shared), -int(one), -int(other))
        found = await self._found(who, reference, device, begin, most + 1)
        pairs = found[: min(most, _fitting(found))]
        if len(found) > len(pairs):
            last = pairs[-1]
            response.next_page_token = token_of(_CALL, (last[0], -last[1], -last[2]))
        await self._describe(pairs, response)
        return response

    async def _found(
        self, who: Principal, reference: Checkpoint | None, device: str, begin: _Place, most: int
    ) -> list[_Pair]:
        """At most so many pairs behind a place, in their order: those that are known, as long as they are right."""
        question = (who.admin, who.domain, device, reference.key if reference else None)
        await self._upkeep.caught_up()
        index, known = self._store.sharing, self._known.pop(question, None)
        revision = index.revision
        if known is not None and known.revision == revision:
            self._known[question] = known
            if (pairs := known.behind(begin, most)) is not None:
                return _pairs(pairs, index.numbered())
        kept = most if begin[0] == _FIRST[0] else max(most, _KEPT)
        asked = self._asked(who, reference, device)  # in one step with the revision
        found, sharers = await self._best(asked, begin, kept, both=reference is not None)
        if index.revision == revision:
            self._known[question] = _KnownPairs(revision, begin, found[::-1], len(found) < kept)
            for oldest in [*self._known][:-_KNOWN]:
                del self._known[oldest]
        return _pairs(found[:most], sharers)

    def _asked(self, who: Principal, reference: Checkpoint | None, device: str) -> list[Checkpoint]:
        """The checkpoints whose pairs are asked for, in the order in which they came."""
        if reference is not None:
            return [reference]
        return [one for one in self._catalog.visible(who) if device in ("", one.key.device)]

    async def _best(
        self, asked: Iterable[Checkpoint], begin: _Place, most: int, *, both: bool
    ) -> tuple[list[_Numbers], dict[int, Sharer]]:
        """At most so many pairs behind a place, in their order: those with later checkpoints, or with `both` all.

        And the checkpoints by number, for some may have gone by then.
        """
        best: list[_Numbers] = []
        sharers: dict[int, Sharer] = {}
        turn = LoopTurn()
        for checkpoint in asked:
            async with self._upkeep.still() as index:
                one = index.sharer(checkpoint)
                if one is None or not _range(one, best, begin, most):  # it has gone meanwhile, or has too little
                    continue
                partners = Partners(one, later=not both)
                for _ in partners.count():
                    if turn.is_over:
                        await turn.next()
            wanted = _range(one, best, begin, most)
            for other, shared in [(other, shared) for other, shared in partners.shared.items() if shared in wanted]:
                pair = shared, -one.number, -other.number, partners.only.get(other, 0)
                if pair < begin:
                    sharers[one.number], sharers[other.number] = one, other
                    (heapq.heappush if len(best) < most else heapq.heappushpop)(best, pair)
                if turn.is_over:
                    await turn.next()
            if turn.is_over:
                await turn.next()
        ordered = []
        while best:
            ordered.append(heapq.heappop(best))
            if turn.is_over:
                await turn.next()
        return ordered[::-1], sharers

    async def _describe(self, pairs: list[_Pair], response: inspection_pb2.ListSharingResponse) -> None:
        components = await self._components(pairs)
        places: dict[Sharer, int] = {}
        turn = LoopTurn()
        for pair in pairs:
            one, other = (places.setdefault(sharer, len(places)) for sharer in (pair.one, pair.other))
            response.pairs.add(
                device=pair.one.checkpoint.key.device, one=one, other=other, shared_bytes=pair.shared_bytes,
                only_bytes=pair.only_bytes,
                components=[
                    inspection_pb2.SharedComponents(one=mine, other=theirs, shared_bytes=length)
                    for (mine, theirs), length in components[pair.one].get(pair.other, {}).items()
                ],
            )  # fmt: skip
            if turn.is_over:
                await turn.next()
        for sharer in places:
            key = sharer.checkpoint.key
            response.checkpoints.add(content_digest=key.content_digest, name=self._catalog.name(sharer.checkpoint))
            if turn.is_over:
                await turn.next()

    async def _components(self, pairs: list[_Pair]) -> dict[Sharer, dict[Sharer, dict[ComponentPair, int]]]:
        """What is between which components of the pairs, where either has any."""
        wanted: dict[Sharer, set[Sharer]] = defaultdict(set)
        for pair in pairs:
            if _component_bytes(pair):
                wanted[pair.one].add(pair.other)
        found: dict[Sharer, dict[Sharer, dict[ComponentPair, int]]] = defaultdict(dict)
        turn = LoopTurn()
        for one, others in wanted.items():
            async with self._upkeep.still():
                for _ in count_components(one, others, found[one]):
                    if turn.is_over:
                        await turn.next()
            if turn.is_over:
                await turn.next()
        return found


def _component_bytes(pair: _Pair) -> int:
    """What all pairs of components of two checkpoints would take; 0 where that is too much, or neither has any."""
    one, other = pair.one, pair.other
    if not one.name_bytes and not other.name_bytes:
        return 0
    ones, others = len(one.parts), len(other.parts)
    size = ones * other.name_bytes + others * one.name_bytes + _NUMBERS_BYTES * ones * others
    return size if size <= _MOST_OF_PAIR else 0


def _fitting(pairs: list[_Pair]) -> int:
    """How many of these pairs a page takes."""
    return bisect_right(list(accumulate(map(_component_bytes, pairs))), _MOST_OF_PAGE)


def _pairs(found: Iterable[_Numbers], sharers: Mapping[int, Sharer]) -> list[_Pair]:
    return [_Pair(*numbers, sharers[-numbers[1]], sharers[-numbers[2]]) for numbers in found]


def _range(one: Sharer, best: list[_Numbers], begin: _Place, most: int) -> range:
    """How many bytes a checkpoint may have in common with another for a pair that is behind `begin` and in `best`.

    As checkpoints are asked for in the order of their numbers, its pairs are behind those with as much in common.
    """
    least = best[0][0] + 1 if len(best) == most else 1
    return range(least, min(begin[0] - (-one.number > begin[1]), one.most_shared_bytes) + 1)
