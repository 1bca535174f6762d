"""Ask transformers' own conversion which stored tensors it will fuse into one parameter: the groups of a load.

Nothing here decides what a model's parameters are: transformers converts stored tensors by their stored names, as ever,
and a parameter is a view where its parts lie in a row (fusing.py). This only says beforehand which should, and in which
order. So what it gets wrong costs memory, never a weight.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch

from weightd.types import TensorKey

from .guards import loading
from .pretrained import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightd._groups import StoredTensor

log = logging.getLogger(__name__)

_PROBE = 2
"""Size of each dimension of the tensors that stand for stored ones: enough to tell any two elements apart."""

_MOST_DIMENSIONS = 8
"""Of a stored tensor that is asked about: a file may say any number, and each doubles what stands for the tensor."""


def groups_of(
    cls: Any, config: Any, stored: Sequence[StoredTensor], *, component: str = "", key_mapping: Any = None
) -> list[list[TensorKey]]:
    """The stored tensors of a component that make up one parameter each as they are, in the order of its bytes.

    `cls` is a model's class of transformers, `config` its configuration, `key_mapping` as in `from_pretrained`. None
    where transformers converts nothing (before 5.0), or where it does more with them than stacking and joining.
    """
    if VERSION < (5, 0):
        return []
    ranks = {tensor.name: len(tensor.shape) for tensor in stored if tensor.component == component}
    try:
        with loading(), torch.device("meta"):
            model = cls(copy.deepcopy(config))
        merged = _merged(model, ranks, key_mapping)
    except Exception as error:  # noqa: BLE001  # transformers' business, and its own load will say it: this is a hint
        log.info("%s: which tensors it merges is not known: %s", cls.__name__, error)
        return []
    found = (order for converter, target, sources in merged for order in _orders(converter, target, sources, model))
    return [[TensorKey(component, name) for name in order] for order in found if len(order) > 1]


_Sources = dict[str, list[tuple[str, int]]]
"""Names and ranks of stored tensors by the pattern of a converter that they match, in transformers' order."""


def _merged(model: Any, ranks: Mapping[str, int], key_mapping: Any) -> list[tuple[Any, str, _Sources]]:
    """Each converter's use: the converter, the name of what it makes, and what of. Names go through transformers'."""
    from transformers import conversion_mapping, core_model_loading

    conversions = conversion_mapping.get_model_conversion_mapping(model, key_mapping)
    renamings = [one for one in conversions if isinstance(one, core_model_loading.WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, core_model_loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    known = model.state_dict()
    uses: dict[str, tuple[Any, _Sources]] = {}
    for name in sorted(ranks, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, known
        )
        if pattern is not None and target in known:
            _, sources = uses.setdefault(target, (by_pattern[pattern], {}))
            sources.setdefault(pattern, []).append((name, ranks[name]))
    return [(converter, target, sources) for target, (converter, sources) in uses.items()]


def _orders(converter: Any, target: str, sources: _Sources, model: Any) -> list[list[str]]:
    """The order of whole stored tensors in each thing that a converter makes of them; nothing where it does more.

    It is tried on small tensors that stand for the stored ones, each with elements of its own.
    """
    if any(rank > _MOST_DIMENSIONS for tensors in sources.values() for _, rank in tensors):
        return []
    names: dict[int, tuple[str, int]] = {}
    position = 0
    try:
        probe = copy.deepcopy(converter)
        for pattern, tensors in sources.items():
            for name, rank in tensors:
                size = _PROBE**rank
                names[position] = name, size
                elements = torch.arange(position, position + size).reshape([_PROBE] * rank)
                probe.add_tensor(target, name, pattern, elements)
                position += size
        made = probe.convert(target, model=model, config=model.config)
        made = made[0] if isinstance(made, tuple) else made  # 5.0 returns errors, too
    except Exception as error:  # noqa: BLE001  # it wants the real shapes, or the real dtype: transformers' business
        log.debug("%s: %r does more than stacking and joining: %s", target, converter, error)
        return []
    return [_order(result[0] if isinstance(result, list) else result, names) for result in made.values()]


def _order(result: torch.Tensor, names: Mapping[int, tuple[str, int]]) -> list[str]:
    """The tensors whose elements a result has, whole and one behind the other; nothing where it has them otherwise."""
    elements: list[int] = result.flatten().tolist()
    order: list[str] = []
    at = 0
    while at < len(elements):
        name, size = names.get(elements[at], ("", 1))
        if not name or elements[at : at + size] != list(range(elements[at], elements[at] + size)):
            return []
        order.append(name)
        at += size
    return order
