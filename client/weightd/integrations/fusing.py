"""Return views instead of copies if a framework stacks or joins attached tensors that lie in a row.

Frameworks make one parameter of several stored tensors by `torch.stack` and `torch.cat`. In a `TorchFusionMode` these
return a view of the store wherever the result's elements lie there at regular distances, in the result's order.
Values are what torch's own functions return, so no table of names is needed, and no name is changed: only how a model
is placed decides what is shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from weightd._tensors import strided
from weightd.types import ALIGNMENT

if TYPE_CHECKING:
    from weightd.attachment import Attachment

_Geometry = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape, and strides in elements."""

_Place = Callable[[Sequence[torch.Tensor], int], _Geometry | None]
"""The geometry of what a function makes of tensors, along a dimension; None where they do not lie so."""

_PARTS = "_weightd_parts"
"""An attribute of results, for whatever is made of them in turn."""


class _Part(NamedTuple):
    """An attached tensor: where its bytes are."""

    address: int
    length: int


class TorchFusionMode(TorchFunctionMode):
    """Torch function mode: torch.stack and torch.cat of attached tensors return views where they can.

    `advice` is what to do where parts do not lie in a row, for reasons of private parameters. Writes to such a view
    are writes to the store's memory, as those to any attached tensor (docs/library.md#writing).
    """

    def __init__(self, attachment: Attachment, advice: str = "") -> None:
        super().__init__()
        self._attachment = attachment
        self._advice = advice
        self._made: dict[int, tuple[_Part, ...]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called instead of every function of torch that this thread calls."""
        kwargs = kwargs or {}
        place = _FUNCTIONS.get(func)
        if place is None or not args or kwargs.keys() - {"dim"} or not _alike(args[0]):
            return func(*args, **kwargs)
        tensors: Sequence[torch.Tensor] = args[0]
        made = self._view(place, tensors, args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if made is None:
            made = func(*args, **kwargs)
        if all(parts := [self._parts(tensor) for tensor in tensors]):
            every = tuple(part for some in parts for part in some)
            setattr(made, _PARTS, every)
            if len(every) > 1:
                self._made[made.data_ptr()] = every
        return made

    def finish(self, module: torch.nn.Module) -> None:
        """Give a module's parameters that lie in strides private memory: kernels expect theirs in one piece."""
        for parameter in module.parameters():
            if not parameter.is_contiguous() and self._attachment.holds(parameter.data_ptr(), 1):
                parts = self._made.get(parameter.data_ptr())
                parameter.data = parameter.data.contiguous()
                if parts is not None:
                    self._made[parameter.data_ptr()] = parts

    def reason(self, tensor: torch.Tensor) -> str:
        """Why a tensor that was made of attached ones is private; empty for one that was not."""
        parts = self._made.get(tensor.data_ptr(), ())
        if not parts:
            return ""
        if odd := [part.length for part in parts[:-1] if part.length % ALIGNMENT]:
            return (
                f"it is made of {len(parts)} stored tensors, of which one has {odd[0]} bytes, no multiple of "
                f"{ALIGNMENT}, so nothing lies right behind it"
            )
        order = sorted(parts)
        runs = 1 + sum(one.address + one.length != other.address for one, other in itertools.pairwise(order))
        where = "lie in another order" if runs == 1 else f"lie in {runs} places"
        why = self._advice or "some are shared with other tensors, or memory came in pieces"
        return f"the {len(parts)} stored tensors that it is made of {where}: {why}"

    def _parts(self, tensor: torch.Tensor) -> tuple[_Part, ...]:
        """The attached tensors that this one is, or was made of; none where there is anything else in it."""
        known: tuple[_Part, ...] | None = getattr(tensor, _PARTS, None)
        if known is not None:
            return known
        if tensor.is_contiguous() and tensor.nbytes and self._attachment.holds(tensor.data_ptr(), tensor.nbytes):
            return (_Part(tensor.data_ptr(), tensor.nbytes),)
        return ()

    def _view(self, place: _Place, tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor | None:
        """What the function would return, as a view; None where it can be none."""
        found = place(tensors, dim)
        if found is None:
            return None
        shape, strides = found
        first = tensors[0]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        memory = self._attachment.span(first.data_ptr(), extent * first.element_size())
        if memory is None:
            return None
        return strided(memory, first.dtype, shape, strides, self._attachment.torch_device)


def _alike(tensors: Any) -> bool:
    """Whether these are plain tensors of one dtype, with elements, that could lie side by side."""
    return (
        isinstance(tensors, list | tuple)
        and len(tensors) > 0
        and all(type(one) is torch.Tensor and one.layout is torch.strided for one in tensors)
        and all(one.numel() and one.dtype == tensors[0].dtype and one.dim() == tensors[0].dim() for one in tensors)
        and not any(one.requires_grad or one.is_conj() or one.is_neg() or one.is_meta for one in tensors)
    )


def _stacked(tensors: Sequence[torch.Tensor], dim: int) -> _Geometry | None:
    """The geometry of `torch.stack`, from the first tensor on; None where they do not lie at one distance."""
    first = tensors[0]
    dim = dim + first.dim() + 1 if dim < 0 else dim
    if not 0 <= dim <= first.dim() or any(one.shape != first.shape or not _same(one, first) for one in tensors):
        return None
    step = _step(tensors, first.nbytes)
    if step is None:
        return None
    shape, strides = tuple(first.shape), first.stride()
    return (*shape[:dim], len(tensors), *shape[dim:]), (*strides[:dim], step, *strides[dim:])


def _joined(tensors: Sequence[torch.Tensor], dim: int) -> _Geometry | None:
    """The geometry of `torch.cat`, from the first tensor on; None where they do not lie one behind the other."""
    first = tensors[0]
    dim = dim + first.dim() if dim < 0 else dim
    if not 0 <= dim < first.dim() or not all(_same(one, first, but=dim) for one in tensors):
        return None
    shape, strides = list(first.shape), list(first.stride())
    shape[dim] = sum(one.shape[dim] for one in tensors)
    long = [one.stride(dim) for one in tensors if one.shape[dim] > 1]
    step = long[0] if long else _step(tensors, first.nbytes)
    if step is None or any(stride != step for stride in long):
        return None
    strides[dim] = step
    position = first.data_ptr()
    for one in tensors:
        if one.data_ptr() != position:
            return None
        position += one.shape[dim] * step * one.element_size()
    return tuple(shape), tuple(strides)


_FUNCTIONS: dict[Callable[..., Any], _Place] = {
    torch.stack: _stacked, torch.cat: _joined, torch.concat: _joined, torch.concatenate: _joined
}  # fmt: skip


def _same(one: torch.Tensor, other: torch.Tensor, but: int | None = None) -> bool:
    """Whether two tensors have equal sizes, and equal strides where they matter, in all dimensions `but` one."""
    return all(
        mine == theirs and (mine == 1 or stride == there)
        for at, (mine, theirs, stride, there) in enumerate(
            zip(one.shape, other.shape, one.stride(), other.stride(), strict=True)
        )
        if at != but
    )


def _step(tensors: Sequence[torch.Tensor], usual: int) -> int | None:
    """The one distance, in elements, at which tensors lie; `usual` bytes for one alone. None where there is none."""
    places = [one.data_ptr() for one in tensors]
    step = places[1] - places[0] if len(places) > 1 else usual
    regular = all(place == places[0] + at * step for at, place in enumerate(places))
    return step // tensors[0].element_size() if regular and step > 0 and not step % tensors[0].element_size() else None
