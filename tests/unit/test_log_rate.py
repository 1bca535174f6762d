"""However much nonsense comes, the log grows by two lines in ten seconds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from weightd_daemon.handles import log_rate
from weightd_daemon.handles.log_rate import HandleLogRate

if TYPE_CHECKING:
    import pytest


def test_one_line_and_the_number_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_rate, "SECONDS", 0.01)
    counted: list[int] = []

    async def run() -> None:
        told = asyncio.Event()

        def tell(more: int) -> None:
            counted.append(more)
            told.set()

        rate = HandleLogRate(tell)
        assert [rate.may_log() for _ in range(1000)] == [True] + [False] * 999
        async with asyncio.timeout(60):
            await told.wait()
        assert counted == [999]
        assert rate.may_log(), "afterwards it begins anew"
        rate._end()
        assert counted == [999], "nothing is said of none"

    asyncio.run(run())
