"""The catalogue of a fleet, as whoever asks sees it, whatever engine it runs on."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from weightd._sizes import size
from weightd.errors import CapacityError, DaemonUnreachableError, InvalidReferenceError, NotFoundError
from weightd_fleet.agent.peer import Peer
from weightd_fleet.agent.resident import DEVICE
from weightd_fleet.agent.tls import TlsFolder

from .fleet_state import FleetState
from .following import FollowedMembers
from .loading import FleetLoads
from .results import (
    AppliedSpec,
    DrainReport,
    FleetStats,
    Placement,
    PlannedReplica,
    ReplicaPlan,
    ReplicasLeftOver,
    ReplicaTarget,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weightd_fleet.agent.addresses import AgentAddress
    from weightd_fleet.core.catalogue import PlacementDecision
    from weightd_fleet.core.placing import LeftOverReplicas

    from .members import FleetMember
    from .results import FleetCheckpoint, FleetNode, LoadReport, WantedCheckpoint

AGENT_PORT: Final = 7411
MOST_REPLICAS: Final = 10_000
_REFILL_SECONDS: Final = 10.0
"""How long a question waits after a start for agents that have not answered yet."""


class AgentAccess(NamedTuple):
    """How a catalogue reaches agents: at which port, and with which certificates ("" for none).

    `patience` is how many seconds one may be silent, after which it is asked anew.
    """

    port: int = AGENT_PORT
    tls_dir: str = ""
    patience: float = 30.0


class FleetService:
    """A catalogue that runs. The engine says who the members are; everything else comes from their agents.

    Safe for use from several threads. All questions raise NotFoundError and InvalidReferenceError for a reference that
    stands for nothing, or for several things.
    """

    def __init__(self, access: AgentAccess, runs_on: str) -> None:
        self._tls = TlsFolder(Path(access.tls_dir)) if access.tls_dir else None
        self._patience = access.patience
        self._runs_on = runs_on
        self._since = datetime.datetime.now(datetime.UTC)
        self._state = FleetState()
        self._members = FollowedMembers(self._state, self._peer, access.port)
        self._loads = FleetLoads(self._state, self._peer)

    def update(self, members: Iterable[FleetMember]) -> None:
        """Take the engine's word for who is alive."""
        for node in self._members.update(members):
            self._loads.abandon(node)

    def close(self) -> None:
        """Follow nobody any longer."""
        self.update(())

    def nodes(self) -> tuple[FleetNode, ...]:
        """All nodes."""
        return self._filled_state().nodes()

    def checkpoints(self) -> tuple[FleetCheckpoint, ...]:
        """All checkpoints that a node has."""
        return self._filled_state().checkpoints()

    def stats(self) -> FleetStats:
        """Figures of the fleet."""
        state = self._filled_state()
        nodes, checkpoints = state.nodes(), state.checkpoints()
        memories = [device for node in nodes for device in node.devices if device.device == DEVICE]
        return FleetStats(
            nodes=len(nodes),
            live_nodes=sum(node.state == "live" for node in nodes),
            checkpoints=len(checkpoints),
            replicas=sum(len(one.resident_on) for one in checkpoints),
            budget_bytes=sum(memory.budget_bytes for memory in memories),
            resident_bytes=sum(memory.used_bytes for memory in memories),
            logical_bytes=sum(one.size_bytes * len(one.resident_on) for one in checkpoints),
            transfers=self._loads.transfers,
            moved_bytes=self._loads.moved_bytes,
            catalogue_node=self._runs_on,
            since=self._since,
            refilled_seconds=state.refilled_seconds,
        )

    def place(self, reference: str, replicas: int = 1) -> Placement:
        """Choose nodes for replicas of a checkpoint."""
        checkpoint = self._filled_state().named(reference)
        found = self._state.choose(checkpoint, _counted(replicas))
        targets = tuple(
            ReplicaTarget(
                node=target.node,
                name=self._state.node_name(target.node),
                device=DEVICE,
                size_bytes=target.size_bytes,
                missing_bytes=target.missing_bytes,
                why=self._why(
                    target.node, target.size_bytes, target.missing_bytes, target.partner, target.partner_bytes
                ),
            )
            for target in found.targets
        )
        return Placement(reference, checkpoint, replicas, targets, _shortage(found))

    def load(
        self,
        reference: str,
        on: Placement | Sequence[str] | None = None,
        replicas: int | None = None,
        pin: bool = False,
    ) -> LoadReport:
        """Make replicas resident: on certain nodes, or on the best ones, of which those in a placement come first."""
        checkpoint = self._filled_state().named(reference)
        if on is not None and not isinstance(on, Placement):
            nodes = [self._state.node_named(node) for node in on]
            if replicas not in (None, len(nodes)):
                raise InvalidReferenceError(f"{replicas} replicas on {len(nodes)} nodes: leave the number out")
            if not nodes or len({node.node for node in nodes}) < len(nodes):
                raise InvalidReferenceError("a load names no node, or one twice; name each once")
            return self._loads.load(reference, checkpoint, nodes, len(nodes), pin=pin)
        if on is not None and on.checkpoint != checkpoint:
            raise InvalidReferenceError(f"{reference}: is not what {on.reference} was placed as; place it anew")
        count = _counted(replicas if replicas is not None else on.replicas if on else 1)
        return self._load_best(reference, checkpoint, on.nodes if on else (), count, pin=pin)

    def plan(self, references: Sequence[str], replicas: int = 1) -> ReplicaPlan:
        """Plan where checkpoints go together."""
        named = {self._filled_state().named(reference): reference for reference in references}
        if len(named) < len(references):
            raise InvalidReferenceError("two references stand for one checkpoint; name it once, and ask for replicas")
        return self._plan({checkpoint: _counted(replicas) for checkpoint in named}, named)

    def apply(self, spec: Sequence[WantedCheckpoint]) -> AppliedSpec:
        """Load, and pin, what is wanted and missing."""
        wanted = {self._filled_state().named(item.reference): item for item in spec}
        if len(wanted) < len(spec):
            raise InvalidReferenceError("two references stand for one checkpoint; name it once, with its replicas")
        plan = self._plan(
            {checkpoint: _counted(item.replicas) for checkpoint, item in wanted.items()},
            {checkpoint: item.reference for checkpoint, item in wanted.items()},
        )
        loaded: list[LoadReport] = []
        present: list[PlannedReplica] = []
        left_over = list(plan.left_over)
        for checkpoint, item in wanted.items():
            holders = self._state.holders(checkpoint)
            planned = [one for one in plan.replicas if one.checkpoint == checkpoint]
            # Of more than are wanted, those that are pinned stay so; no more are pinned than are wanted.
            planned.sort(key=lambda one: (one.node not in holders, not holders.get(one.node, False)))
            for one in planned[: item.replicas]:
                if one.node in holders and (holders[one.node] or not item.pin):
                    present.append(one)
                    continue
                try:
                    loaded.append(self.load(item.reference, [one.node], pin=item.pin))
                except (CapacityError, DaemonUnreachableError, NotFoundError) as error:  # it filled up, or is gone
                    left_over.append(ReplicasLeftOver(item.reference, checkpoint, 1, str(error)))
        return AppliedSpec(tuple(loaded), tuple(present), tuple(left_over))

    def drain(self, node: str, keep_replicas: int = 1) -> DrainReport:
        """Copy what would be held by too few others, then end the service of a node's agent."""
        if not 0 <= keep_replicas <= MOST_REPLICAS:
            raise InvalidReferenceError(f"keep {keep_replicas} replicas: must be from 0 to {MOST_REPLICAS}")
        leaving = self._filled_state().node_named(node)
        if leaving.state == "unknown":
            raise NotFoundError(f"node {leaving.name}: cannot be drained: {leaving.problem}")
        copied: list[LoadReport] = []
        held = {name: name in device.pinned for device in leaving.devices for name in device.checkpoints}
        for checkpoint, pinned in held.items() if leaving.state == "live" else ():
            others = self._state.holders(checkpoint).keys() - {leaving.node}
            if (lacking := keep_replicas - len(others)) > 0:
                reference = self._state.name_of(checkpoint)
                without = {leaving.node, *others}
                copied.append(self._load_best(reference, checkpoint, (), lacking, pin=pinned, without=without))
        self._loads.drain(leaving)
        only_here = tuple(
            self._state.name_of(one) for one in leaving.serves if self._state.servers(one).keys() <= {leaving.node}
        )
        return DrainReport(leaving.node, leaving.name, tuple(copied), only_here)

    # -- parts of these ----------------------------------------------------------------------------------------------

    def _peer(self, address: AgentAddress) -> Peer:
        return Peer(address, self._tls, self._patience)

    def _filled_state(self) -> FleetState:
        """The state, after a start once the agents have told what they hold."""
        self._state.wait_for_refill(_REFILL_SECONDS)
        return self._state

    def _load_best(
        self,
        reference: str,
        checkpoint: str,
        first: Sequence[str],
        replicas: int,
        *,
        pin: bool,
        without: Iterable[str] = (),
    ) -> LoadReport:
        """Load on nodes in `first`, then on all others from the best on, except those in `without`."""
        found = self._state.choose(checkpoint, MOST_REPLICAS)
        ranked = dict.fromkeys([*first, *(target.node for target in found.targets)])
        nodes = {node.node: node for node in self._state.nodes() if node.state == "live"}
        targets = [nodes[node] for node in ranked if node in nodes and node not in set(without)]
        if len(targets) < replicas:
            held = f"{replicas} replicas asked for, and {len(targets)} nodes have room"
            raise CapacityError(f"{reference}: {held}; add a node, or remove or unpin what is not needed")
        return self._loads.load(reference, checkpoint, targets, replicas, pin=pin)

    def _plan(self, wanted: dict[str, int], references: dict[str, str]) -> ReplicaPlan:
        found = self._state.plan(wanted)
        replicas = []
        for one in found.replicas:
            node = one.device.rpartition("/")[0]
            replicas.append(
                PlannedReplica(
                    reference=references[one.checkpoint],
                    checkpoint=one.checkpoint,
                    node=node,
                    name=self._state.node_name(node),
                    device=DEVICE,
                    size_bytes=one.size_bytes,
                    missing_bytes=one.missing_bytes,
                    why=self._why(node, one.size_bytes, one.missing_bytes, one.partner, one.partner_bytes),
                )
            )
        left_over = tuple(
            ReplicasLeftOver(references[checkpoint], checkpoint, left.replicas, _why_left(left))
            for checkpoint, left in found.left_over
        )
        return ReplicaPlan(tuple(replicas), left_over, found.used_bytes)

    def _why(self, node: str, total: int, missing: int, partner: str, partner_bytes: int) -> str:
        name = self._state.node_name(node)
        if not missing:
            return f"{name}: has all of its {size(total)}"
        told = f"{name}: {size(missing)} of {size(total)} missing"
        return f"{told}; {size(partner_bytes)} are those of {self._state.name_of(partner)}" if partner else told


def _counted(replicas: int) -> int:
    if not 0 < replicas <= MOST_REPLICAS:
        raise InvalidReferenceError(f"{replicas} replicas: must be from 1 to {MOST_REPLICAS}")
    return replicas


def _shortage(found: PlacementDecision) -> str:
    if len(found.targets) == found.replicas:
        return ""
    return (
        f"{len(found.targets)} of {found.replicas} replicas placed: each live node takes one, and {found.full_devices} "
        "have no room for it"
    )


def _why_left(left: LeftOverReplicas) -> str:
    if left.needs_nodes:
        return "every live node has a replica already"
    return f"needs {size(left.least_bytes)} or more on a node, and the emptiest has {size(left.most_room_bytes)} left"
