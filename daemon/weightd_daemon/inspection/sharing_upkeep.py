"""Keeps the index of who shares with whom up with what the daemon holds: in turns, and at once for those who ask."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from weightd_daemon.turns import LoopTurn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from weightd_daemon.core.sharing import SharingIndex


class SharingUpkeep:
    """Works off what the index has noted, also when nobody asks: a note keeps the records of an evicted checkpoint."""

    def __init__(self, index: SharingIndex) -> None:
        self._index = index
        self._noted = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Keep it up from now on; the loop runs."""
        self._index.on_note = self._noted.set
        self._noted.set()
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def caught_up(self) -> None:
        """Wait until the index knows of everything that has happened; it is right until the caller pauses."""
        async with self._lock:
            await self._catch_up()

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncIterator[SharingIndex]:
        """Around steps that read the index: it is right at the beginning, and stays as it is though the loop goes on.

        All others who ask wait meanwhile, so be quick. A device that is lost goes nevertheless.
        """
        async with self._lock:
            await self._catch_up()
            yield self._index

    async def _catch_up(self) -> None:
        turn = LoopTurn()
        while self._index.go_on():
            if turn.is_over:
                await turn.next()

    async def _serve(self) -> None:
        while True:
            await self._noted.wait()
            self._noted.clear()
            await self.caught_up()
