"""What a fleet answers: plain values, which travel between the catalogue's process and a driver. Sizes are bytes.

`node` is the engine's id of a node (in Ray the node's id), `name` what people call it. A checkpoint is its name in the
fleet, `b3:` and 64 hex digits; a reference is that, or what the checkpoint was published as.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from weightd._sizes import size
from weightd.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

RAY_NODE_LABEL: Final = "ray.io/node-id"
"""The label that Ray gives to each node: its id."""

NodeState = Literal["live", "draining", "unknown"]


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device of a node. `firm_bytes` cannot be evicted now; `checkpoints` are resident, those in `firm` firmly."""

    device: str
    kind: str
    budget_bytes: int
    used_bytes: int
    firm_bytes: int
    checkpoints: tuple[str, ...]
    firm: tuple[str, ...]
    pinned: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FleetNode:
    """A node that the engine counts as alive, at the address where its agent is looked for.

    `state` is "live", "draining" (its agent serves nothing new), or "unknown", where `problem` says why: nothing is
    known of its memory then. A live node has a `problem`, too, if its daemon does not answer its agent. `serves` are
    the checkpoints of which it has every byte, in memory or in files.
    """

    node: str
    name: str
    address: str
    state: NodeState
    problem: str
    devices: tuple[NodeDevice, ...]
    serves: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FleetCheckpoint:
    """A checkpoint that some node has. `names` are what it was published as; the rest are nodes."""

    checkpoint: str
    names: tuple[str, ...]
    size_bytes: int
    resident_on: tuple[str, ...]
    pinned_on: tuple[str, ...]
    served_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplicaTarget:
    """A device for a replica: `missing_bytes` of its `size_bytes` are not resident there. `why` is a sentence."""

    node: str
    name: str
    device: str
    size_bytes: int
    missing_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices for some replicas of a checkpoint, the best first; nothing is reserved there, or moved.

    `shortage` says why there are fewer than were asked for, and is empty otherwise.
    """

    reference: str
    checkpoint: str
    replicas: int
    targets: tuple[ReplicaTarget, ...]
    shortage: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The targets' nodes."""
        return tuple(target.node for target in self.targets)

    def options(self) -> dict[str, Any]:
        """What Ray's `.options()` and Serve's `ray_actor_options` take, so that actors run on these nodes alone.

        Errors: CapacityError (there is no target).
        """
        return _options(self.reference, self.nodes, self.shortage)

    def explain(self) -> str:
        """Why these devices, and why no more, a line each."""
        return "\n".join([*(target.why for target in self.targets), *([self.shortage] if self.shortage else [])])


@dataclass(frozen=True, slots=True)
class LoadedReplica:
    """A replica that is resident now. Of its tensors `moved_bytes` came from other nodes, and `local_bytes` were there.

    `small_bytes` are headers and small files received. `content_digest` is the daemon's name of the checkpoint.
    """

    node: str
    name: str
    device: str
    moved_bytes: int
    local_bytes: int
    small_bytes: int
    content_digest: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SkippedTarget:
    """A target that took no replica, and why: it is full, or does not answer."""

    node: str
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Replicas of a checkpoint that a load made resident, or found so. All that were asked for."""

    reference: str
    checkpoint: str
    replicas: tuple[LoadedReplica, ...]
    skipped: tuple[SkippedTarget, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The replicas' nodes."""
        return tuple(replica.node for replica in self.replicas)

    @property
    def moved_bytes(self) -> int:
        """Bytes of tensors that came from other nodes."""
        return sum(replica.moved_bytes for replica in self.replicas)

    @property
    def local_bytes(self) -> int:
        """Bytes of tensors that were on the replicas' nodes."""
        return sum(replica.local_bytes for replica in self.replicas)

    def options(self) -> dict[str, Any]:
        """As `Placement.options`, for the nodes that have the replicas."""
        return _options(self.reference, self.nodes, "")

    def explain(self) -> str:
        """What was loaded where, and which targets were skipped, a line each."""
        loaded = (
            f"{one.name}: {size(one.moved_bytes)} received, {size(one.local_bytes)} were there" for one in self.replicas
        )
        return "\n".join([*loaded, *(f"{one.name}: skipped: {one.why}" for one in self.skipped)])


@dataclass(frozen=True, slots=True)
class PlannedReplica:
    """A replica in a plan. `missing_bytes` are not resident there now; `why` is a sentence."""

    reference: str
    checkpoint: str
    node: str
    name: str
    device: str
    size_bytes: int
    missing_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class ReplicasLeftOver:
    """Replicas that a plan finds no place for, and why."""

    reference: str
    checkpoint: str
    replicas: int
    why: str

    def explain(self) -> str:
        """The same in a line."""
        return f"{self.reference}: {self.replicas} not placed: {self.why}"


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Where some checkpoints go together. `placed_bytes` is the memory that all devices use then, page for page."""

    replicas: tuple[PlannedReplica, ...]
    left_over: tuple[ReplicasLeftOver, ...]
    placed_bytes: int

    @property
    def missing_bytes(self) -> int:
        """What has to be brought to the nodes."""
        return sum(replica.missing_bytes for replica in self.replicas)

    def explain(self) -> str:
        """Where each replica goes and why, and why others go nowhere, a line each."""
        return "\n".join(
            [
                *(f"{one.reference} on {one.why}" for one in self.replicas),
                *(one.explain() for one in self.left_over),
            ]
        )


@dataclass(frozen=True, slots=True)
class WantedCheckpoint:
    """A checkpoint that a fleet is to have in memory: on so many nodes, pinned there or not."""

    reference: str
    replicas: int = 1
    pin: bool = False


@dataclass(frozen=True, slots=True)
class AppliedSpec:
    """What `apply` has done: replicas that it loaded or pinned, those that were right, and what found no place."""

    loaded: tuple[LoadReport, ...]
    present: tuple[PlannedReplica, ...]
    left_over: tuple[ReplicasLeftOver, ...]

    def explain(self) -> str:
        """What was done, what was there and what is left over, a line each."""
        return "\n".join(
            [
                *(f"{one.reference} on {line}" for one in self.loaded for line in one.explain().splitlines()),
                *(f"{one.reference} on {one.name}: was there" for one in self.present),
                *(one.explain() for one in self.left_over),
            ]
        )


@dataclass(frozen=True, slots=True)
class DrainReport:
    """A node whose agent serves nothing new, and what was copied to other nodes before.

    `only_here` are checkpoints in its memory or its files that no other node can serve now.
    """

    node: str
    name: str
    copied: tuple[LoadReport, ...]
    only_here: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FleetStats:
    """Figures of the fleet, and of the catalogue that says them.

    `resident_bytes` is the host memory that the daemons use on nodes that answer; `logical_bytes` is what the resident
    checkpoints would take if none shared. The catalogue waits for `transfers` fetches now; those that ended moved
    `moved_bytes`. It runs on `catalogue_node` since `since`, and knew nothing then; after `refilled_seconds` all agents
    that answer had told it what they hold (None until they have).
    """

    nodes: int
    live_nodes: int
    checkpoints: int
    replicas: int
    budget_bytes: int
    resident_bytes: int
    logical_bytes: int
    transfers: int
    moved_bytes: int
    catalogue_node: str
    since: datetime
    refilled_seconds: float | None


def _options(reference: str, nodes: Sequence[str], shortage: str) -> dict[str, Any]:
    if not nodes:
        raise CapacityError(f"{reference}: no node to run on: {shortage}")
    return {"label_selector": {RAY_NODE_LABEL: f"in({','.join(nodes)})"}}
