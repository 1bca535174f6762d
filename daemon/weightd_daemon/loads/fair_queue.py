"""The fair queue: how many loads and verifications run at a time, in total and per user; the rest wait in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Hashable


class LoadQueue:
    """Fair queue for loads: at most `most` at a time, `of_one` of one user. After a change running loads go on."""

    def __init__(self, most: int, of_one: int) -> None:
        self._most = most
        self._of_one = of_one
        self._taken: Counter[Hashable] = Counter()
        self._waiting: list[tuple[Hashable, asyncio.Future[None]]] = []

    def resize(self, most: int, of_one: int) -> None:
        """Have other numbers from now on."""
        self._most, self._of_one = most, of_one
        self._deal()

    @contextlib.asynccontextmanager
    async def turn(self, user: Hashable) -> AsyncGenerator[None, None]:
        """Wait for a turn, and have it until the block ends."""
        dealt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (user, dealt)
        self._waiting.append(place)
        self._deal()
        try:
            await dealt
            yield
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
            else:  # it was dealt, be it in the moment in which this task was cancelled
                self._taken[user] -= 1
                self._taken += Counter()  # drops those who have none
            self._deal()

    def _deal(self) -> None:
        """Give what turns there are to the first who may have them."""
        for place in list(self._waiting):
            user, dealt = place
            if self._taken.total() >= self._most:
                return
            if not dealt.done() and self._taken[user] < self._of_one:
                self._waiting.remove(place)
                self._taken[user] += 1
                dealt.set_result(None)
