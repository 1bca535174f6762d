"""Which checkpoints of a plan fit a budget: greedily, next is always the one that adds the fewest bytes.

Greedy is not optimal, but it can be explained, and its order is one in which to load: each figure is what that load
adds. It ends by itself: when the cheapest of the rest does not fit, none of the rest does.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from weightd.plan_report import BudgetPlan, BudgetStep

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from .plan import SharedContent

EXPLAINED = 50
"""For how many checkpoints that do not fit the plan says what to remove: the cheapest ones."""


def fit(names: Sequence[str], contents: Iterable[SharedContent], budget: int) -> BudgetPlan:
    """Order all checkpoints, and say which fit `budget` bytes; equal costs keep the order of `names`."""
    patterns = [(content.length, _copies(content)) for content in contents]
    order = _ordered(names, patterns)
    steps: list[BudgetStep] = []
    used = fitting = total = explained = 0
    for name, added in order:
        total += added
        fits = total <= budget
        remove: tuple[str, ...] = ()
        if fits:
            used, fitting = total, fitting + 1
        elif explained < EXPLAINED:
            explained += 1
            remove = _to_remove(name, [name for name, _ in order[:fitting]], patterns, budget)
        steps.append(BudgetStep(name, added, total, fits, remove))
    return BudgetPlan(budget, used, fitting, tuple(steps))


_Pattern = tuple[int, "Mapping[str, int]"]
"""Bytes, and how many copies of them each checkpoint holds."""


def _copies(content: SharedContent) -> dict[str, int]:
    return {name: len(components) for name, components in content.held().items()}


def _ordered(names: Sequence[str], patterns: Sequence[_Pattern]) -> list[tuple[str, int]]:
    """All checkpoints in order, with the bytes that each adds to those before it."""
    adds = dict.fromkeys(names, 0)
    having: dict[str, list[int]] = {name: [] for name in names}
    for at, (length, copies) in enumerate(patterns):
        for name, count in copies.items():
            adds[name] += length * count
            having[name].append(at)
    present = [0] * len(patterns)
    order = []
    while adds:
        name = min(adds, key=adds.__getitem__)
        order.append((name, adds.pop(name)))
        for at in having[name]:
            length, copies = patterns[at]
            before, present[at] = present[at], max(present[at], copies[name])
            if present[at] > before:
                for other in copies.keys() & adds.keys():
                    adds[other] -= length * (min(copies[other], present[at]) - min(copies[other], before))
    return order


def _to_remove(wanted: str, resident: Sequence[str], patterns: Sequence[_Pattern], budget: int) -> tuple[str, ...]:
    """The checkpoints to remove so that `wanted` fits beside the rest: the one that frees the least, if one is enough.

    Otherwise those that free the most, one after the other. Empty if `wanted` does not fit even alone.
    """
    if _taken([wanted], patterns) > budget:
        return ()
    kept = [*resident, wanted]
    removed: list[str] = []
    while (excess := _taken(kept, patterns) - budget) > 0:
        frees = _freed(kept, patterns)
        candidates = [name for name in kept if name != wanted]
        enough = [name for name in candidates if frees[name] >= excess]
        chosen = min(enough, key=frees.__getitem__) if enough else max(candidates, key=frees.__getitem__)
        removed.append(chosen)
        kept.remove(chosen)
    return tuple(removed)


def _taken(names: Collection[str], patterns: Iterable[_Pattern]) -> int:
    """Bytes that these checkpoints hold together."""
    kept = set(names)
    return sum(
        length * max((count for name, count in copies.items() if name in kept), default=0)
        for length, copies in patterns
    )


def _freed(names: Sequence[str], patterns: Iterable[_Pattern]) -> Counter[str]:
    """Bytes that go with each of these checkpoints if the others stay."""
    freed: Counter[str] = Counter(dict.fromkeys(names, 0))
    kept = set(names)
    for length, copies in patterns:
        held = {name: count for name, count in copies.items() if name in kept}
        next_most, most = sorted((0, 0, *held.values()))[-2:]
        for name, count in held.items():
            if count == most > next_most:
                freed[name] += length * (most - next_most)
    return freed
