"""Events of the core and the daemon. Manifests, event readers and metrics follow them.

What is of checkpoints and leases comes out of the core itself; the rest is told by whoever does these things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .lease import LeaseBegun, LeaseEnded

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, Content
    from .lease import LeasePeer


@dataclass(frozen=True, slots=True)
class CheckpointSealed:
    """Core event: a checkpoint is about to become resident. `manifest` is what the sealing load has made of it.

    `by` asked for the load, under a name that may be empty.
    """

    checkpoint: Checkpoint
    content: Content
    manifest: object
    load: int = 0
    by: LeasePeer | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointEvicted:
    """Core event: a checkpoint is no longer resident; `reason` is "capacity", "removed", "lost" or "drained".

    `load` is the number of the load that needed its room; 0 where none did. `by` asked for that load,
    and is not said to another sharing domain, or removed the checkpoint.
    """

    checkpoint: Checkpoint
    reason: str
    load: int = 0
    by: LeasePeer | None = None


@dataclass(frozen=True, slots=True)
class LoadBegun:
    """Core event: a load was requested; `name` may be empty."""

    load: int
    peer: LeasePeer
    device: str
    domain: str
    name: str


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """Core event: a load is over. `reason` is "OK", "CANCELLED" or its error's; figures only if it succeeded."""

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
    """Core event: a load was answered from resident content. `name` is the name that it set; may be empty."""

    checkpoint: Checkpoint
    peer: LeasePeer
    name: str


@dataclass(frozen=True, slots=True)
class CatalogNameChanged:
    """Core event: a name points to a content, or to none if it was dropped. `previous` is empty if it was new."""

    domain: str
    name: str
    content_digest: str
    previous: str
    by: LeasePeer | None


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """Core event: a device has lost its memory with all checkpoints on it, each of which has its own event."""

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
    """Core event: the daemon is "draining" or "drained", or "undrained" again."""

    state: str


Event = (
    CheckpointSealed
    | CheckpointEvicted
    | LeaseBegun
    | LeaseEnded
    | LoadBegun
    | LoadEnded
    | LoadAnswered
    | CatalogNameChanged
    | DeviceLost
    | DeviceAbsent
    | DeviceBack
    | DrainChanged
)
