"""Memory that is being released: requests that the core queues, and that the reclaimer executes and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arena import Extent


@dataclass(frozen=True, slots=True)
class Punch:
    """Give the pages of a free extent back to the system."""

    domain: str
    extent: Extent
    losses: int = field(default=0, compare=False)
    """How often the device had lost its memory when this was queued."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give a whole segment back to the system."""

    segment: int
    size: int
    losses: int = field(default=0, compare=False)
    """As in Punch."""


Reclaim = Punch | Release
