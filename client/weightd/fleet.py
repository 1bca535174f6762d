"""A fleet of nodes on Ray: where a checkpoint's bytes are, where a replica adds the fewest, and fetches of what lacks.

    from weightd import fleet

    with fleet.connect() as nodes:
        placed = nodes.place("org/tuned", replicas=2)
        nodes.load("org/tuned", on=placed, pin=True)
    Engine.options(**placed.options()).remote()

Needs the extra `fleet-ray`. A reference is what a checkpoint was published as, or its name in the fleet, `b3:…`; a node
is the id that Ray gives it, its name, or its address.

`WeightdRouter` and `NodeResidency` are for deployments of Ray Serve (docs/fleet.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from weightd.errors import InvalidReferenceError
from weightd_fleet.service.results import (
    AppliedSpec,
    DrainReport,
    FleetCheckpoint,
    FleetNode,
    FleetStats,
    LoadedReplica,
    LoadReport,
    NodeDevice,
    Placement,
    PlannedReplica,
    ReplicaPlan,
    ReplicasLeftOver,
    ReplicaTarget,
    SkippedTarget,
    WantedCheckpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from weightd_fleet.engines.ray_serve import NodeResidency as NodeResidency
    from weightd_fleet.engines.ray_serve import WeightdRouter as WeightdRouter

__all__ = [
    "AppliedSpec",
    "DrainReport",
    "Fleet",
    "FleetCheckpoint",
    "FleetNode",
    "FleetStats",
    "LoadReport",
    "LoadedReplica",
    "NodeDevice",
    "Placement",
    "PlannedReplica",
    "ReplicaPlan",
    "ReplicaTarget",
    "ReplicasLeftOver",
    "SkippedTarget",
    "WantedCheckpoint",
    "connect",
]


def __getattr__(name: str) -> Any:
    """Import what is for Ray Serve when it is first named: Ray comes with it."""
    if name in ("NodeResidency", "WeightdRouter"):
        from weightd_fleet.engines import ray_serve

        return getattr(ray_serve, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def connect(
    address: str | None = None, *, port: int | None = None, tls_dir: str | None = None, start: bool = True
) -> Fleet:
    """Connect to the catalogue of a Ray cluster, which is started on the cluster's head if it does not run.

    A process that is a driver or a worker of Ray asks its own cluster. Another one becomes a driver of the cluster at
    `address` (default: RAY_ADDRESS, else the one that runs on this machine). The catalogue looks for each node's agent
    at `port` (default: WEIGHTD_FLEET_PORT, else 7411) with the certificates in `tls_dir`, an absolute path on the head
    (default: WEIGHTD_FLEET_TLS_DIR; without any it speaks to agents on the loopback only). One that runs already keeps
    its own.

    Errors: DaemonUnreachableError (no cluster, or no catalogue and `start` is False), InvalidReferenceError (Ray is not
    installed; `tls_dir` is relative; or the catalogue runs with another port or folder than you name).
    """
    try:
        from weightd_fleet.engines.ray_connection import connect_catalogue
    except ModuleNotFoundError as error:
        raise InvalidReferenceError(
            f"weightd.fleet needs {error.name}, which is not installed: pip install '.[fleet-ray]' in weightd's "
            "checkout"
        ) from error
    catalogue = connect_catalogue(address, port=port, tls_dir=tls_dir, start_it=start)
    return Fleet(catalogue.ask, catalogue.leave)


class Fleet:
    """A fleet's catalogue, which answers while its head lives. Safe for use from several threads.

    All methods raise DaemonUnreachableError (the catalogue does not answer), NotFoundError (no such checkpoint or
    node), and InvalidReferenceError (a reference that several checkpoints were published as: it lists them).
    """

    def __init__(self, ask: Callable[..., Any], close: Callable[[], None]) -> None:
        self._ask = ask
        self._close = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, if `connect` made this process its driver. The catalogue goes on."""
        self._close()

    def nodes(self) -> tuple[FleetNode, ...]:
        """The nodes that Ray counts as alive, and what their agents say, by name."""
        answer: tuple[FleetNode, ...] = self._ask("nodes")
        return answer

    def checkpoints(self) -> tuple[FleetCheckpoint, ...]:
        """The checkpoints that live nodes have, by their names."""
        answer: tuple[FleetCheckpoint, ...] = self._ask("checkpoints")
        return answer

    def place(self, reference: str, replicas: int = 1) -> Placement:
        """Choose nodes for replicas of a checkpoint: where the fewest bytes are missing, then where most is free.

        Nodes that have it count, and come first. Nothing is moved or reserved.
        """
        answer: Placement = self._ask("place", reference, replicas)
        return answer

    def load(
        self,
        reference: str,
        *,
        on: Placement | str | Sequence[str] | None = None,
        replicas: int | None = None,
        pin: bool = False,
    ) -> LoadReport:
        """Make replicas resident in host memory, and say what was moved for it; waits until all are there.

        Without `on`, and with a Placement, `replicas` (default: 1, or the placement's) are loaded on the best nodes;
        one that is full or does not answer is skipped, and the next best is tried. With nodes, each of them gets one or
        it is an error. Only tensors that a node lacks are moved.

        Errors: CapacityError (no more nodes have room; replicas that were loaded stay), and those of a fetch.
        """
        named = (on,) if isinstance(on, str) else on
        answer: LoadReport = self._ask("load", reference, named, replicas, pin)
        return answer

    def plan(self, references: Iterable[str], replicas: int = 1) -> ReplicaPlan:
        """Plan where checkpoints go together, so that few bytes are held twice. Nothing is moved or reserved.

        Pinned and leased checkpoints stay where they are, others may be evicted for it.
        """
        answer: ReplicaPlan = self._ask("plan", tuple(references), replicas)
        return answer

    def apply(self, spec: Iterable[WantedCheckpoint | Mapping[str, Any] | str]) -> AppliedSpec:
        """Make the fleet have what is wanted: load, and pin, what is missing. Nothing is removed, unpinned or moved.

        An item is a WantedCheckpoint, a mapping with its fields, or a reference. Whatever finds no place is reported,
        and is no error.
        """
        answer: AppliedSpec = self._ask("apply", _wanted(spec))
        return answer

    def drain(self, node: str, keep_replicas: int = 1) -> DrainReport:
        """Copy from a node what fewer than `keep_replicas` others hold in memory, then end its agent's service.

        With 0 nothing is copied. Its daemon, and whoever is attached to it, go on. Errors: CapacityError (a copy finds
        no place; the node serves on).
        """
        answer: DrainReport = self._ask("drain", node, keep_replicas)
        return answer

    def stats(self) -> FleetStats:
        """Figures of the fleet and of its catalogue."""
        answer: FleetStats = self._ask("stats")
        return answer


def _wanted(spec: Iterable[WantedCheckpoint | Mapping[str, Any] | str]) -> tuple[WantedCheckpoint, ...]:
    found: list[WantedCheckpoint] = []
    for item in spec:
        try:
            wanted = (
                item
                if isinstance(item, WantedCheckpoint)
                else WantedCheckpoint(item)
                if isinstance(item, str)
                else WantedCheckpoint(**item)
            )
        except TypeError as error:
            raise InvalidReferenceError(
                f"{str(item)[:200]}: is no wanted checkpoint; give reference, and replicas and pin if you like"
            ) from error
        found.append(wanted)
    return tuple(found)
