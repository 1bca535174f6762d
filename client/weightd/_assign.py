"""Put attached tensors in the place of a module's parameters: assign, tie and freeze them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class AttachedMemory(Protocol):
    """An attachment, as far as its memory is asked about."""

    def holds(self, address: int, length: int) -> bool:
        """Whether `length` bytes at an address of this process lie in memory that is attached."""


_frozen: Any = WeakTensorKeyDictionary()  # Any: it has no types
"""Parameters that `freeze` has turned gradients off for."""


def assign(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], attachment: AttachedMemory, *, strict: bool
) -> Any:
    """Assign tensors of an attachment, by the module's own names, to parameters, and private copies to buffers.

    See `Attachment.load_into`.
    """
    tied = list(_tied(module))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    state = {name: tensor.clone() if name in buffers else tensor for name, tensor in tensors.items()}
    present = set(state)
    for names in tied:  # a checkpoint often has a tied tensor under one of its names only
        given = [name for name in names if name in present]
        if given:
            state.update(dict.fromkeys(names, state[given[0]]))
    found = module.load_state_dict(state, strict=strict, assign=True)
    for names in tied:
        for name in names[1:]:
            _set_parameter(module, name, module.get_parameter(names[0]))
    freeze(module, attachment)
    return found


def freeze(module: torch.nn.Module, attachment: AttachedMemory) -> None:
    """Turn gradients off for what is shared: an optimiser's step writes in place."""
    for parameter in module.parameters():
        if parameter.requires_grad and holds(attachment, parameter):
            parameter.requires_grad_(False)
            _frozen[parameter] = True


def make_private(module: torch.nn.Module) -> None:
    """Replace all that a module has by copies, and turn gradients on again where `freeze` has turned them off.

    Tied parameters stay tied.
    """
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.clone()
    for parameter in module.parameters():
        if _frozen.pop(parameter, False):
            parameter.requires_grad_(True)


def make_buffers_private(module: torch.nn.Module, attachment: AttachedMemory) -> None:
    """Replace buffers on shared memory by copies: frameworks write to buffers in place."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():  # there is no public way to set one in place
            if buffer is not None and holds(attachment, buffer):
                owner._buffers[name] = buffer.clone()


def holds(attachment: AttachedMemory, tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in memory that is attached, all of them."""
    storage = tensor.untyped_storage()
    return bool(storage.nbytes()) and attachment.holds(storage.data_ptr(), storage.nbytes())


def _tied(module: torch.nn.Module) -> Iterator[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return (group for group in names.values() if len(group) > 1)


def _set_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, parameter)
