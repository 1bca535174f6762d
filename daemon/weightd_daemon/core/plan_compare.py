"""Compares two planned checkpoints: which of their tensors differ."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from weightd.plan_report import Difference, DifferingTensors

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from .plan import PlannedTensor

LISTED = 20
"""Most rows of a list of differing tensors."""

_Label = tuple[str, str, str, tuple[int, ...]]


def label(tensor: PlannedTensor) -> _Label:
    """Component, name, dtype and shape: what two tensors agree in that are compared."""
    return tensor.component, tensor.name, tensor.dtype, tensor.shape


def compare(names: tuple[str, str], first: Iterable[PlannedTensor], second: Iterable[PlannedTensor]) -> Difference:
    """Compare two checkpoints tensor by tensor; a tensor without an identity equals no other.

    Tensors are matched that agree in component, name, dtype and shape; of the rest those that agree in all but the
    component, as of a model that is a component of a pipeline; and of the rest those with equal bytes.
    """
    left, right = list(first), list(second)
    equal, differing = 0, []
    for key in (label, _name, _content):
        twins: dict[Hashable, list[PlannedTensor]] = defaultdict(list)
        for tensor in right:
            twins[key(tensor)].append(tensor)
        unmatched = []
        for tensor in left:
            if not (same := twins.get(key(tensor))):
                unmatched.append(tensor)
            elif _content(tensor) == _content(same.pop()):
                equal += 1
            else:
                differing.append(tensor)
        left, right = unmatched, [tensor for some in twins.values() for tensor in some]
    return Difference(
        checkpoints=names,
        equal_tensors=equal,
        differing_tensors=len(differing),
        differing_bytes=sum(tensor.length for tensor in differing),
        differing=_summed(differing),
        only_tensors=(len(left), len(right)),
        only=(_summed(left), _summed(right)),
    )


def _name(tensor: PlannedTensor) -> Hashable:
    return tensor.name, tensor.dtype, tensor.shape


def _content(tensor: PlannedTensor) -> Hashable:
    """Equal for tensors with equal bytes; like no other if that is not known."""
    known = tensor.identity is not None or not tensor.length
    return (tensor.length, tensor.identity if tensor.length else None) if known else object()


def _summed(tensors: Iterable[PlannedTensor]) -> tuple[DifferingTensors, ...]:
    """Tensors by their names with `*` for numbers: a model repeats its layers. The largest first."""
    same: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        same[re.sub(r"(?<![A-Za-z0-9])[0-9]+(?![A-Za-z0-9])", "*", _path(tensor))].append(tensor)
    sums = [
        DifferingTensors(name if len(some) > 1 else _path(some[0]), len(some), sum(tensor.length for tensor in some))
        for name, some in same.items()
    ]
    return tuple(sorted(sums, key=lambda found: (-found.bytes, found.name))[:LISTED])


def _path(tensor: PlannedTensor) -> str:
    return f"{tensor.component}/{tensor.name}" if tensor.component else tensor.name
