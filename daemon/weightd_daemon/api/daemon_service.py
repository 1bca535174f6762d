"""DaemonService: version, statistics, events, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator

from weightd._proto.v1 import daemon_pb2, daemon_pb2_grpc
from weightd.errors import InvalidReferenceError, PermissionDeniedError
from weightd_daemon import __version__
from weightd_daemon.devices.naming import meant
from weightd_daemon.wire import add_leases

from .context import GrpcServiceContext
from .error_mapping import Context

LOOK_SECONDS = 1.0
"""How often the connection of a follower is looked for; ended leases are the sweep's (handles/lease_sweep.py)."""


class DaemonService(daemon_pb2_grpc.DaemonServiceServicer):
    """gRPC service for the daemon as a whole: version, statistics, events, drain, reclaim."""

    def __init__(self, parts: GrpcServiceContext) -> None:
        self._parts = parts
        self._started = time.monotonic()

    async def GetVersion(  # noqa: N802  # named by the proto
        self, request: daemon_pb2.GetVersionRequest, context: Context
    ) -> daemon_pb2.GetVersionResponse:
        """Needs no token, so that anybody who reaches the socket can ask."""
        uptime = time.monotonic() - self._started
        return daemon_pb2.GetVersionResponse(version=__version__, pid=os.getpid(), uptime_seconds=uptime)

    async def GetStats(  # noqa: N802
        self, request: daemon_pb2.GetStatsRequest, context: Context
    ) -> daemon_pb2.GetStatsResponse:
        """The books of every device at one moment."""
        self._parts.caller(context)
        await self._parts.statistics.refresh()
        return self._parts.statistics.read()

    async def WatchEvents(  # noqa: N802
        self, request: daemon_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[daemon_pb2.Event]:
        """What is remembered, then what happens, as long as the caller's connection is there."""
        parts = self._parts
        _, who = parts.caller(context)
        with parts.event_stream.reader(who) as reader:
            for event in reader.recent:
                await reader.turn()
                yield event
            loop = asyncio.get_running_loop()
            look = loop.time()
            while request.follow:
                if loop.time() >= look:
                    parts.caller(context)
                    look = loop.time() + LOOK_SECONDS
                happened = await reader.next(look - loop.time())
                if happened is not None:
                    yield happened

    async def Drain(  # noqa: N802
        self, request: daemon_pb2.DrainRequest, context: Context
    ) -> AsyncIterator[daemon_pb2.DrainEvent]:
        """Begin a drain and watch it."""
        parts = self._parts
        seconds = request.timeout_seconds if request.HasField("timeout_seconds") else None
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise InvalidReferenceError(f"a drain cannot wait {seconds} s; leave it out to wait without end")
        self._check_admin(context)
        if request.forget:
            async with contextlib.aclosing(self._forget(request.forget, seconds, context)) as said:
                async for event in said:
                    yield event
            return
        parts.drain.begin()
        async with contextlib.aclosing(parts.drain.watch(seconds)) as changes:
            async for leases in changes:
                event = daemon_pb2.DrainEvent(holders=daemon_pb2.DrainHolders())
                checkpoints = parts.store.checkpoints.values()
                await add_leases(event.holders.leases, leases, checkpoints, parts.catalog)
                yield event
        result = daemon_pb2.DrainResult(checkpoints=parts.drain.checkpoints, freed_bytes=parts.drain.freed_bytes)
        yield daemon_pb2.DrainEvent(result=result)

    async def Undrain(  # noqa: N802
        self, request: daemon_pb2.UndrainRequest, context: Context
    ) -> daemon_pb2.UndrainResponse:
        """Take a drain back."""
        self._check_admin(context)
        self._parts.drain.undo()
        self._parts.absences.hurry()  # a device that was let go of is to serve again
        return daemon_pb2.UndrainResponse()

    async def _forget(
        self, device: str, seconds: float | None, context: Context
    ) -> AsyncGenerator[daemon_pb2.DrainEvent, None]:
        """Have one device forgotten, absent or not."""
        parts = self._parts
        connection, _ = parts.caller(context)
        freed: list[int] = []
        forgetting = parts.forgetting.forget(meant(parts.devices, device), seconds, connection.peer, freed.append)
        async with contextlib.aclosing(forgetting) as changes:
            async for leases in changes:
                event = daemon_pb2.DrainEvent(holders=daemon_pb2.DrainHolders())
                await add_leases(event.holders.leases, leases, parts.store.checkpoints.values(), parts.catalog)
                yield event
        yield daemon_pb2.DrainEvent(result=daemon_pb2.DrainResult(checkpoints=len(freed), freed_bytes=sum(freed)))

    def _check_admin(self, context: Context) -> None:
        _, who = self._parts.caller(context)
        if not who.admin:
            raise PermissionDeniedError("only admins may drain the daemon: its own user, root, and those in `admins`")
