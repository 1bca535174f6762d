"""Place replicas of checkpoints on devices, so that few bytes are held twice, and explain each placement.

Greedy by marginal bytes, the biggest checkpoint first, then local search (search.py). Other attempts begin with what
was left over, or with other checkpoints. The problem is bin packing with overlapping items, which is NP-hard; tests
compare with the optimum.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .books import FleetDevice, PlacementBooks
from .search import PlacementSearch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .atoms import Atoms

EFFORT: Final = 8_000
"""How many placements the searches of all attempts may try together."""
EFFORT_FOR_FEW: Final = 32_000
"""The same for at most _FEW checkpoints, which take a shorter time each."""
_ATTEMPTS: Final = 6
_FEW: Final = 100
"""With more checkpoints than this, a second attempt is made only if something is left over, and no third one."""


@dataclass(frozen=True, slots=True)
class ReplicaPlacement:
    """A replica on a device. Checkpoints and devices are numbers, sizes are bytes.

    `missing_bytes` have to be brought there, `alone_bytes` no other checkpoint placed there has. `partner` is the
    checkpoint there that has the most bytes in common with it, which are `partner_bytes`; None if there is none.
    """

    checkpoint: int
    device: int
    size_bytes: int
    missing_bytes: int
    alone_bytes: int
    partner: int | None
    partner_bytes: int


@dataclass(frozen=True, slots=True)
class LeftOverReplicas:
    """Replicas of a checkpoint that were placed nowhere, and why: too few nodes, or no budget has room."""

    checkpoint: int
    replicas: int
    needs_nodes: bool
    least_bytes: int
    """The fewest bytes that one of them would add to a device."""
    most_room_bytes: int
    """The most bytes that a device without it has left."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What lies where: placements by device, what is left over, and the bytes used on each device."""

    placements: tuple[ReplicaPlacement, ...]
    left_over: tuple[LeftOverReplicas, ...]
    used_bytes: tuple[int, ...]

    @property
    def placed_bytes(self) -> int:
        """Bytes used on all devices."""
        return sum(self.used_bytes)


def place(atoms: Atoms, replicas: Sequence[int], devices: Sequence[FleetDevice]) -> FleetPlan:
    """Place so many replicas of each checkpoint, those included that devices hold already.

    No device goes over its budget by what is placed, and no node gets two replicas of a checkpoint. What is evictable
    may be evicted for it. Errors: ValueError (the numbers of checkpoints differ).
    """
    best: tuple[tuple[int, int], PlacementSearch] | None = None
    for search in _attempts(atoms, replicas, devices):
        search.save_bytes()
        left_bytes = sum(int(atoms.sizes[left]) * count for left, count in search.unplaced.items())
        cost = (left_bytes, search.books.total)
        if best is None or cost < best[0]:
            best = cost, search
    assert best is not None
    return _explained(best[1].books, best[1].unplaced)


def least_nodes(atoms: Atoms, replicas: Sequence[int], node: FleetDevice, most: int) -> int | None:
    """The number of nodes like this one, at most `most`, that place everything; None where `most` do not.

    It is found by halving, so that fewer nodes may do where greedy placing is unlucky with one of the numbers.
    """

    def places_all(nodes: int) -> bool:
        equal = [FleetDevice(f"{number}", f"{number}", node.budget_bytes, node.page_bytes) for number in range(nodes)]
        return any(not search.unplaced for search in _attempts(atoms, replicas, equal))

    if not places_all(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if places_all(middle) else (middle, high)
    return high


def _attempts(atoms: Atoms, replicas: Sequence[int], devices: Sequence[FleetDevice]) -> Iterator[PlacementSearch]:
    """Placements that each begin with other checkpoints, and what is left over placed as far as the effort goes."""
    if len(replicas) != len(atoms.members):
        raise ValueError(f"{len(replicas)} numbers of replicas for {len(atoms.members)} checkpoints")
    order = sorted(range(len(replicas)), key=lambda checkpoint: (-atoms.sizes[checkpoint], checkpoint))
    few = len(order) <= _FEW
    attempts = _ATTEMPTS if few else 2
    for attempt in range(attempts):
        books = PlacementBooks(atoms, devices)
        left_over = _greedy(books, replicas, order)
        search = PlacementSearch(books, left_over, (EFFORT_FOR_FEW if few else EFFORT) // attempts)
        search.place_left_over()
        yield search
        possible = [left for left in search.unplaced if books.allowed(left).any()]
        if not possible and (search.unplaced or not few):
            return
        first = possible or order[attempt + 1 : attempt + 2]
        order = first + [checkpoint for checkpoint in order if checkpoint not in first]


def _greedy(books: PlacementBooks, replicas: Sequence[int], order: Sequence[int]) -> Counter[int]:
    """Place each checkpoint where it adds the fewest bytes. Returns how many replicas of which are left over."""
    unplaced: Counter[int] = Counter()
    for checkpoint in order:
        fresh = books.fresh(checkpoint)  # a replica changes what the next one adds only on its own device
        for _ in range(replicas[checkpoint] - len(books.of_checkpoint[checkpoint])):
            device = books.cheapest(checkpoint, fresh)
            if device is None:
                unplaced[checkpoint] += 1
            else:
                books.put(checkpoint, device)
    return unplaced


def _explained(books: PlacementBooks, unplaced: Counter[int]) -> FleetPlan:
    placements = [
        placement
        for checkpoint, where in enumerate(books.of_checkpoint)
        if where
        for placement in _placements(books, checkpoint)
    ]
    placements.sort(key=lambda placement: (placement.device, placement.checkpoint))
    left_over = [_left_over(books, checkpoint, count) for checkpoint, count in sorted(unplaced.items())]
    return FleetPlan(tuple(placements), tuple(left_over), tuple(books.used.tolist()))


def _placements(books: PlacementBooks, checkpoint: int) -> Iterator[ReplicaPlacement]:
    """The replicas of a checkpoint, and what each shares where it is."""
    common = {
        int(other): int(shared)
        for other, shared in zip(*books.atoms.common(checkpoint), strict=True)
        if other != checkpoint and shared
    }
    for device in books.of_checkpoint[checkpoint]:
        partner = max(common.keys() & books.on_device[device], key=lambda other: (common[other], -other), default=None)
        yield ReplicaPlacement(
            checkpoint=checkpoint,
            device=device,
            size_bytes=int(books.atoms.sizes[checkpoint]),
            missing_bytes=int(books.missing(checkpoint)[device]),
            alone_bytes=books.alone(checkpoint, device),
            partner=partner,
            partner_bytes=0 if partner is None else common[partner],
        )


def _left_over(books: PlacementBooks, checkpoint: int, count: int) -> LeftOverReplicas:
    allowed = books.allowed(checkpoint)
    if not allowed.any():
        return LeftOverReplicas(checkpoint, count, needs_nodes=True, least_bytes=0, most_room_bytes=0)
    fresh, room = books.fresh(checkpoint)[allowed], (books.budgets - books.used)[allowed]
    return LeftOverReplicas(checkpoint, count, False, int(fresh.min()), int(room.max()))
