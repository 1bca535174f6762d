"""A load under way, for those who wait for it: what they are told, when, and what is left of those who leave."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from support.filled import WHO
from weightd.errors import LeaseLostError
from weightd_daemon.core.events import LoadBegun
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.revision import BooksRevision
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.request import LoadRequest, LoadStatus

PEER = LeasePeer(1, 1, 1000, "")
WISH = LoadRequest(who=WHO, peer=PEER, sources=(), device="host", name="m")


def flight() -> InFlightLoad:
    return InFlightLoad(WISH, -1, 0.0, BooksRevision())


def test_what_a_detached_request_asks_for_stays_wanted_when_it_leaves() -> None:
    async def run() -> None:
        load = flight()
        load.join(1, WISH)
        load.join(2, replace(WISH, detached=True))
        for waiter in (1, 2, 3):
            load.leave(waiter)
        assert [(request.name, request.detached) for request in load.waiters.values()] == [("m", True)]
        assert load.detached

    asyncio.run(run())


@pytest.mark.parametrize("comes", [True, False])
def test_who_waits_for_a_step_hears_also_when_the_load_ends_before(comes: bool) -> None:
    async def run() -> None:
        load = flight()
        waiting = [asyncio.create_task(step) for step in (load.has_loader(), load.has_files())]
        await asyncio.sleep(0)
        if comes:
            load.loader_there.set()
            load.files_there.set()
        else:
            load.fail(LeaseLostError("it ended"))
        async with asyncio.timeout(60):
            assert [await one for one in waiting] == [comes] * 2

    asyncio.run(run())


def test_progress_is_told_at_once_and_until_the_load_is_done() -> None:
    async def run() -> None:
        load = flight()
        seen: list[LoadStatus] = []

        async def watch() -> None:
            async for status in load.events():
                seen.append(status)
                if len(seen) < 3:
                    asyncio.get_running_loop().call_soon(load.report, LoadStatus("copying", len(seen), 3))
                else:
                    asyncio.get_running_loop().call_soon(load.fail, LeaseLostError("it ended"))

        async with asyncio.timeout(60):
            await watch()
        assert [status.done for status in seen] == [0, 1, 2]
        assert [status async for status in load.events()] == []

    asyncio.run(run())


def test_what_a_load_has_been_told_first_is_how_it_went() -> None:
    async def run() -> None:
        load = flight()
        load.fail(LeaseLostError("first"))
        load.fail(LeaseLostError("second"))
        load.succeed(None, None)  # type: ignore[arg-type]  # not looked at
        begun = LoadBegun(1, PEER, "host", "", "m")
        assert load.ended(begun, 1.0).reason == "LEASE_LOST"
        assert "first" in load.ended(begun, 1.0).message

    asyncio.run(run())


def test_what_went_for_it_is_named_within_its_sharing_domain_alone() -> None:
    async def run() -> None:
        load = flight()
        load.went("", "mine")
        load.went("uid-7", "theirs")
        assert (load.evicted, load.evicted_others) == (["mine"], 1)

    asyncio.run(run())
