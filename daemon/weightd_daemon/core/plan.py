"""Computes how much memory sharing would save among checkpoints, from their tensor lists, before any load.

The figures are those that the books show once these checkpoints are resident (loading.py): equal bytes are held once,
below OWN_COPY_BELOW once for each name that a checkpoint has for them. Copies are shared between checkpoints one to
one, so of these there are as many as the checkpoint with the most names has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from .blob import OWN_COPY_BELOW

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence


class PlannedTensor(NamedTuple):
    """Tensor in a sharing plan: `length` is bytes, `identity` what equal bytes have in common (None: nothing)."""

    component: str
    name: str
    length: int
    identity: Hashable


@dataclass(frozen=True, slots=True)
class _PlannedComponent:
    """One part of a checkpoint; `shared_bytes` are those of its tensors that other checkpoints have as well."""

    name: str
    tensors: int
    total_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class _PlannedCheckpoint:
    """One checkpoint: `exclusive_bytes` would be held for it alone, `shared_bytes` is the rest of its tensors' bytes.

    `shared_with` counts the other checkpoints that have any of its bytes.
    """

    name: str
    tensors: int
    total_bytes: int
    exclusive_bytes: int
    shared_bytes: int
    shared_with: int
    components: tuple[_PlannedComponent, ...]


@dataclass(frozen=True, slots=True)
class _SharedPart:
    """Bytes that a component of one checkpoint has in common with a component of another, named in a pair's order."""

    components: tuple[str, str]
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class _PlannedPair:
    """What two checkpoints would hold together, once instead of twice; `parts` adds up to it, the biggest first."""

    checkpoints: tuple[str, str]
    shared_bytes: int
    parts: tuple[_SharedPart, ...]


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """Bytes that checkpoints would share if all were resident.

    Checkpoints come in the order given, components by name, pairs that share the biggest first.

    `total_bytes` is what the tensors take without sharing, `unique_bytes` with it.
    """

    total_bytes: int
    unique_bytes: int
    saved_bytes: int
    saved_ratio: float
    checkpoints: tuple[_PlannedCheckpoint, ...]
    pairs: tuple[_PlannedPair, ...]


def recurring(lengths: Iterable[int]) -> set[int]:
    """The lengths that occur more than once: a tensor of any other length is equal to none."""
    return {length for length, count in Counter(lengths).items() if count > 1 and length}


def make_plan(checkpoints: Mapping[str, Sequence[PlannedTensor]]) -> SharingPlan:
    """What sharing would save among these checkpoints, by name."""
    exclusive: Counter[str] = Counter()
    shared: Counter[tuple[str, str]] = Counter()
    parts: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    unique = 0
    for length, once, having in _contents(checkpoints):
        held = {name: components[: 1 if once else None] for name, components in having.items()}
        unique += length * max(map(len, held.values()))
        for name, components in having.items():
            elsewhere = max((len(other) for at, other in held.items() if at != name), default=0)
            exclusive[name] += length * max(0, len(held[name]) - elsewhere)
            for component in components if once and elsewhere else components[:elsewhere]:
                shared[name, component] += length
        for (name, first), (at, second) in combinations(held.items(), 2):
            for part in zip(first, second, strict=False):  # as many as both have
                parts.setdefault((name, at), Counter())[part] += length
    partners = Counter(name for pair in parts for name in pair)
    found = tuple(
        _checkpoint(name, tensors, exclusive[name], shared, partners[name]) for name, tensors in checkpoints.items()
    )
    total = sum(checkpoint.total_bytes for checkpoint in found)
    pairs = (
        _PlannedPair(pair, by_part.total(), tuple(_SharedPart(*part) for part in _biggest_first(by_part)))
        for pair, by_part in parts.items()
    )
    return SharingPlan(
        total_bytes=total,
        unique_bytes=unique,
        saved_bytes=total - unique,
        saved_ratio=(total - unique) / total if total else 0.0,
        checkpoints=found,
        pairs=tuple(sorted(pairs, key=lambda pair: (-pair.shared_bytes, pair.checkpoints))),
    )


def _contents(
    checkpoints: Mapping[str, Sequence[PlannedTensor]],
) -> Iterator[tuple[int, bool, dict[str, tuple[str, ...]]]]:
    """Bytes that the very same components have, in sum: length, whether held once, and who has them.

    By checkpoint, its components that have them are listed once for each tensor, sorted. In sum, because a hundred
    fine-tunes have thousands of pairs and hundreds of tensors in common, but few patterns of who has what.
    """
    found: dict[tuple[int, Hashable], dict[str, list[str]]] = {}
    for name, tensors in checkpoints.items():
        for component, _, length, identity in sorted(tensors, key=lambda tensor: tensor[:2]):
            if length:
                content = (length, object() if identity is None else identity)
                found.setdefault(content, {}).setdefault(name, []).append(component)
    sums: Counter[tuple[bool, tuple[tuple[str, tuple[str, ...]], ...]]] = Counter()
    for (length, _), having in found.items():
        pattern = tuple((name, tuple(components)) for name, components in having.items())
        sums[length >= OWN_COPY_BELOW, pattern] += length
    return ((length, once, dict(pattern)) for (once, pattern), length in sums.items())


def _checkpoint(
    name: str, tensors: Sequence[PlannedTensor], exclusive: int, shared: Counter[tuple[str, str]], partners: int
) -> _PlannedCheckpoint:
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        sizes.setdefault(tensor.component, []).append(tensor.length)
    total = sum(tensor.length for tensor in tensors)
    return _PlannedCheckpoint(
        name=name,
        tensors=len(tensors),
        total_bytes=total,
        exclusive_bytes=exclusive,
        shared_bytes=total - exclusive,
        shared_with=partners,
        components=tuple(
            _PlannedComponent(component, len(lengths), sum(lengths), shared[name, component])
            for component, lengths in sorted(sizes.items())
        ),
    )


def _biggest_first(sizes: Counter[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
