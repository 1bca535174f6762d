"""Order fetches from agents: each reads from the nodes with the fewest readers, and full nodes are passed over."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from weightd.errors import (
    CapacityError,
    DaemonUnreachableError,
    FormatError,
    NotFoundError,
    ResourceLimitError,
    WeightdError,
)
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent.addresses import parse_address
from weightd_fleet.agent.resident import DEVICE

from .results import LoadedReplica, LoadReport, SkippedTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from weightd_fleet.agent.addresses import AgentAddress
    from weightd_fleet.agent.peer import Peer

    from .fleet_state import FleetState
    from .results import FleetNode

_MOST_SOURCES: Final = 8
_FETCH_SECONDS: Final = 6 * 3600.0
"""How long a fetch may take. One from a node that leaves the fleet ends at once."""
_SEEN_SECONDS: Final = 10.0
"""How long a load waits for the target's agent to tell what is resident now."""
_MOST_REPLICAS: Final = 32
"""How many replicas of a load are fetched at once."""
MOST_FETCHES: Final = 8
"""How many fetches one node does at once; an agent refuses more than twice as many."""
_OF_THE_TARGET: Final = (CapacityError, DaemonUnreachableError, ResourceLimitError)
"""Errors after which another target is tried."""


class FleetLoads:
    """The fetches that a catalogue has ordered. Safe for use from several threads."""

    def __init__(self, state: FleetState, connect: Callable[[AgentAddress], Peer]) -> None:
        self._state = state
        self._connect = connect
        self._lock = threading.Lock()
        self._readers: Counter[str] = Counter()
        """Fetches by the node that they read from first."""
        self._turns: dict[str, threading.Semaphore] = {}
        """What lets MOST_FETCHES fetch at once, by the node that fetches."""
        self._running: dict[str, list[Peer]] = {}
        """Connections of fetches by the node that fetches."""
        self.moved_bytes = 0
        """What all fetches that have ended moved."""

    @property
    def transfers(self) -> int:
        """How many fetches run."""
        with self._lock:
            return sum(map(len, self._running.values()))

    def abandon(self, node: str) -> None:
        """End the fetches of a node that has left."""
        with self._lock:
            peers = list(self._running.get(node, ()))
        for peer in peers:
            peer.close()

    def load(
        self, reference: str, checkpoint: str, targets: Sequence[FleetNode], replicas: int, *, pin: bool
    ) -> LoadReport:
        """Make replicas resident on the first of some targets that take one.

        Errors: CapacityError, or DaemonUnreachableError if none answers (too few take one; it says why each did not,
        and what was loaded stays), NotFoundError (no node serves the checkpoint), and those of a fetch that every
        target would have.
        """
        waiting = _Waiting(targets)
        failed: list[tuple[FleetNode, WeightdError]] = []

        def fill() -> LoadedReplica | None:
            for target in waiting:
                try:
                    return self._fetch(reference, checkpoint, target, pin=pin)
                except _OF_THE_TARGET as error:
                    failed.append((target, error))
            return None

        with ThreadPoolExecutor(min(replicas, _MOST_REPLICAS)) as pool:
            ended = list(pool.map(lambda _: fill(), range(replicas)))
        loaded = [replica for replica in ended if replica is not None]
        if len(loaded) < replicas:
            there = f" (on {', '.join(one.name for one in loaded)})" if loaded else ""
            why = "; ".join(f"{target.name}: {error}" for target, error in failed)
            unreachable = all(isinstance(error, DaemonUnreachableError) for _, error in failed)
            kind = DaemonUnreachableError if unreachable else CapacityError
            raise kind(f"{reference}: {len(loaded)} of {replicas} replicas are resident{there}: {why}")
        for replica in loaded:
            self._await(checkpoint, replica.node, pin=pin)
        skipped = tuple(SkippedTarget(target.node, target.name, str(error)) for target, error in failed)
        return LoadReport(reference, checkpoint, tuple(loaded), skipped)

    def drain(self, node: FleetNode) -> None:
        """End the service of a node's agent. Errors: DaemonUnreachableError, PermissionDeniedError."""
        with self._connect(parse_address(node.address)) as peer:
            peer.drain()
        self._state.wait_until(
            lambda: all(one.state != "live" for one in self._state.nodes() if one.node == node.node), _SEEN_SECONDS
        )

    def _fetch(self, reference: str, checkpoint: str, target: FleetNode, *, pin: bool) -> LoadedReplica:
        began = time.monotonic()
        name = self._state.name_of(checkpoint) if reference == checkpoint else reference
        with self._turn(target.node), self._reading(checkpoint, target.node) as sources:
            request = peer_pb2.FetchRequest(
                name=checkpoint,
                sources=sources,
                sink=peer_pb2.SINK_MEMORY,
                local_name="" if name == checkpoint else name,
                pin=pin,
            )
            result = self._result(target, request)
        with self._lock:
            self.moved_bytes += result.moved_bytes
        return LoadedReplica(
            node=target.node,
            name=target.name,
            device=DEVICE,
            moved_bytes=result.moved_bytes,
            local_bytes=result.local_bytes,
            small_bytes=result.small_bytes,
            content_digest=result.content_digest,
            seconds=time.monotonic() - began,
        )

    def _result(self, target: FleetNode, request: peer_pb2.FetchRequest) -> peer_pb2.FetchResult:
        with self._connect(parse_address(target.address)) as peer, self._running_on(target.node, peer):
            for event in peer.fetch(request, _FETCH_SECONDS):
                if event.HasField("result"):
                    return event.result
        raise FormatError(f"peer {target.address}: ends a fetch without its result")

    @contextlib.contextmanager
    def _reading(self, checkpoint: str, target: str) -> Iterator[list[str]]:
        """The agents to read from, those with the fewest readers first. Errors: NotFoundError."""
        servers = self._state.servers(checkpoint)
        own = servers.pop(target, None)  # needed only if it is the only one: then nothing is missing
        if not servers and own is None:
            raise NotFoundError(f"{checkpoint}: no agent serves all of it now; publish it on a node with an agent")
        with self._lock:
            nodes = sorted(servers, key=lambda node: (self._readers[node], node))[:_MOST_SOURCES]
            first = nodes[0] if nodes else target
            self._readers[first] += 1
        try:
            yield [servers[node] for node in nodes] or [own or ""]
        finally:
            with self._lock:
                self._readers[first] -= 1

    def _turn(self, node: str) -> threading.Semaphore:
        with self._lock:
            return self._turns.setdefault(node, threading.Semaphore(MOST_FETCHES))

    @contextlib.contextmanager
    def _running_on(self, node: str, peer: Peer) -> Iterator[None]:
        with self._lock:
            self._running.setdefault(node, []).append(peer)
        try:
            yield
        finally:
            with self._lock:
                self._running[node].remove(peer)

    def _await(self, checkpoint: str, node: str, *, pin: bool) -> None:
        """Wait until the catalogue has heard of a replica, so that whoever asks next is told of it."""
        wanted = {True} if pin else {True, False}
        self._state.wait_until(lambda: self._state.holders(checkpoint).get(node) in wanted, _SEEN_SECONDS)


class _Waiting:
    """Targets that several threads take in turn."""

    def __init__(self, targets: Iterable[FleetNode]) -> None:
        self._targets = iter(targets)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[FleetNode]:
        return self

    def __next__(self) -> FleetNode:
        with self._lock:
            return next(self._targets)
