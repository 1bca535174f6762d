"""What the store tells of: checkpoints that come and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, Content


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checkpoint is about to become resident; `manifest` is what whoever seals has made of its manifest."""

    checkpoint: Checkpoint
    content: Content
    manifest: object


@dataclass(frozen=True, slots=True)
class Evicted:
    """A checkpoint is no longer resident; `reason` is "capacity", "removed" or "lost"."""

    checkpoint: Checkpoint
    reason: str


Event = Sealed | Evicted
