"""Limits how often users may do something that costs all others time: a token bucket for each user."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_USERS = 1024
"""From so many on, users whose bucket is full again are forgotten."""


class UserRateLimit:
    """Token bucket per user: `burst` at once, and `per_second` in the long run. `now` returns seconds."""

    def __init__(self, now: Callable[[], float], *, burst: int, per_second: float) -> None:
        self._now = now
        self._ahead = burst / per_second
        self._step = 1 / per_second
        self._used: dict[int | None, float] = {}
        """When the bucket of a user is full again."""

    def delay(self, uid: int | None, most: float = float("inf")) -> float | None:
        """Enter one more of a user. Returns after how many seconds its turn comes.

        None where that is more than `most`: then it is not entered.
        """
        now = self._now()
        full = max(self._used.get(uid, now), now) + self._step
        delay = max(0.0, full - now - self._ahead)
        if delay > most:
            return None
        if uid not in self._used and len(self._used) >= _MOST_USERS:
            self._used = {user: until for user, until in self._used.items() if until > now}
        self._used[uid] = full
        return delay
