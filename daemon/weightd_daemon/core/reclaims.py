"""Memory on its way back to the system: what the books queue, and somebody else carries out and reports done."""

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
