"""The views that a manifest lists: fused tensors of an attachment."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ._manifest import odd_view
from .layouts import adjacent
from .types import DTYPE_BITS, DerivedView, TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ._manifest import ListedView


class View(NamedTuple):
    """A view: its bytes as those of one tensor, and in which mapping of the segment they are nobody else's."""

    view: DerivedView
    info: TensorInfo
    copy: int


def views(
    every: Iterable[ListedView],
    rows: Sequence[TensorInfo],
    attached: Mapping[TensorKey, TensorInfo],
    copies: Mapping[TensorKey, int],
) -> dict[TensorKey, View]:
    """The views whose members are all attached, by name. `rows` are all of the manifest's tensors.

    Not those of which some members are first at their address and others not: no mapping of the segment is theirs
    alone. Errors: ServerError (a view that its members cannot be).
    """
    found: dict[TensorKey, View] = {}
    names = {TensorKey(info.component, info.name) for info in rows}
    for component, name, numbers, shape in every:
        if not numbers or max(numbers) >= len(rows):
            raise odd_view(name, f"has a member outside the {len(rows)} tensors")
        members = [rows[number] for number in numbers]
        first = members[0]
        length = sum(info.length for info in members)
        if any((info.component, info.dtype) != (component, first.dtype) for info in members):
            raise odd_view(name, "has members of several components or dtypes")
        if not adjacent((info.segment, info.offset, info.length) for info in members):
            raise odd_view(name, "has members that do not lie one behind the other")
        if min(shape, default=0) < 0 or prod(shape) * DTYPE_BITS.get(first.dtype, 0) != length * 8:
            raise odd_view(name, f"has {length} bytes, which are no {first.dtype} of shape {list(shape)}")
        key = TensorKey(component, name)
        if key in names:
            raise odd_view(name, "has a name that is taken")
        names.add(key)
        keys = [TensorKey(component, info.name) for info in members]
        mappings = {copies.get(member, 0) for member in keys}
        if len(mappings) == 1 and all(member in attached for member in keys):
            info = TensorInfo(
                component, name, first.dtype, shape, first.segment, first.offset, length, b"", 0, first.file
            )
            view = DerivedView(component, name, tuple(member.name for member in keys), shape)
            found[key] = View(view, info, mappings.pop())
    return found
