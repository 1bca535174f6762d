"""Encode groups for a load request: tensors that the loader should place one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ._references.index import MAX_JSON_BYTES, weight_map
from .errors import InvalidReferenceError, WeightdError
from .types import TensorKey

if TYPE_CHECKING:
    from ._proto.v1 import checkpoint_pb2
    from ._references.files import OpenedReference

_MAX_HEADER_BYTES = 100_000_000
"""safetensors' own bound."""


class StoredTensor(NamedTuple):
    """A tensor as a file's header has it; `length` is bytes."""

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


Members = Sequence[TensorKey | tuple[str, str] | str]
"""Tensors of one group, in the order in which they should lie: names, or (component, name)."""

Groups = Iterable[Members] | Callable[[Sequence[StoredTensor]], Iterable[Members]]
"""Groups, or what makes them of the checkpoint's tensors; it is only called where something has to be loaded."""


def add_groups(request: checkpoint_pb2.LoadRequest, groups: Groups, opened: OpenedReference) -> None:
    """Put groups into a request for the files that are opened; nothing where one of them is no safetensors file.

    The daemon says what is wrong with such a file, or with an index. Of a tensor that several files have, the one
    counts whose file the index names. Errors: InvalidReferenceError (the checkpoint has no such tensor).
    """
    try:
        found = _tensors(opened)
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError, WeightdError):
        return
    numbers = {key: number for key, (number, _) in found.items()}
    stored = [tensor for _, tensor in found.values()]
    for group in groups(stored) if callable(groups) else groups:
        members = [TensorKey("", member) if isinstance(member, str) else TensorKey(*member) for member in group]
        if unknown := [member for member in members if member not in numbers]:
            raise InvalidReferenceError(f"groups: tensor {unknown[0].name[:200]!r} is not in the checkpoint")
        request.group_sizes.append(len(members))
        request.group_tensors.extend(numbers[member] for member in members)


def _tensors(opened: OpenedReference) -> dict[TensorKey, tuple[int, StoredTensor]]:
    """The checkpoint's tensors, and the number of each among those of all headers."""
    files = list(zip(opened.sources, opened.fds, strict=True))
    indexes = {
        source.component: weight_map(source.file, os.pread(descriptor, MAX_JSON_BYTES + 1, 0))
        for source, descriptor in files
        if source.is_index
    }
    found: dict[TensorKey, tuple[int, StoredTensor]] = {}
    number = 0
    for source, descriptor in files:
        for tensor in () if source.is_index else _header(descriptor, source.component):
            key = TensorKey(tensor.component, tensor.name)
            if key not in found or indexes.get(source.component, {}).get(tensor.name) == source.file:
                found[key] = number, tensor
            number += 1
    return found


def _header(descriptor: int, component: str) -> list[StoredTensor]:
    """A file's tensors in the order in which the daemon counts them. Errors: ValueError and others, as json's."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError("not a safetensors file")
    header = json.loads(os.pread(descriptor, length, 8))
    header.pop("__metadata__", None)
    rows = [(*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]
    rows.sort(key=lambda row: (row[0], row[1]))
    return [StoredTensor(component, name, dtype, shape, end - begin) for begin, end, name, dtype, shape in rows]
