"""The catalogue as an actor of Ray: detached, so that it outlives drivers, and on the head, so that it holds no worker.

A detached actor on a worker would keep an autoscaler from removing that node.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import ray

from weightd.errors import InvalidReferenceError
from weightd_fleet.service.fleet_service import AgentAccess, FleetService
from weightd_fleet.service.members import FleetMember

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

NAME: Final = "weightd-catalogue"
NAMESPACE: Final = "weightd"
QUICK: Final = frozenset({"nodes", "checkpoints", "place", "plan", "stats"})
"""Questions that are answered at once, and so never wait behind loads."""
SLOW: Final = frozenset({"load", "apply", "drain"})
SLOW_GROUP: Final = "work"
_MEMBERS_SECONDS: Final = 0.5
_QUICK_THREADS: Final = 8
_SLOW_THREADS: Final = 64


class CatalogueSettings(NamedTuple):
    """How a catalogue was started, and by which version of weightd."""

    access: AgentAccess
    version: str


def members() -> Iterator[FleetMember]:
    """The nodes that Ray counts as alive."""
    for node in ray.nodes():
        if node["Alive"]:
            yield FleetMember(node["NodeID"], node["NodeName"], node["NodeManagerAddress"])


class RayCatalogue:
    """The actor: a FleetService whose members are Ray's nodes."""

    def __init__(self, settings: CatalogueSettings) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._settings = settings
        self._service = FleetService(settings.access, ray.get_runtime_context().get_node_id())
        self._service.update(members())
        threading.Thread(target=self._follow, name="members", daemon=True).start()

    def _follow(self) -> None:
        while True:
            time.sleep(_MEMBERS_SECONDS)
            try:
                self._service.update(members())
            except Exception:  # the head may be restarting
                log.exception("the nodes of the cluster cannot be listed")

    def settings(self) -> CatalogueSettings:
        """How it was started."""
        return self._settings

    def ask(self, question: str, *given: Any) -> Any:
        """Answer at once."""
        return self._answer(question, QUICK, given)

    def work(self, question: str, *given: Any) -> Any:
        """Answer after work of any length, which is done again if the actor is restarted meanwhile."""
        return self._answer(question, SLOW, given)

    def _answer(self, question: str, allowed: frozenset[str], given: tuple[Any, ...]) -> Any:
        if question not in allowed:
            raise InvalidReferenceError(f"{question[:80]!r} is nothing that the catalogue answers")
        return getattr(self._service, question)(*given)


def start(settings: CatalogueSettings) -> Any:
    """The handle of the catalogue, which is started on the cluster's head if there is none."""
    actor = ray.remote(
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=_QUICK_THREADS,
        concurrency_groups={SLOW_GROUP: _SLOW_THREADS},
    )(RayCatalogue)
    lasting = actor.options(name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True)
    return lasting.remote(settings)
