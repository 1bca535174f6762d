"""ListSharing: the pairs of checkpoints that have bytes in common, those with most first.

Pairs are not kept: n checkpoints with one tensor in common are n²/2 of them. Each page goes through the sets of blobs
once more, and keeps the best pairs behind the last of the page before.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from weightd._proto.v1 import inspection_pb2
from weightd_daemon.core.partners import ComponentPair, Partners, count_components
from weightd_daemon.turns import LoopTurn

from .pages import position_of, rows_of, token_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.sharing import Sharer
    from weightd_daemon.core.store import ContentStore

    from .sharing_upkeep import SharingUpkeep

_CALL = "ListSharing"
_MOST_COMPONENTS = 10_000
"""Ways in which the components of two checkpoints may be paired: where there are more, none is told of."""
_MOST_OF_PAGE = 200_000
"""The same, of a page."""
_FIRST = ((1 << 63) - 1, 0, 0)
"""The place before all pairs: bytes in common, and the numbers of both."""


class _Pair(NamedTuple):
    """Two checkpoints; of two such tuples the smaller one is listed later."""

    shared_bytes: int
    before_one: int
    """The number of `one` below 0: of pairs with as much in common, the one that came first is listed first."""
    before_other: int
    only_bytes: int
    one: Sharer
    other: Sharer


class SharingList:
    """Answers ListSharing."""

    def __init__(self, store: ContentStore, catalog: Catalog, upkeep: SharingUpkeep) -> None:
        self._store = store
        self._catalog = catalog
        self._upkeep = upkeep

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
        found = await self._best(self._asked(who, reference, device), begin, most + 1, both=reference is not None)
        pairs = found[: min(most, _fitting(found))]
        if len(found) > len(pairs):
            last = pairs[-1]
            response.next_page_token = token_of(_CALL, (last[0], -last[1], -last[2]))
        await self._describe(pairs, response)
        return response

    def _asked(self, who: Principal, reference: Checkpoint | None, device: str) -> list[Checkpoint]:
        """The checkpoints whose pairs are asked for, in the order in which they came."""
        if reference is not None:
            return [reference]
        return [one for one in self._catalog.visible(who) if device in ("", one.key.device)]

    async def _best(
        self, asked: Iterable[Checkpoint], begin: tuple[int, int, int], most: int, *, both: bool
    ) -> list[_Pair]:
        """At most so many pairs behind a place, in their order: those with later checkpoints, or with `both` all."""
        best: list[_Pair] = []
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
                pair = _Pair(shared, -one.number, -other.number, partners.only.get(other, 0), one, other)
                if pair < begin:
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
        return ordered[::-1]

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
            names = self._catalog.names(sharer.checkpoint)
            response.checkpoints.add(content_digest=key.content_digest, name=names[0] if names else "")
            if turn.is_over:
                await turn.next()

    async def _components(self, pairs: list[_Pair]) -> dict[Sharer, dict[Sharer, dict[ComponentPair, int]]]:
        """What is between which components of the pairs, where either has any."""
        wanted: dict[Sharer, set[Sharer]] = defaultdict(set)
        for pair in pairs:
            if any(part.component for sharer in (pair.one, pair.other) for part in sharer.parts) and _ways(pair):
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


def _ways(pair: _Pair) -> int:
    """In how many ways the components of two checkpoints may be paired; 0 where that is too many."""
    ways = len(pair.one.parts) * len(pair.other.parts)
    return ways if ways <= _MOST_COMPONENTS else 0


def _fitting(pairs: list[_Pair]) -> int:
    """How many of these pairs a page takes."""
    return bisect_right(list(accumulate(map(_ways, pairs))), _MOST_OF_PAGE)


def _range(one: Sharer, best: list[_Pair], begin: tuple[int, int, int], most: int) -> range:
    """How many bytes a checkpoint may have in common with another for a pair that is behind `begin` and in `best`.

    As checkpoints are asked for in the order of their numbers, its pairs are behind those with as much in common.
    """
    least = best[0].shared_bytes + 1 if len(best) == most else 1
    return range(least, min(begin[0] - (-one.number > begin[1]), one.most_shared_bytes) + 1)
