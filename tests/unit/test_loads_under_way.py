"""How loads under way are listed: their figures, who waits, and who sees them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from weightd._proto.v1 import checkpoint_pb2, inspection_pb2
from weightd.errors import LeaseLostError
from weightd_daemon.core.lease import NOBODY, LeasePeer
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.revision import BooksRevision
from weightd_daemon.inspection.loads_under_way import list_loads
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.request import LoadRequest, LoadStatus

ALICE, ADMIN = Principal(1000, admin=False, domain="uid-1000"), Principal(0, admin=True, domain="uid-0")
PEER = LeasePeer(1, 12, 1000, "python load.py")


def flight(number: int, who: Principal, peer: LeasePeer = PEER, **wish: Any) -> InFlightLoad:
    load = InFlightLoad(LoadRequest(who=who, peer=peer, sources=(), device="host", **wish), -1, 5.0, BooksRevision())
    load.number = number
    load.join(1, load.request)
    return load


def listed(who: Principal, *loads: InFlightLoad) -> list[inspection_pb2.LoadUnderWay]:
    under_way: Any = SimpleNamespace(under_way=list(loads))
    return list(asyncio.run(list_loads(under_way, who)).loads)


def on_a_loop(make: Any) -> Any:
    """What `make` returns, made while a loop runs, as loads are."""

    async def run() -> Any:
        return make()

    return asyncio.run(run())


def test_the_end_is_what_is_left_at_the_rate_of_now() -> None:
    def make() -> InFlightLoad:
        load = flight(3, ALICE, name="m")
        load.loader_there.set()
        load.report(LoadStatus("copying", 20, 50))
        load.rate = lambda: 10.0  # type: ignore[method-assign]  # of a clock that the test has not
        return load

    (load,) = listed(ALICE, on_a_loop(make))
    expected = checkpoint_pb2.LoadProgress(
        phase=checkpoint_pb2.LoadProgress.PHASE_COPYING, done_bytes=20, total_bytes=50
    )
    assert load.progress == expected
    assert (load.bytes_per_second, load.remaining_seconds) == (10, 3)
    assert (load.load, list(load.names), load.device, load.waiters) == (3, ["m"], "host", 1)
    assert (load.pid, load.uid, load.command, load.begin_time.seconds) == (12, 1000, "python load.py", 5)


def test_what_is_not_known_is_not_set() -> None:
    def make() -> list[InFlightLoad]:
        waiting, opening = flight(1, ADMIN, peer=NOBODY), flight(2, ADMIN, detached=True)
        opening.loader_there.set()
        return [opening, waiting]

    waiting, opening = listed(ADMIN, *on_a_loop(make))
    for field in ("progress", "remaining_seconds", "pid", "uid"):
        assert not waiting.HasField(field), field
    assert waiting.user == "?"
    assert opening.HasField("progress")
    assert not opening.HasField("remaining_seconds")
    assert (opening.bytes_per_second, opening.waiters) == (0, 0)


def test_others_and_what_has_no_number_or_has_ended_are_left_out() -> None:
    def make() -> list[InFlightLoad]:
        ended = flight(4, ALICE)
        ended.fail(LeaseLostError("it ended"))
        return [flight(0, ALICE), flight(1, ALICE), flight(2, ADMIN), ended]

    loads = on_a_loop(make)
    assert [load.load for load in listed(ALICE, *loads)] == [1]
    assert [load.load for load in listed(ADMIN, *loads)] == [1, 2]
