"""The report of `weightd plan` as plain values: its JSON output has the same keys, in this order. Sizes are bytes.

The process that reads files (weightd_daemon/planning.py) makes it; the command and the page show it.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class PlannedComponent:
    """One part of a checkpoint; `shared_bytes` are those of its tensors that other checkpoints have as well."""

    name: str
    tensors: int
    total_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """One checkpoint: `exclusive_bytes` would be held for it alone, `shared_bytes` is the rest of its tensors' bytes.

    `shared_with` counts the other checkpoints that have any of its bytes.
    """

    name: str
    tensors: int
    total_bytes: int
    exclusive_bytes: int
    shared_bytes: int
    shared_with: int
    components: tuple[PlannedComponent, ...]


@dataclass(frozen=True, slots=True)
class SharedPart:
    """Bytes that a component of one checkpoint has in common with a component of another, named in a pair's order."""

    components: tuple[str, str]
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedPair:
    """What two checkpoints would hold together, once instead of twice; `parts` adds up to it, the biggest first."""

    checkpoints: tuple[str, str]
    shared_bytes: int
    parts: tuple[SharedPart, ...]


@dataclass(frozen=True, slots=True)
class DifferingTensors:
    """Tensors that differ between two checkpoints; numbers in names are replaced: `layers.*.q_proj.weight`.

    `count` tensors have this name and have `bytes` in the first checkpoint, or in the second if only that has them.
    """

    name: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints compare, tensor by tensor.

    `equal_tensors` of both have equal bytes. `differing_tensors` agree in name, dtype and shape and have other bytes,
    `differing_bytes` of one checkpoint. `only_tensors` are in one of them alone, in the order of `checkpoints`. The
    lists name the largest.
    """

    checkpoints: tuple[str, str]
    equal_tensors: int
    differing_tensors: int
    differing_bytes: int
    differing: tuple[DifferingTensors, ...]
    only_tensors: tuple[int, int]
    only: tuple[tuple[DifferingTensors, ...], tuple[DifferingTensors, ...]]


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two checkpoints whose tensors agree in name, shape and dtype, but not all in their bytes.

    Both ratios are from 0 to 1, estimated from `sampled_bytes` read of both together, and of all tensors:
    `equal_elements` is the share of elements that are equal, `delta_ratio` the size of a lossless difference relative
    to the size of one checkpoint. weightd does not save these bytes.
    """

    a: str
    b: str
    equal_elements: float
    delta_ratio: float
    sampled_bytes: int


@dataclass(frozen=True, slots=True)
class BudgetStep:
    """A checkpoint in the order of loading: `added_bytes` is what those before it do not hold yet.

    `total_bytes` is what all up to this one hold together, also those that do not fit. For one that does not, `remove`
    names fitting checkpoints without which it fits; it is empty if even all of them would not do.
    """

    name: str
    added_bytes: int
    total_bytes: int
    fits: bool
    remove: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """What fits a budget, and in which order: next is always the checkpoint that adds the fewest bytes.

    So none that comes after the first that does not fit would fit beside those before it. `fitting` counts the fitting
    ones, and `used_bytes` is what they hold together.
    """

    budget_bytes: int
    used_bytes: int
    fitting: int
    order: tuple[BudgetStep, ...]


@dataclass(frozen=True, slots=True)
class SkippedPath:
    """What a scan passed over, by path or reference, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Bytes that checkpoints would share if all were resident.

    Checkpoints come in the order given, components by name, pairs that share the biggest first.

    `total_bytes` is what the tensors take without sharing, `unique_bytes` with it, `read_bytes` what was hashed to find
    out. If `at_most`, no bytes were compared: shared and saved figures are upper bounds, unique and exclusive ones
    lower bounds, provided that no checkpoint has one tensor twice; pairs have no parts, `differences` is empty.
    `near_duplicates` is None if they were not looked for. What ends in `_left_out` counts what is beyond a limit.
    `budget` is None without a budget.
    """

    total_bytes: int
    unique_bytes: int
    saved_bytes: int
    saved_ratio: float
    read_bytes: int
    checkpoints: tuple[PlannedCheckpoint, ...]
    pairs: tuple[PlannedPair, ...]
    pairs_left_out: int = 0
    at_most: bool = False
    differences: tuple[Difference, ...] = ()
    near_duplicates: tuple[NearDuplicate, ...] | None = None
    near_duplicates_left_out: int = 0
    budget: BudgetPlan | None = None
    skipped: tuple[SkippedPath, ...] = ()


def read_report(values: Any) -> PlanReport:
    """The report that `dataclasses.asdict` and JSON made `values` of."""
    report: PlanReport = _read(PlanReport, values)
    return report


def _read(kind: Any, values: Any) -> Any:
    return kind(**{name: _value(hint, values[name]) for name, hint in _hints(kind).items()})


@functools.cache  # a report has thousands of pairs
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(hint: Any, value: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return None if value is None else _value(next(kind for kind in get_args(hint) if kind is not type(None)), value)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        each = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else list(kinds)
        return tuple(_value(kind, item) for kind, item in zip(each, value, strict=True))
    return _read(hint, value) if is_dataclass(hint) and isinstance(hint, type) else value
