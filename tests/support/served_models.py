"""A deployment of Ray Serve that serves checkpoints from its nodes' daemons, and routers that a test can look into.

There is one application at a time. Its router lives in the process that asks it, which is the test's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig

import weightd
from support import routers_seen
from support.daemon import eventually
from weightd_fleet.engines.ray_serve import STATS_KEY, NodeResidency, WeightdRouter

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle as Handle
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

PAGE = 4096
_numbers = itertools.count()


class DefaultRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # Ray has no types
    """Serve's own router."""

    def initialize_state(self, **_: Any) -> None:
        routers_seen.made.append(self)


class WatchedRouter(WeightdRouter):
    """Our router."""

    def initialize_state(self, **_: Any) -> None:
        routers_seen.made.append(self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        routers_seen.asked_for.append(pending_request)
        return await super().choose_replicas(candidate_replicas, pending_request)


class Models:
    """Answers with its node, and with how many bytes it has read for the request."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths
        self.client = weightd.connect()
        self.residency = NodeResidency(self.client)
        self.read_bytes = 0

    async def record_routing_stats(self) -> dict[str, Any]:
        return await self.residency.routing_stats()

    @serve.multiplexed(max_num_models_per_replica=8)
    async def model(self, name: str) -> weightd.Attachment:
        return await asyncio.to_thread(self.attach, name)

    def attach(self, name: str) -> weightd.Attachment:
        """Attach to a model, which is loaded if it is not resident, and look at each of its pages."""
        report = self.client.load_report(self.paths[name], name=name)
        assert report is not None
        self.read_bytes += report.read_bytes
        attachment = self.client.attach(name)
        for key in attachment.tensors:
            bytes(attachment.buffer(key.name, key.component)[::PAGE])
        return attachment

    async def __call__(self) -> dict[str, Any]:
        """Answer for a model."""
        before = self.read_bytes
        await self.model(serve.get_multiplexed_model_id())
        node = ray.get_runtime_context().get_node_labels()["weightd.io/node"]
        return {"node": node, "read_bytes": self.read_bytes - before}

    async def hold(self, folder: str, go_on: str) -> dict[str, Any]:
        """Answer for a model when there is a file `go_on`; until then one in `folder` has this process's number."""
        answer = await self()

        def wait() -> None:
            (Path(folder) / f"{os.getpid()}.pid").touch()
            eventually(Path(go_on).exists)

        await asyncio.to_thread(wait)
        return answer

    async def ready(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def served(router: type[RequestRouter], paths: dict[str, str], **options: Any) -> Iterator[Handle]:
    """An application until the end of the block. `options` are those of the deployment."""
    # A handle keeps the router that it began with, and Serve keeps handles by the name of the application.
    name = f"models-{next(_numbers)}"
    deployment = serve.deployment(
        Models,
        request_router_config=RequestRouterConfig(request_router_class=router, request_routing_stats_period_s=0.2),
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        **options,
    )
    try:
        handle = serve.run(deployment.bind(paths), name=name, route_prefix=None)
        handle.ready.remote().result(timeout_s=60)  # the first request makes the router
        yield handle
    finally:
        serve.delete(name)


def replicas() -> list[RunningReplica]:
    """The replicas that the router knows."""
    return list(routers_seen.made[-1].curr_replicas.values())


def resident(replica: RunningReplica) -> dict[str, int]:
    """What is resident on a replica's node, by what the router was told of it."""
    found: dict[str, int] = replica.routing_stats.get(STATS_KEY, {})
    return found
