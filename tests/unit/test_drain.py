"""A drain, step by step: what goes beside it."""

from __future__ import annotations

import asyncio
from typing import Any

from support.filled import Filled
from weightd_daemon.operations.drain import DrainOperation


class NoLoads:
    under_way = ()

    def end_all(self, error: Exception) -> None:
        pass


def test_what_goes_meanwhile_by_other_means_is_passed_over() -> None:
    books, loads = Filled(4, held=False), NoLoads()
    events: list[Any] = []
    drain = DrainOperation(
        store=books.store, loads=loads, on_event=events.append, resumed=lambda: None,  # type: ignore[arg-type]  # as much as it uses
    )  # fmt: skip

    async def run() -> None:
        drain.begin()
        while len(books.store.checkpoints) == 4:  # noqa: ASYNC110  # nothing tells of each
            await asyncio.sleep(0)
        books.store.remove(list(books.store.checkpoints.values())[-1])
        async for _ in drain.watch(5.0):
            pass

    asyncio.run(run())
    assert not books.store.checkpoints
    assert (drain.state, drain.checkpoints) == ("drained", 3)
    assert [event.state for event in events] == ["draining", "drained"]
