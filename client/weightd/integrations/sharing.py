"""Report which tensors of a module lie in shared memory.

The report is made anew for each call: code may cast, move, replace and write to parameters after the load.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from weightd import _assign
from weightd._mapping.ranges import MappedExtents, MappedRange, written
from weightd._sizes import size
from weightd.errors import InvalidReferenceError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

    from weightd.attachment import Attachment

    Explain = Callable[[str, torch.nn.Parameter], str]
    """Why a parameter of that name is not on shared memory."""

log = logging.getLogger(__name__)

_SHOWN = 5
"""Names that a line shows."""


class CopiedTensor(NamedTuple):
    """A tensor of a framework's module that is not on shared memory: its name there, its private bytes, and why."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class SharingReport:
    """Which memory of a framework's module is shared and which is private. Sizes are bytes; each storage counts once.

    `buffers` are private by rule, since frameworks write to them; they are in no other figure. `missing` names the
    parameters and buffers that the checkpoint did not have. `writes_seen` is false where the kernel does not tell
    which pages a write has made private; those then count as shared.
    """

    shared_bytes: int
    copied: tuple[CopiedTensor, ...] = ()
    buffers: tuple[CopiedTensor, ...] = field(default=(), repr=False)
    missing: tuple[str, ...] = ()
    writes_seen: bool = True

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
        permille = int(self.shared_ratio * 1000)  # never 100 % where a byte is private
        percent = f"{permille // 10}" if permille % 10 == 0 else f"{permille / 10:.1f}"
        shared, copied = (size(count) for count in (self.shared_bytes, self.copied_bytes))
        line = f"{percent} % of the parameters shared: {shared}, {copied} private"
        if self.copied:
            line += ": " + _listed([f"{tensor.name} ({tensor.reason})" for tensor in self.copied])
        made = set(self.missing).difference(tensor.name for tensor in self.copied)
        if made:
            line += "; the checkpoint lacks " + _listed(sorted(made))
        return line if self.writes_seen else f"{line}; this system does not tell what has been written to since"


def remember(
    module: torch.nn.Module,
    attachments: Attachment | Iterable[Attachment],
    explain: Explain,
    missing: Collection[str] = (),
    *,
    quiet: bool = False,
) -> None:
    """Let `report` know a module that has been loaded, and log what it says: a warning where something is private.

    `explain` is asked now why parameters are private; `missing` names those, and buffers, that no file had. `quiet`
    logs nothing.
    """
    global _mapped
    every = attachments if isinstance(attachments, Iterable) else (attachments,)
    _mapped = [*_alive(), *itertools.chain.from_iterable(one.ranges() for one in every)]
    extents = MappedExtents(_mapped)
    was = {name: _Was(one.dtype, one.device, one.shape) for name, one in module.named_parameters()}
    reasons = {name: explain(name, one) for name, one in module.named_parameters() if not _holds(extents, one)}
    _origins[module] = _Origin(was, reasons, frozenset(missing))
    if quiet:
        return
    found = report(module)
    level = logging.WARNING if found.copied or found.missing else logging.INFO
    log.log(level, "%s: %s", type(module).__name__, found)


def note_left(module: torch.nn.Module, why: str) -> None:
    """Let `report` say why a module was left to its framework."""
    _left[module] = why


def make_private(module: torch.nn.Module) -> None:
    """Give a module memory of its own: every parameter and buffer becomes a copy, which may be written to.

    Tied parameters stay tied, and those that have lost their gradient because they were shared have it again. It takes
    the module's bytes once more, and ends its report.
    """
    _assign.make_private(module)
    forget(module)


def forget(module: torch.nn.Module) -> None:
    """End what is known of a module and of all that is in it."""
    for one in module.modules():
        _origins.pop(one, None)


def is_loaded(module: torch.nn.Module) -> bool:
    """Whether an integration has loaded a module, or something in it, and it was not made private since."""
    return any(one in _origins for one in module.modules())


def is_shared(module: torch.nn.Module) -> bool:
    """Whether any parameter of a module lies on shared memory now."""
    extents = MappedExtents(_alive())
    return any(_holds(extents, parameter) for parameter in module.parameters())


