"""Modules of torch on attached tensors: assigning them, what must be private, and a report of what a module shares."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from weightd.errors import InvalidReferenceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from weightd.attachment import Attachment

    Explain = Callable[[str, torch.nn.Parameter], str]
    """Why a parameter of that name is not on shared memory."""

log = logging.getLogger(__name__)

_SHOWN = 5
"""Copies that a line of the log names."""


class CopiedTensor(NamedTuple):
    """A tensor of a module that is not on shared memory: its name there, its bytes, and why."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class SharingReport:
    """What a module has on shared memory and what it had to copy. Sizes are bytes; each storage counts once.

    `buffers` are private by rule, since frameworks write to them; they are in no other figure.
    """

    shared_bytes: int
    copied: tuple[CopiedTensor, ...] = ()
    buffers: tuple[CopiedTensor, ...] = field(default=(), repr=False)

    @property
    def copied_bytes(self) -> int:
        """Bytes of parameters that are private."""
        return sum(tensor.nbytes for tensor in self.copied)

    @property
    def shared_ratio(self) -> float:
        """Shared bytes of all bytes of parameters; 1.0 for a module without parameters."""
        total = self.shared_bytes + self.copied_bytes
        return self.shared_bytes / total if total else 1.0

    def __str__(self) -> str:
        line = (
            f"{self.shared_ratio:.2f} of the parameters shared: {self.shared_bytes} bytes, {self.copied_bytes} copied"
        )
        named = "; ".join(f"{tensor.name} ({tensor.reason})" for tensor in self.copied[:_SHOWN])
        more = len(self.copied) - _SHOWN
        return line + (f": {named}" if named else "") + (f"; and {more} more" if more > 0 else "")


def load_into(
    module: torch.nn.Module, attachment: Attachment, *, component: str | None = None, strict: bool = True
) -> Any:
    """Assign attached tensors to parameters, and private copies to buffers; see `Attachment.load_into`."""
    return assign(module, attachment.state_dict(component), attachment, strict=strict)


def assign(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], attachment: Attachment, *, strict: bool
) -> Any:
    """The same with tensors of an attachment by the module's own names."""
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


def freeze(module: torch.nn.Module, attachment: Attachment) -> None:
    """Turn gradients off for what is shared: an optimiser's step writes in place."""
    for parameter in module.parameters():
        if holds(attachment, parameter):
            parameter.requires_grad_(False)


def make_buffers_private(module: torch.nn.Module, attachment: Attachment) -> None:
    """Replace buffers on shared memory by copies: frameworks write to buffers in place."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():  # there is no public way to set one in place
            if buffer is not None and holds(attachment, buffer):
                owner._buffers[name] = buffer.clone()


def make_private(module: torch.nn.Module) -> None:
    """Give a module memory of its own: every parameter and buffer becomes a copy, which may be written to.

    Tied parameters stay tied. It takes the module's bytes once more, and ends what its report said.
    """
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.clone()
    for one in module.modules():
        _reports.pop(one, None)


def refuse_while_shared(cls: Any, method: str, concerned: Callable[..., Iterable[torch.nn.Module]]) -> None:
    """Let a method that writes into weights refuse while they are shared.

    They are those of the modules that `concerned`, which is called as the method is, names. On the class: what an
    instance keeps would be pickled and copied with it.
    """
    original = getattr(cls, method)

    @functools.wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module in concerned(self, *args, **kwargs):
            if is_shared(module):
                raise InvalidReferenceError(
                    f"{method} writes into weights, and those of {type(module).__name__} are shared with other "
                    "processes: call make_private on that model first"
                )
        return original(self, *args, **kwargs)

    setattr(cls, method, guarded)


def loaded_in_place(
    module: torch.nn.Module, state_dict: object = None, strict: bool = True, assign: bool = False
) -> list[torch.nn.Module]:
    """What `Module.load_state_dict` writes to, called with these arguments."""
    return [] if assign else [module]


def holds(attachment: Attachment, tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in memory that is attached, all of them."""
    storage = tensor.untyped_storage()
    return bool(storage.nbytes()) and attachment.holds(storage.data_ptr(), storage.nbytes())


def examine(module: torch.nn.Module, attachment: Attachment, explain: Explain) -> SharingReport:
    """Look where each parameter and buffer of a module lies."""
    shared, copied, seen = 0, [], set()
    for name, parameter in module.named_parameters():
        storage = parameter.untyped_storage()
        if storage.data_ptr() in seen or not storage.nbytes():
            continue
        seen.add(storage.data_ptr())
        if holds(attachment, parameter):
            shared += parameter.nbytes
        else:
            copied.append(CopiedTensor(name, parameter.nbytes, explain(name, parameter)))
    buffers = tuple(
        CopiedTensor(name, buffer.nbytes, "a buffer, which frameworks write to")
        for name, buffer in module.named_buffers()
    )
    return SharingReport(shared, tuple(copied), buffers)


_reports: WeakKeyDictionary[torch.nn.Module, SharingReport] = WeakKeyDictionary()


def keep_report(module: torch.nn.Module, found: SharingReport) -> None:
    """Remember the report of a module, and log it: as a warning where something had to be copied."""
    _reports[module] = found
    log.log(logging.WARNING if found.copied else logging.INFO, "%s: %s", type(module).__name__, found)


def is_shared(module: torch.nn.Module) -> bool:
    """Whether an integration has loaded a module, and it was not made private since."""
    return module in _reports


def report(module: torch.nn.Module) -> SharingReport:
    """What a module that an integration has loaded shares. Errors: InvalidReferenceError (it came from elsewhere)."""
    found = _reports.get(module)
    if found is None:
        raise InvalidReferenceError(f"{type(module).__name__} was not loaded through weightd, or is private now")
    return found


def _tied(module: torch.nn.Module) -> Iterator[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return (group for group in names.values() if len(group) > 1)


def _set_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, parameter)


def stored_dtypes(attachment: Attachment, component: str) -> Mapping[str, int]:
    """Bytes of each floating dtype that a component stores, by safetensors' name, most bytes first."""
    sizes: dict[str, int] = {}
    for info in attachment.tensors.values():
        if info.component == component and info.dtype.startswith(("F", "BF")):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.length
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
