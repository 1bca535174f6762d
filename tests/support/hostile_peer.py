"""Agents in this process whose answers a test distorts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.agents import NO_DAEMON
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent.addresses import AgentAddress
from weightd_fleet.agent.agent import NodeSettings, fetching_node
from weightd_fleet.agent.peer_service import PeerService, serve
from weightd_fleet.agent.serving import ReadAdmission, ServedBlobs

Distort = Callable[["HostilePeer", Iterator[Any]], Iterator[Any]]


class HostilePeer(PeerService):
    """A PeerService with answers of its own to ReadRows, or to GetManifest."""

    distort: Distort | None = None
    distort_manifest: Distort | None = None
    read = 0
    """How often rows were asked for."""

    def _rows(self, request: Any) -> Iterator[peer_pb2.RowPiece]:
        self.read += 1
        honest = super()._rows(request)
        return self.distort(self, honest) if self.distort else honest

    def _manifest(self, request: Any) -> Iterator[peer_pb2.ManifestPiece]:
        honest = super()._manifest(request)
        return self.distort_manifest(self, honest) if self.distort_manifest else honest


@contextlib.contextmanager
def hostile_peer(
    state: Path,
    distort: Distort | None = None,
    manifest: Distort | None = None,
    readers: int = 16,
    fetch: Callable[..., Any] = lambda *_: None,  # never asked to fetch
) -> Iterator[tuple[AgentAddress, HostilePeer]]:
    """A peer that serves published files, until the end of the block."""
    with fetching_node(NodeSettings(str(state), str(NO_DAEMON))) as node:
        blobs = ServedBlobs(node.state, node.resident)
        service = HostilePeer(blobs, ReadAdmission(readers), fetch, secure=False)
        service.distort, service.distort_manifest = distort, manifest
        server, address = serve(service, AgentAddress("127.0.0.1", 0), None)
        try:
            yield address, service
        finally:
            service.stopping.set()
            server.stop(None).wait()
