"""Requests of Ray Serve for a model go to a replica on a node where the model's bytes are.

    @serve.deployment(
        request_router_config=RequestRouterConfig(
            request_router_class="weightd.fleet:WeightdRouter", request_routing_stats_period_s=1
        )
    )
    class Models:
        def __init__(self) -> None:
            self.client = weightd.connect()  # this node's daemon
            self.residency = NodeResidency(self.client)

        async def record_routing_stats(self) -> dict[str, Any]:
            return await self.residency.routing_stats()

A multiplexed model id is the name of a checkpoint in the nodes' daemons. What a node's daemon calls by a name is that
node's business: the router trusts a name as a hint where to go, and the replica loads what it finds.
"""

from __future__ import annotations

import asyncio
import math
import random
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from ray.serve.request_router import FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter

from weightd.errors import DaemonUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.serve.request_router import PendingRequest, RunningReplica

    from weightd import Client

STATS_KEY: Final = "weightd_resident_bytes"
"""Where the statistics of a replica have what is resident on its node: bytes of checkpoints by name."""


class NodeResidency:
    """What is resident in a node's daemon, for `record_routing_stats` of a deployment that WeightdRouter routes to."""

    def __init__(self, client: Client, device: str | None = None) -> None:
        """Ask by `client`, of the memory of one device or, by default, of all of them."""
        self._client = client
        self._device = device
        self._revision: int | None = None
        self._resident: dict[str, int] = {}

    async def routing_stats(self) -> dict[str, Any]:
        """Return the bytes of each resident checkpoint, by each of its names.

        This asks on a thread, for a daemon may take its time, and for the list only if something has changed. A daemon
        that cannot be reached has nothing: Serve would keep what it said last if this raised.
        """
        try:
            resident = await asyncio.to_thread(self._ask)
        except DaemonUnreachableError:
            self._revision = None
            resident = {}
        return {STATS_KEY: resident}

    def _ask(self) -> dict[str, int]:
        revision = self._client.stats().revision
        if revision != self._revision:
            found: dict[str, int] = {}
            for one in self._client.checkpoints():
                if one.state == "resident" and self._device in (None, one.device):
                    found.update({name: max(one.total_bytes, found.get(name, 0)) for name in one.names})
            # Sorted: Serve tells all routers of statistics whose text has changed.
            self._resident = dict(sorted(found.items()))
            self._revision = revision  # of before the list: what has changed meanwhile is asked for again
        return self._resident


class WeightdRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray may be absent
    """Routes a request for a model to where the fewest bytes have to be loaded for it.

    First come replicas that have the model loaded; then those on nodes that have its bytes, most bytes first, so that a
    model with more requests than a replica takes spreads without another copy in memory; then all others. Of those it
    begins with one of the replicas with the fewest models, and all routers with the same one, so that requests at once
    for a model that is nowhere load it once. A replica whose queue is full passes the request on in this order. A
    request without a model is routed as Serve does it by default.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas to try, the best first. Serve calls this again, less and less often, while all are full."""
        model = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if pending_request is None or not model:
            chosen = self.apply_locality_routing(pending_request)
            return [_two([replica for replica in candidate_replicas if replica.replica_id in chosen])]
        pending_request.routing_context.should_backoff = True  # else Serve would ask again at once, and spin
        loaded, fewest, more = self.rank_replicas_via_multiplex(candidate_replicas, model)
        sure = {replica.node_id for replica in loaded}  # their statistics may be old
        held: dict[float, list[RunningReplica]] = {}
        for replica in (*fewest, *more):
            size = math.inf if replica.node_id in sure else resident_bytes(replica.routing_stats, model)
            held.setdefault(size, []).append(replica)
        cold = held.pop(0, [])
        warm = [held[size] for size in sorted(held, reverse=True)]
        ranks = [loaded, *warm, *_from_home([replica for replica in cold if replica in fewest] or cold, cold, model)]
        return [_two(self.select_available_replicas(rank) or rank) for rank in ranks if rank]


def _from_home(
    first: list[RunningReplica], replicas: list[RunningReplica], model: str
) -> Iterator[list[RunningReplica]]:
    """Rank replicas whose nodes have nothing: one of `first` by the model alone, others on its node, then the rest."""
    if not first:
        return
    home = min(first, key=lambda replica: (_score(model, replica.node_id), _score(model, replica.replica_id)))
    others = [replica for replica in replicas if replica is not home]
    yield [home]
    yield [replica for replica in others if replica.node_id == home.node_id]
    yield [replica for replica in others if replica.node_id != home.node_id]


def _score(model: str, place: object) -> bytes:
    """Rendezvous hashing: each model has an order of its own of the places, which is the same in every process."""
    return blake2b(f"{model}\0{place}".encode(), digest_size=8).digest()


def _two(replicas: list[RunningReplica]) -> list[RunningReplica]:
    """Two of them, or fewer if there are not so many; Serve takes the one with the shorter queue, and asks for both."""
    return random.sample(replicas, min(2, len(replicas)))


def resident_bytes(stats: object, model: str) -> int:
    """Bytes of a model on the node of a replica, by the replica's statistics, which may be of any form; else 0."""
    resident = stats.get(STATS_KEY) if isinstance(stats, dict) else None
    held = resident.get(model) if isinstance(resident, dict) else None
    return held if isinstance(held, int) and held > 0 else 0
