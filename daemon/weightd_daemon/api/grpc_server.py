"""The gRPC services: decode, ask the books, encode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weightd._limits import DAEMON, check_grpc_can_start
from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    lease_pb2,
    lease_pb2_grpc,
)
from weightd._transport.address import grpc_target
from weightd_daemon.wire import leases_to

from .checkpoint_service import CheckpointService
from .context import Parts
from .daemon_service import DaemonService
from .error_mapping import Context, ErrorMapping

MAX_MESSAGE = 64 << 20
_SERVICES = tuple(
    proto.DESCRIPTOR.services_by_name[name].full_name
    for proto, name in (
        (checkpoint_pb2, "CheckpointService"),
        (lease_pb2, "LeaseService"),
        (daemon_pb2, "DaemonService"),
    )
)


class LeaseService(lease_pb2_grpc.LeaseServiceServicer):
    """Lists leases."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def List(  # noqa: N802
        self, request: lease_pb2.ListLeasesRequest, context: Context
    ) -> lease_pb2.ListLeasesResponse:
        """The leases that are held now, of checkpoints that the caller may see."""
        parts = self._parts
        _, who = parts.caller(context)
        leases = await leases_to(parts.store.leases.refresh(), parts.catalog.visible(who), parts.catalog)
        return lease_pb2.ListLeasesResponse(leases=leases)


class ControlPlane:
    """The gRPC server with its services, health and reflection. For `on_call` and `before_answer` see ErrorMapping."""

    def __init__(self, parts: Parts, on_call: Callable[[str, str], None], before_answer: Callable[[], None]) -> None:
        self._on_call, self._before_answer = on_call, before_answer
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # public, but not in its types
        self._checkpoints, self._leases, self._daemon = (
            CheckpointService(parts),
            LeaseService(parts),
            DaemonService(parts),
        )
        self._servers: list[grpc.aio.Server] = []
        self._serving = 0

    def bind(self, path: Path) -> None:
        """Bind to a Unix socket, at first or beside those before. What lies at `path` is removed. Errors: OSError."""
        check_grpc_can_start(DAEMON)
        options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
        server = grpc.aio.server(interceptors=[ErrorMapping(self._on_call, self._before_answer)], options=options)
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(self._checkpoints, server)
        lease_pb2_grpc.add_LeaseServiceServicer_to_server(self._leases, server)
        daemon_pb2_grpc.add_DaemonServiceServicer_to_server(self._daemon, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
        try:
            server.add_insecure_port(grpc_target(path))
        except RuntimeError as error:  # why, gRPC does not say
            raise OSError(0, "gRPC cannot listen there", str(path)) from error
        self._servers.append(server)

    async def serve(self) -> None:
        """Serve where `bind` has bound. gRPC cannot listen at another place later: each has a server of its own."""
        if not self._serving:
            for service in ("", *_SERVICES):
                await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        while self._serving < len(self._servers):
            await self._servers[self._serving].start()
            self._serving += 1

    async def ready(self) -> None:
        """Everything is up: say so to whoever asks for health."""
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Tell watchers of health, refuse new calls, give those under way `grace` seconds, then end."""
        await self._health.enter_graceful_shutdown()
        await asyncio.shield(asyncio.gather(*(server.stop(grace) for server in self._servers)))
