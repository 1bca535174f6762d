"""Loads that wait for their turn, and those who wait for them: who joins, who leaves, and what is answered at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from support.filled import WHO, Filled
from weightd.errors import DeviceError, InUseError, LeaseLostError, PermissionDeniedError, WeightdError
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.checkpoint import Checkpoint
from weightd_daemon.core.events import CheckpointEvicted, Event, LoadAnswered
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.principal import Principal
from weightd_daemon.loads.fair_queue import LoadQueue
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.loads import MAX_UNFINISHED, Loads
from weightd_daemon.loads.request import LoadOutcome, LoadRequest

DEVICE = "GPU-0"
RESTED = (SourceFile("", "f", FileIdentity(1, 2, 3, 4, 5)),)
WISH = LoadRequest(who=WHO, peer=LeasePeer(1, 1, 1000, ""), sources=RESTED, device=DEVICE)
LATER = 1000.0
"""A time at which these files have not changed for long."""


class Hall:
    """Loads of which none has its turn, over a device with one checkpoint."""

    def __init__(self) -> None:
        self.books = Filled(0, held=False)
        self.books.add(DEVICE, 0)
        (self.resident,) = self.books.store.checkpoints.values()
        self.told: list[Event] = []
        unused: Any = None
        self.loads = Loads(
            store=self.books.store, catalog=self.books.catalog, devices={**self.books.devices}, reclaimers={},
            index=unused, prepare=unused, now=lambda: LATER, on_event=self.told.append, open_manifest=unused, lock=-1,
            threads=1, fair_queue=LoadQueue(0, 0), limits=UserLimits(),
        )  # fmt: skip

    def start(self, **wish: Any) -> tuple[InFlightLoad, int, bool]:
        return self.loads.start(replace(WISH, **wish), os.open(os.devnull, os.O_RDONLY))

    def join(self, **wish: Any) -> tuple[InFlightLoad, int]:
        load, waiter, begins = self.loads.start(replace(WISH, **wish), -1)
        assert not begins
        return load, waiter


@asynccontextmanager
async def hall() -> AsyncIterator[Hall]:
    made = Hall()
    async with asyncio.timeout(60):
        yield made
        await made.loads.close()


def running(test: Callable[[Hall], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs on a loop."""

    async def play() -> None:
        async with hall() as here:
            await test(here)

    def run() -> None:
        asyncio.run(play())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@running
async def test_one_who_leaves_takes_the_load_along_when_nobody_else_waits(here: Hall) -> None:
    load, first, _ = here.start()
    _, second = here.join(peer=LeasePeer(2, 2, 1000, ""))
    here.loads.leave(load, first)
    assert here.loads.under_way == [load]
    here.loads.disconnected(2)
    with pytest.raises(LeaseLostError, match="nobody waits for it any more"):
        await load.done
    here.loads.leave(load, second)
    assert here.loads.under_way == []


@running
async def test_a_detached_load_stays_when_its_connection_goes(here: Hall) -> None:
    load, _, _ = here.start(detached=True)
    here.loads.disconnected(WISH.peer.connection)
    assert here.loads.under_way == [load]


@running
async def test_whoever_wants_files_read_joins_only_a_load_that_does(here: Hall) -> None:
    plain, _, _ = here.start()
    reading, _, begins = here.start(verify=True)
    assert begins
    assert here.join() == (reading, 3), "the newest"
    assert here.join(verify=True)[0] is reading
    assert here.loads.under_way.count(plain) == 1
    assert here.loads.find_resident(replace(WISH, verify=True)) is None


@running
async def test_a_load_that_has_ended_is_not_joined_and_its_successor_is_kept(here: Hall) -> None:
    first, waiter, _ = here.start()
    here.loads.leave(first, waiter)
    second, _, begins = here.start()
    assert begins
    assert first.task is not None
    await asyncio.wait([first.task])
    assert here.join()[0] is second


@running
async def test_files_that_may_have_changed_are_loaded_by_each_who_asks(here: Hall) -> None:
    fresh = (SourceFile("", "f", FileIdentity(1, 2, 3, 4, int(LATER * 1e9))),)
    loads = {here.start(sources=fresh)[0] for _ in range(2)}
    assert len(loads) == 2


@running
async def test_a_connection_has_so_many_loads_under_way(here: Hall) -> None:
    here.start()
    for _ in range(MAX_UNFINISHED - 1):
        here.join()
    with pytest.raises(InUseError, match=f"this connection has {MAX_UNFINISHED} loads under way"):
        here.loads.start(WISH, -1)
    assert here.loads.untaken(1000) == 1, "they wait for one intake"


@running
async def test_a_daemon_that_stops_begins_no_load(here: Hall) -> None:
    here.loads.cancel_all()
    with pytest.raises(LeaseLostError, match="the daemon is stopping"):
        here.loads.start(WISH, -1)


@running
async def test_a_device_that_is_lost_ends_its_loads_and_no_others(here: Hall) -> None:
    lost, _, _ = here.start()
    other, _, _ = here.start(device="GPU-1")
    here.loads.lose(DEVICE, DeviceError("it fell"))
    with pytest.raises(DeviceError, match="it fell"):
        await lost.done
    assert here.loads.under_way == [other]


@running
async def test_what_goes_for_a_load_is_told_to_that_load(here: Hall) -> None:
    loads = [here.start()[0], here.start(device="GPU-1")[0]]
    while not all(load.number for load in loads):  # noqa: ASYNC110  # a step of each
        await asyncio.sleep(0)
    here.loads.evicted(CheckpointEvicted(here.resident, "capacity", loads[1].number))
    assert [load.evicted for load in loads] == [[], ["n0"]]


@running
async def test_a_resident_checkpoint_is_the_answer_with_a_name_and_one_lease_a_connection(here: Hall) -> None:
    for _ in range(2):
        assert here.loads.answer(replace(WISH, name="other"), here.resident) == "other"
    assert [lease.peer.connection for lease in here.books.store.leases] == [1]
    assert here.told == [LoadAnswered(here.resident, WISH.peer, "other")] * 2
    assert here.resident.last_used == LATER


@running
async def test_a_default_name_of_somebody_else_is_dropped_and_a_chosen_one_is_refused(here: Hall) -> None:
    here.books.add(DEVICE, 1)
    other = next(one for one in here.books.store.checkpoints.values() if one is not here.resident)
    bob = Principal(1001, admin=False, domain="")
    wish = replace(WISH, who=bob, name="n0")
    assert here.loads.name_and_pin(replace(wish, name_is_default=True), other) == ""
    with pytest.raises(PermissionDeniedError, match="name 'n0' belongs to uid 1000"):
        here.loads.name_and_pin(wish, other)


@running
async def test_a_detached_load_stays_without_a_name_that_it_may_not_have(here: Hall) -> None:
    """Nobody waits who could be told: the log says so."""
    load, _, _ = here.start(detached=True, name="mine")
    here.join(name="not its own")
    named: list[str] = []

    def refuse(request: LoadRequest, _: Checkpoint) -> str:
        named.append(request.name)
        raise WeightdError("no")

    here.loads.name_and_pin = cast("Any", refuse)  # type: ignore[method-assign]  # as somebody else has it by now
    here.loads._finish(load, here.resident, LoadOutcome("sha256:0", 1, 2, 3, 4, 5.0))
    assert named == ["mine"]
    assert (await load.done)[0] is here.resident
