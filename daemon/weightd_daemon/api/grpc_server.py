"""The gRPC server, which serves all services on the control socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weightd._limits import DAEMON, MAX_LOAD_REQUEST, check_grpc_can_start
from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    composition_pb2,
    composition_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    inspection_pb2,
    inspection_pb2_grpc,
    lease_pb2,
    lease_pb2_grpc,
)
from weightd._transport.address import grpc_target
from weightd_daemon.wire import add_leases

from .admission import MAX_CALLS_OF_CONNECTION, RpcAdmission
from .checkpoint_service import CheckpointService
from .composition_service import CompositionService
from .context import GrpcServiceContext
from .daemon_service import DaemonService
from .error_mapping import Context, GrpcErrorInterceptor
from .inspection_service import InspectionService

MAX_ANSWER = 64 << 20
"""Bytes of an answer: lists are as long as the books."""
CONNECTIONS_OF_OTHERS = 32
"""Connections on the control socket beside one for each on the handle socket: of those who ask for health."""
HANDSHAKE_SECONDS = 5
IDLE_SECONDS = 120
"""How long a connection may have no call; gRPC's channels connect anew by themselves."""
_SERVICES = tuple(
    proto.DESCRIPTOR.services_by_name[name].full_name
    for proto, name in (
        (checkpoint_pb2, "CheckpointService"),
        (composition_pb2, "CompositionService"),
        (lease_pb2, "LeaseService"),
        (daemon_pb2, "DaemonService"),
        (inspection_pb2, "InspectionService"),
    )
)


class LeaseService(lease_pb2_grpc.LeaseServiceServicer):
    """gRPC service that lists leases."""

    def __init__(self, parts: GrpcServiceContext) -> None:
        self._parts = parts

    async def List(  # noqa: N802  # the name that gRPC calls
        self, request: lease_pb2.ListLeasesRequest, context: Context
    ) -> lease_pb2.ListLeasesResponse:
        """The leases that are held now, of checkpoints that the caller may see."""
        parts = self._parts
        _, who = parts.caller(context)
        response = lease_pb2.ListLeasesResponse()
        await add_leases(response.leases, parts.store.leases.refresh(), parts.catalog.visible(who), parts.catalog)
        return response


class GrpcServer:
    """The gRPC server with its services, health and reflection.

    For `on_call` and `before_answer` see GrpcErrorInterceptor.

    `max_connections` is how many clients there may be, each with one connection.
    """

    def __init__(
        self,
        parts: GrpcServiceContext,
        max_connections: int,
        on_call: Callable[[str, str], None],
        before_answer: Callable[[], None],
    ) -> None:
        self._options = [
            ("grpc.max_receive_message_length", MAX_LOAD_REQUEST),
            ("grpc.max_send_message_length", MAX_ANSWER),
            ("grpc.max_allowed_incoming_connections", max_connections + CONNECTIONS_OF_OTHERS),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
            ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
            ("grpc.max_concurrent_streams", MAX_CALLS_OF_CONNECTION),
            ("grpc.http2.bdp_probe", 0),  # or what nobody has asked for yet would be let in by the megabyte
        ]
        self._interceptors = [GrpcErrorInterceptor(RpcAdmission(parts.connections), on_call, before_answer)]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # public, but not in its types
        self._checkpoints, self._leases = CheckpointService(parts), LeaseService(parts)
        self._compositions = CompositionService(parts)
        self._daemon, self._inspection = DaemonService(parts), InspectionService(parts)
        self._servers: list[grpc.aio.Server] = []
        self._serving = 0

    def bind(self, path: Path) -> None:
        """Bind to a Unix socket, at first or beside those before. What lies at `path` is removed. Errors: OSError."""
        check_grpc_can_start(DAEMON)
        server = grpc.aio.server(interceptors=self._interceptors, options=self._options)
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(self._checkpoints, server)
        composition_pb2_grpc.add_CompositionServiceServicer_to_server(self._compositions, server)
        lease_pb2_grpc.add_LeaseServiceServicer_to_server(self._leases, server)
        daemon_pb2_grpc.add_DaemonServiceServicer_to_server(self._daemon, server)
        inspection_pb2_grpc.add_InspectionServiceServicer_to_server(self._inspection, server)
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
