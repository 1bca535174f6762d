"""Computes how much memory sharing would save among checkpoints, from their tensor lists, before any load.

The figures are those that the books show once these checkpoints are resident (loading.py): equal bytes are held once,
below OWN_COPY_BELOW once for each name that a checkpoint has for them. Copies are shared between checkpoints one to
one, so of these there are as many as the checkpoint with the most names has.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from weightd.plan_report import PlannedCheckpoint, PlannedComponent, PlannedPair, PlanReport, SharedPart

from .blob import OWN_COPY_BELOW

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence


MOST_PAIRS = 10_000
"""How many pairs a plan lists: every pair of 141 checkpoints, of a thousand one in fifty."""


class PlannedTensor(NamedTuple):
    """Tensor in a sharing plan: `length` is bytes, `identity` what equal bytes have in common (None: nothing)."""

    component: str
    name: str
    length: int
    identity: Hashable
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def having(self, identity: Hashable) -> PlannedTensor:
        """The same tensor with another identity. Several times faster than `_replace`; there may be a million."""
        return PlannedTensor(self.component, self.name, self.length, identity, self.dtype, self.shape)


class SharedContent(NamedTuple):
    """Bytes that the very same components have: `length` in sum, and whether a checkpoint holds them once only.

    `having` lists by checkpoint the components that have them, once for each tensor, sorted.
    """

    length: int
    once: bool
    having: Mapping[str, Sequence[str]]

    def held(self) -> dict[str, Sequence[str]]:
        """The components for which a checkpoint holds a copy: the first one where it holds them once."""
        return {name: components[: 1 if self.once else None] for name, components in self.having.items()}


def recurring(lengths: Iterable[int]) -> set[int]:
    """The lengths that occur more than once: a tensor of any other length is equal to none."""
    return {length for length, count in Counter(lengths).items() if count > 1 and length}


def make_plan(
    checkpoints: Mapping[str, Sequence[PlannedTensor]], contents: Sequence[SharedContent] | None = None
) -> PlanReport:
    """What sharing would save among these checkpoints, by name; `contents` are theirs, if they are known already."""
    exclusive: Counter[str] = Counter()
    shared: Counter[tuple[str, str]] = Counter()
    if contents is None:
        contents = shared_contents(checkpoints)
    unique = 0
    for content in contents:
        length, once, having = content
        held = content.held()
        # Of a checkpoint with the most copies, the others have as many as the next one has.
        next_most, most = sorted((0, *map(len, held.values())))[-2:]
        unique += length * most
        for name, components in having.items():
            elsewhere = next_most if len(held[name]) == most else most
            exclusive[name] += length * max(0, len(held[name]) - elsewhere)
            for component in components if once and elsewhere else components[:elsewhere]:
                shared[name, component] += length
    sizes = _pair_sizes(contents)
    partners = Counter(name for pair in sizes for name in pair)
    found = tuple(
        _checkpoint(name, tensors, exclusive[name], shared, partners[name]) for name, tensors in checkpoints.items()
    )
    total = sum(checkpoint.total_bytes for checkpoint in found)
    pairs = _pairs(contents, heapq.nsmallest(MOST_PAIRS, sizes, key=lambda pair: (-sizes[pair], pair)))
    return PlanReport(
        total_bytes=total,
        unique_bytes=unique,
        saved_bytes=total - unique,
        saved_ratio=(total - unique) / total if total else 0.0,
        read_bytes=0,
        checkpoints=found,
        pairs=pairs,
        pairs_left_out=len(sizes) - len(pairs),
    )


def shared_contents(checkpoints: Mapping[str, Sequence[PlannedTensor]]) -> list[SharedContent]:
    """What checkpoints have, in sum: a hundred fine-tunes have thousands of pairs and hundreds of tensors in common,
    but few patterns of who has what.
    """
    found: dict[tuple[int, Hashable], dict[str, list[str]]] = {}
    for name, tensors in checkpoints.items():
        for tensor in sorted(tensors, key=lambda tensor: tensor[:2]):
            if tensor.length:
                content = (tensor.length, object() if tensor.identity is None else tensor.identity)
                found.setdefault(content, {}).setdefault(name, []).append(tensor.component)
    sums: Counter[tuple[bool, tuple[tuple[str, tuple[str, ...]], ...]]] = Counter()
    for (length, _), having in found.items():
        pattern = tuple((name, tuple(components)) for name, components in having.items())
        sums[length >= OWN_COPY_BELOW, pattern] += length
    return [SharedContent(length, once, dict(pattern)) for (once, pattern), length in sums.items()]


def _pair_sizes(contents: Iterable[SharedContent]) -> Counter[tuple[str, str]]:
    """The bytes that two checkpoints have in common, for all that have any."""
    sizes: Counter[tuple[str, str]] = Counter()
    for content in contents:
        copies = [(name, len(components)) for name, components in content.held().items()]
        for (name, first), (at, second) in combinations(copies, 2):
            sizes[name, at] += content.length * min(first, second)
    return sizes


def _pairs(contents: Iterable[SharedContent], listed: Sequence[tuple[str, str]]) -> tuple[PlannedPair, ...]:
    """The listed pairs, in their order, with what they share by component."""
    parts: dict[tuple[str, str], Counter[tuple[str, str]]] = {pair: Counter() for pair in listed}
    for content in contents:
        held = content.held()
        few = math.comb(len(held), 2) < len(listed)
        for pair in combinations(held, 2) if few else listed:
            if pair in parts and pair[0] in held and pair[1] in held:
                for part in zip(held[pair[0]], held[pair[1]], strict=False):  # as many as both have
                    parts[pair][part] += content.length
    return tuple(
        PlannedPair(pair, by_part.total(), tuple(SharedPart(*part) for part in _biggest_first(by_part)))
        for pair, by_part in parts.items()
    )


def _checkpoint(
    name: str, tensors: Sequence[PlannedTensor], exclusive: int, shared: Counter[tuple[str, str]], partners: int
) -> PlannedCheckpoint:
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        sizes.setdefault(tensor.component, []).append(tensor.length)
    total = sum(tensor.length for tensor in tensors)
    return PlannedCheckpoint(
        name=name,
        tensors=len(tensors),
        total_bytes=total,
        exclusive_bytes=exclusive,
        shared_bytes=total - exclusive,
        shared_with=partners,
        components=tuple(
            PlannedComponent(component, len(lengths), sum(lengths), shared[name, component])
            for component, lengths in sorted(sizes.items())
        ),
    )


def _biggest_first(sizes: Counter[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
