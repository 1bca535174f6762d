"""The identity behind a request to the daemon."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a uid (None for a peer without an identity), whether it is an admin, and its sharing domain."""

    uid: int | None
    admin: bool
    domain: str
