"""Events of the core and the daemon. Manifests, event readers and metrics follow them.

What is of checkpoints and leases comes out of the core itself; the rest is told by whoever does these things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .lease import Attached, Detached

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, Content
    from .lease import Peer


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checkpoint is about to become resident; `manifest` is what whoever seals has made of its manifest.

    `by` asked for the load, under a name that may be empty.
    """

    checkpoint: Checkpoint
    content: Content
    manifest: object
    load: int = 0
    by: Peer | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Evicted:
    """A checkpoint is no longer resident; `reason` is "capacity", "removed", "lost" or "drained".

    `load` is the number of the load that needed its room; 0 where none did. `by` asked for that load,
    and is not said to another sharing domain, or removed the checkpoint.
    """

    checkpoint: Checkpoint
    reason: str
    load: int = 0
    by: Peer | None = None


@dataclass(frozen=True, slots=True)
class LoadBegun:
    """A load was asked for; `name` may be empty."""

    load: int
    peer: Peer
    device: str
    domain: str
    name: str


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """A load is over. `reason` is "OK", "CANCELLED" or that of its error; only one that went well has figures."""

    begun: LoadBegun
    reason: str
    message: str
    seconds: float
    content_digest: str = ""
    total_bytes: int = 0
    unique_bytes: int = 0
    read_bytes: int = 0
    evicted: tuple[str, ...] = ()
    """What went for it: of each checkpoint of its domain the first name, or the digest."""
    evicted_others: int = 0
    """How many of other domains went for it."""


@dataclass(frozen=True, slots=True)
class LoadAnswered:
    """A load was answered from memory, for its files are resident; `name` is what it has given, and may be empty."""

    checkpoint: Checkpoint
    peer: Peer
    name: str


@dataclass(frozen=True, slots=True)
class Named:
    """A name points to a content now: to none if it was dropped. `previous` is what it pointed to; empty if nothing."""

    domain: str
    name: str
    content_digest: str
    previous: str
    by: Peer | None


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """A device has lost its memory, and every checkpoint on it; those are told of one by one."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceAbsent:
    """A device cannot be served now; every checkpoint on it stays as it is."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceBack:
    """A device that was absent is served again, with every checkpoint that was kept on it."""

    device: str


@dataclass(frozen=True, slots=True)
class DrainChanged:
    """The daemon is "draining" or "drained", or "undrained" again."""

    state: str


Event = (
    Sealed
    | Evicted
    | Attached
    | Detached
    | LoadBegun
    | LoadEnded
    | LoadAnswered
    | Named
    | DeviceLost
    | DeviceAbsent
    | DeviceBack
    | DrainChanged
)
