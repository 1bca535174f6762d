"""How long the pool keeps idle loaders, and what it keeps of those that were lent again meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loads import loader_pool
from weightd_daemon.loads.loader_pool import LoadProcessPool
from weightd_daemon.loads.loader_process import LoadProcess


class _Loader:
    """A loader that has always closed its files already."""

    def __init__(self) -> None:
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False

    async def receive(self) -> wire.ToDaemon:
        return wire.ToDaemon(idle=wire.Idle())

    def forget_segments(self) -> None:
        pass

    def hang_up(self) -> None:
        self.ended = True

    def kill(self) -> None:
        self.exited.set_result(None)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> LoadProcessPool:
    async def spawn(*_: object) -> LoadProcess:
        return cast("LoadProcess", _Loader())

    monkeypatch.setattr(LoadProcess, "spawn", spawn)
    return LoadProcessPool((), ())


async def _lend(pool: LoadProcessPool) -> Any:
    """Lend a loader for a job. Returns it; it is idle."""
    loader = await pool.acquire()
    assert await pool.put_back(loader)
    return loader


async def _pass(seconds: float) -> None:
    """Wait until timers are over that were set before for as many seconds, and what waits for them has run."""
    await asyncio.sleep(0)  # a task that sets one may not have begun
    await asyncio.sleep(seconds)
    for _ in range(3):
        await asyncio.sleep(0)


def test_many_loads_leave_no_task_each(pool: LoadProcessPool) -> None:
    async def run() -> list[int]:
        tasks = []
        for _ in range(2):
            for _ in range(100):
                await _lend(pool)
            tasks.append(len(asyncio.all_tasks()))
        await pool.close()
        return tasks

    assert asyncio.run(run()) == [1, 1]  # this one


def test_idle_loader_is_ended(pool: LoadProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_pool, "IDLE_SECONDS", 0.01)

    async def run() -> None:
        loader = await _lend(pool)
        await _pass(0.01)
        assert loader.ended
        assert await pool.acquire() is not loader

    asyncio.run(run())


def test_loader_that_was_lent_again_is_idle_anew(pool: LoadProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(loader_pool, "IDLE_SECONDS", 0.01)
        await _lend(pool)
        await asyncio.sleep(0)  # its time begins
        monkeypatch.setattr(loader_pool, "IDLE_SECONDS", 3600.0)
        loader = await _lend(pool)
        await _pass(0.01)
        assert not loader.ended
        await pool.close()

    asyncio.run(run())


def test_what_a_loader_still_says_of_its_job_is_not_heard(pool: LoadProcessPool) -> None:
    """Its load has ended, and it is on its way to be idle."""

    async def run() -> None:
        loader = cast("Any", await pool.acquire())
        messages = [wire.ToDaemon(progress=wire.Progress()), wire.ToDaemon(idle=wire.Idle())]

        async def receive() -> wire.ToDaemon:
            return messages.pop(0)

        loader.receive = receive
        assert await pool.put_back(loader)
        assert await pool.dismiss_idle()
        assert not await pool.dismiss_idle()

    asyncio.run(run())
