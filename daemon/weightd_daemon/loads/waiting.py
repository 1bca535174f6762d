"""Waits for an event of something that may end before the event happens."""

from __future__ import annotations

import asyncio
from typing import Any


async def happens(event: asyncio.Event, done: asyncio.Future[Any]) -> bool:
    """Wait for an event, or until `done` has a result or an error, which is not raised here.

    Returns whether the event has happened.
    """
    waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiting, done], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return event.is_set()
