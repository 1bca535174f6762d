"""Loads under way, as monitors see them: how far each is, how fast, and for whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd._proto.v1 import checkpoint_pb2, inspection_pb2
from weightd_daemon.turns import LoopTurn
from weightd_daemon.wire import time_to, user_name

if TYPE_CHECKING:
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.loads.flight import InFlightLoad
    from weightd_daemon.loads.loads import Loads

PHASES = {
    "opening": checkpoint_pb2.LoadProgress.PHASE_OPENING,
    "hashing": checkpoint_pb2.LoadProgress.PHASE_HASHING,
    "copying": checkpoint_pb2.LoadProgress.PHASE_COPYING,
}


async def list_loads(loads: Loads, who: Principal) -> inspection_pb2.ListLoadsResponse:
    """The loads that `who` may see, as a list of checkpoints shows them: those of its domain, an admin all."""
    response, turn = inspection_pb2.ListLoadsResponse(), LoopTurn()
    seen = [load for load in loads.under_way if load.number and (who.admin or load.request.who.domain == who.domain)]
    for load in sorted(seen, key=lambda load: load.number):
        if not load.done.done():
            _describe(load, response.loads.add())
        if turn.is_over:
            await turn.next()
    return response


def _describe(load: InFlightLoad, to: inspection_pb2.LoadUnderWay) -> None:
    request, progress = load.request, load.progress
    to.load = load.number
    to.names.extend(dict.fromkeys(waiting.name for waiting in load.waiters.values() if waiting.name))
    to.reference = request.reference
    to.device = request.device
    if load.loader_there.is_set():
        rate = load.rate()
        to.progress.phase = PHASES[progress.phase]
        to.progress.done_bytes, to.progress.total_bytes = progress.done, progress.total
        to.bytes_per_second = rate
        if rate:
            to.remaining_seconds = max(0, progress.total - progress.done) / rate
    to.begin_time.CopyFrom(time_to(load.begun))
    if request.peer.pid is not None:
        to.pid = request.peer.pid
    if request.peer.uid is not None:
        to.uid = request.peer.uid
    to.user = user_name(request.peer.uid)
    to.command = request.peer.command
    to.waiters = sum(not waiting.detached for waiting in load.waiters.values())
