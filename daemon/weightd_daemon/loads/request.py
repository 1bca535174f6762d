"""The request and the result of a load: plain values, passed between the API and the loads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightd_daemon.core.checkpoint import Content

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightd.types import SourceFile
    from weightd_daemon.core.lease import LeasePeer
    from weightd_daemon.core.manifest import ContentFile, ContentTensor
    from weightd_daemon.core.principal import Principal


class LoadGroups(NamedTuple):
    """Groups of tensors in a load's request: each one's size, and all tensors. Packed, as a load may wait long."""

    sizes: Sequence[int]
    tensors: Sequence[int]


NO_GROUPS = LoadGroups((), ())


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One client's request for a load. `name_is_default` drops the name, without an error, if another user owns it;
    `reference` is for people.
    """

    who: Principal
    peer: LeasePeer
    sources: tuple[SourceFile, ...]
    device: str
    name: str = ""
    name_is_default: bool = False
    pin: bool = False
    detached: bool = False
    verify: bool = False
    reference: str = ""
    groups: LoadGroups = NO_GROUPS
    """Tensors that should lie one behind the other, by their numbers in all of the files' headers; not checked yet."""


class ComposedTensors(NamedTuple):
    """What a checkpoint that is composed is to be: its files and tensors, and the name of each tensor in its source.

    `sources` are indices into those of the request; what they are for a tensor without bytes has no meaning.
    """

    files: Sequence[ContentFile]
    entries: Sequence[ContentTensor]
    sources: Sequence[int]
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class LoadComposition:
    """The resident tensors that a load consists of, in place of files.

    `sources` are content digests and components. `read` decodes and checks the rest, on a thread, once it is the load's
    turn: a list of 100,000 tensors waits as it came. Errors of `read`: InvalidReferenceError.
    """

    sources: tuple[tuple[str, str], ...]
    read: Callable[[], ComposedTensors]


@dataclass(slots=True)
class LoadStatus:
    """Progress of a load; `phase` is "opening", "hashing" or "copying"."""

    phase: str = "opening"
    done: int = 0
    total: int = 0


class LoadOutcome(NamedTuple):
    """Result of a load, in bytes and seconds, and what was evicted for it.

    For its figures see LoadEnded in core/events.py.
    """

    content_digest: str
    tensors: int
    total_bytes: int
    unique_bytes: int
    read_bytes: int
    seconds: float
    groups: int = 0
    """How many of the request's groups were fit to be heeded."""
    ignored_groups: tuple[str, ...] = ()
    """Why others were not."""
    evicted: tuple[str, ...] = ()
    evicted_others: int = 0


class LoadManifestDraft(Protocol):
    """Interface of the manifest of a load that is not sealed yet.

    persistence/descriptor_store.py implements it.
    """

    @property
    def size(self) -> int:
        """Bytes of the manifest."""

    def discard(self) -> None:
        """Give it up; nothing happens where the seal has taken it."""


Prepare = Callable[[Content, str], Awaitable[LoadManifestDraft]]
"""Makes the manifest of a content on the device of that UUID, and has kept what is to outlive the daemon."""