def shared_modules() -> list[torch.nn.Module]:
    """Modules that integrations have loaded, and that are on shared memory now."""
    return [module for module in list(_origins) if is_shared(module)]


def report(module: torch.nn.Module) -> SharingReport:
    """What of a module is shared now: of one that an integration has loaded, or that contains or is part of such.

    Errors: InvalidReferenceError (nothing of it came from an integration, or it is private now).
    """
    if not is_loaded(module) and not is_shared(module):
        why = _left.get(module)
        state = f"shares no memory: {why}" if why else "was not loaded through weightd, or is private now"
        raise InvalidReferenceError(f"{type(module).__name__} {state}")
    return look(module)


def look(module: torch.nn.Module) -> SharingReport:
    """The same for any module."""
    origins = {prefix: _origins[one] for prefix, one in module.named_modules() if one in _origins}
    extents = MappedExtents(_alive())
    shared, copied, seen, writes_seen = 0, [], set(), True
    for name, parameter in module.named_parameters():
        place = _place(parameter)
        if place is not None and (place in seen or not place[1]):
            continue
        if place is not None and not parameter.is_meta:
            seen.add(place)
        if not _inside(extents, place):
            copied.append(CopiedTensor(name, parameter.nbytes, _reason(origins, name, parameter)))
            continue
        private = written(*place) if place is not None and parameter.device.type == "cpu" else 0
        writes_seen = writes_seen and private is not None
        own = min(private or 0, parameter.nbytes)
        shared += parameter.nbytes - own
        if own:
            copied.append(CopiedTensor(name, own, "written to, or beside it in a page of memory"))
    missing = {f"{prefix}.{name}" if prefix else name for prefix, one in origins.items() for name in one.missing}
    buffers = tuple(
        CopiedTensor(
            name,
            buffer.nbytes,
            "not in the checkpoint: the framework has made it"
            if name in missing
            else "a buffer, which frameworks write to",
        )
        for name, buffer in module.named_buffers()
    )
    return SharingReport(shared, tuple(copied), buffers, tuple(sorted(missing)), writes_seen)


# -- inside ------------------------------------------------------------------------------------------------------------


class _Was(NamedTuple):
    """A parameter when its module was loaded."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size


class _Origin(NamedTuple):
    """What is known of a module since it was loaded."""

    was: dict[str, _Was]
    reasons: dict[str, str]
    missing: frozenset[str]


_origins: WeakKeyDictionary[torch.nn.Module, _Origin] = WeakKeyDictionary()
_left: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
"""Why modules were left to their framework."""
_mapped: list[MappedRange] = []
"""Where memory lay that was attached for any of them."""


def _alive() -> list[MappedRange]:
    return [one for one in _mapped if one.owner() is not None]


def _place(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Address and bytes of a tensor's storage; None where it has none of its own, as subclasses of Tensor may."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return None


def _holds(extents: MappedExtents, tensor: torch.Tensor) -> bool:
    return _inside(extents, _place(tensor))


def _inside(extents: MappedExtents, place: tuple[int, int] | None) -> bool:
    return place is not None and place[1] > 0 and extents.hold(*place)


def _reason(origins: dict[str, _Origin], name: str, parameter: torch.nn.Parameter) -> str:
    """Why a parameter is private now."""
    if parameter.is_meta:
        return "on torch's meta device: it has no bytes"
    prefixes = [prefix for prefix in origins if not prefix or name.startswith(f"{prefix}.")]
    if not prefixes:
        return "it was not loaded through weightd, or is private now"
    prefix = max(prefixes, key=len)
    origin, inside = origins[prefix], name.removeprefix(f"{prefix}.") if prefix else name
    was = origin.was.get(inside)
    if was is None:
        return "added since it was loaded"
    if parameter.shape != was.shape:
        return f"replaced since it was loaded by one of shape {tuple(parameter.shape)}"
    if parameter.dtype != was.dtype:
        return f"cast to {str(parameter.dtype).removeprefix('torch.')} since it was loaded"
    if parameter.device != was.device:
        return f"moved to {parameter.device} since it was loaded"
    return origin.reasons.get(inside, "replaced since it was loaded")


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return "; ".join(names[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
