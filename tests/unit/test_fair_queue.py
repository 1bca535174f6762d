"""LoadQueue: how many run at a time, in all and of one user, who comes next, and what a cancelled wait leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from weightd_daemon.loads.fair_queue import LoadQueue


class Crowd:
    """Tasks that take a turn each and hold it until they are let go; `inside` are those that have one, in order."""

    def __init__(self, most: int, of_one: int) -> None:
        self.fair_queue = LoadQueue(most, of_one)
        self.inside: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str, user: object = None) -> None:
        """Tasks by name; their user is the first letter."""
        for name in names:
            self._gates[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._stay(name, user or name[0]))
        await self.settle()

    async def go(self, name: str) -> None:
        self._gates[name].set()
        await self._tasks[name]
        await self.settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tasks[name]
        await self.settle()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def _stay(self, name: str, user: object) -> None:
        async with self.fair_queue.turn(user):
            self.inside.append(name)
            await self._gates[name].wait()
        self.inside.remove(name)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_so_many_at_a_time_and_the_others_in_order() -> None:
    async def test() -> None:
        crowd = Crowd(2, 2)
        await crowd.come("a1", "a2", "a3", "b1")
        assert crowd.inside == ["a1", "a2"]
        await crowd.go("a2")
        assert crowd.inside == ["a1", "a3"]  # who came first
        await crowd.go("a1")
        await crowd.go("a3")
        await crowd.go("b1")
        assert crowd.inside == []

    run(test)


def test_who_has_all_it_may_have_holds_up_nobody_else() -> None:
    async def test() -> None:
        crowd = Crowd(3, 2)
        await crowd.come("a1", "a2", "a3", "b1", "b2")
        assert crowd.inside == ["a1", "a2", "b1"]
        await crowd.go("b1")
        assert crowd.inside == ["a1", "a2", "b2"]  # a3 waits on, for its own user's turns
        await crowd.go("a1")
        assert crowd.inside == ["a2", "b2", "a3"]
        for name in ("a2", "b2", "a3"):
            await crowd.go(name)

    run(test)


def test_a_cancelled_wait_and_a_cancelled_turn_leave_nothing() -> None:
    async def test() -> None:
        crowd = Crowd(1, 1)
        await crowd.come("a1", "b1", "c1")
        await crowd.cancel("b1")
        await crowd.cancel("a1")
        assert crowd.inside[-1] == "c1"
        crowd.inside = ["c1"]
        await crowd.come("d1")
        assert crowd.inside == ["c1"]
        await crowd.go("c1")
        assert crowd.inside == ["d1"]
        await crowd.go("d1")

    run(test)


def test_who_is_cancelled_in_the_moment_of_its_turn_gives_it_on() -> None:
    async def test() -> None:
        crowd = Crowd(1, 1)
        await crowd.come("a1", "b1", "c1")
        crowd._gates["a1"].set()
        for _ in range(100):  # b's turn is dealt as a leaves, before b runs again
            if crowd.fair_queue._waiting[0][0] != "b":
                break
            await asyncio.sleep(0)
        await crowd.cancel("b1")
        assert crowd.inside == ["c1"]
        await crowd.go("c1")
        assert crowd.fair_queue._taken.total() == 0

    run(test)


def test_more_turns_let_the_next_in_and_fewer_hold_them_up() -> None:
    async def test() -> None:
        crowd = Crowd(1, 1)
        await crowd.come("a1", "b1", "a2")
        crowd.fair_queue.resize(3, 1)
        await crowd.settle()
        assert crowd.inside == ["a1", "b1"]
        crowd.fair_queue.resize(3, 2)
        await crowd.settle()
        assert crowd.inside == ["a1", "b1", "a2"]
        crowd.fair_queue.resize(1, 1)
        await crowd.come("c1")
        await crowd.go("a1")
        await crowd.go("b1")
        assert crowd.inside == ["a2"]
        await crowd.go("a2")
        assert crowd.inside == ["c1"]
        await crowd.go("c1")

    run(test)
