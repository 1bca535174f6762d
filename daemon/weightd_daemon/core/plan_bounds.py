"""What sharing could save at most, as far as lengths say: for plans that read headers alone.

Any two tensors of one length in different checkpoints may be equal, whatever they are called. That those of one
checkpoint differ is assumed: otherwise a model could be one layer, and the bound would say nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from .plan import make_plan, shared_contents

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightd.plan_report import PlannedCheckpoint, PlanReport

    from .plan import PlannedTensor, SharedContent


def make_bounds(checkpoints: Mapping[str, Sequence[PlannedTensor]]) -> tuple[PlanReport, list[SharedContent]]:
    """The plan with upper bounds of what is shared and saved, and the contents that would save the most in sum.

    Pairs have no parts, for lengths do not say which component equals which.
    """
    alike = {name: _ranked(tensors) for name, tensors in checkpoints.items()}
    contents = shared_contents(alike)
    report = make_plan(alike, contents)
    having = Counter(length for tensors in checkpoints.values() for length in {tensor.length for tensor in tensors})
    shared = {
        name: _shared(tensors, {length for length, count in having.items() if count > 1})
        for name, tensors in checkpoints.items()
    }
    bounded = replace(
        report,
        at_most=True,
        checkpoints=tuple(_bounded(found, shared[found.name]) for found in report.checkpoints),
        pairs=tuple(replace(pair, parts=()) for pair in report.pairs),
    )
    return bounded, contents


def _ranked(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The same tensors, the first of a length equal to the first of this length in any checkpoint, and so on."""
    seen: dict[int, int] = defaultdict(int)
    found = []
    for tensor in tensors:
        found.append(tensor.having(seen[tensor.length]))
        seen[tensor.length] += 1
    return found


def _shared(tensors: Sequence[PlannedTensor], lengths: set[int]) -> Counter[str]:
    """The bytes in tensors of these lengths, by component."""
    shared: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.length in lengths:
            shared[tensor.component] += tensor.length
    return shared


def _bounded(found: PlannedCheckpoint, shared: Counter[str]) -> PlannedCheckpoint:
    return replace(
        found,
        shared_bytes=shared.total(),
        exclusive_bytes=found.total_bytes - shared.total(),
        components=tuple(replace(part, shared_bytes=shared[part.name]) for part in found.components),
    )
