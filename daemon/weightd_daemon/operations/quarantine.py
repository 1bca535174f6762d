"""Ends the quarantine: frees memory set aside at the start, once no process of an earlier daemon can write to it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from weightd_daemon.log_line import Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from weightd_daemon.core.memory import MemoryAccounting

    from .serving_lock import DaemonInstanceLock

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""Between two looks: the kernel tells nobody that a lock has gone."""


async def thaw_when_unwritten(
    lock: DaemonInstanceLock,
    memories: Mapping[str, MemoryAccounting],
    hollow: Mapping[str, Callable[[int], Iterable[tuple[int, int]]]],
) -> None:
    """Wait until no process of a daemon before may write to memory, and let all of it be used again.

    `hollow` tells of each device which ranges of a segment have no memory.
    """
    await asyncio.to_thread(lock.end_others)
    while lock.is_written_by_others():  # noqa: ASYNC110  # nobody would set an event
        await asyncio.sleep(_LOOK_SECONDS)
    thawed = 0
    for uuid, memory in memories.items():
        memory.quarantine = False
        for segment in memory.quarantined():
            # It is not released meanwhile: what is set aside keeps it. A loss takes it from the books, though.
            memory.thaw(segment, await asyncio.to_thread(hollow[uuid], segment))
            thawed += 1
    words = "the loader of the daemon before has ended: memory is used again"
    log.info(Line(words, {"segments": thawed}))
