"""Loader processes: started on demand, and kept for a while after their work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .loader_process import LoadProcess, LoadProcessDiedError

if TYPE_CHECKING:
    from collections.abc import Sequence

IDLE_SECONDS = 10.0
"""How long a loader waits for the next job: a burst of loads pays for one start."""

LEAVE_SECONDS = 5.0
"""How long a loader may take to close its files before it is replaced, and to be gone once it was killed."""


class LoadProcessPool:
    """The daemon's pool of processes for loads, lent one job at a time.

    `inherited` are descriptors that each of them keeps open.
    """

    def __init__(self, argv: Sequence[str], inherited: Sequence[int]) -> None:
        self._argv = argv
        self._inherited = inherited
        self._idle: dict[LoadProcess, asyncio.TimerHandle] = {}
        """Each with the timer that ends it, unless it is lent again before."""
        self._alive: set[LoadProcess] = set()

    async def acquire(self) -> LoadProcess:
        """A loader without a job: one that is idle, else a new one. Errors: those of `LoadProcess.spawn`."""
        while self._idle:
            loader, retirement = self._idle.popitem()
            retirement.cancel()
            if not loader.exited.done():
                return loader
        loader = await LoadProcess.spawn(self._argv, self._inherited)
        self._alive.add(loader)
        loader.exited.add_done_callback(lambda _: self._alive.discard(loader))
        return loader

    async def put_back(self, loader: LoadProcess) -> bool:
        """Wait until a loader has closed its files, and keep it for the next job. Returns False if it is unfit."""
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                while not (message := await loader.receive()).HasField("idle"):
                    if message.HasField("failed"):  # while it closed what is done with
                        return False
        except (LoadProcessDiedError, TimeoutError):
            return False
        loader.forget_segments()
        self._idle[loader] = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._retire, loader)
        return True

    async def dismiss_idle(self) -> bool:
        """End the loaders that wait for a job, for what they hold of a device. Returns whether there were any."""
        idle, self._idle = self._idle, {}
        for loader, retirement in idle.items():
            retirement.cancel()
            loader.kill()
        waiting = [loader.exited for loader in idle]
        if waiting:
            await asyncio.wait(waiting, timeout=LEAVE_SECONDS)
        return bool(waiting)

    async def close(self) -> None:
        """Kill all loaders and wait until they are gone; one that cannot die is left to the kernel."""
        for loader in self._alive:
            loader.kill()
        waiting = [loader.exited for loader in self._alive]
        if waiting:
            await asyncio.wait(waiting, timeout=LEAVE_SECONDS)
        for retirement in self._idle.values():
            retirement.cancel()

    def _retire(self, loader: LoadProcess) -> None:
        del self._idle[loader]
        loader.hang_up()
