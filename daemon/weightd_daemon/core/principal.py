"""The identity behind a request to the daemon."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """On whose behalf the core acts: a uid (None: no identity), whether it is an admin, and its sharing domain."""

    uid: int | None
    admin: bool
    domain: str
