"""The reclaimer: what returning memory costs the loop."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from support.prompt_memory import PromptMemory
from weightd_daemon.core.arena import Extent
from weightd_daemon.devices.driver_thread import AnyThread
from weightd_daemon.devices.reclaimer import DeviceReclaimer

if TYPE_CHECKING:
    import pytest

PAGE = 4096
PIECES = 5000


class Device:
    """Counts what it is asked to punch."""

    punched = 0
    sparse, releases_by, calls = True, "fallocate", AnyThread()

    def punch(self, *_: int) -> None:
        self.punched += 1


def test_many_pieces_are_reported_in_steps_between_which_the_loop_serves_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weightd_daemon.turns.TURN_SECONDS", 0.0)  # so each turn is over at once
    device: Any = Device()
    left: list[int] = []

    async def run() -> None:
        reclaimer = DeviceReclaimer(device)
        memory = PromptMemory(
            budget=1 << 30, page=PAGE, sparse=True, pool_limit=0, create=lambda _: 1, on_reclaim=reclaimer.kick
        )
        reclaimer.watch(memory)
        granted = memory.grant(1, "", 2 * PIECES * PAGE, 2 * PIECES * PAGE)
        assert granted is not None
        memory.give_back("", [Extent(1, 2 * at * PAGE, PAGE) for at in range(PIECES)], pool=False)
        while memory.reclaiming:
            left.append(memory.used // PAGE)
            await asyncio.sleep(0)
        await reclaimer.finish()

    asyncio.run(run())
    assert device.punched == PIECES, "no two of them are neighbours"
    steps = [before - after for before, after in pairwise([*left, PIECES]) if before != after]
    assert sum(steps) == PIECES
    assert max(steps) == 1
