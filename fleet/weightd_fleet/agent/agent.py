"""An agent: one process a node that serves PeerService, and fetches from other agents where a client asks for it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import weightd
from weightd.errors import InvalidReferenceError
from weightd_fleet.publishing.state import PublishedState, state_folder

from .fetching import FetchingNode, fetch
from .peer import Peer
from .peer_service import PeerService, serve
from .resident import ResidentTensors
from .serving import ReadAdmission, ServedBlobs
from .tls import TlsFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .addresses import AgentAddress
    from .requests import Fetched, FetchOrder


@dataclass(frozen=True)
class NodeSettings:
    """Where a node keeps its state, which daemon it has, and how it proves itself; None are the defaults.

    `tls` None is plain text, which peers on the loopback alone may be spoken to in. `patience` is how many seconds a
    peer, or the daemon, may be silent.
    """

    state_dir: str | None = None
    socket: str | None = None
    tls: str | None = None
    patience: float = 30.0


@contextlib.contextmanager
def fetching_node(settings: NodeSettings, serves_at: str = "") -> Iterator[FetchingNode]:
    """What a fetch uses. Nothing is connected to before it is needed."""
    tls = TlsFolder(Path(settings.tls)) if settings.tls else None

    def connect() -> weightd.Client:
        return weightd.connect(settings.socket, timeout=settings.patience)

    resident = ResidentTensors(connect)
    try:
        yield FetchingNode(
            PublishedState(state_folder(settings.state_dir)),
            resident,
            connect,
            lambda address: Peer(address, tls, settings.patience),
            serves_at,
        )
    finally:
        resident.close()


@contextlib.contextmanager
def running_agent(
    listen: AgentAddress,
    settings: NodeSettings,
    readers: int,
    note: Callable[[str], None],
    advertised: AgentAddress | None = None,
) -> Iterator[AgentAddress]:
    """Run an agent that at most `readers` peers read from at once. Yields where it listens.

    `advertised` is the address that other nodes are told, by default the one that it listens on, if that is one.
    It is not guessed: the agent's certificate must name it.

    Errors: PermissionDeniedError (plain text beyond the loopback), InvalidReferenceError (among others: nobody can
    connect to what other nodes are told).
    """
    tls = TlsFolder(Path(settings.tls)) if settings.tls else None
    if advertised is not None or tls is not None:  # else it is on the loopback, or refused
        _require_reachable(advertised, listen)
    with fetching_node(settings) as node:
        serves_at = ""

        def fetch_for_client(order: FetchOrder, advance: Callable[[int, int], None]) -> Fetched:
            return fetch(node.serving_at(serves_at), order, advance, note)

        service = PeerService(
            ServedBlobs(node.state, node.resident), ReadAdmission(readers), fetch_for_client, secure=tls is not None
        )
        server, address = serve(service, listen, tls)
        serves_at = str(advertised or address)
        try:
            yield address
        finally:
            service.stopping.set()
            server.stop(1.0).wait()


def _require_reachable(advertised: AgentAddress | None, listen: AgentAddress) -> None:
    """Errors: InvalidReferenceError (other nodes would be told an address that they cannot connect to)."""
    told = advertised or listen
    if told.is_any or (told is advertised and not told.port):
        raise InvalidReferenceError(
            f"{told}: other nodes cannot connect to that; give --advertise HOST:PORT, an address of this node that its "
            "certificate names"
        )
