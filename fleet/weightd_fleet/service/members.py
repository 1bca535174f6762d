"""Who belongs to a fleet, which its engine knows."""

from __future__ import annotations

from typing import NamedTuple


class FleetMember(NamedTuple):
    """A node that the engine counts as alive: its id, what people call it, and its host name or IP address."""

    node: str
    name: str
    host: str
